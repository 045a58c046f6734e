"""`profile.png`: the newest numbers of every matrix over its depth; what a single analysis has to show."""

from __future__ import annotations

import numpy as np

from lowrank_vit.report.heat_maps import matrix_scalars
from lowrank_vit.report.layout import by_type, subtitle
from lowrank_vit.report.read_run import Run
from lowrank_vit.report.style import MUTED, heading, new_figure, png, tidy

_PANELS = (
    ("sigma_max", "largest singular value σ₁"),
    ("stable_rank", "stable rank"),
    ("effective_rank", "effective rank"),
    ("alpha", "power-law α"),
    ("mp_outliers", "values beyond the noise edge"),
    ("cos0_u_mean", "mean cos u with the start"),
)
_COLORS = ("#20639b", "#d1603d", "#3caea3", "#8a6fb0", "#b08a2e", "#7a8793")


def profile_plot(run: Run) -> bytes | None:
    """A panel for each number that there is, a line for each type. Returns PNG bytes; None without any."""
    panels = [(metric, title, matrix_scalars(run, "spec", metric)) for metric, title in _PANELS]
    panels = [panel for panel in panels if any(np.isfinite(values[-1]) for values in panel[2].values())]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(0.6 + 3.7 * columns, 1.1 + 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for n, (axes, (_, title, found)) in enumerate(zip(grid.flat, panels, strict=False)):
        tidy(axes, title, "block" if n >= len(panels) - columns else "")
        for color, (kind, names) in zip(_COLORS, by_type(found).items(), strict=False):
            values = [found[name][-1] for name in names]
            axes.plot(range(len(names)), values, color=color, marker="o", markersize=3, linewidth=1.4, label=kind)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if n == 0:
            axes.legend(fontsize=8, frameon=False, labelcolor=MUTED)
    heading(figure, "Every matrix by depth", subtitle(run, run.scalars["update"].astype(np.int64)[-1:]))
    return png(figure)
