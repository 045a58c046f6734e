"""Signals that ask a run to save and end: Ctrl-C, a batch system's SIGTERM, SIGUSR1 before a time limit, and SIGHUP
when a terminal closes.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from types import FrameType

from lowrank_vit.common.terminal import end_within
from lowrank_vit.data.batch import Batch
from lowrank_vit.ranks.world import World
from lowrank_vit.score.evaluate import Batches

SAME_REQUEST_S = 5.0
"""Signals that come within this time of the first one are the same request."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
NO_LAUNCHER = "the loss of its launcher"
_LAUNCHER_LOST = 1000
"""Stands for the loss of the launcher; no signal has this number."""
_ORDERS = (signal.SIGTERM, signal.SIGINT)
"""Signals that end the process at once when they come a second time."""
_CLEAN_UP_S = 3.0
"""Time to clean up after a second signal."""
_AGREE_S, _AGREE_STEPS = 2.0, 1000
"""Time, and largest number of steps, between two agreements of the ranks."""


@contextlib.contextmanager
def handled(
    handler: Callable[[int, FrameType | None], None], *, spared: Sequence[signal.Signals] = SIGNALS
) -> Generator[None]:
    """Send `SIGNALS` to `handler` within the context, except signals in `spared` that are ignored, as under nohup.

    Does nothing outside the main thread, where Python does not allow it.
    """
    is_main = threading.current_thread() is threading.main_thread()
    left = [number for number in spared if signal.getsignal(number) is signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in SIGNALS if is_main and number not in left}
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)


class Stopped(Exception):
    """Raised where all ranks should end; the state is that after the last update."""


class StopRequest:
    """Notes the first signal, about which all ranks then agree; a second Ctrl-C or SIGTERM ends the process at once.

    A signal within `SAME_REQUEST_S` of the first does not count as a second: Ctrl-C reaches both torchrun and its
    ranks, and torchrun passes it on to the ranks again.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked_at: float | None = None
        self._signal = 0
        self.begin(0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif number in _ORDERS and now - self._asked_at > SAME_REQUEST_S:
            end_within(_CLEAN_UP_S)
            raise KeyboardInterrupt
        self.ask(number)

    @contextlib.contextmanager
    def noted(self) -> Generator[StopRequest]:
        """Note signals within the context; leave SIGHUP alone if it is ignored, as under nohup.

        Does nothing outside the main thread, where Python does not allow it.
        """
        with handled(self._note, spared=(signal.SIGHUP,)):
            yield self

    def ask(self, number: int = _LAUNCHER_LOST) -> None:
        """Ask the run to end because of this signal, once all ranks know. Safe in a signal handler.

        Without a number: because this rank's launcher is gone.
        """
        self._signal = number
        self._world.common_step.is_wanted = True

    @property
    def reason(self) -> str:
        """The signal's name, e.g. SIGTERM, or `NO_LAUNCHER`; empty if there was none."""
        if self._signal == _LAUNCHER_LOST:
            return NO_LAUNCHER
        return signal.Signals(self._signal).name if self._signal else ""

    def begin(self, num_steps: int) -> None:
        """A series of steps of similar duration (updates, or validation batches) starts after `num_steps`."""
        self._next = num_steps + 1
        self._agreed_at = time.monotonic(), num_steps

    def comes_after(self, num_steps: int) -> bool:
        """Whether all ranks should end here because one of them was asked to. All ranks call it after every step.

        The ranks agree over the host's network, at the next common step after one of them was asked to end. A stop thus
        comes well within the 30 s that torchrun leaves after SIGTERM. They also agree about every two seconds, since
        there is no common step without torch's store. Other steps do not wait. All ranks agree at the same steps,
        because all use the slowest rank's time.
        """
        if self._world.size == 1:
            return self._signal > 0
        if not self._world.common_step.is_here() and num_steps < self._next:
            return False
        now, (then, step) = time.monotonic(), self._agreed_at
        number, step_s = self._world.greatest(self._signal, (now - then) / max(1, num_steps - step))
        self._signal = int(number) or self._signal  # a signal that came meanwhile counts next time
        self._agreed_at = now, num_steps
        self._next = num_steps + max(1, min(_AGREE_STEPS, int(_AGREE_S / max(step_s, 1e-9))))
        return number > 0


class UntilStopped:
    """A validation loader that raises `Stopped` when all ranks should end; a resumed run then validates the epoch."""

    def __init__(
        self, loader: Batches, num_batches: int, stop: StopRequest, tell: Callable[[int], object] = lambda done: None
    ) -> None:
        """`num_batches`: of the rank with the most batches. The other ranks keep agreeing after their last batch.

        `tell` is called after each batch with the number of batches of all passes so far.
        """
        self._loader, self._num_batches, self._stop = loader, num_batches, stop
        self._tell, self._done = tell, 0

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Batches of one pass over this rank's samples."""
        batches = iter(self._loader.batches(epoch))
        self._stop.begin(0)
        for n in range(self._num_batches):
            batch = next(batches, None)
            if batch is not None:
                yield batch
            self._done += 1
            self._tell(self._done)
            if self._stop.comes_after(n + 1):
                raise Stopped
        yield from batches
