"""Which classes are taken for which: the confusion matrix as a picture, and the most frequent mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_vit.common.terminal import one_line
from lowrank_vit.report.style import INK, MUTED, heading, new_figure, png, style_bar, tidy

_LABELLED = 20
"""Up to so many classes have their names at the axes, and their counts in the cells."""
_NAMED_PAIRS = 16
_NAME_LENGTH = 24


@dataclass(frozen=True)
class Pair:
    """How often one class was taken for another one."""

    true: str
    predicted: str
    count: int
    share: float
    """Of the samples of the true class, 0-1."""


def most_confused(confusion_CC: np.ndarray, class_names: list[str], count: int = _NAMED_PAIRS) -> list[Pair]:
    """The most frequent mistakes, most frequent first; int (C, C), rows are true classes."""
    wrong = confusion_CC.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [(int(n) // len(wrong), int(n) % len(wrong)) for n in order]
    totals = confusion_CC.sum(1)
    return [
        Pair(class_names[a], class_names[b], int(wrong[a, b]), float(wrong[a, b] / totals[a]))
        for a, b in pairs
        if wrong[a, b]
    ]


def confusion_plot(confusion_CC: np.ndarray, class_names: list[str], subtitle: str) -> bytes:
    """PNG bytes; int (C, C) counts, rows are true classes. Cells show shares of their row."""
    num_classes = len(class_names)
    figure = new_figure(11.5, 6.6)
    picture, listed = figure.subplots(1, 2, width_ratios=[1.75, 1])
    shares_CC = confusion_CC / np.maximum(1, confusion_CC.sum(1, keepdims=True))
    shown = picture.imshow(100 * shares_CC, cmap="Blues", vmin=0, vmax=100, interpolation="nearest", aspect="auto")
    style_bar(figure.colorbar(shown, ax=picture, shrink=0.7), "% of the true class")
    tidy(picture, "", "taken for", "true class")
    picture.grid(visible=False)
    if num_classes <= _LABELLED:
        names = [_short(name) for name in class_names]
        picture.set_xticks(range(num_classes), names, rotation=45, ha="right", parse_math=False)
        picture.set_yticks(range(num_classes), names, parse_math=False)
        for (row, column), count in np.ndenumerate(confusion_CC):
            if count:
                ink = "white" if shares_CC[row, column] > 0.55 else INK
                picture.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=ink)
    listed.axis("off")
    listed.set_title("most frequent mistakes", loc="left", fontsize=10.5, color=INK, fontweight="bold")
    pairs = most_confused(confusion_CC, class_names)
    for n, pair in enumerate(pairs):
        place = 1 - (n + 0.5) / _NAMED_PAIRS
        text = f"{_short(pair.true)} taken for {_short(pair.predicted)}"
        look: dict[str, Any] = {"va": "center", "fontsize": 9, "transform": listed.transAxes}
        listed.text(0.2, place, text, color=INK, parse_math=False, **look)
        counted = f"{pair.count:,} ({pair.share:.0%})"
        listed.text(0.17, place, counted, ha="right", color=MUTED, **look)
    if not pairs:
        listed.text(0, 0.95, "none", va="center", fontsize=9, color=MUTED, transform=listed.transAxes)
    heading(figure, "Confusions", subtitle)
    return png(figure)


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
