"""Picture of the circuits of heads, `circuits.png`: ranks by depth, and composition with heads of the block before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_vit.report.read import Run
from lowrank_vit.report.style import (
    EMA,
    GRID,
    INK,
    MODEL,
    MUTED,
    heading,
    index_ticks,
    log_ticks,
    moment,
    new_figure,
    png,
    style_bar,
    tidy,
)
from lowrank_vit.spectral.measures.circuits import BlockCircuits, chance_stable_rank
from lowrank_vit.spectral.measures.metrics import stable_rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHANCE: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (3, 2)), "zorder": 1}
_OF = {"raw": ", without the weights of norms", "folded": ", the weights of norms and LayerScale folded in"}
_MOST_PAIRS = 11
"""Most blocks in the lower rows; a deeper model has evenly spaced ones."""
_LEAST_COLUMNS = 6
_LEAST_RANGE = 2.0
"""Least range of the colours, as a factor either way, lest differences by chance stand out."""


def circuits_plot(run: Run) -> bytes | None:
    """Above, by depth: stable rank of each head's QK and OV, and the scores of all pairs of heads; below, score maps.

    Dashed lines are chance: independent Gaussian factors for the ranks, unrelated directions for the scores, with two
    standard deviations of a pair shaded. Returns PNG bytes; None without circuits.
    """
    blocks = {key.rpartition("/")[2]: one for key, one in run.circuits.blocks.items() if key.startswith("spec/")}
    if not blocks:
        return None
    pairs = [name for name, one in blocks.items() if one.q_HG.size]
    shown = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), _MOST_PAIRS)).round()).astype(int)
    pairs = [pairs[i] for i in shown]
    rows = 1 + bool(pairs)
    figure = new_figure(15.5, 3.9 + 3.2 * bool(pairs))
    upper, *lower = figure.subfigures(rows, 1, squeeze=False, height_ratios=[2.9, 3.4][:rows])[:, 0]
    panels = upper.subplots(1, 4)
    for axes, title, field in (
        (panels[0], "QK: queries and keys", "qk_HK"),
        (panels[1], "OV: values and output", "ov_HK"),
    ):
        tidy(axes, title, "block", "stable rank of a head" if field == "qk_HK" else "")
        _ranks(axes, [(getattr(one, field), one.width) for one in blocks.values()])
    for axes, title, field in ((panels[2], "Q-composition", "q_HG"), (panels[3], "K-composition", "k_HG")):
        tidy(axes, title, "block", "score with heads of the block before" if field == "q_HG" else "")
        _scores(axes, list(blocks.values()), field)
    if pairs:
        _maps(lower[0], {name: blocks[name] for name in pairs})
    text = "a dot is a head, or a pair of heads; line: mean, for scores the root mean square; dashed: chance"
    of = _OF.get(run.circuits.circuits, run.circuits.circuits)
    heading(figure, f"Circuits of heads{of}", f"{text}  ·  {moment(run, run.circuits.update)}")
    return png(figure)


def _ranks(axes: Axes, of_blocks: list[tuple[np.ndarray, int]]) -> None:
    ranks = [[stable_rank(s) for s in s_HK] for s_HK, _ in of_blocks]
    for place, of_heads in enumerate(ranks):
        axes.scatter([place] * len(of_heads), of_heads, color=MODEL, alpha=0.45, s=9, linewidths=0, zorder=2)
    axes.plot(range(len(ranks)), [np.mean(of_heads) for of_heads in ranks], color=MODEL, linewidth=1.6)
    # K = min(n, D) gives D unless a head is wider than the stream, as in no ViT.
    axes.plot(range(len(ranks)), [chance_stable_rank(width, s_HK.shape[1]) for s_HK, width in of_blocks], **_CHANCE)
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _scores(axes: Axes, blocks: list[BlockCircuits], field: str) -> None:
    with_scores = [(place, one) for place, one in enumerate(blocks) if one.q_HG.size]
    if not with_scores:
        axes.text(0.5, 0.5, "no block before", transform=axes.transAxes, ha="center", color=MUTED)
        return
    for place, one in with_scores:
        scores = getattr(one, field).ravel()
        axes.scatter(np.full(scores.size, place), scores, color=MODEL, alpha=0.2, s=7, linewidths=0, zorder=2)
    places = [place for place, _ in with_scores]
    mean = [np.sqrt(np.mean(np.square(getattr(one, field)))) for _, one in with_scores]
    axes.plot(places, mean, color=EMA, linewidth=1.8, marker="o", markersize=3, zorder=3)
    chance = np.array([1 / one.width for _, one in with_scores])
    spread = np.array([np.nanmean(one.spread_HG) for _, one in with_scores])
    low, high = (np.sqrt(np.maximum(chance + side * 2 * spread, 0)) for side in (-1, 1))
    axes.fill_between(places, low, high, color=GRID, zorder=0)
    axes.plot(places, np.sqrt(chance), **_CHANCE)
    axes.set(xlim=(-0.3, len(blocks) - 0.7))
    _whole_numbers(axes)


def _maps(figure: Any, blocks: dict[str, BlockCircuits]) -> None:
    """A square for each pair of heads: its squared score over the chance value."""
    from matplotlib.colors import LogNorm

    grid = figure.subplots(2, max(len(blocks), _LEAST_COLUMNS), squeeze=False)
    for axes in grid[:, len(blocks) :].ravel():
        axes.set_axis_off()
    ratios = {
        (row, column): np.square(scores) * one.width
        for column, one in enumerate(blocks.values())
        for row, scores in enumerate((one.q_HG, one.k_HG))
    }
    values = np.concatenate([ratio.ravel() for ratio in ratios.values()])
    values = np.abs(np.log(values[np.isfinite(values) & (values > 0)]))
    most = max(_LEAST_RANGE, float(np.exp(values.max())) if values.size else 0.0)
    image = None
    for (row, column), ratio_HG in ratios.items():
        axes = grid[row, column]
        name = list(blocks)[column]
        tidy(axes, name if row == 0 else "", "heads before" if row else "", "" if column else f"{'QK'[row]}: heads")
        axes.grid(visible=False)
        heads, before = ratio_HG.shape
        image = axes.imshow(
            ratio_HG,
            cmap="RdBu_r",
            norm=LogNorm(1 / most, most),
            extent=(0.5, before + 0.5, heads + 0.5, 0.5),
        )
        for axis, count in ((axes.xaxis, before), (axes.yaxis, heads)):
            axis.set_ticks(index_ticks(count))
        axes.title.set_color(INK)
    if image is not None:
        bar = figure.colorbar(image, ax=list(grid.ravel()), pad=0.01, fraction=0.02, aspect=28)
        style_bar(bar, "squared score, chance = 1")
        log_ticks(bar.ax.yaxis)
