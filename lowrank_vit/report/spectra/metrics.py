"""Pictures of the metrics that are logged for every matrix.

`stable_rank.png` and `cosines.png`: heat maps, block by time; `ema.png`: the model and its moving average;
`profile.png`: the newest numbers over the depth. Shape legend: T refreshes, B matrices of one type (blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_vit.report.read import Run, series
from lowrank_vit.report.style import (
    EMA,
    MODEL,
    MUTED,
    TRAIN,
    by_type,
    heading,
    log_ticks,
    new_figure,
    png,
    style_bar,
    subtitle,
    tidy,
    type_look,
    update_ticks,
)
from lowrank_vit.spectral.measures.metrics import effective_rank, stable_rank
from lowrank_vit.spectral.measures.subspaces import chance_cosines

if TYPE_CHECKING:
    from matplotlib.colors import LogNorm, Normalize


_OVERLAPS = (
    ("block_cos_u_overlap", "cos_u_mean", "with the refresh before,\n{} u"),
    ("block_cos_v_overlap", "cos_v_mean", "with the refresh before,\n{} v"),
    ("block_cos0_u_overlap", "cos0_u_mean", "with the start,\n{} u"),
    ("block_cos0_v_overlap", "cos0_v_mean", "with the start,\n{} v"),
)
"""Metric, the metric that runs of earlier versions logged instead, and the row's label."""
_OF_CHANCE: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (3, 2))}
_BOUNDS = (0.1, 10.0)
"""Range of the colours of the bound on a turn."""


def stable_rank_plot(run: Run) -> bytes | None:
    """The stable rank, and the effective rank as a share of the full rank.

    Returns PNG bytes; None with fewer than two refreshes (no time axis).
    """
    updates_T, modules = series(run, "spec")
    if len(updates_T) < 2:
        return None
    measures = (("stable rank", stable_rank), ("effective rank (% of full)", _effective_rank_percent))
    rows = [(label, {n: [measure(s) for s in s_TK] for n, s_TK in modules.items()}) for label, measure in measures]
    return _heat_maps(run, "Rank of the weights over time", updates_T, rows, norms=[_log_norm] * len(rows))


def cosine_plot(run: Run) -> bytes | None:
    """Overlap of the top subspaces with those of the refresh before and of the first one, with energy and bound.

    A run that has logged no blocks has the mean cosines of the recorded vectors instead. Returns PNG bytes; None with
    fewer than two logged refreshes.
    """
    rows: list[tuple[str, dict[str, list[float]]]] = []
    norms: list[Callable[[np.ndarray], Normalize]] = []

    def add(label: str, found: dict[str, np.ndarray], norm: Callable[[np.ndarray], Normalize]) -> None:
        if found:
            rows.append((label, {name: values.tolist() for name, values in found.items()}))
            norms.append(norm)

    for metric, earlier, label in _OVERLAPS:
        if found := matrix_scalars(run, "spec", metric):
            add(label.format("overlap") + " (0: chance)", found, _unit_norm)
        elif found := matrix_scalars(run, "spec", earlier):
            chances = [_chance_of_mean(run, name, earlier.split("_")[1]) for name in found]
            add(label.format("mean cos") + _range_of_chance(chances), found, _unit_norm)
        if metric == "block_cos_v_overlap":
            energy, bound = (matrix_scalars(run, "spec", one) for one in ("block_energy", "turn_bound"))
            add("energy that the earlier\nblock still holds", energy, _unit_norm)
            add("bound on the sine of its\nturn (grey: none)", bound, _bound_norm)
    if not rows or len(run.scalars["update"]) < 2:
        return None
    updates_T = run.scalars["update"].astype(np.int64)
    return _heat_maps(run, "Where the top subspaces point", updates_T, rows, norms=norms)


def _chance_of_mean(run: Run, name: str, side: str) -> float:
    """The chance value of the mean cosine of the recorded top vectors; NaN where too little is known."""
    level, shape = matrix_scalars(run, "spec", f"chance_{side}").get(name), run.shapes.get(name)
    if level is None or shape is None or not np.isfinite(level[-1]):
        return float("nan")
    n = shape["uv".index(side)]
    k = min(max(1, round(float(level[-1]) ** 2 * n)), n)  # it is sqrt(k / n)
    return float(np.mean(chance_cosines(k, n)))


def _range_of_chance(chances: list[float]) -> str:
    known = sorted({f"{chance:.2f}" for chance in chances if np.isfinite(chance)})
    return f" (chance: {'-'.join(dict.fromkeys((known[0], known[-1])))})" if known else ""


def matrix_scalars(run: Run, kind: str, metric: str) -> dict[str, np.ndarray]:
    """Matrix to one logged scalar over the refreshes (T,), in model order; without means by type and depth."""
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
    # A refresh covers the time from half-way to the one before until half-way to the next.
    edges = np.concatenate([[updates_T[0]], (updates_T[1:] + updates_T[:-1]) / 2, [updates_T[-1]]])
    axes_grid = figure.subplots(len(rows), len(types), squeeze=False)
    for row, ((label, values), norm_of) in enumerate(zip(rows, norms, strict=True)):
        norm = norm_of(np.array([value for names in types.values() for n in names for value in values[n]]))
        for column, (kind, names) in enumerate(types.items()):
            axes = axes_grid[row, column]
            last = row == len(rows) - 1
            tidy(axes, kind if row == 0 else "", "update" if last else "", "block" if column == 0 else "")
            axes.grid(visible=False)
            axes.set_facecolor(TRAIN)  # where there is no number
            image = axes.pcolormesh(
                edges, np.arange(len(names) + 1) - 0.5, [values[name] for name in names],
                cmap="coolwarm" if norm_of is _bound_norm else "viridis", norm=norm,
            )  # fmt: skip
            axes.yaxis.get_major_locator().set_params(integer=True)
            update_ticks(axes.xaxis)
            axes.invert_yaxis()
            if column == len(types) - 1:
                more = "both" if norm_of is _bound_norm else "neither"
                bar = figure.colorbar(image, ax=list(axes_grid[row]), pad=0.01, fraction=0.04, aspect=18, extend=more)
                if norm_of is not _unit_norm:
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


def _bound_norm(_: np.ndarray) -> LogNorm:
    """A scale of two colours that meet at 1, above which a bound on a sine says nothing."""
    from matplotlib.colors import LogNorm

    return LogNorm(*_BOUNDS)


def _unit_norm(values: np.ndarray) -> Normalize:
    """A scale from the smallest value to 1."""
    from matplotlib.colors import Normalize

    values = values[np.isfinite(values)]
    low = float(values.min()) if values.size else 0.0
    return Normalize(min(low, 0.999), 1.0)


def ema_plot(run: Run) -> bytes | None:
    """Means over the blocks of each type over time: of model, EMA, and the squared cosine between the two.

    Returns PNG bytes; None without an EMA, or with fewer than two refreshes in the log.
    """
    of_block, earlier = "block_ema_cos_u_mean_sq", "ema_cos_u_mean"
    is_of_block = bool(matrix_scalars(run, "spec", of_block))
    between = (of_block, "mean cos² u,\nmodel to EMA") if is_of_block else (earlier, "mean cos u, model to EMA")
    rows = (("sigma_max", "mean σ₁"), ("stable_rank", "mean stable rank"), between)
    found = {(kind, m): matrix_scalars(run, kind, m) for kind in ("spec", "spec_ema") for m, _ in rows}
    types = by_type(found["spec_ema", "sigma_max"])
    if not types or len(run.scalars["update"]) < 2:
        return None
    updates_T = run.scalars["update"].astype(np.int64)
    figure = new_figure(1.2 + 3.0 * len(types), 1.1 + 2.2 * len(rows))
    grid = figure.subplots(len(rows), len(types), squeeze=False)
    for row, (metric, label) in enumerate(rows):
        for column, (kind, names) in enumerate(types.items()):
            axes = grid[row, column]
            bottom = row == len(rows) - 1
            tidy(axes, kind if row == 0 else "", "update" if bottom else "", label if column == 0 else "")
            for source, color, name in (("spec", MODEL, "model"), ("spec_ema", EMA, "EMA")):
                values = found[source, metric]
                lines = [values[n] for n in names if n in values]
                if lines:
                    label_ = ("cosine²" if is_of_block else "cosine") if bottom else name
                    axes.plot(updates_T, np.mean(lines, axis=0), color=color, linewidth=1.7, label=label_)
            if bottom:
                levels = matrix_scalars(run, "spec", "block_chance_u_mean_sq")
                unknown = np.array([np.nan])
                chances = [levels.get(n, unknown)[-1] if is_of_block else _chance_of_mean(run, n, "u") for n in names]
                if np.isfinite(chances).all():
                    axes.axhline(float(np.mean(chances)), **_OF_CHANCE, label="chance")
                axes.set_ylim(0, 1.02)
            update_ticks(axes.xaxis)
            if column == len(types) - 1 and axes.get_lines():
                axes.legend(fontsize=8, frameon=False, labelcolor=MUTED)
    heading(figure, "Model and moving average", subtitle(run, updates_T))
    return png(figure)


_ALPHA = "exponent α ± its standard error"
_PANELS = (
    ("sigma_max", "largest singular value", "σ₁"),
    ("stable_rank", "stable rank", "Σ σ² / σ₁²"),
    ("effective_rank", "effective rank", "exp(entropy of σ / Σ σ)"),
    ("alpha", "power law of the tail", _ALPHA),
    ("mp_outliers", "values beyond the noise edge", "count"),
    ("block_cos0_u_overlap", "left vectors against the start", "overlap (0: chance)"),
    ("cos0_u_mean", "left vectors against the start", "mean cosine (dashed: chance)"),
)
"""The last panel replaces the one before for runs of earlier versions, which did not log that metric."""


def _newest(found: Mapping[str, np.ndarray]) -> int | None:
    """The newest refresh at which any matrix has the number; None where none has."""
    finite_T = np.isfinite(list(found.values())).any(axis=0) if found else np.zeros(0)
    return max(np.flatnonzero(finite_T).tolist(), default=None)


def profile_plot(run: Run) -> bytes | None:
    """A panel for each metric that the run has, a line for each type. Returns PNG bytes; None without any.

    Metrics of whole spectra are from the newest refresh that had them.
    """
    panels = [(metric, title, label, matrix_scalars(run, "spec", metric)) for metric, title, label in _PANELS]
    newest = {metric: _newest(found) for metric, _, _, found in panels}
    panels = [panel for panel in panels if newest[panel[0]] is not None]
    if "block_cos0_u_overlap" in [metric for metric, *_ in panels]:
        panels = [panel for panel in panels if panel[0] != "cos0_u_mean"]
    if not panels:
        return None
    alpha_errors = matrix_scalars(run, "spec", "alpha_sigma")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(0.6 + 3.7 * columns, 1.1 + 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (metric, title, label, found) in zip(grid.flat, panels, strict=False):
        at = newest[metric]
        update = run.scalars["update"][at]
        tidy(axes, title if update == run.scalars["update"][-1] else f"{title}, update {update:,.0f}", "block", label)
        for kind, names in by_type(found).items():
            color, marker = type_look(kind)
            values = [found[name][at] for name in names]
            axes.plot(range(len(names)), values, color=color, marker=marker, markersize=3.5, linewidth=1.4, label=kind)
            if label == _ALPHA and (errors := [alpha_errors[name][at] for name in names if name in alpha_errors]):
                axes.errorbar(range(len(names)), values, errors, fmt="none", ecolor=color, elinewidth=0.8, capsize=2)
            if metric == "cos0_u_mean":
                chances = [_chance_of_mean(run, name, "u") for name in names]
                axes.plot(range(len(names)), chances, color=color, linewidth=1, linestyle=(0, (3, 2)))
        if metric == "block_cos0_u_overlap":
            axes.axhline(0, **_OF_CHANCE)
            axes.set_ylim(-0.05, 1.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
    heading(figure, "Every matrix by depth", subtitle(run, run.scalars["update"].astype(np.int64)[-1:]))
    # One legend above all panels: inside a panel it could hide lines.
    lines = [line for line in grid.flat[0].get_lines() if not str(line.get_label()).startswith("_")]
    figure.legend(
        handles=lines, loc="outside upper right", ncols=min(3, len(lines)), frameon=False, fontsize=9, labelcolor=MUTED
    )
    return png(figure)
