"""`stable_rank.png` and `cosines.png`: heat maps, block by time, of ranks and of how far the subspaces have turned.

Shape legend: T refreshes, B matrices of one type (blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lowrank_vit.report.layout import by_type, style_bar, subtitle
from lowrank_vit.report.read_run import Run, series
from lowrank_vit.report.style import heading, log_ticks, new_figure, png, tidy, update_ticks
from lowrank_vit.spectral.metrics import effective_rank, stable_rank

if TYPE_CHECKING:
    from matplotlib.colors import LogNorm, Normalize

_COSINES = (
    ("cos_u_mean", "with the refresh\nbefore, mean cos u"),
    ("cos_v_mean", "with the refresh\nbefore, mean cos v"),
    ("cos0_u_mean", "with the start,\nmean cos u"),
    ("cos0_v_mean", "with the start,\nmean cos v"),
)


def stable_rank_plot(run: Run) -> bytes | None:
    """The stable rank, and the effective rank as a share of the full rank.

    Returns PNG bytes; None when there are fewer than two refreshes (no time axis).
    """
    updates_T, modules = series(run, "spec")
    if len(updates_T) < 2:
        return None
    measures = (("stable rank", stable_rank), ("effective rank (% of full)", _effective_rank_percent))
    rows = [(label, {n: [measure(s) for s in s_TK] for n, s_TK in modules.items()}) for label, measure in measures]
    return _heat_maps(run, "Rank of the weights over time", updates_T, rows, norms=[_log_norm] * len(rows))


def cosine_plot(run: Run) -> bytes | None:
    """Principal cosines of the recorded top vectors, with the refresh before and with the first one.

    Returns PNG bytes; None where the run has logged none yet, or only one.
    """
    rows: list[tuple[str, dict[str, list[float]]]] = []
    for metric, label in _COSINES:
        found = matrix_scalars(run, "spec", metric)
        if found:
            rows.append((label, {name: values.tolist() for name, values in found.items()}))
    if not rows or len(run.scalars["update"]) < 2:
        return None
    updates_T = run.scalars["update"].astype(np.int64)
    return _heat_maps(run, "Where the top subspaces point", updates_T, rows, norms=[_unit_norm] * len(rows))


def matrix_scalars(run: Run, kind: str, metric: str) -> dict[str, np.ndarray]:
    """Matrix to one logged scalar over the refreshes (T,), in model order; without the aggregates."""
    prefix, ending = f"{kind}/", f"/{metric}"
    found = {
        key.removeprefix(prefix).removesuffix(ending): values
        for key, values in run.scalars.items()
        if key.startswith(prefix) and key.endswith(ending)
    }
    return {name: values for name, values in found.items() if not name.startswith(("type/", "depth/"))}


def _heat_maps(
    run: Run,
    title: str,
    updates_T: np.ndarray,
    rows: Sequence[tuple[str, Mapping[str, list[float]]]],
    norms: Sequence[Callable[[np.ndarray], Normalize]],
) -> bytes:
    types = by_type(rows[0][1])
    figure = new_figure(1.8 + 2.9 * len(types), 1.1 + 2.45 * len(rows))
    # A refresh stands for the time around it, from half-way to the one before to half-way to the next.
    edges = np.concatenate([[updates_T[0]], (updates_T[1:] + updates_T[:-1]) / 2, [updates_T[-1]]])
    axes_grid = figure.subplots(len(rows), len(types), squeeze=False)
    for row, ((label, values), norm_of) in enumerate(zip(rows, norms, strict=True)):
        norm = norm_of(np.array([value for names in types.values() for n in names for value in values[n]]))
        for column, (kind, names) in enumerate(types.items()):
            axes = axes_grid[row, column]
            last = row == len(rows) - 1
            tidy(axes, kind if row == 0 else "", "update" if last else "", "block" if column == 0 else "")
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
                if norm_of is _log_norm:
                    log_ticks(bar.ax.yaxis)
                style_bar(bar, label)
    heading(figure, title, "first block on top  ·  " + subtitle(run, updates_T))
    return png(figure)


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


def _unit_norm(values: np.ndarray) -> Normalize:
    """From the smallest cosine to 1."""
    from matplotlib.colors import Normalize

    values = values[np.isfinite(values)]
    low = float(values.min()) if values.size else 0.0
    return Normalize(min(low, 0.999), 1.0)
