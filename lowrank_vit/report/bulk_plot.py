"""`bulk.png`: the newest spectra as histograms, with the law of a random matrix and the edge that noise stays below."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lowrank_vit.report.layout import by_type, first_middle_last, moment
from lowrank_vit.report.read_run import Run, series
from lowrank_vit.report.style import EMA, INK, MODEL, MUTED, TRAIN, heading, new_figure, png, tidy
from lowrank_vit.spectral.tails import bulk_density, marchenko_pastur, power_law

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 48


def bulk_plot(run: Run) -> bytes | None:
    """First, middle and last block of each type: histogram, Marchenko-Pastur density, edge, outliers, alpha.

    Returns PNG bytes; None without spectra, or where their shapes are not known (`spectra/index.json`).
    """
    updates_T, modules = series(run, "spec")
    modules = {name: s_TK[-1] for name, s_TK in modules.items() if name in run.shapes}
    if not modules:
        return None
    chosen = {kind: first_middle_last(names) for kind, names in by_type(modules).items()}
    rows = max(len(names) for names in chosen.values())
    figure = new_figure(1.2 + 3.2 * len(chosen), 1.2 + 2.35 * rows)
    grid = figure.subplots(rows, len(chosen), squeeze=False)
    for column, names in enumerate(chosen.values()):
        for row in range(rows):
            axes = grid[row, column]
            if row >= len(names):
                axes.set_axis_off()
                continue
            bottom = row == len(names) - 1
            tidy(axes, names[row], "singular value σᵢ" if bottom else "", "density" if column == 0 else "")
            _histogram(axes, modules[names[row]], run.shapes[names[row]])
    text = "grey: values now; blue: noise of the same median; red: its edge (99 %), what lies beyond is counted"
    heading(figure, "Spectra and the Marchenko-Pastur edge", f"{text}  ·  {moment(run, updates_T[-1])}")
    return png(figure)


def _histogram(axes: Axes, s_K: np.ndarray, shape: tuple[int, int]) -> None:
    axes.grid(visible=False)
    if not np.isfinite(s_K).all() or s_K[0] <= 0:
        axes.text(0.5, 0.5, "not finite or zero", transform=axes.transAxes, ha="center", color=MUTED)
        return
    noise, fit = marchenko_pastur(s_K, shape), power_law(s_K)
    right = 1.04 * max(float(s_K[0]), noise.edge if np.isfinite(noise.edge) else 0.0)
    axes.hist(s_K, bins=np.linspace(0, right, BINS + 1).tolist(), density=True, color=TRAIN)
    lines = []
    if np.isfinite(noise.edge):
        x = np.linspace(right / 1000, right, 1000)
        # Scaled by the share that is not outliers, so that bulk and bars are of one height.
        share = 1 - noise.outliers / s_K.size
        density = share * bulk_density(x, shape, noise.sigma)
        bars = np.histogram(s_K, bins=np.linspace(0, right, BINS + 1), density=True)[0]
        axes.plot(x, density, color=MODEL, linewidth=1.5)
        axes.axvline(noise.edge, color=EMA, linewidth=1.3, linestyle=(0, (3, 2)))
        # Of a square matrix the law has a finite height at 0; of no matrix may the curve push the bars down.
        axes.set_ylim(0, 1.15 * max(float(bars.max()), min(float(density.max()), 2 * float(bars.max()))))
        lines.append(f"{noise.outliers:.0f} beyond the edge")
    if np.isfinite(fit.alpha):
        lines.append(f"α {fit.alpha:.2f} (KS {fit.ks:.2f})")
    axes.set_xlim(0, right)
    axes.text(0.98, 0.95, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=8, color=INK)
