"""How a cost grows along an axis: the exponent b of cost = a x^b by least squares, and what to expect of larger x."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness.measure import Result, Samples
from benchmarks.harness.show import number

CONFIDENCE = 0.95
EXTRAPOLATED = 100_000_000


@dataclass(frozen=True)
class Growth:
    """The line through (log x, log cost)."""

    exponent: float
    low: float
    high: float
    """Ends of the 95 % interval by Student's t; infinite where there are but two samples."""
    per_item: float
    """Cost a piece (an own sample, a file, a class) at the largest x."""


def growth_of(cases: Mapping[int, Samples], pieces: Callable[[int], float] = float) -> Growth | None:
    """Fit all samples by place on the axis; None with fewer than two places, or where a cost is not above 0.

    `pieces`: how many a cost is divided by, at a place.
    """
    pairs = [(x, sample) for x, case in cases.items() for sample in case.samples]
    if len(cases) < 2 or min(sample for _, sample in pairs) <= 0:
        return None
    x, y = np.log(np.array(pairs, float)).T
    (slope, at_1), left = np.polyfit(x, y, 1), len(pairs) - 2
    width = math.inf
    if left > 0:
        from scipy.stats import t

        residuals = y - (at_1 + slope * x)
        error = math.sqrt(residuals @ residuals / left / ((x - x.mean()) ** 2).sum())
        width = float(t.ppf((1 + CONFIDENCE) / 2, left)) * error
    largest = max(cases)
    return Growth(float(slope), slope - width, slope + width, cases[largest].median / pieces(largest))


def extrapolated(cases: Mapping[int, Samples], x: float) -> float | None:
    """The cost at an x beyond all places: on the straight line through the medians of the smallest and the largest.

    A cost has a part that does not grow, which a power of x would multiply. It is never less than at the largest place;
    None with fewer than two places.
    """
    if len(cases) < 2:
        return None
    small, large = min(cases), max(cases)
    rise = (cases[large].median - cases[small].median) / (large - small)
    return cases[large].median + max(rise, 0.0) * (x - large)


def print_exponents(result: Result, console: Console) -> None:
    """A table of exponents and of costs a sample; nothing where no axis was measured."""
    section: Mapping[str, Mapping[str, Mapping[str, float]]] = result.extra.get("exponents", {})
    if not section:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for n, heading in enumerate(("axis", "cost", "exponent", "95 % interval", "each", "unit")):
        table.add_column(heading, justify="right" if 2 <= n <= 4 else "left", no_wrap=True)
    for axis, costs in section.items():
        for cost, found in costs.items():
            interval = f"{found['low']:.2f} .. {found['high']:.2f}"
            unit, scale = _SMALL[str(found["unit"])]
            table.add_row(axis, cost, f"{found['exponent']:.2f}", interval, number(scale * found["per_item"]), unit)
    console.print(table, "")


_SMALL = {"CPU s": ("ns", 1e9), "s": ("ns", 1e9), "MB": ("bytes", 1e6), "descriptors": ("descriptors", 1.0)}
"""Units of a cost a piece."""


def ratio_name(what: str, large: int, small: int) -> str:
    """first_batch, 14,200,000 and 100,000: first_batch_1e7_vs_1e5."""
    return f"{what}_{_order(large)}_vs_{_order(small)}"


def _order(x: int) -> str:
    return f"1e{math.floor(math.log10(x))}"


def ratio_of(cases: Mapping[int, Samples], sizes: Sequence[int]) -> Samples | None:
    """The largest over the smallest, sample by sample."""
    small, large = (cases.get(x) for x in (min(sizes), max(sizes)))
    if small is None or large is None or min(sizes) == max(sizes):
        return None
    return Samples(tuple(a / b for a, b in zip(large.samples, small.samples, strict=False)))
