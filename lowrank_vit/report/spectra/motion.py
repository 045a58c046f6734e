"""Pictures of tokens and attention of each block, `flows.png`, and of how the weights move, `updates.png`.

Shape legend: T moments, which are validations in `flows.png` and refreshes in `updates.png`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_vit.report.language import msg
from lowrank_vit.report.read import Run
from lowrank_vit.report.spectra.metrics import matrix_scalars
from lowrank_vit.report.style import (
    EMA,
    MODEL,
    MUTED,
    by_type,
    heading,
    new_figure,
    png,
    style_bar,
    subtitle,
    tidy,
    update_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOW_PANELS = (
    (
        "effective_rank",
        msg("effective rank of tokens"),
        msg("exp(entropy of σ / Σ σ)"),
        "rank_limit",
        msg("greatest possible"),
    ),
    ("stable_rank", msg("stable rank of tokens"), "Σ σ² / σ₁²", "rank_limit", msg("greatest possible")),
    ("cosine", msg("mean cosine of tokens"), msg("1: all alike"), "", msg("isotropic: 0")),
    ("cosine_image", msg("mean cosine within an image"), msg("1: all alike"), "", msg("isotropic: 0")),
    ("entropy", msg("entropy of attention"), msg("nats, mean of the heads"), "entropy_uniform", msg("uniform: ln T")),
)
"""Metric, title, label, the metric of a reference level (empty: the level is 0), and the level's name."""
_FAR = 2.0
"""A level so many times above all values is written beside the axis: drawn as a line it would flatten the curves."""
_LEVEL: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (3, 2))}


def flows_plot(run: Run) -> bytes | None:
    """Each block over the validations, if there are two or more, and the newest numbers by depth, with the EMA's.

    Dashed levels are the values of directions without structure or of uniform attention, and the greatest possible
    rank. Returns PNG bytes; None if the run has measured no flows.
    """
    found = {(kind, metric): by_block(run, kind, metric) for kind in ("spec", "spec_ema") for metric, *_ in FLOW_PANELS}
    panels = [panel for panel in FLOW_PANELS if found["spec", panel[0]]]
    if not panels:
        return None
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    updates_T = run.flows["update"].astype(np.int64)
    rows = 1 + (len(updates_T) > 1)
    figure = new_figure(1.4 + 3.1 * len(panels), 1.1 + 2.7 * rows)
    grid = figure.subplots(rows, len(panels), squeeze=False)
    colors, blocks = colormaps["viridis"], list(found["spec", panels[0][0]])
    for column, (metric, title, label, level, of_level) in enumerate(panels):
        of_model = found["spec", metric]
        levels, far = levels_of(run, metric, level, len(updates_T))
        if not levels:
            label, of_level = f"{label}\n{of_level}: {far:.4g}" if far else label, ""
        if rows > 1:
            axes = grid[0, column]
            tidy(axes, title, "update", label)
            for place, values_T in enumerate(of_model.values()):
                shade = colors(0.92 * place / max(len(of_model) - 1, 1))
                axes.plot(updates_T, values_T, color=shade, linewidth=1.3, marker="o", markersize=2.5)
            if of_level and len(set(map(tuple, levels.values()))) == 1:
                axes.plot(updates_T, next(iter(levels.values())), **_LEVEL)
            update_ticks(axes.xaxis)
        axes = grid[-1, column]
        tidy(axes, "" if rows > 1 else title, "block", label)
        for kind, color, name in (("spec", MODEL, "model"), ("spec_ema", EMA, "EMA")):
            if newest := [values_T[-1] for values_T in found[kind, metric].values()]:
                axes.plot(range(len(newest)), newest, color=color, linewidth=1.6, marker="o", markersize=3, label=name)
        if of_level:
            axes.plot(range(len(levels)), [one[-1] for one in levels.values()], **_LEVEL, label=of_level)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes)
    if rows > 1:
        bar = figure.colorbar(
            ScalarMappable(Normalize(0, 1), colors), ax=list(grid[0]), pad=0.01, fraction=0.025, aspect=20
        )
        bar.set_ticks([0, 0.92], labels=[blocks[0], blocks[-1]])
        bar.ax.set_ylim(0, 0.92)
        bar.ax.invert_yaxis()
        style_bar(bar, "")
    images = run.flows.get("spec/flow/images", np.array([np.nan]))[-1]
    of_images = f"{images:,.0f} images of the validation set  ·  " if np.isfinite(images) else ""
    heading(figure, "Tokens and attention of the blocks", of_images + subtitle(run, updates_T, "validations"))
    return png(figure)


def levels_of(run: Run, metric: str, level: str, times: int) -> tuple[dict[str, np.ndarray], float]:
    """Block to a panel's level over the validations (T,), 0 if not logged; or no levels, and one far above all."""
    shown = [value for kind in ("spec", "spec_ema") for of in by_block(run, kind, metric).values() for value in of]
    if not level:
        return dict.fromkeys(by_block(run, "spec", metric), np.zeros(times)), 0.0
    levels = by_block(run, "spec", level)
    least = min((float(np.nanmin(of)) for of in levels.values()), default=0.0)
    return ({}, least) if shown and least > _FAR * float(np.nanmax(shown)) else (levels, 0.0)


def by_block(run: Run, kind: str, metric: str) -> dict[str, np.ndarray]:
    """Block to one metric over the validations (T,), in model order; blocks without a finite value are left out."""
    prefix, ending = f"{kind}/flow/", f"/{metric}"
    return {
        key.removeprefix(prefix).removesuffix(ending): values_T
        for key, values_T in run.flows.items()
        if key.startswith(prefix) and key.endswith(ending) and np.isfinite(values_T).any()
    }


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, labelcolor=MUTED)


_MOVES = (("dw", MODEL, "change since the refresh before"), ("opt", EMA, "optimizer's direction"))
_OF_MOVES = (
    ("effective_rank", "effective rank", ""),
    ("stable_rank", "stable rank", ""),
    ("top_u", "share in the block's\nleft vectors", "chance_u"),
    ("top_v", "share in the block's\nright vectors", "chance_v"),
    ("top", "share in both", "chance"),
)


def updates_plot(run: Run) -> bytes | None:
    """How the weights of each type move: ranks of changes and of optimizer's directions, and shares in the top block.

    Lines are means over the blocks, bands go from the least to the greatest; chance is dashed. Returns PNG bytes; None
    if the run has logged no updates, or fewer than two refreshes.
    """
    found = {(move, m): matrix_scalars(run, "spec", f"{move}_{m}") for move, *_ in _MOVES for m, *_ in _OF_MOVES}
    types = by_type(dict.fromkeys(name for of in found.values() for name in of))
    if not types or len(run.scalars["update"]) < 2:
        return None
    updates_T = run.scalars["update"].astype(np.int64)
    figure = new_figure(1.2 + 3.0 * len(types), 1.1 + 2.1 * len(_OF_MOVES))
    grid = figure.subplots(len(_OF_MOVES), len(types), squeeze=False)
    for row, (metric, label, level) in enumerate(_OF_MOVES):
        for column, (kind, names) in enumerate(types.items()):
            axes, is_last = grid[row, column], row == len(_OF_MOVES) - 1
            tidy(axes, kind if row == 0 else "", "update" if is_last else "", label if column == 0 else "")
            for move, color, in_words in _MOVES:
                lines = np.array([found[move, metric][name] for name in names if name in found[move, metric]])
                there = np.isfinite(lines).any(axis=0) if lines.size else np.zeros(0, bool)
                if there.any():
                    x, shown = updates_T[there], lines[:, there]
                    axes.fill_between(x, np.nanmin(shown, 0), np.nanmax(shown, 0), color=color, alpha=0.15, linewidth=0)
                    axes.plot(
                        x, np.nanmean(shown, 0), color=color, linewidth=1.6, marker="o", markersize=2, label=in_words
                    )
            if level:
                levels = [matrix_scalars(run, "spec", f"{move}_{level}") for move, *_ in _MOVES]
                chances = [of[name] for of in levels for name in names if name in of]
                if np.isfinite(chances).any():
                    axes.axhline(float(np.nanmean(chances)), **_LEVEL, label="chance")
                axes.set_ylim(bottom=0)
            update_ticks(axes.xaxis)
    handles, labels = grid[2, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9, labelcolor=MUTED)
    heading(figure, "How the weights move", "band: least and greatest of the blocks  ·  " + subtitle(run, updates_T))
    return png(figure)
