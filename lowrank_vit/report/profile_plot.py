"""`profile.png`: the newest numbers of every matrix over its depth; what a single analysis has to show."""

from __future__ import annotations

import numpy as np

from lowrank_vit.report.heat_maps import matrix_scalars
from lowrank_vit.report.layout import by_type, subtitle
from lowrank_vit.report.read_run import Run
from lowrank_vit.report.style import MUTED, heading, new_figure, png, tidy

_PANELS = (
    ("sigma_max", "largest singular value", "σ₁"),
    ("stable_rank", "stable rank", "Σ σ² / σ₁²"),
    ("effective_rank", "effective rank", "exp(entropy of σ / Σ σ)"),
    ("alpha", "power law of the tail", "exponent α"),
    ("mp_outliers", "values beyond the noise edge", "count"),
    ("cos0_u_mean", "left vectors against the start", "mean cosine"),
)
_COLORS = ("#20639b", "#d1603d", "#3caea3", "#8a6fb0", "#b08a2e", "#7a8793")


def profile_plot(run: Run) -> bytes | None:
    """A panel for each number that there is, a line for each type. Returns PNG bytes; None without any."""
    panels = [(title, label, matrix_scalars(run, "spec", metric)) for metric, title, label in _PANELS]
    panels = [panel for panel in panels if any(np.isfinite(values[-1]) for values in panel[2].values())]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(0.6 + 3.7 * columns, 1.1 + 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, label, found) in zip(grid.flat, panels, strict=False):
        tidy(axes, title, "block", label)
        for color, (kind, names) in zip(_COLORS, by_type(found).items(), strict=False):
            values = [found[name][-1] for name in names]
            axes.plot(range(len(names)), values, color=color, marker="o", markersize=3, linewidth=1.4, label=kind)
        axes.xaxis.get_major_locator().set_params(integer=True)
    heading(figure, "Every matrix by depth", subtitle(run, run.scalars["update"].astype(np.int64)[-1:]))
    # One legend above all panels: inside of one it would stand on lines, which may be anywhere.
    lines = grid.flat[0].get_lines()
    figure.legend(
        handles=lines, loc="outside upper right", ncols=min(3, len(lines)), frameon=False, fontsize=9, labelcolor=MUTED
    )
    return png(figure)
