"""`spectra.png` and `stable_rank.png`: how the singular values of the weights move while the model trains.

Shape legend: T refreshes, K singular values of a matrix, B matrices of one type (blocks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lowrank_vit.report.read_run import Run, series
from lowrank_vit.report.style import INK, MUTED, heading, log_ticks, new_figure, png, tidy, update_ticks
from lowrank_vit.spectral.metrics import effective_rank, stable_rank
from lowrank_vit.spectral.select import module_type

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, LogNorm
    from matplotlib.figure import Figure

MAX_TYPES = 4
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
    chosen = {kind: _first_middle_last(names) for kind, names in _by_type(modules).items()}
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
        title = f"{kind}: start and now" if fan_rows else f"{kind}: at update {updates_T[0]:,}"
        tidy(axes, title, "index i", "singular value σᵢ" if column == 0 else "")
        _first_and_last(axes, {name: modules[name] for name in names})
        axes.set(yscale="log", ylim=limits)
        log_ticks(axes.yaxis)
        if column == len(chosen) - 1:
            _legend(axes, len(names), with_start=bool(fan_rows))
    if fans:
        _index_bar(figure, fans, colors)
    heading(figure, "Singular values of the weights", _subtitle(run, updates_T))
    return png(figure)


def stable_rank_plot(run: Run) -> bytes | None:
    """Heat maps, block by time: the stable rank, and the effective rank as a share of the full rank.

    Returns PNG bytes; None when there are fewer than two refreshes (no time axis).
    """
    updates_T, modules = series(run, "spec")
    if len(updates_T) < 2:
        return None
    types = _by_type(modules)
    figure = new_figure(1.8 + 2.9 * len(types), 6.2)
    # A refresh stands for the time around it, from half-way to the one before to half-way to the next.
    edges = np.concatenate([[updates_T[0]], (updates_T[1:] + updates_T[:-1]) / 2, [updates_T[-1]]])
    measures = (("stable rank", stable_rank), ("effective rank (% of full)", _effective_rank_percent))
    axes_grid = figure.subplots(len(measures), len(types), squeeze=False)
    for row, (label, measure) in enumerate(measures):
        values = {n: [measure(s) for s in modules[n]] for names in types.values() for n in names}
        norm = _log_norm(np.array([value for column in values.values() for value in column]))
        for column, (kind, names) in enumerate(types.items()):
            axes = axes_grid[row, column]
            tidy(axes, kind, "update" if row else "", "block" if column == 0 else "")
            axes.grid(visible=False)
            image = axes.pcolormesh(
                edges, np.arange(len(names) + 1) - 0.5, [values[name] for name in names],
                cmap="viridis", norm=norm,
            )  # fmt: skip
            axes.yaxis.get_major_locator().set_params(integer=True)
            update_ticks(axes.xaxis)
            axes.invert_yaxis()
            if column == len(types) - 1:
                bar = figure.colorbar(image, ax=list(axes_grid[row]), pad=0.01, fraction=0.04, aspect=18)
                log_ticks(bar.ax.yaxis)
                _style_bar(bar, label)
    heading(figure, "Rank of the weights over time", "first block on top  ·  " + _subtitle(run, updates_T))
    return png(figure)


def _by_type(modules: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Module names by type, in model order; of more than MAX_TYPES types those with the most modules."""
    types: dict[str, list[str]] = {}
    for name in modules:
        types.setdefault(module_type(name), []).append(name)
    # A picture with more columns could not be read; the report's table has every type.
    most = sorted(types, key=lambda kind: -len(types[kind]))[:MAX_TYPES]
    return {kind: names for kind, names in types.items() if kind in most}


def _first_middle_last(names: list[str]) -> list[str]:
    return [names[i] for i in dict.fromkeys((0, len(names) // 2, len(names) - 1))]


def _effective_rank_percent(s: np.ndarray) -> float:
    return 100 * effective_rank(s) / s.size


def _log_norm(values: np.ndarray) -> LogNorm:
    """One logarithmic colour scale over all the values; NaN and 0 stay blank."""
    from matplotlib.colors import LogNorm

    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return LogNorm(0.1, 1.0)
    low, high = float(values.min()), float(values.max())
    return LogNorm(low, high if high > low else 1.01 * low)


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
    _style_bar(bar, "")


def _style_bar(bar: Colorbar, label: str) -> None:
    bar.set_label(label, fontsize=9.5, color=INK)
    bar.ax.tick_params(labelsize=8.5, colors=MUTED)
    bar.outline.set_visible(False)


def _subtitle(run: Run, updates_T: np.ndarray) -> str:
    model = f"{run.args['model']}  ·  " if run.args.get("model") else ""
    return f"{model}{len(updates_T)} refreshes, updates {updates_T[0]:,} to {updates_T[-1]:,}"
