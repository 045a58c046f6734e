"""Locks between processes, released when a process dies: on a folder, to hold or to wait for, and on an open file.

A folder's lock is flock on FOLDER/.lock, by the library filelock. If the file system has no flock, it is filelock's
soft lock, the file FOLDER/.lock.soft, which counts as released when its process on this host is gone; one that another
host has left must be removed by hand.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_vit.common.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

Say = Callable[[str], object]
"""Called with one line for the log."""
LOCK = ".lock"
SOFT_LOCK = ".lock.soft"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""Error numbers of flock on a file system without locks."""


@contextmanager
def one_process_in(folder: Path, say: Say, advice: str) -> Generator[None]:
    """Hold `folder`'s lock; wait, and say once for whom, while another process has it.

    The folder is made if it is missing. Raises `UserError` with `advice` if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock_folder(folder)
        if held is None:
            say(f"waiting for {holder(folder)} to finish in {folder}")
            held = lock_folder(folder, wait=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. {advice}") from error
    assert held is not None
    try:
        yield
    finally:
        held.release()


class FolderLock:
    """A lock on a folder that this process holds until `release` or until it ends."""

    def __init__(self, lock: BaseFileLock) -> None:
        self._lock = lock

    def release(self) -> None:
        """Let others have it. A second call does nothing."""
        self._lock.release(force=True)


def lock_folder(folder: Path, *, wait: bool = False) -> FolderLock | None:
    """Take `folder`'s lock; None while another process, or another holder in this one, has it, unless we `wait`.

    Raises `OSError` if the folder cannot be written.
    """
    import filelock  # takes a twentieth of a second, which most commands need not spend

    path = folder / LOCK
    lock: BaseFileLock = filelock.UnixFileLock(path, fallback_to_soft=False, thread_local=False)
    try:
        lock.acquire(blocking=wait)
    except filelock.Timeout:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        lock = filelock.SoftFileLock(folder / SOFT_LOCK, thread_local=False)
        try:
            lock.acquire(blocking=wait)
        except filelock.Timeout:
            return None
    with suppress(OSError):  # a full disk: the others then wait for "another process"
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    return FolderLock(lock)


def holder(folder: Path) -> str:
    """The process that has, or had last, `folder`'s lock, in words."""
    with suppress(OSError), (folder / LOCK).open("rb") as file:
        return file.read(200).decode(errors="replace") or "another process"
    return "another process"


def is_locked(folder: Path) -> bool:
    """Whether a living process has `folder`'s lock now; nothing is written to find out."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        pass
    return (folder / SOFT_LOCK).exists() and not _is_gone(holder(folder))


def _is_gone(process: str) -> bool:
    """Whether a process, in the words of `lock_folder`, was on this host and is gone."""
    import psutil

    told = re.fullmatch(rf"process (\d+) on {re.escape(socket.gethostname())}", process)
    return told is not None and not psutil.pid_exists(int(told[1]))


def try_flock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed; return whether that succeeded, None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True
