"""Waiting for other ranks so that Ctrl-C works, and with a line about whom a rank waits for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator
from datetime import timedelta

from lowrank_vit.common.terminal import say

_FIRST_LINE_S, _NEXT_LINE_S = 20.0, 60.0
_POLL_S, _QUICK_S, _LATER_POLL_S = 0.05, 10.0, 0.5
"""Seconds between two reads of the store: at first for `_QUICK_S` seconds, then later."""
_LOOKS_PER_S = 2048
"""Largest number of reads per second of all ranks together; one thread of one process serves the store."""


def pause_s(usual_s: float, size: int) -> float:
    """Seconds between two reads of the store by each of `size` ranks: longer than usual if there are many."""
    return max(usual_s, size / _LOOKS_PER_S)


def until(is_so: Callable[[], bool], limit: timedelta, size: int = 1) -> bool:
    """Wait until `is_so` returns True; return False after the limit. It waits in Python, so that Ctrl-C works.

    `size`: how many ranks wait for the store at the same time.
    """
    began = time.monotonic()
    while not is_so():
        waited_s = time.monotonic() - began
        if waited_s > limit.total_seconds():
            return False
        time.sleep(pause_s(_POLL_S if waited_s < _QUICK_S else _LATER_POLL_S, size))
    return True


@contextlib.contextmanager
def saying(line: Callable[[], str]) -> Generator[None]:
    """During the context, a thread prints `line()`, unless it is empty, after 20 seconds and then once a minute."""
    is_over = threading.Event()

    def speak() -> None:
        wait_s = _FIRST_LINE_S
        while not is_over.wait(wait_s):
            with contextlib.suppress(RuntimeError):  # the store is gone, as the waiting thread reports
                if text := line():
                    say(text)
            wait_s = _NEXT_LINE_S

    thread = threading.Thread(target=speak, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
