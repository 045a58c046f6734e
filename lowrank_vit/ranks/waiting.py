"""Waiting for other ranks: where Ctrl-C is heard, and not without a word."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator
from datetime import timedelta

from lowrank_vit.common.terminal import say

_FIRST_LINE_S, _NEXT_LINE_S = 20.0, 60.0
_POLL_S, _QUICK_S, _LATER_POLL_S = 0.05, 10.0, 0.5
"""Seconds between two looks at the store, at first and later."""
_LOOKS_PER_S = 2048
"""How often all ranks together look at the store at most, which one thread of one process serves."""


def pause_s(usual_s: float, size: int) -> float:
    """Seconds between two looks of each of `size` ranks at the store: longer than usual where they are many."""
    return max(usual_s, size / _LOOKS_PER_S)


def until(is_so: Callable[[], bool], limit: timedelta, size: int = 1) -> bool:
    """Wait until something is so, in Python, where Ctrl-C is heard, not in torch's store; False after the limit.

    `size`: how many ranks wait at one time for what the store tells.
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
    """While the context lasts, have a thread print a line, unless it is empty, after 20 seconds and once a minute."""
    is_over = threading.Event()

    def speak() -> None:
        wait_s = _FIRST_LINE_S
        while not is_over.wait(wait_s):
            with contextlib.suppress(RuntimeError):  # the store is gone: whoever waits says so
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
