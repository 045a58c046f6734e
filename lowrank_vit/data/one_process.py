"""Let one of several processes do what all of them need done once."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import UserError


@contextmanager
def one_process_in(folder: Path, say: Callable[[str], object], advice: str) -> Iterator[None]:
    """Hold `folder`'s lock; wait, and say so, while another process of this machine has it.

    The lock is the system's own (flock on FOLDER/.lock), so a process that dies gives it back. The folder is made if it
    is missing; `UserError` with `advice` where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. {advice}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process to finish in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
