"""Waiting for what other processes and threads do: for as long as it may take on a busy machine, and no longer."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import psutil

T = TypeVar("T")

LONG_S = 300.0
"""Seconds. Nothing that a test waits for takes so long unless something is broken, however busy the machine is."""


class Running(Protocol):
    """A process that was started."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        ...


def wait_until(is_so: Callable[[], T], what: str = "", *, while_runs: Running | None = None) -> T:
    """The first true value of `is_so`, which is asked again and again.

    Fails after `LONG_S`, and where the process that is to bring it about has ended without.
    """
    end = time.monotonic() + LONG_S
    while True:
        has_ended = while_runs is not None and while_runs.poll() is not None  # before it is asked for the last time
        if found := is_so():
            return found
        what = what or "what was waited for"
        assert not has_ended, f"the process ended, and {what} never came"
        assert time.monotonic() < end, f"{what} has not come after {LONG_S:.0f} s"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; its parent may still have to be told."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def free_port() -> int:
    """A port that nobody listens at, and that the system gives to nobody who asks for any: those are 32768 and up."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
