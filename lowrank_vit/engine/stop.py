"""Signals that ask a run to save and end: Ctrl-C, a batch system's SIGTERM, SIGUSR1 before the time limit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from lowrank_vit.engine.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Notes the first signal and passes it on to all ranks; a second Ctrl-C or SIGTERM ends the process at once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_asked = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_asked and number != signal.SIGUSR1:
            signal.default_int_handler(number, frame)  # raises KeyboardInterrupt
        self._is_asked = True
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
