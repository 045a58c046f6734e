"""A step at which all ranks agree soon after one of them has asked for it, and of which no step has to wait.

The threads that watch the ranks (see `failing.py`) tell one another through torch's store which step each rank ends
next. The greatest of these is the common one: no rank has passed it, and since nobody passes the step that it has told
before all are known, all of them hear of it in time. So it comes within a step, however slow steps have become.
"""

from __future__ import annotations

import threading
from typing import Any

_WANTED = "step wanted"
"""Key in torch's store."""


class CommonStep:
    """What one rank knows of it. It comes once in a run. The main thread calls `is_here`, the watching one the rest."""

    def __init__(self) -> None:
        self.is_wanted = False
        """Set it to ask for one; a signal handler may."""
        self._steps = 0
        """Those that the main thread has ended."""
        self._told: int | None = None
        self._common: int | None = None
        self._lock, self._is_decided = threading.Lock(), threading.Event()

    def is_here(self) -> bool:
        """Whether the step that ends here is the common one. Every rank calls it after every step.

        It waits only where one is wanted, until the threads of all ranks have heard of that.
        """
        with self._lock:
            self._steps += 1
            is_told = self._told is not None
        if not is_told:
            return False
        self._is_decided.wait()
        return self._steps == self._common

    def poll(self, store: Any, rank: int, size: int) -> None:
        """Tell the other ranks, and hear of them. Call it often; raises `RuntimeError` where the store is gone."""
        if self._is_decided.is_set():
            return
        if self._told is None:
            if self.is_wanted:
                store.set(_WANTED, "")
            elif not store.check([_WANTED]):
                return
            with self._lock:
                self._told = self._steps + 1
            store.set(f"step/{rank}", str(self._told))
        keys = [f"step/{other}" for other in range(size)]
        if store.check(keys):
            self._common = max(map(int, store.multi_get(keys)))
            self._is_decided.set()

    def give_up(self) -> None:
        """Have the main thread go on, since the store is gone."""
        self._is_decided.set()
