"""Pictures of stored spectra: `spectra.png` over the updates, `bulk.png` the newest ones, `vectors.png` then and now.

Shape legend: T refreshes, K singular values of a matrix, B matrices of one type (blocks), k vectors recorded at an end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lowrank_vit.report.read import Run, series
from lowrank_vit.report.style import (
    EMA,
    INK,
    MODEL,
    MUTED,
    TRAIN,
    by_type,
    first_middle_last,
    heading,
    index_ticks,
    log_ticks,
    middle,
    moment,
    new_figure,
    png,
    style_bar,
    subtitle,
    tidy,
    update_ticks,
)
from lowrank_vit.spectral.measures.metrics import above_rounding, power_law
from lowrank_vit.spectral.measures.noise import bulk_density, marchenko_pastur
from lowrank_vit.spectral.measures.subspaces import chance_cosines
from lowrank_vit.spectral.solving.extremes import Triplets
from lowrank_vit.spectral.watching.files import StoredVectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


MAX_LINES = 160
DEPTH_COLORS = ("#20639b", "#3caea3", "#d1603d")
DEPTH_NAMES = ("first block", "middle block", "last block")


def spectra_plot(run: Run) -> bytes | None:
    """Fans of sigma_i over the updates for the first, middle and last block of each type, then first against last.

    A line connects the refreshes that know the value. Returns PNG bytes; None if the run has no spectra. With only one
    refresh there is no time axis, so there are no fans.
    """
    updates_T, modules = series(run, "spec")
    if not modules:
        return None
    every_T, known = series(run, "spec", whole=False)
    modules = {name: s_TK for name, s_TK in modules.items() if name in known}
    chosen = {kind: first_middle_last(names) for kind, names in by_type(modules).items()}
    depth_rows = max(len(names) for names in chosen.values())
    fan_rows, has_start = depth_rows if len(every_T) > 1 else 0, len(updates_T) > 1
    figure = new_figure(1.2 + 3.2 * len(chosen), 1.2 + 2.25 * fan_rows + 2.9)
    grid = figure.add_gridspec(fan_rows + 1, len(chosen), height_ratios=[1.0] * fan_rows + [1.25])
    colors = _index_colors()
    fans: list[Axes] = []
    for column, (kind, names) in enumerate(chosen.items()):
        limits = _log_limits([modules[name] for name in names])
        for row, name in enumerate(names if fan_rows else ()):
            axes = figure.add_subplot(grid[row, column])
            tidy(axes, name, "update" if row == len(names) - 1 else "", "singular value σᵢ" if column == 0 else "")
            _fan(axes, every_T, known[name], colors)
            axes.set(yscale="log", ylim=limits, xlim=(every_T[0], every_T[-1]))
            log_ticks(axes.yaxis)
            update_ticks(axes.xaxis)
            fans.append(axes)
        axes = figure.add_subplot(grid[fan_rows, column])
        title = f"{kind}: start and now" if has_start else f"{kind}: {moment(run, updates_T[0])}"
        tidy(axes, title, "index i", "singular value σᵢ" if column == 0 else "")
        _first_and_last(axes, {name: modules[name] for name in names})
        axes.set(yscale="log", ylim=limits)
        log_ticks(axes.yaxis)
        if column == len(chosen) - 1:
            _legend(axes, len(names), with_start=has_start)
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
    is_left_out = np.isnan(s_TK) & ~np.isnan(s_TK[:, :1])  # where only the first values were computed
    lines = [np.column_stack([updates_T, positive[:, i]])[~is_left_out[:, i]] for i in shown[::-1]]  # largest on top
    shade = colors(shown[::-1] / max(k - 1, 1))
    axes.add_collection(LineCollection(lines, colors=shade, linewidths=0.8), autolim=False)


def _first_and_last(axes: Axes, modules: dict[str, np.ndarray]) -> None:
    for s_TK, color in zip(modules.values(), DEPTH_COLORS, strict=False):
        index = np.arange(1, s_TK.shape[1] + 1)
        if len(s_TK) > 1:
            axes.plot(index, np.where(s_TK[0] > 0, s_TK[0], np.nan), color=color, linewidth=1, linestyle=(0, (3, 2)))
        axes.plot(index, np.where(s_TK[-1] > 0, s_TK[-1], np.nan), color=color, linewidth=1.8)


def _log_limits(spectra: list[np.ndarray]) -> tuple[float, float]:
    """Limits for all but the very smallest values: a square random matrix has a few far below the rest."""
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


BINS = 48


def bulk_plot(run: Run) -> bytes | None:
    """First, middle and last block of each type: histogram, Marchenko-Pastur density, edge, outliers, alpha.

    Returns PNG bytes; None without spectra, or where their shapes are not known (`spectra/index.json`).
    """
    updates_T, modules = series(run, "spec")
    modules = {name: s_TK[-1] for name, s_TK in modules.items() if name in run.shapes}
    if not modules:
        return None
    compared = modules | run.scaled
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
            name = names[row]
            _histogram(axes, compared[name], modules[name], run.shapes[name])
    values = "values now (qkv: with Q, K and V each over its own noise)" if run.scaled else "values now"
    text = f"grey: {values}; blue: noise of the same median; red: its edge (99 %), values beyond it are counted"
    heading(figure, "Spectra and the Marchenko-Pastur edge", f"{text}  ·  {moment(run, updates_T[-1])}")
    return png(figure)


def _histogram(axes: Axes, s_K: np.ndarray, own_K: np.ndarray, shape: tuple[int, int]) -> None:
    """The histogram of the values `s_K` to compare with noise; the power law is fitted to the matrix's own `own_K`."""
    axes.grid(visible=False)
    if not np.isfinite(s_K).all() or s_K[0] <= 0:
        axes.text(0.5, 0.5, "not finite or zero", transform=axes.transAxes, ha="center", color=MUTED)
        return
    above, of_above = above_rounding(s_K, shape)
    noise, fit = marchenko_pastur(above, of_above), power_law(above_rounding(own_K, shape)[0])
    right = 1.04 * max(float(s_K[0]), noise.edge if np.isfinite(noise.edge) else 0.0)
    axes.hist(s_K, bins=np.linspace(0, right, BINS + 1).tolist(), density=True, color=TRAIN)
    lines = []
    if np.isfinite(noise.edge):
        x = np.linspace(right / 1000, right, 1000)
        # Scaled by the share of values that are not outliers, so that the curve has the height of the bars.
        share = (above.size - noise.outliers) / s_K.size
        density = share * bulk_density(x, of_above, noise.sigma)
        bars = np.histogram(s_K, bins=np.linspace(0, right, BINS + 1), density=True)[0]
        axes.plot(x, density, color=MODEL, linewidth=1.5)
        axes.axvline(noise.edge, ymax=0.8, color=EMA, linewidth=1.3, linestyle=(0, (3, 2)))  # below the text
        # The law may be high near 0; the curve must not make the bars too small.
        axes.set_ylim(0, 1.35 * max(float(bars.max()), min(float(density.max()), 2 * float(bars.max()))))
        lines.append(f"{noise.outliers:.0f} beyond the edge (bulk KS {noise.ks:.3f})")
    if np.isfinite(fit.alpha):
        lines.append(f"α {fit.alpha:.2f} ± {fit.sigma:.2f} (KS {fit.ks:.2f})")
    axes.set_xlim(0, right)
    axes.text(0.98, 0.95, "\n".join(lines), transform=axes.transAxes, ha="right", va="top", fontsize=8, color=INK)


_KIND = "spec/"


def vectors_plot(run: Run) -> bytes | None:
    """For the middle block of each type: start against now, and the newest stored refresh but one against now.

    A bright diagonal means that vectors have not changed; a bright block off it, that neighbours have changed places or
    mixed; dark columns, that a direction is new. Returns PNG bytes; None with fewer than two stored vector files.
    """
    if len(run.vectors) < 2:
        return None
    now = run.vectors[-1]
    pairs = [(run.vectors[0], now), *([(run.vectors[-2], now)] if len(run.vectors) > 2 else [])]
    shared = [key for key in now.ends if key.startswith(_KIND) and all(_both(old, now, key) for old, _ in pairs)]
    types = by_type(key.removeprefix(_KIND) for key in shared)
    if not types:
        return None
    rows = [(old, side) for old, _ in pairs for side in ("u", "v")]
    figure = new_figure(1.6 + 2.5 * len(types), 1.1 + 2.5 * len(rows))
    grid = figure.subplots(len(rows), len(types), squeeze=False)
    sides: set[int] = set()
    for row, (old, side) in enumerate(rows):
        for column, names in enumerate(types.values()):
            key = _KIND + middle(names)
            before, after = (getattr(one, side) for one in _both(old, now, key))
            sides.add(before.shape[0])
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
                axis.set_ticks(index_ticks(k))
            if column == len(types) - 1:
                style_bar(figure.colorbar(image, ax=list(grid[row]), pad=0.01, fraction=0.03, aspect=18), "|cosine|")
    text = "top vectors, largest singular value first; a bright diagonal: the vectors have not changed"
    chances = dict.fromkeys(f"{chance_cosines(1, n)[0]:.2f}" for n in (max(sides), min(sides)))
    heading(figure, "Singular vectors then and now", f"{text}  ·  by chance a cosine is {' to '.join(chances)}")
    return png(figure)


def vector_pairs(run: Run) -> list[tuple[int, int, str, Triplets, Triplets]]:
    """For the middle matrix of each type: earlier and newest update, its name, and the top vectors then and now."""
    found: list[tuple[int, int, str, Triplets, Triplets]] = []
    for old in run.vectors[:-1]:
        now = run.vectors[-1]
        shared = [key.removeprefix(_KIND) for key in now.ends if key.startswith(_KIND) and _both(old, now, key)]
        for names in by_type(shared).values():
            if both := _both(old, now, _KIND + middle(names)):
                found.append((old.update, now.update, middle(names), *both))
    return found


def _both(old: StoredVectors, now: StoredVectors, key: str) -> tuple[Triplets, Triplets] | tuple[()]:
    """The top vectors of both, including those between the recorded ones if both have them; () if they do not fit."""
    if key not in old.ends:
        return ()
    has_blocks = key in old.blocks and key in now.blocks
    before, after = (one.blocks[key] if has_blocks else one.ends[key][0] for one in (old, now))
    return (before, after) if (before.u.shape, before.v.shape) == (after.u.shape, after.v.shape) else ()
