"""Signals that ask a run to save and end: Ctrl-C, a batch system's SIGTERM, SIGUSR1 before the time limit, SIGHUP of a
terminal that is closed.
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
"""No signal has this number."""
_ORDERS = (signal.SIGTERM, signal.SIGINT)
"""Those of which a second one ends the process at once."""
_CLEAN_UP_S = 3.0
"""Time for what a second one leaves to be closed."""
_AGREE_S, _AGREE_STEPS = 2.0, 1000
"""Time, and the most steps, between two agreements of the ranks."""


@contextlib.contextmanager
def handled(
    handler: Callable[[int, FrameType | None], None], *, spared: Sequence[signal.Signals] = SIGNALS
) -> Generator[None]:
    """Have `SIGNALS` go to `handler` within the context; not those of `spared` that are ignored, as by nohup.

    Does nothing outside the main thread, where Python cannot do so.
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
    """All ranks are to end here; the state is that after the last update."""


class StopRequest:
    """Notes the first signal, on which all ranks then agree; a second Ctrl-C or SIGTERM ends the process at once.

    What comes within `SAME_REQUEST_S` of the first is not a second: Ctrl-C reaches torchrun and its ranks alike, and
    torchrun passes it on to the ranks again.
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
        """Only note signals within the context; not SIGHUP where it is ignored, as by nohup.

        Does nothing outside the main thread, where Python cannot do so.
        """
        with handled(self._note, spared=(signal.SIGHUP,)):
            yield self

    def ask(self, number: int = _LAUNCHER_LOST) -> None:
        """Have the run end because of the signal of that number, once all ranks know. Safe in a signal handler.

        Without one: since the launcher of this rank is gone.
        """
        self._signal = number
        self._world.common_step.is_wanted = True

    @property
    def reason(self) -> str:
        """The signal's name, e.g. SIGTERM, or `NO_LAUNCHER`; empty without one."""
        if self._signal == _LAUNCHER_LOST:
            return NO_LAUNCHER
        return signal.Signals(self._signal).name if self._signal else ""

    def begin(self, num_steps: int) -> None:
        """A stretch of steps (updates, or batches of a validation) of about one duration begins after `num_steps`."""
        self._next = num_steps + 1
        self._agreed_at = time.monotonic(), num_steps

    def comes_after(self, num_steps: int) -> bool:
        """Whether all ranks end here, because one of them was asked to. Every rank calls it after every step.

        They agree by the host's network, at the next common step after a rank was asked to end, so that a stop comes
        well within the 30 s that torchrun leaves after SIGTERM; and about every two seconds in any case, as there is
        no common step without torch's store. No step waits for it. At the same steps on every rank, since all reckon
        with the slowest one's time.
        """
        if self._world.size == 1:
            return self._signal > 0
        if not self._world.common_step.is_here() and num_steps < self._next:
            return False
        now, (then, step) = time.monotonic(), self._agreed_at
        number, step_s = self._world.greatest(self._signal, (now - then) / max(1, num_steps - step))
        self._signal = int(number) or self._signal  # one that came meanwhile is for the next time
        self._agreed_at = now, num_steps
        self._next = num_steps + max(1, min(_AGREE_STEPS, int(_AGREE_S / max(step_s, 1e-9))))
        return number > 0


class UntilStopped:
    """A validation loader that raises `Stopped` when all ranks are to end; the epoch is validated after resuming."""

    def __init__(
        self, loader: Batches, num_batches: int, stop: StopRequest, tell: Callable[[int], object] = lambda done: None
    ) -> None:
        """`num_batches`: of the rank that has most. The others go on agreeing when they are through with theirs.

        `tell` is told after each how many batches were seen, in all passes.
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
