"""Files and folders that exist whole or not at all, and the removal of leftovers of killed processes.

A file is written as `.NAME.XXXXXXXX.part` beside its own name, put on the disk (fsync) and renamed; a folder likewise.
The writer holds a lock (flock) on that temporary file until it is renamed, so one that can be locked is the leftover of
a killed process. (The `.NAME.partial` of a conversion is different: it is kept, to resume from.)
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filesystem import hard_link, rename, sync, sync_directory
from lowrank_vit.common.locks import try_flock
from lowrank_vit.common.terminal import as_bytes
from lowrank_vit.common.threads import beat

_LEFTOVER = re.compile(r"\..+\.(part|[0-9a-f]{8}\.tmp|unfinished)|(index\.json|(update|vectors)_\d+\.npz)\.partial")
"""Names of temporary files and folders; all but `.part` are those of earlier versions."""
_IS_FOLDER = 0x10
"""The attribute of a member of a zip archive that is a folder; torch writes no folders."""
_DEAD_AFTER_S = 3600.0
"""On a file system without locks, a temporary file that nobody has written to for so long is a leftover."""


@contextmanager
def whole_file(path: Path, *, through_link: bool = True, mode: int = 0o666) -> Generator[io.BufferedWriter]:
    """Yield a temporary file to write bytes to, which takes `path`'s place at the end, when it is on the disk.

    On any exception, Ctrl-C included, it is removed and `path` stays as it was. A link at `path` stays, and the file
    that it points to is replaced; without `through_link` the link itself is. A device or a pipe is written to directly,
    and so is a file in a folder where none can be made. `mode`: permissions of a new file, before the umask. Raises the
    `OSError` of every step (full disk, no permission, a folder at `path`), also if torch, while it writes, turns it
    into a `RuntimeError` without a reason.
    """
    # A link to a bigger disk is there for a reason.
    target = path.resolve() if through_link else path
    if target.is_dir():  # otherwise only the rename at the very end would fail
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if target.exists() and not (target.is_file() and os.access(target.parent, os.W_OK)):
        with target.open("wb") as file:
            yield file
        return
    temporary, descriptor = _create(target, mode)
    file = _Output(descriptor)
    try:
        try:
            yield file
        except RuntimeError as error:
            if file.error is None:
                raise
            raise file.error from error
        file.flush()
        sync(descriptor)
        rename(temporary, target)
        file.close()
    except BaseException:
        with suppress(OSError):
            file.raw.close()  # without writing its buffer
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


class _Output(io.BufferedWriter):
    """A file that remembers why it could not be written, and counts every block as progress."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(io.FileIO(descriptor, "wb"))
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        beat()
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def write_all(files: Mapping[Path, Callable[[], str | bytes]]) -> None:
    """Write small files, whose contents are made one by one, and continue after failures.

    Raises `UserError` that names each that could not be written, and why.
    """
    failures: list[str] = []
    for path, content in files.items():
        try:
            write_whole(path, content())
        except UserError as error:
            failures.append(str(error))
        except Exception as error:  # also an error of making the content, as in a drawing library
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            failures.append(f"{path} cannot be written: {reason}.")
    if failures:
        raise UserError(" ".join(failures))


def write_whole(path: Path, content: str | bytes, *, through_link: bool = True) -> None:
    """Write a small file; see `whole_file`. Text is written as by `as_bytes`.

    Leftovers of killed processes under this name are removed.
    """
    remove_leftovers(path.parent, path.name)
    with whole_file(path, through_link=through_link) as file:
        file.write(as_bytes(content) if isinstance(content, str) else content)


def append_whole(path: Path, line: str) -> None:
    """Add a line to a file, which is made if it is missing: all of it or, on an error, nothing. Raises `OSError`."""
    data = memoryview(as_bytes(line))
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise


def link_whole(existing: Path, path: Path) -> None:
    """Give a file a second name, `path`, at once; make a copy if the file system has no links. Raises `OSError`."""
    temporary = _temporary(path)
    with existing.open("rb") as source:
        if not hard_link(existing, temporary):
            with whole_file(path, through_link=False) as copy:
                shutil.copyfileobj(source, copy)
            return
        try:
            rename(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # it is still there if `path` was a name of the same file
    sync_directory(path.parent)


@contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """Yield a hidden folder to fill, which gets the name `path` at the end; nothing may be there then.

    On any exception it is removed with all that is in it. Files in it are on the disk only if whoever writes them sees
    to that. Raises `OSError`.
    """
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            try_flock(descriptor)
            yield temporary
            sync_directory(temporary)
            rename(temporary, path)
        finally:
            os.close(descriptor)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def remove_leftovers(folder: Path, of: str = "") -> None:
    """Remove the leftovers of killed processes in `folder` whose names begin with `of`; errors are ignored.

    Files that a living process writes stay: see the head of this file.
    """
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if _LEFTOVER.fullmatch(path.name) and path.name.lstrip(".").startswith(of.lstrip(".")):
                with suppress(OSError):
                    _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    is_folder = path.is_dir()
    descriptor = os.open(path, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW)
    try:
        is_free = try_flock(descriptor)
        if is_free is None:
            is_free = time.time() - os.fstat(descriptor).st_mtime > _DEAD_AFTER_S
        if is_free and is_folder:
            shutil.rmtree(path)
        elif is_free:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def _create(target: Path, mode: int) -> tuple[Path, int]:
    """A new temporary file for `target`, open and locked."""
    while True:
        temporary = _temporary(target)
        # Not `tempfile`: it makes files that only their owner can read, whatever the umask.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        # Until it is locked it looks like a leftover, and another process may be removing it.
        if try_flock(descriptor) is not False and temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


@contextmanager
def writing(path: Path, advice: str) -> Generator[None]:
    """Turn every `OSError` inside into a `UserError`: `path` cannot be written, why, and `advice`. Notes are kept."""
    try:
        yield
    except OSError as error:
        message = UserError(f"{path} cannot be written: {error.strerror or error}. {advice}")
        for note in getattr(error, "__notes__", []):
            message.add_note(note)
        raise message from error


def damaged_member(path: Path) -> str:
    """The name of a member of a zip archive whose bytes do not match their checksum (CRC-32); empty if there is none.

    Empty, too, for a file that is no archive, and for an archive without checksums. A gigabyte takes about a third of a
    second. Raises `zipfile.BadZipFile` and other errors if the archive's own directory is damaged.
    """
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # For a member marked as a folder torch returns uninitialised memory, and no checksum covers the mark.
        files = (member for member in members if not member.is_dir())
        marked = next((member.filename for member in files if member.external_attr & _IS_FOLDER), "")
        has_checksums = any(member.CRC for member in members)
        return marked or (archive.testzip() if has_checksums else None) or ""
