"""Pictures of a compression: the curve with its errors, ranks by layer, spectra plain and weighted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_vit.report.compression.read import Compression, rises
from lowrank_vit.report.style import (
    GRID,
    INK,
    MUTED,
    by_type,
    first_middle_last,
    heading,
    log_ticks,
    new_figure,
    png,
    style_bar,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Lines also differ without colour: by their marks, in grey print.
_COLORS = {"svd": "#6b7a88", "asvd": "#3caea3", "fwsvd": "#c9a227", "svdllm": "#20639b", "kfac": "#d1603d"}
_MARKS = {"svd": "s", "asvd": "^", "fwsvd": "v", "svdllm": "D", "kfac": "o"}
_DASHES: dict[str, Any] = {"greedy": "-", "energy": (0, (5, 2)), "uniform": (0, (1.5, 1.5))}
_LABELLED = 30
"""Up to so many layers have their ranks written in the picture."""


def curve_plot(found: Compression) -> bytes:
    """PNG bytes: top-1 and loss over the share of the model that is left, and measured over predicted rises of loss."""
    figure = new_figure(13.2, 4.9)
    top1, loss, predicted = figure.subplots(1, 3)
    by = found.content.get("by", "params")
    what = "parameters" if by == "params" else "FLOPs"
    tidy(top1, "Top-1", f"{what} left, share of the model", "%")
    tidy(loss, "Loss", f"{what} left, share of the model", "nats")
    handles = []
    for line in found.methods:
        points = sorted((one for one in found.points if found.line_of(one) == line), key=lambda one: one[by])
        x = [one[by] / max(1, found.original[by]) for one in points]
        look = _look(points[0])
        handles.append(_with_errors(top1, x, points, "top1", look | {"label": line}))
        _with_errors(loss, x, points, "loss", look)
    for axes, name in ((top1, "top1"), (loss, "loss")):
        axes.axhline(found.original[name], color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
    losses = [one["loss"] for one in found.points if one["loss"] is not None and one["loss"] > 0]
    if losses and found.original["loss"] and found.original["loss"] > 0:
        loss.set_yscale("log")
        log_ticks(loss.yaxis)
    top1.text(0.02, found.original["top1"], "original ", transform=top1.get_yaxis_transform(), va="bottom", **_small())
    _predicted(predicted, found)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=8.5, frameon=False)
    heading(figure, "Accuracy against size", f"{found.subtitle}  ·  bars: two standard errors of paired differences")
    return png(figure)


def _small() -> dict[str, Any]:
    return {"fontsize": 8, "color": MUTED}


def _look(point: dict[str, Any]) -> dict[str, Any]:
    method, dashes = point["method"], _DASHES.get(point["allocation"], "-")
    return {"color": _COLORS.get(method, INK), "marker": _MARKS.get(method, "o"), "markersize": 5, "linestyle": dashes}


def _with_errors(axes: Axes, x: list[float], points: list[dict[str, Any]], name: str, look: dict[str, Any]) -> Any:
    y = [np.nan if one[name] is None else one[name] for one in points]
    errors = [2 * (one.get(f"{name}_error") or 0) for one in points]
    return axes.errorbar(x, y, errors, linewidth=1.6, elinewidth=1, capsize=2, **look)


def _predicted(axes: Axes, found: Compression) -> None:
    tidy(axes, "Rise of the loss", "predicted, nats", "measured, nats")
    everything = []
    for method in dict.fromkeys(point["method"] for point in found.points):
        measured, predicted = rises(found, method)
        color, mark = _COLORS.get(method, INK), _MARKS.get(method, "o")
        axes.plot(predicted, measured, linestyle="", color=color, marker=mark, markersize=5)
        everything += [*measured, *predicted]
    if not everything:
        axes.text(0.5, 0.5, "no measurable rise", transform=axes.transAxes, ha="center", **_small())
        return
    limits = min(everything) / 1.5, max(everything) * 1.5
    axes.plot(limits, limits, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    if limits[1] < 100 * limits[0]:  # else powers of ten are enough
        log_ticks(axes.xaxis)
        log_ticks(axes.yaxis)
    axes.text(0.04, 0.96, "dashes: as predicted", transform=axes.transAxes, va="top", **_small())


def ranks_plot(found: Compression) -> bytes | None:
    """PNG bytes: the share of its full rank that each layer keeps, over the budgets; None without targets."""
    full = found.full_ranks
    if not full or not found.points:
        return None
    lines = found.methods
    figure = new_figure(1.9 + 2.6 * len(lines), 1.7 + 0.21 * max(8, min(len(full), 60)))
    grid = figure.subplots(1, len(lines), squeeze=False)[0]
    shown: Any = None
    for column, line in enumerate(lines):
        points = sorted((one for one in found.points if found.line_of(one) == line), key=lambda one: -one["budget"])
        shares = [[one["ranks"].get(name, rank) / rank for one in points] for name, rank in full.items()]
        axes = grid[column]
        shown = axes.imshow(np.array(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        tidy(axes, line, "budget")
        axes.grid(visible=False)
        axes.set_xticks(range(len(points)), [f"{one['budget']:g}" for one in points])
        if column == 0 and len(full) <= 2 * _LABELLED:
            axes.set_yticks(range(len(full)), list(full), parse_math=False)
        elif column == 0:
            axes.set_ylabel("layers, first above", fontsize=9.5, color=MUTED)
        else:
            axes.set_yticks([])
        if len(full) <= _LABELLED:
            for row, name in enumerate(full):
                for place, one in enumerate(points):
                    rank = one["ranks"].get(name)
                    ink = "white" if shares[row][place] > 0.55 else INK
                    text = "all" if rank is None else str(rank)
                    axes.text(place, row, text, ha="center", va="center", fontsize=7.5, color=ink)
    style_bar(figure.colorbar(shown, ax=list(grid), shrink=0.7, pad=0.01), "of the full rank")
    heading(figure, "Ranks chosen layer by layer", f"{found.subtitle}  ·  all: the layer stays as it is")
    return png(figure)


def spectra_plot(found: Compression) -> bytes | None:
    """PNG bytes: plain and weighted singular values over the first, for the first, middle and last layer of each type.

    None without spectra.
    """
    spectra: dict[str, dict[str, list[float]]] = found.content.get("spectra") or {}
    if not spectra:
        return None
    chosen = {kind: first_middle_last(names) for kind, names in by_type(spectra).items()}
    rows = max(len(names) for names in chosen.values())
    figure = new_figure(1.2 + 3.2 * len(chosen), 1.7 + 2.3 * rows)
    grid = figure.subplots(rows, len(chosen), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for column, names in enumerate(chosen.values()):
        for row, name in enumerate(names):
            axes = grid[row, column]
            axes.set_axis_on()
            tidy(axes, name, "index i" if row == len(names) - 1 else "", "σᵢ / σ₁" if column == 0 else "")
            for method, values in spectra[name].items():
                s = np.array(values, float)
                s = s / s[0] if s.size and s[0] > 0 else s
                color, width = _COLORS.get(method, INK), 2.2 if method == "svd" else 1.4
                (handles[method],) = axes.plot(
                    np.arange(1, s.size + 1), np.where(s > 0, s, np.nan), color=color, lw=width
                )
            axes.set(yscale="log", ylim=(1e-4, 1.3))
    for axes in grid.flat:
        axes.grid(visible=True, color=GRID, linewidth=0.7)
    labels = ["svd (plain)" if method == "svd" else method for method in handles]
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=len(labels), fontsize=8.5, frameon=False)
    heading(figure, "Spectra, plain and weighted", f"{found.subtitle}  ·  a method truncates the spectrum of its line")
    return png(figure)
