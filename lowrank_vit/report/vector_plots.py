"""`vectors.png`: |U^T U'| and |V^T V'| of the recorded vectors between two moments, as maps.

Shape legend: k recorded vectors of one end; rows of a map are the earlier ones, columns the later ones.
"""

from __future__ import annotations

import numpy as np

from lowrank_vit.report.layout import by_type, middle, style_bar
from lowrank_vit.report.read_run import Run
from lowrank_vit.report.style import heading, new_figure, png, tidy
from lowrank_vit.spectral.store import StoredVectors

_KIND = "spec/"


def vectors_plot(run: Run) -> bytes | None:
    """For the middle block of each type: start against now, and the newest stored refresh but one against now.

    A bright diagonal says that each vector is still itself; a bright block off it, that neighbours have changed places
    or mixed; dark columns, that a direction is new. Returns PNG bytes; None with fewer than two stored vector files.
    """
    if len(run.vectors) < 2:
        return None
    now = run.vectors[-1]
    pairs = [(run.vectors[0], now), *([(run.vectors[-2], now)] if len(run.vectors) > 2 else [])]
    shared = [key for key in now.ends if key.startswith(_KIND) and all(_fit(old, now, key) for old, _ in pairs)]
    types = by_type(key.removeprefix(_KIND) for key in shared)
    if not types:
        return None
    rows = [(old, side) for old, _ in pairs for side in ("u", "v")]
    figure = new_figure(1.6 + 2.5 * len(types), 1.1 + 2.5 * len(rows))
    grid = figure.subplots(len(rows), len(types), squeeze=False)
    for row, (old, side) in enumerate(rows):
        for column, names in enumerate(types.values()):
            key = _KIND + middle(names)
            before, after = (getattr(moment.ends[key][0], side) for moment in (old, now))
            axes = grid[row, column]
            letter = side.upper()
            label = f"|{letter}ᵀ{letter}′|, from update {old.update:,}" if column == 0 else ""
            tidy(
                axes,
                middle(names) if row == 0 else "",
                f"at update {now.update:,}" if row == len(rows) - 1 else "",
                label,
            )
            axes.grid(visible=False)
            k = before.shape[1]
            image = axes.imshow(
                np.abs(before.T @ after), vmin=0, vmax=1, cmap="magma", extent=(0.5, k + 0.5, k + 0.5, 0.5)
            )
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_ticks([1, k] if k > 1 else [1])
            if column == len(types) - 1:
                style_bar(figure.colorbar(image, ax=list(grid[row]), pad=0.01, fraction=0.03, aspect=18), "|cosine|")
    text = "recorded top vectors, largest singular value first; a bright diagonal: each is still itself"
    heading(figure, "Singular vectors then and now", text)
    return png(figure)


def _fit(old: StoredVectors, now: StoredVectors, key: str) -> bool:
    return key in old.ends and all(
        getattr(old.ends[key][0], side).shape == getattr(now.ends[key][0], side).shape for side in ("u", "v")
    )
