"""The phases of a training run, reported to a listener, such as a bench or a profiler of the real loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, ParamSpec, Protocol, TypeVar, cast

from lowrank_vit.ranks.signs import Progress
from lowrank_vit.run.state import Position

T = TypeVar("T")
P = ParamSpec("P")

Phase = Literal[
    "epoch",  # the updates of one epoch
    "data",  # waiting for the next batch
    "augment",  # preparing a batch, as the loader does it: inside "data" on a CPU, on the loader's stream on CUDA
    "step",  # one batch; contains the next five
    "inputs",  # the parts of normalising, mixing and erasing that are not compiled with the model
    "forward",
    "backward",
    "optimizer",  # clipping, the update and setting gradients to None
    "ema",
    "refresh",  # copying the weights if spectra are due, and logging finished spectra
    "log",  # waiting for the device and writing a line of the log
    "checkpoint",  # if one is due: copying the state, and waiting until the previous checkpoint is written
    "evaluation",
]
"""A part of the loop. Phases are nested as noted; time outside of them belongs to the loop itself."""


class PhaseListener(Protocol):
    """Called when each phase begins and ends, also by an error; on the host, which runs ahead of a GPU.

    Both methods are called in the phase's thread, with its stream current. They must not draw random numbers or change
    tensors.
    """

    def begin(self, phase: Phase) -> None:
        """The phase begins."""
        ...

    def end(self, phase: Phase) -> None:
        """The phase ends; phases that began later have ended."""
        ...


_IN_WORDS: dict[Phase, str] = {
    "epoch": "training",
    "data": "waiting for the next batch",
    "augment": "augmenting a batch",
    "step": "a training step",
    "inputs": "preparing a step's inputs",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer's step",
    "ema": "updating the EMA",
    "refresh": "copying weights for the spectra",
    "log": "logging",
    "checkpoint": "saving a checkpoint",
    "evaluation": "validation",
}


_WAITS_FOR_THREADS: tuple[Phase, ...] = ("checkpoint", "refresh")
"""Phases that may wait for a thread of this rank, which writes the previous one, or recomputes it after a resume."""


class ToldToRanks(PhaseListener):
    """Reports this rank's phase to the other ranks through `Progress`; forwards all calls to another listener."""

    def __init__(self, progress: Progress, position: Position, listener: PhaseListener | None) -> None:
        """`position`: of the run. Until it moves, and in the first validation, compilation gets extra time."""
        self._progress, self._position, self._listener = progress, position, listener
        self._first: int | None = None
        self._open: list[Phase] = []
        self._has_validated = False
        progress.updates = lambda: position.num_updates

    def begin(self, phase: Phase) -> None:
        """Report the phase, then call the other listener."""
        if self._first is None:
            self._first = self._position.num_updates
        is_compiled = self._position.num_updates > self._first
        if phase == "evaluation":
            is_compiled, self._has_validated = self._has_validated, True
        self._progress.is_starting = not is_compiled
        self._open.append(phase)
        self._show(phase)
        if self._listener:
            self._listener.begin(phase)

    def end(self, phase: Phase) -> None:
        """Call the other listener, then report the phase."""
        if self._listener:
            self._listener.end(phase)
        self._open.pop()
        self._show(phase)

    def _show(self, phase: Phase) -> None:
        now = self._open[-1] if self._open else "epoch"
        self._progress.what, self._progress.is_background = _IN_WORDS[now], now in _WAITS_FOR_THREADS
        if phase == "augment":  # each rank does this at its own time and lead
            self._progress.ticks += 1
        else:
            self._progress.place += 1


class Phases:
    """Marks the phases of one run for a listener; without one it costs nothing."""

    def __init__(self, listener: PhaseListener | None = None) -> None:
        self._listener = listener

    def __call__(self, phase: Phase) -> AbstractContextManager[None]:
        """Tell the listener that `phase` begins and, at the end of the `with` block, that it ends."""
        return _SILENT if self._listener is None else _Told(self._listener, phase)

    def each(self, phase: Phase, items: Iterator[T]) -> Iterator[T]:
        """Yield the same items; the phase is the wait for each item and for the end."""
        return items if self._listener is None else self._told_of_each(phase, items)

    def _told_of_each(self, phase: Phase, items: Iterator[T]) -> Iterator[T]:
        end = object()
        try:
            while True:
                with self(phase):
                    item = next(items, end)
                if item is end:
                    return
                yield cast(T, item)
        finally:
            if close := getattr(items, "close", None):
                close()

    def around(self, phase: Phase, function: Callable[P, T]) -> Callable[P, T]:
        """Return a function whose every call is the phase."""
        if self._listener is None:
            return function

        def told(*args: P.args, **kwargs: P.kwargs) -> T:
            with self(phase):
                return function(*args, **kwargs)

        return told


class _Told(AbstractContextManager[None]):
    def __init__(self, listener: PhaseListener, phase: Phase) -> None:
        self._listener: PhaseListener = listener
        self._phase: Phase = phase

    def __enter__(self) -> None:
        self._listener.begin(self._phase)

    def __exit__(self, *_: object) -> None:
        self._listener.end(self._phase)


_SILENT = nullcontext()
NOBODY_LISTENS = Phases()
