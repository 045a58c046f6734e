"""The phases of a training step, timed by CUDA events on a GPU, which wait for nothing, by a clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.limits import wait

PHASES = ("data", "augment", "forward", "backward", "optimizer", "ema", "monitor", "other")
"""In the order of a step; "augment" is beside the step on CUDA."""

Mark = Any
"""A moment: seconds of the clock, or a CUDA event."""


@dataclass(frozen=True)
class Phases:
    """Milliseconds a step of each phase, a sample a round."""

    ms: Mapping[str, tuple[float, ...]]
    overlaps: frozenset[str] = frozenset()
    """Phases that run beside the others."""

    @classmethod
    def of(cls, rounds: Sequence[Mapping[str, float]], steps: int, overlaps: frozenset[str] = frozenset()) -> Phases:
        """`rounds`: seconds of each phase in `steps` steps."""
        return cls({name: tuple(1e3 * one[name] / steps for one in rounds) for name in PHASES}, overlaps)

    def shares(self) -> dict[str, float]:
        """Median share of each phase in the step's time, 0-1; those that run beside it are not in the sum."""
        steps = [sum(self.ms[name][n] for name in PHASES if name not in self.overlaps) for n in range(self._rounds)]
        return {name: median(a / b for a, b in zip(self.ms[name], steps, strict=True)) for name in PHASES}

    def bottleneck(self) -> str:
        """The phase that takes most of the step; what runs beside the step shows as waiting for data, if at all."""
        shares = self.shares()
        return max((name for name in PHASES if name not in self.overlaps), key=lambda name: shares[name])

    @property
    def _rounds(self) -> int:
        return len(self.ms[PHASES[0]])


class Timer:
    """Adds up the time between marks by the name of what ended; nothing waits for the device but `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._last: Mark = None

    def now(self) -> Mark:
        """This moment on the current stream."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """The first phase begins."""
        self._last = self.now()

    def end(self, name: str) -> None:
        """The phase `name` ends and the next begins."""
        now = self.now()
        self._spans.append((name, self._last, now))
        self._last = now

    def span(self, name: str, begin: Mark) -> None:
        """What began at `begin` ends, be it inside another phase or on another stream."""
        self._spans.append((name, begin, self.now()))

    def seconds(self) -> dict[str, float]:
        """By phase since the last call; waits for the device."""
        wait(self._device)
        sums: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        is_event = self._device.type == "cuda"
        for name, begin, end in self._spans:
            sums[name] += begin.elapsed_time(end) / 1e3 if is_event else end - begin
        self._spans.clear()
        return sums
