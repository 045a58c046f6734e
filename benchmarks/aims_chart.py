"""The picture of `bench all`: what was measured as a multiple of what is to be reached."""

from __future__ import annotations

from benchmarks.aims import Verdict, judge, short_number
from benchmarks.measure import Result
from benchmarks.show import where

_ROW_IN = 0.36


def aims_chart(result: Result) -> bytes:
    """A row for each aim: the median over it as a dot, a line from the lowest to the highest sample, as a PNG.

    Ratios and speeds of all units share the axis, since each is divided by its own aim; 1 is just reached.
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
        axes.plot([verdict.median / verdict.aim.least], [row], "o", color=colour, markersize=7)
    axes.set_yticks(range(len(verdicts)), [f"{one.aim.bench}: {one.aim.what}" for one in verdicts])
    axes.set_ylim(len(verdicts) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min([0.8, *shares]), 1.15 * max([1.4, *shares]))
    log_ticks(axes.xaxis)
    found = axes.twinx()  # the figures themselves, at the right
    found.set_ylim(axes.get_ylim())
    found.set_yticks(range(len(verdicts)), [_figures(verdict) for verdict in verdicts])
    found.tick_params(length=0, labelsize=8.5, colors=INK)
    for side in ("top", "right", "left", "bottom"):
        found.spines[side].set_visible(False)
    heading(figure, "Measured, and what is to be reached", where(result))
    return png(figure)


def _shares(verdict: Verdict) -> list[float]:
    return [sample / verdict.aim.least for sample in verdict.samples]


def _figures(verdict: Verdict) -> str:
    found = "-" if verdict.median is None else short_number(verdict.median)
    return f"{found} of {short_number(verdict.aim.least)}"
