"""Time named cases side by side: whole rounds in which every case runs once, A B A B ..., and ratios round by round.

Absolute figures drift with whatever else a machine does; a ratio of two neighbours in time drifts far less.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from data_prep.errors import UserError

DEFAULT_REPEATS = 5


def nothing(*args: object) -> None:
    """Do nothing: where a case needs no preparation, or nobody listens."""


@dataclass(frozen=True)
class Case:
    """One thing to time."""

    run: Callable[[], object]
    """The timed part; on an accelerator it waits for the device before it returns."""
    items: float
    """How many items `run` handles (GB are no whole number); a sample is items / seconds."""
    unit: str = "img/s"
    setting: str = ""
    """One sentence for the reader: which settings, what is inside the timed part."""
    before: Callable[[], object] = nothing
    after: Callable[[], object] = nothing
    """Not timed: prepare, then check what was done and clear away. Either raises `UserError` to stop everything."""


@dataclass(frozen=True)
class Samples:
    """The samples of a case or of a ratio, in the order of the rounds."""

    samples: tuple[float, ...]
    unit: str = ""
    """Empty for a ratio."""
    setting: str = ""

    @property
    def median(self) -> float:
        """The middle sample, or the mean of the two in the middle."""
        return median(self.samples)


@dataclass(frozen=True)
class Result:
    """A finished bench."""

    bench: str
    environment: Mapping[str, Any]
    cases: Mapping[str, Samples]
    ratios: Mapping[str, Samples]
    limits: tuple[str, ...] = ()
    """What the figures do not show, a sentence each."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further sections of the JSON."""

    def to_dict(self) -> dict[str, Any]:
        """bench, environment, cases, ratios, and then settings, limits and the extra sections."""
        return {
            "bench": self.bench,
            "environment": dict(self.environment),
            "cases": {
                name: {"unit": case.unit, "median": case.median, "samples": list(case.samples)}
                for name, case in self.cases.items()
            },
            "ratios": {
                name: {"median": ratio.median, "samples": list(ratio.samples)} for name, ratio in self.ratios.items()
            },
            "settings": {name: case.setting for name, case in self.cases.items()},
            "limits": list(self.limits),
            **self.extra,
        }

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def measure(
    bench: str,
    cases: Mapping[str, Case],
    ratios: Mapping[str, tuple[str, str]],
    *,
    environment: Mapping[str, Any],
    repeats: int = DEFAULT_REPEATS,
    warmup: int = 1,
    limits: tuple[str, ...] = (),
    note: Callable[[str], object] = nothing,
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Run `warmup` rounds that do not count and `repeats` that do; every round runs every case once, in order.

    `ratios` maps a name to two cases: the first's sample over the second's of the same round. `note` hears of each
    round as it begins; `clock` tells seconds. Raises `UserError` for `repeats` below 1, and what the cases raise.
    """
    if repeats < 1:
        raise UserError(f"--repeats is {repeats}, expected 1 or more ({DEFAULT_REPEATS} or more for a figure to keep).")
    for name, pair in ratios.items():
        assert set(pair) <= set(cases), name
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for n in range(warmup + repeats):
        note(f"warm-up {n + 1} of {warmup}" if n < warmup else f"round {n - warmup + 1} of {repeats}")
        for name, case in cases.items():
            seconds = _time(case, clock)
            if n >= warmup:
                samples[name].append(case.items / seconds)
    if repeats < DEFAULT_REPEATS:
        limits = (f"Only {repeats} round{'s' * (repeats > 1)}: a smoke test, not a measurement.", *limits)
    return Result(
        bench,
        environment,
        {name: Samples(tuple(samples[name]), case.unit, case.setting) for name, case in cases.items()},
        {
            name: Samples(tuple(a / b for a, b in zip(samples[over], samples[under], strict=True)))
            for name, (over, under) in ratios.items()
        },
        limits,
    )


def _time(case: Case, clock: Callable[[], float]) -> float:
    case.before()
    start = clock()
    case.run()
    seconds = clock() - start
    case.after()
    return seconds
