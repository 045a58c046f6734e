"""Signals that ask a run to save and end: Ctrl-C, a batch system's SIGTERM, SIGUSR1 before the time limit."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from lowrank_vit.engine.distributed import World

ONE_WISH_S = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Notes the first signal and passes it on to all ranks; a second Ctrl-C or SIGTERM ends the process at once.

    What comes within `ONE_WISH_S` of the first is not a second: Ctrl-C reaches torchrun and its ranks alike, and
    torchrun passes it on to the ranks again.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked_at: float | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif number != signal.SIGUSR1 and now - self._asked_at > ONE_WISH_S:
            signal.default_int_handler(number, frame)  # raises KeyboardInterrupt
        self._world.ask_to_stop(number)

    @contextlib.contextmanager
    def noted(self) -> Iterator[StopRequest]:
        """Within it signals are only noted. Does nothing outside the main thread, where Python cannot do so."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
