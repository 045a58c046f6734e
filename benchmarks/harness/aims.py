"""The target ratios and speeds of the benches, with a table and a chart that compare results with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.harness.measure import Result
from benchmarks.harness.show import number, where


@dataclass(frozen=True)
class Aim:
    """A target: the median of a ratio or a case is at least `goal`, or at most that if less is better."""

    bench: str
    name: str
    goal: float
    what: str
    """A few words for the table."""
    device: Literal["any", "cpu", "cuda"] = "any"
    """The device type that it is for."""
    is_less_better: bool = False

    def share(self, found: float) -> float:
        """The result relative to the goal: 1 just reaches it, more is better."""
        return self.goal / found if self.is_less_better else found / self.goal

    def is_for(self, device: str) -> bool:
        """Whether it is for this type of device."""
        return self.device in ("any", device)


AIMS = (
    Aim("prep", "passthrough_decode_vs_ffcv", 2.0, "convert, all decoded, / FFCV's writer", "cpu"),
    Aim("prep", "passthrough_header_vs_ffcv", 8.0, "convert, headers read, / FFCV's writer", "cpu"),
    Aim("prep", "reencode_vs_ffcv", 1.2, "convert to 400 px / FFCV's writer", "cpu"),
    Aim("loader", "ffcv_vs_stock_ffcv", 0.95, "loader ffcv / FFCV's Loader", "cpu"),
    Aim("loader", "dali_cpu_vs_stock_dali", 0.95, "loader dali / plain DALI pipeline", "cpu"),
    Aim("loader", "best_vs_timm", 2.0, "best loader / timm's loader", "cpu"),
    Aim("loader", "plan", 1e6, "plan, samples/s on one core", "cpu"),
    Aim("augment", "full_recipe_vs_timm", 2.0, "augmentation / timm's transforms", "cpu"),
    Aim("spectral", "gram64_vs_inline_svd", 3.0, "float64 spectra / inline float32 SVD", "cpu"),
    Aim("spectral", "full_refresh_vs_before", 1.35, "a refresh of the spectra / before", "cpu"),
    Aim("spectral", "ends_refresh_vs_before", 2.0, "the same, first values alone", "cpu"),
    Aim("spectral", "ends_refresh_vs_before_initial", 1.5, "the same, timm's initial weights", "cpu"),
    Aim("spectral", "lowrank_vs_fullrank", 0.67, "matrices of rank 8 / of full rank", "cpu"),
    Aim("step", "lowrank_vs_full", 1.2, "step, a quarter of the weights / full rank", "cpu"),
    Aim("scale", "first_batch_1e7_vs_1e5", 1.5, "first batch, set of 14.2 M / of 1e5: at most", "cpu", True),
    Aim("scale", "resume_1e7_vs_1e5", 1.5, "the same at a resume: at most", "cpu", True),
    Aim("scale", "second_open_vs_first_open", 0.1, "opening by a further rank / first: at most", "cpu", True),
    Aim("scale", "ffcv_kept_1e7_vs_1e5", 1.3, "memory of a rank with ffcv, as above: at most", "cpu", True),
    Aim("scale", "private_memory_1e7_vs_1e5", 1.3, "memory of a rank that plans: at most", "cpu", True),
    Aim("step", "compiled_vs_timm_compiled", 1.1, "ViT-S step / timm's, both compiled", "cuda"),
    Aim("end-to-end", "end_to_end", 10_000, "training a ViT-S, img/s", "cuda"),
    Aim("end-to-end", "end_to_end_vs_smaller", 0.97, "ViT-S / smaller of step, decoder beside it", "cuda"),
    Aim("monitor", "with_monitor_vs_without", 0.99, "steps with a refresh every 10 / without", "cuda"),
    Aim("step-base", "compiled_vs_timm_compiled", 1.1, "ViT-B step / timm's, both compiled", "cuda"),
    Aim("end-to-end-base", "end_to_end", 3_000, "training a ViT-B, img/s", "cuda"),
    Aim("end-to-end-base", "end_to_end_vs_synthetic", 0.97, "training a ViT-B / its step alone", "cuda"),
    Aim("loader", "dali_gpu", 12_000, "loader dali on the GPU, img/s", "cuda"),
    Aim("loader", "dali_gpu_400px", 19_000, "the same, set of at most 400 px, img/s", "cuda"),
    Aim("loader", "interpolated_vs_repeated_colours", 0.95, "dali, colours interpolated / repeated", "cuda"),
    Aim("loader", "resident_256px", 100_000, "resident 256 px raw, img/s", "cuda"),
    Aim("loader", "resident", 60_000, "resident 500 px photographs, img/s", "cuda"),
    Aim("augment", "full_recipe", 500_000, "augmentation on the GPU, img/s", "cuda"),
    Aim("augment", "full_recipe_vs_step", 50, "the same / ViT-S step (2 % of its time)", "cuda"),
    Aim("spectral", "gram64_vs_inline_svd", 50.0, "float64 spectra / inline float32 SVD", "cuda"),
)
"""As in `docs/benchmarks/README.md`. Ratios without an aim are reported too.

Benches are named as in `selection.py`. A monitor that costs at most 1 % of a step is 0.99 of its speed.
"""


@dataclass(frozen=True)
class Verdict:
    """An aim and its result."""

    aim: Aim
    samples: tuple[float, ...]
    """Empty if the bench did not finish."""
    median: float | None

    @property
    def is_reached(self) -> bool | None:
        """Whether the aim is reached; None without a result."""
        return None if self.median is None else self.aim.share(self.median) >= 1


def judge(results: Mapping[str, Mapping[str, Any]], device: str, aims: Sequence[Aim] = AIMS) -> list[Verdict]:
    """Compare the JSON of benches, by bench, with the aims of these benches for the type of device.

    A bench without a result must be in `results` with an empty mapping, so that its aims are listed.
    """
    verdicts = []
    for aim in aims:
        if aim.bench not in results or not aim.is_for(device):
            continue
        result = results[aim.bench]
        found = result.get("ratios", {}).get(aim.name) or result.get("cases", {}).get(aim.name)
        verdicts.append(Verdict(aim, tuple(found["samples"]) if found else (), found["median"] if found else None))
    return verdicts


def print_verdicts(verdicts: Sequence[Verdict], console: Console) -> None:
    """Print the table, 80 columns wide."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("bench")
    table.add_column("to be reached", overflow="fold")
    for heading in ("median", "min .. max", "aim", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    words = {True: "yes", False: "NO", None: "not run"}
    for verdict in verdicts:
        samples, median = verdict.samples, verdict.median
        spread = f"{short_number(min(samples))} .. {short_number(max(samples))}" if samples else ""
        found = "" if median is None else short_number(median)
        aim = verdict.aim
        table.add_row(aim.bench, aim.what, found, spread, short_number(aim.goal), words[verdict.is_reached])
    console.print(table)


def short_number(value: float) -> str:
    """A number in three digits: 3.20M, 12.5k, 0.987."""
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k" if value >= 1e4 else number(value)


_ROW_IN = 0.36


def aims_chart(result: Result) -> bytes:
    """A row for each aim: the median over it as a dot, a line from the lowest to the highest sample, as a PNG.

    Ratios and speeds of all units share the axis, since each is divided by its aim; 1 just reaches it.
    """
    from lowrank_vit.report.style import EMA, GRID, INK, MODEL, MUTED, heading, log_ticks, new_figure, png, tidy

    extra = result.extra
    verdicts = judge({bench: extra["benches"].get(bench, {}) for bench in extra["wanted"]}, extra["device"])
    figure = new_figure(9.2, 1.6 + _ROW_IN * max(len(verdicts), 1))
    axes = figure.subplots()
    tidy(axes, xlabel="multiple of the aim; median, and from the lowest to the highest sample")
    axes.grid(visible=False, axis="y")
    axes.axvline(1, color=INK, linewidth=1.2)
    shares = [share for verdict in verdicts for share in _shares(verdict)]
    for row, verdict in enumerate(verdicts):
        axes.axhline(row, color=GRID, linewidth=0.7, zorder=0)
        if verdict.median is None:
            axes.text(1.03, row, "not measured", va="center", fontsize=8.5, color=MUTED)
            continue
        colour = MODEL if verdict.is_reached else EMA
        of_row = _shares(verdict)
        axes.plot([min(of_row), max(of_row)], [row, row], color=colour, linewidth=2.5, alpha=0.45)
        axes.plot([verdict.aim.share(verdict.median)], [row], "o", color=colour, markersize=7)
    axes.set_yticks(range(len(verdicts)), [f"{one.aim.bench}: {one.aim.what}" for one in verdicts])
    axes.set_ylim(len(verdicts) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min([0.8, *shares]), 1.15 * max([1.4, *shares]))
    log_ticks(axes.xaxis)
    found = axes.twinx()  # the figures, on the right
    found.set_ylim(axes.get_ylim())
    found.set_yticks(range(len(verdicts)), [_figures(verdict) for verdict in verdicts])
    found.tick_params(length=0, labelsize=8.5, colors=INK)
    for side in ("top", "right", "left", "bottom"):
        found.spines[side].set_visible(False)
    heading(figure, "Measured, and what is to be reached", where(result))
    return png(figure)


def _shares(verdict: Verdict) -> list[float]:
    return [verdict.aim.share(sample) for sample in verdict.samples]


def _figures(verdict: Verdict) -> str:
    found = "-" if verdict.median is None else short_number(verdict.median)
    return f"{found} of {short_number(verdict.aim.goal)}"
