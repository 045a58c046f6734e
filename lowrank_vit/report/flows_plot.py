"""Picture of a model's flows, `flows.png`: how the tokens of each block are spread, and what attention looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_vit.report.read import Run
from lowrank_vit.report.style import (
    EMA,
    MODEL,
    MUTED,
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

_PANELS = (
    ("effective_rank", "effective rank of tokens", "exp(entropy of σ / Σ σ)", "rank_limit", "no more is possible"),
    ("stable_rank", "stable rank of tokens", "Σ σ² / σ₁²", "", ""),
    ("cosine", "mean cosine of tokens", "1: all alike", "", "isotropic: 0"),
    ("cosine_image", "mean cosine within an image", "1: all alike", "", "isotropic: 0"),
    ("entropy", "entropy of attention", "nats, mean of the heads", "entropy_uniform", "uniform: ln T"),
)
"""Metric, title and label; what the level is logged as, or 0 where it has words alone."""
_LEVEL: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (3, 2))}


def flows_plot(run: Run) -> bytes | None:
    """Each block over the validations, where there are two or more, and the newest numbers by depth, with the EMA's.

    Levels are dashed: what directions without structure, or uniform attention, would give, and the greatest rank that
    is possible. Returns PNG bytes; None where the run has looked at no flows.
    """
    found = {(kind, metric): _by_block(run, kind, metric) for kind in ("spec", "spec_ema") for metric, *_ in _PANELS}
    panels = [panel for panel in _PANELS if found["spec", panel[0]]]
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
        levels = _by_block(run, "spec", level) if level else dict.fromkeys(of_model, np.zeros(len(updates_T)))
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
    heading(figure, "What flows through the blocks", of_images + subtitle(run, updates_T, "validations"))
    return png(figure)


def _by_block(run: Run, kind: str, metric: str) -> dict[str, np.ndarray]:
    """Block to one number over the validations (T,), in model order; those without any finite one are left out."""
    prefix, ending = f"{kind}/flow/", f"/{metric}"
    return {
        key.removeprefix(prefix).removesuffix(ending): values_T
        for key, values_T in run.flows.items()
        if key.startswith(prefix) and key.endswith(ending) and np.isfinite(values_T).any()
    }


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, labelcolor=MUTED)
