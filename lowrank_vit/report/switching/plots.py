"""`lowrank.png`: the rank of every layer over the updates, and the evidence of the refreshes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_vit.report.style import (
    EMA,
    INK,
    MUTED,
    by_type,
    heading,
    new_figure,
    png,
    style_bar,
    tidy,
    type_look,
    update_ticks,
)
from lowrank_vit.report.switching.read import Look, Switching, mean_over_time, read_switching

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from lowrank_vit.report.read import Run

_NO_LOOK = "#d9d9d9"
_LABELLED = 30
"""Up to so many layers have their ranks written in the picture."""
_NAMED = 60
"""Up to so many layers are named beside the picture."""


def switching_plot(run: Run) -> bytes | None:
    """PNG bytes: ranks by layer over the updates; energy, cosine and certificates with chance. None without any."""
    switching = read_switching(run.path)
    if not switching or not switching.layers:
        return None
    names, looks = switching.layers, switching.looks
    end = max([run.status.updates if run.status else 0, *(one.update for one in [*looks, *switching.switches])])
    full = {name: min(run.shapes[name]) if name in run.shapes else _greatest(switching, name) for name in names}
    rows, height = 2 if looks else 1, 1.2 + 0.2 * max(8, min(len(names), _NAMED))
    figure = new_figure(13.2 if looks else 8.6, 1.0 + height + (2.9 if looks else 0.0))
    above, *below = figure.subfigures(rows, 1, height_ratios=[height, 2.9][:rows], squeeze=False)[:, 0]
    panels = above.subplots(1, 2 if looks else 1, squeeze=False)[0]
    shown = _ranks(panels[0], switching, full, end)
    if looks:
        _verdicts(panels[1], switching, full, end)
        _evidence(below[0], switching, end)
    style_bar(above.colorbar(shown, ax=list(panels), shrink=0.7, pad=0.01), "of the full rank")
    what = "would be factorised (dry run)" if switching.is_dry else "are factorised"
    model = f"{run.args['model']}  ·  " if run.args.get("model") else ""
    count = len(switching.ranks_after(len(switching.switches)))
    title = "Ranks of the layers in a dry run" if switching.is_dry else "Ranks of the layers"
    heading(figure, title, f"{model}{count} of {len(names)} layers {what}; all: the layer is whole")
    return png(figure)


def _greatest(switching: Switching, name: str) -> int:
    """The greatest rank of a layer in the log, for a layer of unknown shape."""
    found = [one.ranks[name] for one in switching.switches if name in one.ranks]
    return max([1, *found, *(int(one.layers[name].get("rank", 1)) for one in switching.looks if name in one.layers)])


def _heat(axes: Axes, shares_LT: np.ndarray, edges: list[int]) -> Any:
    """A heat map: rows are layers, the first above; a column is a range of updates."""
    edges = [*edges[:-1], max(edges[-1], edges[-2] + 1)]
    rows = np.arange(len(shares_LT) + 1) - 0.5
    shown = axes.pcolormesh(edges, rows, shares_LT, cmap="Blues", vmin=0, vmax=1)
    axes.invert_yaxis()
    axes.grid(visible=False)
    update_ticks(axes.xaxis)
    return shown


def _ranks(axes: Axes, switching: Switching, full: dict[str, int], end: int) -> Any:
    names = list(full)
    stages = [switching.ranks_after(count) for count in range(len(switching.switches) + 1)]
    shares = np.array([[ranks.get(name, full[name]) / full[name] for ranks in stages] for name in names])
    edges = [0, *(one.update for one in switching.switches), end]
    tidy(axes, "Would be kept" if switching.is_dry else "Kept", "update")
    shown = _heat(axes, shares, edges)
    if len(names) <= _NAMED:
        axes.set_yticks(range(len(names)), names, parse_math=False)
    else:
        axes.set_yticks([])
        axes.set_ylabel("layers, first above", fontsize=9.5, color=MUTED)
    for update in edges[1:-1]:
        axes.axvline(update, color=EMA, linewidth=1.4)
    if len(names) <= _LABELLED:
        for column, ranks in enumerate(stages):
            if edges[column + 1] - edges[column] < 0.06 * end:
                continue
            for row, name in enumerate(names):
                ink = "white" if shares[row, column] > 0.55 else INK
                text = str(ranks.get(name, "all"))
                place = (edges[column] + edges[column + 1]) / 2
                axes.text(place, row, text, ha="center", va="center", fontsize=7.5, color=ink)
    return shown


def _verdicts(axes: Axes, switching: Switching, full: dict[str, int], end: int) -> None:
    """The rank that each refresh would keep, drawn until the next; dots where it finds a layer settled."""
    names, looks = list(full), switching.looks

    def kept(look: Look, name: str) -> float:
        return look.layers[name].get("rank", 0.0) / full[name] if name in look.layers else np.nan

    shares_LT = np.array([[kept(look, name) for look in looks] for name in names])
    updates = [look.update for look in looks]
    longest = max((b - a for a, b in itertools.pairwise(updates)), default=end)
    tidy(axes, "What each whole refresh would keep", "update  ·  dots: settled, white: no rank pays, hatched: no data")
    axes.set_yticks([])
    axes.patch.set(facecolor=_NO_LOOK, edgecolor="white", hatch="////", linewidth=0)
    _heat(axes, shares_LT, [*updates, min(end, updates[-1] + longest)])
    dots = [
        (look.update, row)
        for look in looks
        for row, name in enumerate(names)
        if look.layers.get(name, {}).get("settled", 0)
    ]
    if dots:
        axes.scatter(*zip(*dots, strict=True), s=7, color=EMA, linewidths=0, zorder=3, clip_on=False)
    axes.set_xlim(0, end or 1)


def _covering(curve_T: np.ndarray, others: Sequence[np.ndarray]) -> int:
    """How many other curves visibly coincide with this one somewhere."""
    return sum(bool(np.any(np.abs(other_T - curve_T) < 0.02)) for other_T in others)


def _evidence(figure: SubFigure, switching: Switching, end: int) -> None:
    panels: Any = figure.subplots(1, 4)
    updates = [look.update for look in switching.looks]
    types = by_type(switching.layers)
    marks: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(updates) <= 30 else {}
    every = max(1, len(updates) // 12)
    titles = (
        ("energy", "energy_of_chance", "Energy in earlier directions"),
        ("cosine", "chance", "Cosine with earlier directions"),
        ("above_noise", "", "Share above noise"),
    )
    for axes, (key, chance, title) in zip(panels[:3], titles, strict=True):
        tidy(axes, title, "update  ·  dashes: by chance" if chance else "update")
        curves = {kind: mean_over_time(switching.looks, key, names) for kind, names in types.items()}
        for place, (kind, names) in enumerate(types.items()):
            color, marker = type_look(kind)
            over = _covering(curves[kind], list(curves.values())[place + 1 :])  # curves below others are wider
            look: dict[str, Any] = {"marker": marker, "markersize": 3.5 + 2 * over, "linewidth": 1.4 + 1.8 * over}
            look["markevery"] = (place * every // len(types), every)
            axes.plot(updates, curves[kind], color=color, label=kind, **look)
            if chance:
                dash = (3 * place, (3, 3 * max(1, len(types) - 1)))  # equal curves show by turns
                by_chance = mean_over_time(switching.looks, chance, names)
                axes.plot(updates, by_chance, color=color, linestyle=dash, linewidth=1)
        axes.set_ylim(0, 1.03)
    handles, labels = panels[2].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncol=len(labels), fontsize=8, frameon=False, labelcolor=MUTED
    )
    widest = np.array(
        [max((one.get("certificate", 0.0) for one in look.layers.values()), default=0.0) for look in switching.looks]
    )
    tidy(panels[3], "Widest certificate", "update")
    panels[3].plot(updates, np.where(widest > 0, widest, np.nan), color=INK, clip_on=False, **marks)
    if (widest > 0).any() and widest.max() > 30 * widest[widest > 0].min():
        panels[3].set_yscale("log")
    else:
        panels[3].set_ylim(0, 1.15 * widest.max() or 1)
        panels[3].yaxis.set_major_formatter("{x:g}")  # a power of ten on top would push the row down
    panels[3].set_ylabel("radius / σ₁", fontsize=9.5, color=MUTED)
    for axes in panels:
        axes.set_xlim(0, end or 1)
        update_ticks(axes.xaxis)
        for one in switching.switches:
            axes.axvline(one.update, color=EMA, linewidth=1.2, alpha=0.8)
