"""A large file in the making, which a killed program can go on with.

Beside FILE lie `.FILE.partial` (its first pages) and `.FILE.partial.journal` (one record for each sample in these
pages). A record is written after its data, and is believed later only if the data still have its checksum, so neither
SIGKILL nor a power failure can bring anything wrong into the finished file.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np

from data_prep.writing.direct_io import PageWriter
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import sync_directory

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
        """Forget all records but these, some of the present ones."""
        self._journal.seek(_KEY_BYTES)
        self._journal.write(records.tobytes())
        self._journal.truncate()
        self._journal.flush()

    def add_records(self, records: np.ndarray) -> None:
        """Note samples whose pages have been written."""
        self._journal.write(records.tobytes())
        self._journal.flush()


@contextmanager
def resumable(path: Path, key: str | None) -> Generator[PartialFile]:
    """Yield a partial file that takes `path`'s place at the end.

    `key`, 64 hexadecimal digits, stands for all that decides the content; a partial file with another key is begun
    anew. On an exception, Ctrl-C included, the partial file stays for the next run if it has records, and a note to the
    exception says so; with the key None nothing stays. Either way `path` itself stays as it was.
    Raises `UserError` for every `OSError` inside (full disk, no permission), and where another process is at it.
    """
    # Write through a link rather than replace it: a link to a bigger disk is there for a reason.
    target = path.resolve()
    partial = target.with_name(f".{target.name}.partial")
    journal = partial.with_name(partial.name + ".journal")
    try:
        if target.is_dir():  # otherwise only the rename at the very end would find out
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not target.parent.exists():  # where the parent is a file, opening says so and `mkdir` does not
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
                os.fsync(file.fileno())
                partial.replace(target)
                journal.unlink()
            except BaseException as error:
                _keep_or_remove(opened, key, partial, journal, error)
                raise
        sync_directory(target.parent)
    except OSError as error:
        message = UserError(
            f"{path} cannot be written: {error.strerror or error}. "
            "Check the free space and the permissions of its folder, or give another --out."
        )
        for note in getattr(error, "__notes__", []):
            message.add_note(note)
        raise message from error


def _open(path: Path) -> io.BufferedRandom:
    # Not "w+b", which would empty it, nor `tempfile`, whose files only their owner can read whatever the umask.
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _open_locked(partial: Path, path: Path) -> io.BufferedRandom:
    while True:
        file = _open(partial)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise UserError(
                f"another process is writing {path} at this moment. Wait for it, or give another --out."
            ) from error
        except OSError:
            return file  # a file system without locks
        # The other process may have renamed the file between our opening and locking it.
        if partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
            return file
        file.close()


def _keep_or_remove(opened: PartialFile, key: str | None, partial: Path, journal: Path, error: BaseException) -> None:
    with suppress(OSError):  # what went wrong is already on its way to the user
        count = len(opened.records()) if key is not None else 0
        if count:
            error.add_note(
                f"{count:,} images are finished and kept in {partial}; the same command goes on from there. "
                "Remove that file if you do not want to."
            )
        else:
            partial.unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
