"""A bench's result for readers: a table of 80 columns, a bar chart, and the files of --json and --plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.harness.measure import Result, Samples
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import write_whole

_FILE = tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")
_BAR_HEIGHT_IN = 0.42
_NAME_WIDTH = 28
_TOO_UNEQUAL = 30


@dataclass(frozen=True)
class Output:
    """Where a result goes besides the terminal."""

    json: Annotated[Path | None, _FILE] = None
    """Write environment, samples, medians and ratios to this file."""
    plot: Annotated[Path | None, _FILE] = None
    """Draw the cases as bars, with whiskers from the lowest to the highest sample, to this .png file."""

    def check(self) -> None:
        """Make the files' folders, to raise `UserError` now instead of after minutes of measuring."""
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise UserError(f"--plot {self.plot} does not end in .png.")
        for flag, path in (("--json", self.json), ("--plot", self.plot)):
            if path is None:
                continue
            if path.is_dir():
                raise UserError(f"{flag} {path} is a directory. Give the file to write.")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{flag} {path}: its folder cannot be made: {error.strerror}.") from error

    def earlier(self) -> Result | None:
        """What stands in --json now, if that is the result of a bench."""
        try:
            return self.json and Result.of(json.loads(self.json.read_bytes()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def write(self, result: Result, chart: Callable[[Result], bytes] | None = None) -> None:
        """Write the requested files; `chart` draws the picture (default: `bar_chart`). Raises `UserError`."""
        self.write_json(result)
        try:
            if self.plot is not None and result.cases:
                self.plot.write_bytes((chart or bar_chart)(result))
        except OSError as error:
            raise UserError(f"{error.filename} cannot be written: {error.strerror}.") from error

    def write_json(self, result: Result) -> None:
        """Write only --json, atomically. Raises `UserError`."""
        if self.json is None:
            return
        try:
            write_whole(self.json, result.to_json())
        except OSError as error:
            raise UserError(f"--json {self.json} cannot be written: {error.strerror}.") from error


def print_result(result: Result, console: Console) -> None:
    """Print cases, ratios, settings, failures and limits, and the machine."""
    if result.cases:
        console.print(_table(result.bench, result.cases), "")
    if result.ratios:
        console.print(_table("ratio, round by round", result.ratios), "")
    remarks = [(name, case.setting) for name, case in result.cases.items() if case.setting]
    remarks += [("note", f"{name} failed: {reason}") for name, reason in result.failed.items()]
    remarks += [("note", limit) for limit in result.limits]
    remarks += [("measured on", machine_of(result.environment))] if result.environment else []
    print_remarks(remarks, console)


def print_remarks(remarks: Iterable[tuple[str, str]], console: Console) -> None:
    """Print names with their texts beside them, wrapped."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold", max_width=_NAME_WIDTH)
    grid.add_column()
    for name, remark in remarks:
        grid.add_row(Text(name), Text(remark))
    console.print(grid)


def machine_of(environment: Mapping[str, Any]) -> str:
    """Cores, processor, GPU and commit, as far as they are known."""
    cores, commit = environment.get("cpu_cores"), environment.get("commit")
    parts = [cores and f"{cores} cores", environment.get("cpu"), environment.get("gpu"), commit and f"commit {commit}"]
    return ", ".join(str(part) for part in parts if part)


def bar_chart(result: Result) -> bytes:
    """The cases as horizontal bars at the median with whiskers from min to max, as a PNG; one panel for each unit.

    If the largest is many times the smallest, the axis is logarithmic, so that all can be read.
    """
    from lowrank_vit.report.style import INK, MODEL, MUTED, heading, log_ticks, new_figure, png, tidy

    units = sorted({case.unit for case in result.cases.values()})
    groups = [{name: case for name, case in result.cases.items() if case.unit == unit} for unit in units]
    heights = [_BAR_HEIGHT_IN * len(group) + 0.7 for group in groups]
    figure = new_figure(7.6, 0.9 + sum(heights))
    panels = figure.subplots(len(units), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, unit, group in zip(panels, units, groups, strict=True):
        tidy(axes, xlabel=f"{unit}, median; whiskers: lowest and highest sample")
        axes.grid(visible=False, axis="y")
        names, medians = list(group), [case.median for case in group.values()]
        low = [case.median - min(case.samples) for case in group.values()]
        high = [max(case.samples) - case.median for case in group.values()]
        bars = axes.barh(names, medians, xerr=[low, high], color=MODEL, height=0.62, ecolor=INK, capsize=3)
        labels = [f"{number(case.median)}" for case in group.values()]
        axes.bar_label(bars, labels, padding=6, fontsize=8.5, color=MUTED)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        if max(medians) > _TOO_UNEQUAL * min(medians):
            axes.set_xscale("log")
            log_ticks(axes.xaxis)
            axes.set_xlim(left=0.5 * min(medians))
        else:
            axes.set_xlim(left=0)
    heading(figure, f"Bench: {result.bench}", where(result))
    return png(figure)


def where(result: Result) -> str:
    """The subtitle of a picture: cores, and the GPU or the processor."""
    known = result.environment
    cores = known.get("cpu_cores")
    return ", ".join(str(part) for part in (cores and f"{cores} cores", known.get("gpu") or known.get("cpu")) if part)


def number(value: float) -> str:
    """Three significant digits, or all before the point: 12,345, 98.7, 1.53, 0.0421."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _table(title: str, rows: Mapping[str, Samples]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(title, overflow="fold")
    table.add_column("median", justify="right")
    table.add_column("min .. max", justify="right")
    with_unit = any(row.unit for row in rows.values())
    if with_unit:
        table.add_column("unit")
    if with_cpu := any(row.cpu for row in rows.values()):
        table.add_column("CPU ms/item" if with_unit else "by CPU time", justify="right")
    for name, row in rows.items():
        spread = f"{number(min(row.samples))} .. {number(max(row.samples))}"
        cpu = number(median(row.cpu) * (1e3 if with_unit else 1)) if row.cpu else ""
        table.add_row(name, number(row.median), spread, *([row.unit] * with_unit), *([cpu] * with_cpu))
    return table
