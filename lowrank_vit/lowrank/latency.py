"""How long models and layers take: measured in turns, since absolute times drift; fewer FLOPs are not always faster.

Shape legend: T tokens, R rows of a layer's weight, C its columns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_vit.common.devices import wait_for
from lowrank_vit.lowrank.layers import pays
from lowrank_vit.model.low_rank import LowRankLinear

ROUNDS = 9
LEAST_S = 0.01
"""A sample is of so many calls that it takes this long, so that the clock's grain does not count."""


@dataclass(frozen=True)
class Speed:
    """Times of one thing beside the reference's of the same rounds."""

    ms: float
    """Median of a call."""
    ratio: float
    """Median over the rounds of its time over the reference's; below 1 is faster."""
    low: float
    high: float
    """Quartiles of that."""

    def content(self) -> dict[str, float]:
        """As plain values."""
        return {"ms": self.ms, "ratio": self.ratio, "ratio_low": self.low, "ratio_high": self.high}


@torch.no_grad()
def time_in_turns(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int = ROUNDS, *, tick: Callable[[int], object]
) -> list[Speed]:
    """Time calls in turns, A B C A B C ..., each beside the first, after one round that does not count.

    On CUDA the host waits for the device at both ends of a sample. `tick` is told how many samples more there are.
    """
    counts = [_calls_in(call, device) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, found in zip(calls, counts, times, strict=True):
            found.append(_seconds(call, count, device) / count)
            tick(1)
    speeds: list[Speed] = []
    for found in times:
        ratios = [mine / first for mine, first in zip(found, times[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        speeds.append(Speed(1e3 * statistics.median(found), middle, low, high))
    return speeds


def _calls_in(call: Callable[[], object], device: torch.device) -> int:
    """How many calls take `LEAST_S`; the first of two calls warms up."""
    call()
    return max(1, round(LEAST_S / max(_seconds(call, 1, device), 1e-7)))


def _seconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait_for(device)
    return time.perf_counter() - start


def forward_of(model: nn.Module, input: Tensor) -> Callable[[], object]:
    """A call of a model, or of a layer, in evaluation mode."""
    model.eval()
    return lambda: model(input)


@dataclass(frozen=True)
class LayerSpeed:
    """A shape of layers, and where it gets faster."""

    rows: int
    columns: int
    parts: int
    """Of the rows, each with factors of its own."""
    tokens: int
    ratios: dict[int, float]
    """Rank to the time of two products over that of one."""
    pays: int
    """The greatest rank that saves parameters and FLOPs."""

    @property
    def faster_below(self) -> int | None:
        """The greatest rank tried up to which all take less time than the layer as it is; None where none does."""
        found = None
        for rank in sorted(self.ratios):
            if self.ratios[rank] >= 1:
                break
            found = rank
        return found

    def content(self) -> dict[str, Any]:
        """As plain values."""
        ratios = {str(rank): ratio for rank, ratio in self.ratios.items()}
        shape = {"rows": self.rows, "columns": self.columns, "parts": self.parts, "tokens": self.tokens}
        return {**shape, "pays_up_to": self.pays, "faster_up_to": self.faster_below, "ratios": ratios}


def layer_speeds(
    shapes: Iterable[tuple[int, int, int]], tokens: int, device: torch.device, *, tick: Callable[[int], object]
) -> list[LayerSpeed]:
    """Time a Linear of each shape (R, C, P parts) beside its factors at eighths of the rank that pays."""
    found: list[LayerSpeed] = []
    for rows, columns, parts in dict.fromkeys(shapes):
        most = pays(rows, columns, parts)
        ranks = sorted({max(1, most * eighth // 8) for eighth in range(1, 9)})
        x_TC, b_R = torch.ones(tokens, columns, device=device), torch.ones(rows)
        layers: list[nn.Module] = [nn.Linear(columns, rows)]
        layers += [LowRankLinear(torch.ones(rows, r), torch.ones(parts * r, columns), b_R) for r in ranks]
        calls = [forward_of(layer.to(device), x_TC) for layer in layers]
        speeds = time_in_turns(calls, device, tick=tick)
        ratios = {rank: speed.ratio for rank, speed in zip(ranks, speeds[1:], strict=True)}
        found.append(LayerSpeed(rows, columns, parts, tokens, ratios, most))
    return found
