"""The picture of an augmentation recipe: its operations by level, and samples as the model sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lowrank_vit.report.style import INK, MUTED, heading, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TILE_IN, _SAMPLE_IN, _SAMPLES_A_ROW = 0.95, 1.55, 6


def preview_plot(
    grid: Mapping[str, np.ndarray],
    levels: Sequence[int],
    samples: np.ndarray,
    captions: Sequence[str],
    recipe: str,
    origin: str,
) -> bytes:
    """A PNG: one row of `grid` for each operation, uint8 (levels, H, W, 3), and below it `samples`, uint8 (B, S, S, 3).

    `captions` has one line for each sample; `recipe` and `origin` say which flags and whose images are shown.
    """
    rows = -(-len(samples) // _SAMPLES_A_ROW)
    heights = [_TILE_IN * len(grid) + 0.3, (_SAMPLE_IN + 0.32) * rows + 0.3]
    figure = new_figure(_SAMPLE_IN * _SAMPLES_A_ROW, sum(heights) + 0.7)
    heading(figure, "Augmentation", f"{recipe or 'no operations'}; {origin}")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = upper.subplots(len(grid), len(levels), squeeze=False)
    for row, (name, images) in zip(panels, grid.items(), strict=True):
        for axes, image, level in zip(row, images, levels, strict=True):
            _show(axes, image)
            if axes in panels[0]:
                axes.set_title(f"level {level}", fontsize=9, color=MUTED)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=INK)
    panels = lower.subplots(rows, _SAMPLES_A_ROW, squeeze=False)
    for n, axes in enumerate(panels.flat):
        if n < len(samples):
            _show(axes, samples[n])
            axes.set_title(captions[n].replace(" + ", "\n+ "), fontsize=7.5, color=INK, parse_math=False)
        else:
            axes.set_axis_off()
    return png(figure, dpi=100)


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="nearest" if len(image) < 96 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
