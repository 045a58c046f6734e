"""Copy sets to fast local disk, once per node, and use the copies again while they still match."""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal as size_in_words

from data_prep.formats.beton import file_or_parts
from data_prep.formats.sample_table import sample_table_path
from data_prep.formats.sidecars import Manifest, manifest_path, read_manifest
from data_prep.writing.direct_io import sha256_of
from lowrank_vit.common import terminal
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.common.files import remove_leftovers, whole_folder, write_whole
from lowrank_vit.common.filesystem import free_bytes, sync
from lowrank_vit.common.locks import Say, one_process_in
from lowrank_vit.common.terminal import as_bytes, bytes_shown
from lowrank_vit.common.threads import beat

STAMP = "staged.json"
"""Beside the files of a finished copy: their sizes, times and inodes when they had been checked."""
_CHUNK_BYTES = 1 << 24


def stage_all(betons: Sequence[Path], stage_dir: Path, say: Say = terminal.say) -> list[Path]:
    """Copy each of `betons` (or its parts) and its sidecars below `stage_dir`; returns the copies, to be opened.

    One process of a node copies, the others wait. Each copied file is read back and compared with the manifest's
    SHA-256, or with that of its source if no manifest tells one. A finished copy is used again as long as the source
    has the same manifest (without one: the same size and time) and the copy's files are untouched, by size, time and
    inode; this reads neither.

    Raises `UserError`: no room, not writable; `BetonError`: a source is missing or does not match its manifest.
    """
    sets = [_Set.of(beton, stage_dir) for beton in betons]
    lacking = list({one.folder: one for one in sets if not one.is_copied()}.values())
    if not lacking:
        say(f"staged copy of {_names(sets)} in {stage_dir} is up to date")
        return [one.copy for one in sets]
    with one_process_in(stage_dir, say, "Give another --stage-dir, or leave it out."):
        lacking = [one for one in lacking if not one.is_copied()]  # another process may have made them meanwhile
        try:
            for one in lacking:
                one.remove_older()
            if lacking:
                _check_room(lacking, stage_dir)
                _copy_sets(lacking, stage_dir, say)
        except OSError as error:
            raise UserError(
                f"--stage-dir {stage_dir}: copying failed: {error.strerror or error}. Give another folder, or leave "
                "the flag out."
            ) from error
    return [one.copy for one in sets]


@dataclass(frozen=True)
class _Set:
    """A set to be copied."""

    beton: Path
    sha256: dict[Path, str]
    """SHA-256 of every file; empty if no manifest tells it."""
    num_bytes: int
    folder: Path
    """The folder of the finished copy."""
    origin: str
    """The beginning of the names of this source's folders."""

    @classmethod
    def of(cls, beton: Path, stage_dir: Path) -> _Set:
        sha256: dict[Path, str] = {}
        state: list[object] = []
        for part in file_or_parts(beton):
            if not part.exists():
                raise BetonError(f"{part} is not there, so it cannot be copied to --stage-dir.")
            manifest = _manifest(part)
            stat = part.stat()
            if manifest and manifest.file_bytes != stat.st_size:
                raise BetonError(
                    f"{part} has {stat.st_size:,} bytes, but {manifest_path(part).name} says {manifest.file_bytes:,}. "
                    "Convert it again, or copy it again with its sidecars."
                )
            # A manifest is the last file that a conversion writes, and it has the checksums of the other two.
            sha256 |= {part: manifest.sha256 if manifest else ""}
            table_sha256 = manifest.sample_table_sha256 if manifest else ""
            sidecars = {manifest_path(part): "", sample_table_path(part): table_sha256}
            sha256 |= {path: told for path, told in sidecars.items() if path.exists()}
            state.append([part.name, _sha256(manifest_path(part)) if manifest else [stat.st_size, stat.st_mtime_ns]])
        source = str(beton.resolve())
        origin = f"{beton.stem}-{_digest(source)}"
        folder = stage_dir / f"{origin}-{_digest(json.dumps([source, sorted(p.name for p in sha256), state]))}"
        return cls(beton, sha256, sum(path.stat().st_size for path in sha256), folder, origin)

    @property
    def copy(self) -> Path:
        """The copy, to be opened in place of the source."""
        return self.folder / self.beton.name

    def is_copied(self) -> bool:
        """Whether the copied files are those that were finished and checked, by size, time and inode."""
        try:
            stamped = json.loads((self.folder / STAMP).read_text(encoding="utf-8"))["files"]
            return stamped == _stamp(self.folder / path.name for path in self.sha256)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def remove_older(self) -> None:
        """Remove copies of the same source before it changed, damaged ones, and what a killed process left."""
        for old in self.folder.parent.glob(f"{glob.escape(self.origin)}-*"):
            shutil.rmtree(old)
        remove_leftovers(self.folder.parent, self.origin)


def _manifest(part: Path) -> Manifest | None:
    return read_manifest(part) if manifest_path(part).exists() else None


def _sha256(small: Path) -> str:
    return hashlib.sha256(small.read_bytes()).hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(as_bytes(text)).hexdigest()[:12]


def _stamp(paths: Iterable[Path]) -> dict[str, list[int]]:
    return {p.name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for p in paths for stat in [p.stat()]}


def _check_room(sets: list[_Set], stage_dir: Path) -> None:
    needed, free = sum(one.num_bytes for one in sets), free_bytes(stage_dir)
    if free is not None and needed > free:
        raise UserError(
            f"--stage-dir {stage_dir}: {_names(sets)} with sidecars take {size_in_words(needed)}, but only "
            f"{size_in_words(free)} are free there. Make room, give a folder on another disk, or leave the flag out."
        )


def _names(sets: list[_Set]) -> str:
    return " and ".join(one.beton.name for one in sets)


def _copy_sets(sets: list[_Set], stage_dir: Path, say: Say) -> None:
    total, begun = sum(one.num_bytes for one in sets), time.monotonic()
    say(f"copying {_names(sets)} with sidecars, {size_in_words(total)}, to {stage_dir} (once)")
    with bytes_shown(total, "copying", say) as advance:
        for one in sets:
            _copy_set(one, advance)
    seconds = time.monotonic() - begun
    say(f"  copied and read back in {seconds:.1f} s ({size_in_words(int(total / max(seconds, 1e-3)))}/s)")


def _copy_set(one: _Set, advance: Callable[[int], object]) -> None:
    """Copy into a hidden folder, which is renamed when all is on the disk and checked."""
    with whole_folder(one.folder) as folder:
        copies = [folder / path.name for path in one.sha256]
        for (path, told), copy in zip(one.sha256.items(), copies, strict=True):
            _copy(path, copy, told, advance)
        stamp = {"source": str(one.beton.resolve()), "files": _stamp(copies)}
        write_whole(folder / STAMP, json.dumps(stamp, indent=1))


def _copy(source: Path, target: Path, told: str, advance: Callable[[int], object]) -> None:
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while chunk := reading.read(_CHUNK_BYTES):
            digest.update(chunk)
            writing.write(chunk)
            advance(len(chunk))
            beat()
        writing.flush()
        sync(writing.fileno())
    if told and digest.hexdigest() != told:
        beton = source.with_name(source.name.removesuffix(".samples"))
        raise BetonError(
            f"{source} does not have the checksum of its manifest. Find out why with `python -m data_prep verify "
            f"{beton} --full`."
        )
    if sha256_of(target) != digest.hexdigest():
        raise BetonError(f"{target}: the copy reads back differently. The disk may be failing.")
