"""Data sets of the benches: photographs like ImageNet's, made once, and the sets made from them or given by `--data`.

The photographs are JPEGs of 500 x 375 pixels, about 110 KB each, made from those that ship with scikit-learn and
scikit-image. The same count and seed give the same images. Each is a window of a mosaic of the photographs in several
scales, mirrored or not, with a little noise.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks.harness.measure import nothing
from data_prep.convert import convert_image_folder
from data_prep.formats.beton import MODE_RAW, file_or_parts, part_path
from data_prep.formats.jpeg import JPEG_MAX_SIDE, ImageOptions
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import remove_leftovers, whole_folder, writing
from lowrank_vit.common.filesystem import symbolic_link
from lowrank_vit.common.packages import needs
from lowrank_vit.data.sets.beton import Beton

VERSION = 1
"""Version of the recipe below; a new number remakes cached photographs."""
WIDTH, HEIGHT = 500, 375
NUM_CLASSES = 10
STAMP = ".photos.json"
_TILE_WIDTHS = (220, 260, 320)
"""Width in pixels of a photograph in a mosaic; a smaller one gives more detail in a window."""
_TILES_A_SIDE = 4
_GAINS = (0.9, 1.0, 1.1, 1.2)
_NOISE_GREY_LEVELS = (4, 6, 8, 10)
_QUALITIES = (91, 96)
"""Lowest and highest JPEG quality."""
_NOISE_MARGIN = 64


def ensure_photos(root: Path, count: int, seed: int = 0, note: Callable[[str], object] = nothing) -> Path:
    """Make `root`/class_00..class_09/NNNNNN.jpg, `count` files in all, unless they exist; return `root`.

    They exist if the stamp in `root` has the same recipe, count and seed. `note` gets a line before they are made,
    which takes about 5 ms per image. Raises `UserError` for fewer images than classes, without photographs to make them
    from, and if `root` has other files or cannot be written.
    """
    if count < NUM_CLASSES:
        raise UserError(f"--count is {count}, expected {NUM_CLASSES} or more: one image for each class.")
    wanted = {"version": VERSION, "count": count, "seed": seed}
    stamp = read_stamp(root)
    if stamp is not None and {key: stamp.get(key) for key in wanted} == wanted:
        return root
    if stamp is None and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} has other files than a benchmark's photographs. Move it away.")
    note(f"making {count:,} photographs in {root} (once)")
    with writing(root, "Check the free space and the permissions."), made_anew(root) as folder:
        sizes = []
        for label in range(NUM_CLASSES):
            (folder / f"class_{label:02d}").mkdir()
        for index, data in enumerate(make_photos(count, seed)):
            (folder / f"class_{index % NUM_CLASSES:02d}" / f"{index:06d}.jpg").write_bytes(data)
            sizes.append(len(data))
        text = json.dumps({**wanted, "mean_bytes": round(sum(sizes) / count), "bytes": sum(sizes)})
        (folder / STAMP).write_text(text + "\n", encoding="utf-8")
    return root


@contextmanager
def made_anew(root: Path) -> Generator[Path]:
    """Yield a folder that replaces `root` at the end, so that an interrupted one is never taken for complete."""
    root.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root.parent, root.name)
    with whole_folder(root) as folder:
        yield folder
        shutil.rmtree(root, ignore_errors=True)


def read_stamp(root: Path) -> dict[str, Any] | None:
    """The stamp of `ensure_photos` in `root`: version, count, seed, mean_bytes, bytes; None if there is none."""
    try:
        stamp = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def make_photos(count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield `count` JPEG files; the one at an index does not depend on the count. Raises `UserError`."""
    mosaics = _mosaics(photograph_arrays())
    rng = np.random.default_rng(seed)
    field = rng.standard_normal((HEIGHT + _NOISE_MARGIN, WIDTH + _NOISE_MARGIN, 1))
    noises = [np.rint(field * level).astype(np.int16) for level in _NOISE_GREY_LEVELS]
    for _ in range(count):
        mosaic = mosaics[rng.integers(len(mosaics))]
        noise = noises[rng.integers(len(noises))]
        image_HWC = _window(mosaic, rng) + _window(noise, rng)
        np.clip(image_HWC, 0, 255, out=image_HWC)
        if rng.integers(2):
            image_HWC = image_HWC[:, ::-1]
        file = io.BytesIO()
        quality = int(rng.integers(_QUALITIES[0], _QUALITIES[1] + 1))
        Image.fromarray(np.ascontiguousarray(image_HWC, np.uint8)).save(file, "JPEG", quality=quality)
        yield file.getvalue()


def _window(pixels_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    top = rng.integers(pixels_HWC.shape[0] - HEIGHT + 1)
    left = rng.integers(pixels_HWC.shape[1] - WIDTH + 1)
    return pixels_HWC[top : top + HEIGHT, left : left + WIDTH]


def _mosaics(photographs: list[np.ndarray]) -> list[np.ndarray]:
    """Every photograph side by side with others, int16 (H, W, 3): one mosaic for each tile size and brightness."""
    mosaics = []
    for width in _TILE_WIDTHS:
        size = (width, width * HEIGHT // WIDTH)
        tiles = [np.asarray(ImageOps.fit(Image.fromarray(p), size, Image.Resampling.LANCZOS)) for p in photographs]
        # A row starts where the last one ended, so that different photographs are neighbours.
        rows = [
            np.concatenate([tiles[(row * _TILES_A_SIDE + column) % len(tiles)] for column in range(_TILES_A_SIDE)], 1)
            for row in range(_TILES_A_SIDE)
        ]
        mosaic = np.concatenate(rows)
        mosaics += [np.rint(mosaic * gain).astype(np.int16) for gain in _GAINS]
    return mosaics


def photograph_arrays() -> list[np.ndarray]:
    """Seven photographs, uint8 (H, W, 3), from the installed packages; nothing is downloaded."""
    to, instead = "Making the benchmark's photographs", "give --data DIR"
    data = needs("skimage.data", extra="dev", to=to, instead=instead)
    samples = needs("sklearn.datasets", extra="dev", to=to, instead=instead).load_sample_images().images
    others = (data.astronaut, data.chelsea, data.coffee, data.rocket)
    return [*samples, data.stereo_motorcycle()[0], *(photograph() for photograph in others)]


_FILES_STAMP = ".files.json"
AS_STORED = ImageOptions(max_side=JPEG_MAX_SIDE)
"""Stores the bytes of JPEGs unchanged, whatever their size."""


def photographs(scratch: Path, count: int, note: Callable[[str], object] = nothing) -> Path:
    """The folder of the bench's photographs, the same one for every bench. Raises `UserError`."""
    return ensure_photos(scratch / f"photos_{count}", count, note=note)


def converted(folder: Path, suffix: str, image: ImageOptions) -> Beton:
    """The photographs of `folder` as FOLDER`suffix`.beton beside it; made once."""
    out = folder.with_name(f"{folder.name}{suffix}.beton")
    convert_image_folder(folder, out, image=image)  # does nothing if it is done already
    return Beton(out)


def open_given(path: Path) -> Beton:
    """Open the set of --data, in one file or in parts. Raises `UserError`."""
    if not all(part.is_file() for part in file_or_parts(path)):
        raise UserError(f"--data {path} is not a file. Give a .beton that `python -m data_prep` wrote.")
    return Beton(path)


def chosen(beton: Beton, count: int) -> np.ndarray:
    """At most `count` sample ids, int64, spread evenly over the set."""
    return np.unique(np.linspace(0, beton.num_samples - 1, min(count, beton.num_samples)).astype(np.int64))


def files_of(beton: Beton, count: int, scratch: Path, note: Callable[[str], object] = nothing) -> Path:
    """A folder below `scratch` with at most `count` samples of the set as JPEG files in class folders, made once.

    They have the stored bytes. Raises `UserError` for a set of raw pixels, or a disk that cannot be written.
    """
    ids = chosen(beton, count)
    if (beton.modes[ids] == MODE_RAW).any():
        raise UserError(f"--data {beton.path} holds raw pixels; the peers read JPEG files. Give a set of JPEGs.")
    states = [(str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns) for part in beton.parts]
    wanted = json.dumps({"parts": states, "samples": len(ids)})
    key = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    root = scratch / f"files_{beton.path.stem}_{len(ids)}_{key}"
    with writing(root, "Choose --scratch on a larger disk."):
        if (root / _FILES_STAMP).is_file() and (root / _FILES_STAMP).read_text(encoding="utf-8") == wanted:
            return root
        note(f"writing {len(ids):,} samples of {beton.path} to {root} (once)")
        with made_anew(root) as made:
            for sample_id, label in zip(ids.tolist(), beton.labels[ids].tolist(), strict=True):
                folder = made / f"class_{label:05d}"
                folder.mkdir(exist_ok=True)
                (folder / f"{sample_id:08d}.jpg").write_bytes(beton.sample(sample_id).tobytes())
            (made / _FILES_STAMP).write_text(wanted, encoding="utf-8")
    return root


def link_repeated(files: Sequence[Path], out: Path, times: int) -> None:
    """Make `out` the set in `files`, repeated `times`: links that are read as its parts."""
    linked = [file.resolve() for _ in range(times) for file in files]
    for n, file in enumerate(linked, 1):
        link = out if len(linked) == 1 else part_path(out, n, len(linked))
        if not symbolic_link(link, file):
            raise UserError(f"{link} cannot be made a link to {file}. Choose --scratch on a disk with links.")


def times_for(num_samples: int, batch_size: int, batches: int) -> int:
    """How often a set must be repeated for an epoch of at least so many complete batches."""
    return max(1, math.ceil(batch_size * batches / num_samples))
