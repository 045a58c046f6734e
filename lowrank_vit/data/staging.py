"""Copy a set to fast local disk, once per node, and use the copy again while it still matches."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from data_prep.direct_io import sha256_of
from data_prep.errors import BetonError, UserError
from data_prep.manifest import manifest_path, read_manifest
from data_prep.parts import file_or_parts
from data_prep.sample_table import sample_table_path
from lowrank_vit.data.one_process import one_process_in

STAMP = "staged.json"
"""Written last, so a folder without it is no finished copy."""
_CHUNK_BYTES = 1 << 24


def stage(beton: Path, stage_dir: Path, say: Callable[[str], object] = print) -> Path:
    """Copy `beton` (or its parts) and its sidecars below `stage_dir`; returns the path of the copy, to be opened.

    One process of a node copies, the others wait. Each copy is read back and compared with its manifest's checksum (or
    with the source's, where it has no manifest). Raises `UserError`: no room, not writable; `BetonError`: damaged.
    """
    files = _files(beton)
    origin = _digest(str(beton.resolve()))
    folder = stage_dir / f"{beton.stem}-{origin}-{_digest(json.dumps(_state_of(files)))}"
    if _is_whole(folder):
        say(f"{beton.name}: the copy in {folder} is up to date")
        return folder / beton.name
    with one_process_in(stage_dir, say, "Give another --stage-dir, or leave it out."):
        if not _is_whole(folder):  # another process may have made it meanwhile
            for old in stage_dir.glob(f"{beton.stem}-{origin}-*"):  # of the same file before it changed, or unfinished
                shutil.rmtree(old)
            _copy_all(files, folder, say)
    return folder / beton.name


def _files(beton: Path) -> list[Path]:
    parts = file_or_parts(beton)
    if missing := [part for part in parts if not part.exists()]:
        raise UserError(f"{missing[0]} is not there, so it cannot be copied to --stage-dir.")
    sidecars = [side(part) for part in parts for side in (manifest_path, sample_table_path)]
    return parts + [path for path in sidecars if path.exists()]


def _state_of(files: list[Path]) -> list[tuple[str, int, int]]:
    return [(path.name, stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()]]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_whole(folder: Path) -> bool:
    """Whether the files are those that were finished and checked, by size and time: reading them takes too long."""
    try:
        stamped = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return [tuple(row) for row in stamped] == _state_of([folder / name for name, *_ in stamped])
    except (OSError, ValueError):
        return False


def _copy_all(files: list[Path], folder: Path, say: Callable[[str], object]) -> None:
    total = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(folder.parent).free
    if total > free:
        raise UserError(
            f"--stage-dir {folder.parent} has {free / 1e9:.2f} GB free, but {files[0].name} and what belongs to it "
            f"take {total / 1e9:.2f} GB. Make room or give another disk."
        )
    say(f"copying {files[0].name} and {len(files) - 1} more files, {total / 1e6:,.1f} MB, to {folder}")
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    try:
        folder.mkdir()
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task("staging", total=total)
            for path in files:
                _copy(path, folder / path.name, lambda count: progress.advance(task, count))
        temporary = folder / f".{STAMP}"
        temporary.write_text(json.dumps(_state_of([folder / path.name for path in files])), encoding="utf-8")
        temporary.replace(folder / STAMP)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"--stage-dir {folder.parent}: copying failed: {error.strerror or error}.") from error
        raise


def _copy(source: Path, target: Path, advance: Callable[[int], object]) -> None:
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while chunk := reading.read(_CHUNK_BYTES):
            digest.update(chunk)
            writing.write(chunk)
            advance(len(chunk))
        writing.flush()
        os.fsync(writing.fileno())
    has_manifest = source.suffix == ".beton" and manifest_path(source).exists()
    wanted = read_manifest(source).sha256 if has_manifest else digest.hexdigest()
    if sha256_of(target) != wanted:
        raise BetonError(
            f"{source} does not have the checksum of its manifest. Find out why with `python -m data_prep verify "
            f"{source} --full`."
            if has_manifest and digest.hexdigest() != wanted
            else f"{target}: what was copied reads back differently. The disk may be failing."
        )
