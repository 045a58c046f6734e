"""`spectra.png`: how the singular values of the weights move while the model trains.

Shape legend: T refreshes, K singular values of a matrix, B matrices of one type (blocks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lowrank_vit.report.layout import by_type, first_middle_last, moment, style_bar, subtitle
from lowrank_vit.report.read_run import Run, series
from lowrank_vit.report.style import MUTED, heading, log_ticks, new_figure, png, tidy, update_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

MAX_LINES = 160
DEPTH_COLORS = ("#20639b", "#3caea3", "#d1603d")
DEPTH_NAMES = ("first block", "middle block", "last block")


def spectra_plot(run: Run) -> bytes | None:
    """Fans of sigma_i over the updates for the first, middle and last block of each type, then first against last.

    Returns PNG bytes; None when the run has no spectra. With one refresh only there is no time axis, so no fans.
    """
    updates_T, modules = series(run, "spec")
    if not modules:
        return None
    chosen = {kind: first_middle_last(names) for kind, names in by_type(modules).items()}
    depth_rows = max(len(names) for names in chosen.values())
    fan_rows = depth_rows if len(updates_T) > 1 else 0
    figure = new_figure(1.2 + 3.2 * len(chosen), 1.2 + 2.25 * fan_rows + 2.9)
    grid = figure.add_gridspec(fan_rows + 1, len(chosen), height_ratios=[1.0] * fan_rows + [1.25])
    colors = _index_colors()
    fans: list[Axes] = []
    for column, (kind, names) in enumerate(chosen.items()):
        limits = _log_limits([modules[name] for name in names])
        for row, name in enumerate(names if fan_rows else ()):
            axes = figure.add_subplot(grid[row, column])
            tidy(axes, name, "update" if row == len(names) - 1 else "", "singular value σᵢ" if column == 0 else "")
            _fan(axes, updates_T, modules[name], colors)
            axes.set(yscale="log", ylim=limits, xlim=(updates_T[0], updates_T[-1]))
            log_ticks(axes.yaxis)
            update_ticks(axes.xaxis)
            fans.append(axes)
        axes = figure.add_subplot(grid[fan_rows, column])
        title = f"{kind}: start and now" if fan_rows else f"{kind}: {moment(run, updates_T[0])}"
        tidy(axes, title, "index i", "singular value σᵢ" if column == 0 else "")
        _first_and_last(axes, {name: modules[name] for name in names})
        axes.set(yscale="log", ylim=limits)
        log_ticks(axes.yaxis)
        if column == len(chosen) - 1:
            _legend(axes, len(names), with_start=bool(fan_rows))
    if fans:
        _index_bar(figure, fans, colors)
    heading(figure, "Singular values of the weights", subtitle(run, updates_T))
    return png(figure)


def _index_colors() -> Colormap:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    # The palest end of viridis is hard to see on white.
    return ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.92, 256)))


def _fan(axes: Axes, updates_T: np.ndarray, s_TK: np.ndarray, colors: Colormap) -> None:
    from matplotlib.collections import LineCollection

    k = s_TK.shape[1]
    shown = np.unique(np.linspace(0, k - 1, min(k, MAX_LINES)).round().astype(int))
    positive = np.where(s_TK > 0, s_TK, np.nan)
    lines = [np.column_stack([updates_T, positive[:, i]]) for i in shown[::-1]]  # the largest on top
    shade = colors(shown[::-1] / max(k - 1, 1))
    axes.add_collection(LineCollection(lines, colors=shade, linewidths=0.8), autolim=False)


def _first_and_last(axes: Axes, modules: dict[str, np.ndarray]) -> None:
    for s_TK, color in zip(modules.values(), DEPTH_COLORS, strict=False):
        index = np.arange(1, s_TK.shape[1] + 1)
        if len(s_TK) > 1:
            axes.plot(index, np.where(s_TK[0] > 0, s_TK[0], np.nan), color=color, linewidth=1, linestyle=(0, (3, 2)))
        axes.plot(index, np.where(s_TK[-1] > 0, s_TK[-1], np.nan), color=color, linewidth=1.8)


def _log_limits(spectra: list[np.ndarray]) -> tuple[float, float]:
    """Room for all but the very smallest values: a square random matrix has a few far below the rest."""
    values = np.concatenate([s_TK.ravel() for s_TK in spectra])
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return 0.1, 1.0
    return max(float(np.quantile(values, 0.01)), float(values.max()) * 1e-4) / 1.15, float(values.max()) * 1.15


def _legend(axes: Axes, depths: int, *, with_start: bool) -> None:
    from matplotlib.lines import Line2D

    names = {1: ("block",), 2: (DEPTH_NAMES[0], DEPTH_NAMES[2])}.get(depths, DEPTH_NAMES)
    handles = [Line2D([], [], color=color, linewidth=1.8) for color in DEPTH_COLORS[:depths]]
    labels = list(names)
    if with_start:
        handles += [Line2D([], [], color=MUTED, linewidth=1, linestyle=(0, (3, 2)))]
        labels += ["at the start"]
    # Spectra descend, so the upper right corner is always free.
    axes.legend(handles, labels, fontsize=8, frameon=False, labelcolor=MUTED, loc="upper right")


def _index_bar(figure: Figure, fans: list[Axes], colors: Colormap) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colors), ax=fans, pad=0.01, fraction=0.025, aspect=40)
    bar.set_ticks([0, 1], labels=["$\\sigma_1$\nlargest", "$\\sigma_K$\nsmallest"])
    bar.ax.invert_yaxis()
    style_bar(bar, "")
