"""Let one of several processes do what all of them need done once."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowrank_vit.common.errors import UserError

Say = Callable[[str], object]
"""Told one line for the log."""
LOCK = ".lock"


@contextmanager
def one_process_in(folder: Path, say: Say, advice: str) -> Generator[None]:
    """Hold `folder`'s lock; wait, and say so, while another process has it.

    The lock is the system's own (flock on FOLDER/.lock), so a process that dies gives it back. The folder is made if it
    is missing; `UserError` with `advice` where it cannot be written. On a file system without locks nobody waits.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not "w": what is in it is the other process's until we have the lock.
        file = os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. {advice}") from error
    with file:
        _lock(file.fileno(), folder, say)
        with suppress(OSError):  # a full disk: the others then wait for "another process"
            os.ftruncate(file.fileno(), 0)
            os.pwrite(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield


def _lock(descriptor: int, folder: Path, say: Say) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        say(f"waiting for {holder} to finish in {folder}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return  # a file system without locks
