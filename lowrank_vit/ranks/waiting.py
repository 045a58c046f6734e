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


def until(is_so: Callable[[], bool], limit: timedelta) -> bool:
    """Wait until something is so, in Python, where Ctrl-C is heard, not in torch's store; False after the limit."""
    began = time.monotonic()
    while not is_so():
        waited_s = time.monotonic() - began
        if waited_s > limit.total_seconds():
            return False
        time.sleep(_POLL_S if waited_s < _QUICK_S else _LATER_POLL_S)
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
