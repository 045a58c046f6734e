"""Latency of models and layers. They are measured in turns, since absolute times drift.

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
"""A sample makes enough calls to take this long, so that the clock's resolution does not matter."""


@dataclass(frozen=True)
class Speed:
    """Times of one model or layer, compared with the reference in the same rounds."""

    ms: float
    """Median time of a call, ms."""
    ratio: float
    """Median over the rounds of its time divided by the reference's; below 1 is faster."""
    low: float
    high: float
    """Lower and upper quartile of the ratio."""

    def content(self) -> dict[str, float]:
        """As plain values."""
        return {"ms": self.ms, "ratio": self.ratio, "ratio_low": self.low, "ratio_high": self.high}


@torch.no_grad()
def time_in_turns(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int = ROUNDS, *, tick: Callable[[int], object]
) -> list[Speed]:
    """Time calls in turns, A B C A B C ..., and compare each with the first; calls before the first round warm up.

    On CUDA the host waits for the device at both ends of a sample. `tick` is called with 1 after each sample.
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
    """How many calls take `LEAST_S`, by the second of two calls; the first warms up."""
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
    """A function that calls a model or a layer, which is set to evaluation mode."""
    model.eval()
    return lambda: model(input)


@dataclass(frozen=True)
class LayerSpeed:
    """Times of a layer shape at several ranks."""

    rows: int
    columns: int
    parts: int
    """Into how many parts the rows are split, each with its own factors."""
    tokens: int
    ratios: dict[int, float]
    """By rank: time of the factorised layer divided by that of the whole one."""
    pays: int
    """The greatest rank that saves parameters and FLOPs."""

    @property
    def faster_below(self) -> int | None:
        """The largest rank up to which every tried rank is faster than the whole layer; None if the smallest is not."""
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
    """Time a Linear of each shape (R, C, P parts) against its factors at eighths of the largest rank that pays."""
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
