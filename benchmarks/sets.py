"""The sets that benches read, made once: photographs converted, samples of a .beton as files, short sets repeated."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.measure import nothing
from benchmarks.photos import ensure_photos
from data_prep.convert import convert_image_folder
from data_prep.formats.beton import MODE_RAW
from data_prep.formats.jpeg import JPEG_MAX_SIDE, ImageOptions
from data_prep.formats.parts import file_or_parts, part_path
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.sets.beton import Beton

STAMP = ".files.json"
AS_STORED = ImageOptions(max_side=JPEG_MAX_SIDE)
"""Whatever their size, the bytes of JPEGs go in as they are."""


def photographs(scratch: Path, count: int, note: Callable[[str], object] = nothing) -> Path:
    """The folder of the bench's photographs, the same one for every bench. Raises `UserError`."""
    return ensure_photos(scratch / f"photos_{count}", count, note=note)


def converted(folder: Path, suffix: str, image: ImageOptions) -> Beton:
    """The photographs of `folder` as FOLDER`suffix`.beton beside it, made once."""
    out = folder.with_name(f"{folder.name}{suffix}.beton")
    convert_image_folder(folder, out, image=image)  # finds itself done where it was
    return Beton(out)


def open_given(path: Path) -> Beton:
    """The set that --data names, in one file or in parts. Raises `UserError`."""
    if not all(part.is_file() for part in file_or_parts(path)):
        raise UserError(f"--data {path} is not a file. Give a .beton that `python -m data_prep` wrote.")
    return Beton(path)


def chosen(beton: Beton, count: int) -> np.ndarray:
    """int64: at most `count` sample ids, evenly over the whole set."""
    return np.unique(np.linspace(0, beton.num_samples - 1, min(count, beton.num_samples)).astype(np.int64))


def files_of(beton: Beton, count: int, scratch: Path, note: Callable[[str], object] = nothing) -> Path:
    """A folder below `scratch` with at most `count` samples of the set as JPEG files in class folders, made once.

    They are the stored bytes. Raises `UserError`: raw pixels, which are no files, or a disk that cannot be written.
    """
    ids = chosen(beton, count)
    if (beton.modes[ids] == MODE_RAW).any():
        raise UserError(f"--data {beton.path} holds raw pixels; the peers read JPEG files. Give a set of JPEGs.")
    states = [(str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns) for part in beton.parts]
    wanted = json.dumps({"parts": states, "samples": len(ids)})
    key = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    root = scratch / f"files_{beton.path.stem}_{len(ids)}_{key}"
    try:
        if (root / STAMP).is_file() and (root / STAMP).read_text(encoding="utf-8") == wanted:
            return root
        note(f"writing {len(ids):,} samples of {beton.path} to {root} (once)")
        # Made beside it, so that what was interrupted is never taken for whole.
        part = root.with_name(f".{root.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        for sample_id, label in zip(ids.tolist(), beton.labels[ids].tolist(), strict=True):
            folder = part / f"class_{label:05d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{sample_id:08d}.jpg").write_bytes(beton.sample(sample_id).tobytes())
        (part / STAMP).write_text(wanted, encoding="utf-8")
        shutil.rmtree(root, ignore_errors=True)
        part.rename(root)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror}. Choose --scratch on a larger disk.") from error
    return root


def link_repeated(files: Sequence[Path], out: Path, times: int) -> None:
    """Make `out` stand for the set in `files`, `times` over: links that are read as its parts."""
    linked = [file.resolve() for _ in range(times) for file in files]
    for n, file in enumerate(linked, 1):
        (out if len(linked) == 1 else part_path(out, n, len(linked))).symlink_to(file)


def times_for(num_samples: int, batch_size: int, batches: int) -> int:
    """How often a set must be repeated for an epoch of so many whole batches."""
    return max(1, math.ceil(batch_size * batches / num_samples))
