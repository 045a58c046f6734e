"""Scores of runs: last and best of each measure, and mean and standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowrank_vit.report.events import Columns
from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.read import Run, read_args, read_summary
from lowrank_vit.report.status import run_status

MEASURES: tuple[tuple[str, str, Callable[[Iterable[float]], float]], ...] = (
    ("eval_top1", msg("top-1 accuracy (%)"), max),
    ("eval_ema_top1", msg("top-1 accuracy, EMA (%)"), max),
    ("eval_top5", msg("top-5 accuracy (%)"), max),
    ("eval_ema_top5", msg("top-5 accuracy, EMA (%)"), max),
    ("eval_loss", msg("eval loss"), min),
    ("eval_ema_loss", msg("eval loss, EMA"), min),
    ("train_loss", msg("train loss, epoch mean"), min),
)
"""Column of `summary.csv`, name with unit, and the function that picks its best value."""
LAST, BEST = msg("last epoch"), msg("best epoch")


@dataclass(frozen=True)
class Score:
    """One measure of several runs."""

    label: str
    """Its name with the unit."""
    when: str
    """`LAST` or `BEST`."""
    values: list[float]
    """By run; NaN where a run has none."""

    @property
    def digits(self) -> int:
        """Digits after the decimal point."""
        return 2 if "%" in self.label else 4

    def text(self, value: float) -> str:
        """A value as shown."""
        return f"{value:.{self.digits}f}" if np.isfinite(value) else tr("not measured")

    def spread(self, of: Sequence[int] | None = None) -> str:
        """`spread_of` all runs, or those at the places `of`."""
        return spread_of([self.values[i] for i in (of if of is not None else range(len(self.values)))], self.text)


def spread_of(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Mean ± standard deviation (n - 1) of the finite values, and their number if some are missing."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return tr("not measured")
    deviation = f" ± {text(statistics.stdev(finite))}" if len(finite) > 1 else ""
    return (
        text(statistics.fmean(finite))
        + deviation
        + (tr(" (of {n})", n=len(finite)) if len(finite) < len(values) else "")
    )


def scores_of(runs: Sequence[Mapping[str, np.ndarray]]) -> list[Score]:
    """Last and best value of every measure that any run has; a run is given by the columns of its `summary.csv`."""
    found: list[Score] = []
    for name, label, better in MEASURES:
        columns = [one.get(name, np.empty(0)) for one in runs]
        finite = [values[np.isfinite(values)] for values in columns]
        if any(values.size for values in finite):
            last = [float(values[-1]) if values.size else float("nan") for values in columns]
            best = [float(better(values)) if values.size else float("nan") for values in finite]
            found += [Score(label, LAST, last), Score(label, BEST, best)]
    return found


def read_scores(path: Path) -> Run:
    """The parts of a run that are quick to read: its options, the rows of its epochs and its progress."""
    args, epochs = read_args(path / "args.yaml", []), read_summary(path / "summary.csv", [])
    empty: Columns = {}
    return Run(path, epochs, empty, args, {}, [], status=run_status(path, args, epochs, empty))


def table_of_seeds(seeds: Sequence[int], paths: Sequence[Path]) -> list[str]:
    """Lines of a table: every measure by seed, with mean and standard deviation (n - 1); empty without measures."""
    scores = scores_of([read_scores(path).epochs for path in paths])
    rows = [["", "", *(f"seed {seed}" for seed in seeds), "mean ± sd"]]
    rows += [[one.label, one.when, *map(one.text, one.values), one.spread()] for one in scores]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [row[i].ljust(widths[i]) if i < 2 else row[i].rjust(widths[i]) for i in range(len(row))]
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows] if scores else []
