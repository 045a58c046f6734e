"""`ema.png`: the spectra of the model beside those of its moving average."""

from __future__ import annotations

import numpy as np

from lowrank_vit.report.heat_maps import matrix_scalars
from lowrank_vit.report.layout import by_type, subtitle
from lowrank_vit.report.read_run import Run
from lowrank_vit.report.style import EMA, MODEL, MUTED, heading, new_figure, png, tidy, update_ticks

_ROWS = (("sigma_max", "mean σ₁"), ("stable_rank", "mean stable rank"), ("ema_cos_u_mean", "mean cos u, model to EMA"))


def ema_plot(run: Run) -> bytes | None:
    """Means over the blocks of each type over time: of the model, of its EMA, and the cosine between the two.

    Returns PNG bytes; None without an EMA, or with fewer than two refreshes in the log.
    """
    found = {(kind, m): matrix_scalars(run, kind, m) for kind in ("spec", "spec_ema") for m, _ in _ROWS}
    types = by_type(found["spec_ema", "sigma_max"])
    if not types or len(run.scalars["update"]) < 2:
        return None
    updates_T = run.scalars["update"].astype(np.int64)
    figure = new_figure(1.2 + 3.0 * len(types), 1.1 + 2.2 * len(_ROWS))
    grid = figure.subplots(len(_ROWS), len(types), squeeze=False)
    for row, (metric, label) in enumerate(_ROWS):
        for column, (kind, names) in enumerate(types.items()):
            axes = grid[row, column]
            bottom = row == len(_ROWS) - 1
            tidy(axes, kind if row == 0 else "", "update" if bottom else "", label if column == 0 else "")
            for source, color, name in (("spec", MODEL, "model"), ("spec_ema", EMA, "EMA")):
                values = found[source, metric]
                lines = [values[n] for n in names if n in values]
                if lines:
                    label_ = "cosine" if metric.startswith("ema_cos") else name
                    axes.plot(updates_T, np.mean(lines, axis=0), color=color, linewidth=1.7, label=label_)
            if metric.startswith("ema_cos"):
                chance = matrix_scalars(run, "spec", "chance_u").get(names[0])
                if chance is not None:
                    axes.axhline(chance[-1], color=MUTED, linewidth=1, linestyle=(0, (3, 2)), label="chance")
                axes.set_ylim(0, 1.02)
            update_ticks(axes.xaxis)
            if column == len(types) - 1 and axes.get_lines():
                axes.legend(fontsize=8, frameon=False, labelcolor=MUTED)
    heading(figure, "Model and moving average", subtitle(run, updates_T))
    return png(figure)
