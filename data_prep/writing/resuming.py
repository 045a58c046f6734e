"""Resume a conversion where an earlier one ended, or find that it is finished.

Beside FILE lie `.FILE.partial` (its first pages) and `.FILE.partial.journal` (one record for each sample in these
pages). A record is written after its data, and counts later only if the data still have its checksum, so neither
SIGKILL nor a power failure can bring wrong data into the finished file. A conversion ends by writing its sidecars under
hidden names and renaming them; the same command finishes these steps if they were cut off.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import struct
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.formats.sample_table import sample_table_path, write_sample_table
from data_prep.formats.sidecars import (
    ADVICE,
    Manifest,
    manifest_path,
    read_manifest,
    read_manifest_file,
    write_manifest,
)
from data_prep.sources.samples import Sample, file_list_sha256
from data_prep.writing.direct_io import PageWriter, sha256_of
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.common.files import remove_leftovers, writing
from lowrank_vit.common.filesystem import rename, sync, sync_directory
from lowrank_vit.common.locks import try_flock

RECORD = np.dtype(
    [
        ("outcome", "u1"),
        ("mode", "u1"),
        ("reason", "u1"),
        ("repairs", "u1"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("size", "<u4"),
        ("checksum", "<u8"),
        ("source_size", "<u8"),
        ("source_mtime_ns", "<u8"),
        ("name_hash", "<u8"),
    ]
)
STORED, BAD = 1, 2
"""Values of `outcome`."""
_KEY_BYTES = 64


class PartialFile:
    """The open file and its journal."""

    def __init__(self, path: Path, file: io.BufferedRandom, journal: io.BufferedRandom, pages: PageWriter) -> None:
        self.path, self.file, self.pages = path, file, pages
        self._journal = journal

    def records(self) -> np.ndarray:
        """`RECORD` (N,): what an interrupted run finished, in order."""
        self._journal.seek(_KEY_BYTES)
        data = self._journal.read()
        return np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)

    def replace_records(self, records: np.ndarray) -> None:
        """Keep only these records, a subset of the present ones."""
        self._journal.seek(_KEY_BYTES)
        self._journal.write(records.tobytes())
        self._journal.truncate()
        self._journal.flush()

    def add_records(self, records: np.ndarray) -> None:
        """Add the records of samples whose pages have been written."""
        self._journal.write(records.tobytes())
        self._journal.flush()


@contextmanager
def resumable(path: Path, key: str | None) -> Generator[PartialFile]:
    """Yield a partial file that takes `path`'s place at the end.

    `key`, 64 hexadecimal digits, stands for everything that decides the content; a partial file with another key is
    emptied. On an exception, Ctrl-C included, the partial file stays for the next run if it has records, and a note on
    the exception says so; with the key None nothing stays. Either way `path` itself stays as it was.
    Raises `UserError` for every `OSError` inside (full disk, no permission), and if another process writes the file.
    """
    target, partial, journal = _names(path)
    with writing(path, ADVICE):
        if target.is_dir():  # otherwise only the rename at the very end would fail
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not target.parent.exists():  # if the parent is a file, `open` says so, unlike `mkdir`
            target.parent.mkdir(parents=True, exist_ok=True)
        with (
            _open_locked(partial, path) as file,
            _open(journal) as records,
            closing(PageWriter(partial, file)) as pages,
        ):
            opened = PartialFile(partial, file, records, pages)
            if key is None or records.read(_KEY_BYTES) != key.encode("ascii"):
                file.truncate(0)
                records.seek(0)
                records.truncate(0)
                records.write((key or "").encode("ascii"))
                records.flush()
            try:
                yield opened
                file.flush()
                sync(file.fileno())
                rename(partial, target)
                journal.unlink(missing_ok=True)  # another process may have removed it as a leftover
            except BaseException as error:
                _keep_or_remove(opened, key, partial, journal, error)
                raise
        sync_directory(target.parent)


def _names(path: Path) -> tuple[Path, Path, Path]:
    """The file to write, its partial file and the journal of that."""
    # Write through a link rather than replace it: a link to a bigger disk is there for a reason.
    target = path.resolve()
    partial = target.with_name(f".{target.name}.partial")
    return target, partial, partial.with_name(partial.name + ".journal")


def remove_left_of(out: Path) -> None:
    """Remove leftovers of killed conversions to `out`, except those that the same command resumes from."""
    target, partial, journal = _names(out)
    for folder in {out.parent, target.parent}:
        remove_leftovers(folder, out.name)
    if not partial.exists():  # the kill came after its rename, before the journal was removed
        with suppress(OSError):
            journal.unlink(missing_ok=True)


def _open(path: Path) -> io.BufferedRandom:
    # Not "w+b", which would empty the file, nor `tempfile`, whose files only the owner can read whatever the umask.
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _open_locked(partial: Path, path: Path) -> io.BufferedRandom:
    while True:
        file = _open(partial)
        is_ours = try_flock(file.fileno())
        if is_ours is False:
            file.close()
            raise UserError(f"another process is writing {path} now. Wait for it, or give another --out.")
        # The other process may have renamed the file between our opening and locking it.
        if is_ours is None or (partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat())):
            return file
        file.close()


def _keep_or_remove(opened: PartialFile, key: str | None, partial: Path, journal: Path, error: BaseException) -> None:
    with suppress(OSError):  # `error` is already on its way to the user
        count = len(opened.records()) if key is not None else 0
        if count:
            error.add_note(
                f"{count:,} images are finished and kept in {partial}; the same command resumes from there. "
                "Remove that file if you do not want that."
            )
        else:
            partial.unlink(missing_ok=True)
            journal.unlink(missing_ok=True)


def _pending(out: Path) -> tuple[Path, Path]:
    """The hidden names of the sample table and the manifest before their renames."""
    return out.with_name(f".{out.name}.partial.samples"), out.with_name(f".{out.name}.partial.json")


def write_pending(out: Path, table: bytes, manifest: Manifest) -> None:
    """Write both sidecars of `out` to the disk under hidden names. Raises `UserError`."""
    table_path, manifest_file = _pending(out)
    write_sample_table(table_path, table)
    write_manifest(manifest_file, manifest)


def rename_pending(out: Path) -> None:
    """Rename both sidecars to their final names, the manifest last. Raises `UserError`."""
    table_path, manifest_file = _pending(out)
    try:
        rename(table_path, sample_table_path(out))
        rename(manifest_file, manifest_path(out))
    except OSError as error:
        raise UserError(f"the sidecars of {out} cannot be renamed: {error.strerror}. Check its folder.") from error
    sync_directory(out.parent)


def is_cut_off(out: Path) -> bool:
    """Whether a conversion to `out` was killed before its last rename; the same command then finishes it."""
    return _pending(out)[1].exists()


def find_finished(
    out: Path,
    key: str,
    files: str,
    samples: Sequence[Sample],
    source_stat: Callable[[Sample], tuple[int, int]],
    on_bad: Literal["error", "skip"],
) -> Manifest | None:
    """The manifest of `out` if the same conversion of the same source files has finished it, else None.

    `key`: stands for everything that decides the bytes; `files`: `file_list_sha256` of `samples`. Sidecars that a crash
    left under hidden names are renamed.
    """
    _recover(out, key)
    try:
        manifest = read_manifest(out)
    except BetonError:
        return None
    is_same = manifest.resume_key == key and manifest.file_list_sha256 == files
    if not is_same or not is_whole(out, manifest) or (manifest.skipped and on_bad == "error"):
        return None
    return manifest if _stat_sha256(samples, source_stat) == manifest.source_stat_sha256 else None


def is_current(
    out: Path, manifest: Manifest, samples: Sequence[Sample], source_stat: Callable[[Sample], tuple[int, int]]
) -> bool:
    """Whether `out` is whole and was made from exactly these source files as they are now.

    Unlike `find_finished` it ignores where the files lie, the versions of the libraries that converted them, and the
    options. `manifest` is that of `out`.
    """
    return (
        is_whole(out, manifest)
        and manifest.file_list_sha256 == file_list_sha256(samples)
        and manifest.source_stat_sha256 == _stat_sha256(samples, source_stat)
    )


def is_whole(out: Path, manifest: Manifest) -> bool:
    """Whether the size of `out` and the content of its sample table are those in its manifest."""
    try:
        table = sample_table_path(out).read_bytes()
        return out.stat().st_size == manifest.file_bytes and _sha256(table) == manifest.sample_table_sha256
    except OSError:
        return False


def pack_stat(stat: tuple[int, int]) -> bytes:
    """A source file's size and modification time in ns as bytes, which `Written.source_stat_sha256` hashes."""
    return struct.pack("<QQ", *stat)


def _stat_sha256(samples: Sequence[Sample], source_stat: Callable[[Sample], tuple[int, int]]) -> str:
    stats = hashlib.sha256()
    for sample in samples:
        stats.update(pack_stat(source_stat(sample)))
    return stats.hexdigest()


def _recover(out: Path, key: str) -> None:
    table_path, manifest_file = _pending(out)
    if not manifest_file.exists() or manifest_path(out).exists():
        return
    with suppress(OSError, UserError):
        manifest = read_manifest_file(manifest_file)
        if manifest.resume_key != key or sha256_of(out) != manifest.sha256:  # rare, so a full check is affordable
            return
        if table_path.exists():
            rename_pending(out)
        else:  # the crash came between the two renames
            rename(manifest_file, manifest_path(out))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
