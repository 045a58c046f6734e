"""The confusion matrix as a picture, with the most frequent mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank_vit.common.terminal import one_line
from lowrank_vit.report.style import INK, MUTED, heading, new_figure, png, style_bar, tidy

MISTAKES = 16
"""How many kinds of mistakes are listed."""
_LABELLED = 20
"""Up to so many classes are named at the axes and have their counts in the cells."""
_CELLS = 680
"""Most cells along an axis of the picture; more would be smaller than a pixel."""
_NAME_LENGTH = 24


class Mistake(NamedTuple):
    """How often one class was taken for another one."""

    true: int
    predicted: int
    times: int
    num_samples: int
    """Samples of the true class."""


def classes_a_cell(num_classes: int) -> int:
    """How many neighbouring classes are drawn as one: 1 up to 680, then as few as leave at most 680."""
    return -(-num_classes // _CELLS)


def confusion_plot(
    counts_BB: np.ndarray, mistakes: Sequence[Mistake], class_names: Sequence[str], subtitle: str
) -> bytes:
    """The picture as PNG bytes; cells show shares of their row.

    Args:
        counts_BB: int (B, B) counts, each cell of `classes_a_cell` classes; rows are true classes.
        mistakes: the most frequent ones, at most `MISTAKES`.
        class_names: one for each class.
        subtitle: the line under the title.
    """
    num_classes = len(class_names)
    together = classes_a_cell(num_classes)
    figure = new_figure(11.5, 6.6)
    picture, listed = figure.subplots(1, 2, width_ratios=[1.75, 1])
    shares_BB = counts_BB / np.maximum(1, counts_BB.sum(1, keepdims=True))
    look: dict[str, Any] = {"cmap": "Blues", "vmin": 0, "vmax": 100, "interpolation": "nearest", "aspect": "auto"}
    end = len(counts_BB) * together - 0.5  # so that ticks are numbers of classes
    shown = picture.imshow(100 * shares_BB, extent=(-0.5, end, end, -0.5), **look)
    style_bar(figure.colorbar(shown, ax=picture, shrink=0.7), f"% of the true class{'es' if together > 1 else ''}")
    of_cell = f"a cell has {together} x {together} of {num_classes:,} classes" if together > 1 else ""
    tidy(picture, of_cell, "taken for", "true class")
    picture.grid(visible=False)
    if num_classes <= _LABELLED:
        names = [_short(name) for name in class_names]
        picture.set_xticks(range(num_classes), names, rotation=45, ha="right", parse_math=False)
        picture.set_yticks(range(num_classes), names, parse_math=False)
        for (row, column), count in np.ndenumerate(counts_BB):
            if count:
                ink = "white" if shares_BB[row, column] > 0.55 else INK
                picture.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=ink)
    listed.axis("off")
    listed.set_title("most frequent mistakes", loc="left", fontsize=10.5, color=INK, fontweight="bold")
    look = {"va": "center", "fontsize": 9, "transform": listed.transAxes}
    for n, one in enumerate(mistakes):
        place = 1 - (n + 0.5) / MISTAKES
        text = f"{_short(class_names[one.true])} taken for {_short(class_names[one.predicted])}"
        listed.text(0.2, place, text, color=INK, parse_math=False, **look)
        counted = f"{one.times:,} ({one.times / one.num_samples:.0%})"
        listed.text(0.17, place, counted, ha="right", color=MUTED, **look)
    if not mistakes:
        listed.text(0, 0.95, "none", color=MUTED, **look)
    heading(figure, "Confusions", subtitle)
    return png(figure)


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
