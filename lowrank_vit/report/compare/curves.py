"""Lines of several runs in one panel: over the updates or epochs, and spectra at a moment that all have reached.

Shape legend: T moments, K singular values of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_vit.report.compare.groups import Compared, Group
from lowrank_vit.report.read import Run, series
from lowrank_vit.report.spectra.metrics import matrix_scalars
from lowrank_vit.report.style import by_type, first_middle_last
from lowrank_vit.spectral.measures.metrics import effective_rank, stable_rank

Curve = tuple[np.ndarray, np.ndarray]
"""Places on the axis, growing, and values."""
METRICS = (
    ("sigma_max", "largest singular value σ₁"),
    ("stable_rank", "stable rank, Σ σ² / σ₁²"),
    ("effective_rank", "effective rank, exp(entropy of σ / Σ σ)"),
    ("alpha", "power-law exponent α of the tail"),
    ("mp_outliers", "values beyond the noise edge"),
    ("block_cos0_u_overlap", "left vectors: overlap with the start (0: chance)"),
)
_OF_SPECTRA: Mapping[str, Callable[[np.ndarray], float]] = {
    "sigma_max": lambda s: float(s[0]),
    "stable_rank": stable_rank,
    "effective_rank": effective_rank,
}
_SCORES = (
    ("eval_top1", "Accuracy", "top-1, %"),
    ("eval_ema_top1", "Accuracy of the EMA", "top-1, %"),
    ("eval_loss", "Loss", "cross-entropy, nats"),
    ("eval_ema_loss", "Loss of the EMA", "cross-entropy, nats"),
    ("train_loss", "Training loss, epoch means", "cross-entropy, nats"),
    ("img_per_s", "Throughput", "images / s"),
)


@dataclass(frozen=True)
class Line:
    """Of one group: a run's own, or the mean of its runs where all of them have a value."""

    group: Group
    x_T: np.ndarray
    y_T: np.ndarray
    deviation_T: np.ndarray | None
    """Standard deviation (n - 1); None of a run alone."""


@dataclass(frozen=True)
class Panel:
    """Lines about one quantity."""

    title: str
    x: str
    y: str
    lines: list[Line]
    is_log: bool = False


@dataclass(frozen=True)
class Figure:
    """Panels in one view, or in several of which a reader chooses."""

    name: str
    """Of its file, and in the page."""
    title: str
    note: str
    views: dict[str, list[Panel]]


def line_of(group: Group, curves: Sequence[Curve]) -> Line | None:
    """One line of the curves of a group's runs; None without a finite value."""
    known = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    if len(known) == 1:
        x, y = known[0]
        return Line(group, x, y, None) if len(x) else None
    # Rounded, since places on an axis of epochs are quotients.
    tables = [dict(zip(np.round(x, 6).tolist(), y.tolist(), strict=True)) for x, y in known]
    shared = sorted(set[float]().union(*tables[:1]).intersection(*tables[1:]))
    if not shared:
        return None
    values = np.array([[table[x] for x in shared] for table in tables])
    return Line(group, np.array(shared), values.mean(0), values.std(0, ddof=1))


def score_figure(compared: Compared) -> Figure | None:
    """Scores and losses of every epoch."""
    panels: list[Panel] = []
    for name, title, label in _SCORES:

        def curve(at: int, name: str = name) -> Curve:
            epochs = compared.runs[at].epochs
            updates = epochs.get("update", np.empty(0))
            return compared.on_axis(at, updates), epochs.get(name, np.full(len(updates), np.nan))

        panels += _panel(compared, title, label, curve)
    return Figure("scores", "Scores", "", {"all": panels}) if panels else None


def type_figure(compared: Compared) -> Figure | None:
    """Means over the matrices of a type, a panel for each; to be chosen: the number."""
    found = {metric: [_values(run, metric) for run in compared.runs] for metric, _ in METRICS}
    types = by_type(dict.fromkeys(name for one in found["sigma_max"] for name in one[1]))
    views: dict[str, list[Panel]] = {}
    for metric, label in METRICS:
        panels: list[Panel] = []
        for kind in types:

            def curve(at: int, metric: str = metric, kind: str = kind) -> Curve:
                updates_T, of = found[metric][at]
                rows = [values_T for name, values_T in of.items() if name in types[kind]]
                means = np.mean(rows, axis=0) if rows else np.full(len(updates_T), np.nan)
                return compared.on_axis(at, updates_T), means

            panels += _panel(compared, kind, label, curve)
        if any(len(line.x_T) > 1 for panel in panels for line in panel.lines):
            views[label] = panels
    note = "Means over the blocks."
    return Figure("types", "Spectra by type of matrix", note, views) if views else None


def layer_figure(compared: Compared, *, every: bool = True) -> Figure | None:
    """Of each layer that two runs have: numbers over time, and the whole spectrum at the last common moment.

    `every`: else of first, middle and last of each type.
    """
    found = {metric: [_values(run, metric) for run in compared.runs] for metric, _ in METRICS[:3]}
    spectra = [_spectra_at(compared, at) for at in range(len(compared.runs))]
    names = [name for name in dict.fromkeys(n for one in spectra for n in one) if sum(name in s for s in spectra) > 1]
    if not every:
        names = [name for group in by_type(names).values() for name in first_middle_last(group)]
    views: dict[str, list[Panel]] = {}
    for layer in names:

        def spectrum(at: int, layer: str = layer) -> Curve:
            s_K = spectra[at].get(layer, np.empty(0))
            return np.arange(1.0, len(s_K) + 1), np.where(s_K > 0, s_K, np.nan)

        panels = _panel(compared, f"spectrum, {moment(compared)}", "singular value σᵢ", spectrum, x="index i", log=True)
        for metric, label in METRICS[:3]:

            def curve(at: int, metric: str = metric, layer: str = layer) -> Curve:
                updates_T, of = found[metric][at]
                return compared.on_axis(at, updates_T), of.get(layer, np.full(len(updates_T), np.nan))

            over_time = _panel(compared, label, label, curve)
            panels += [one for one in over_time if any(len(line.x_T) > 1 for line in one.lines)]
        views[layer] = panels
    return Figure("layers", "Spectra of one layer", "Choose a layer.", views) if views else None


def common_end(compared: Compared) -> float:
    """The last place on the axis that every run with spectra has reached."""
    ends = [updates_T[-1:] for run in compared.runs if len(updates_T := series(run, "spec")[0])]
    places = [compared.on_axis(at, end)[0] for at, end in zip(_with_spectra(compared), ends, strict=True)]
    return float(min(places, default=0.0))


def _with_spectra(compared: Compared) -> list[int]:
    return [at for at, run in enumerate(compared.runs) if len(series(run, "spec")[0])]


def moment(compared: Compared) -> str:
    """The last common moment, in words."""
    if any(run.moment for run in compared.runs):
        return "of the analyses"
    end = common_end(compared)
    return f"epoch {end:.4g}" if compared.axis == "epoch" else f"update {end:,.0f}"


def _spectra_at(compared: Compared, at: int) -> dict[str, np.ndarray]:
    """A run's whole spectra at the last common moment, or the last ones before it."""
    updates_T, of = series(compared.runs[at], "spec")
    before = np.flatnonzero(compared.on_axis(at, updates_T) <= common_end(compared) + 1e-6) if len(updates_T) else []
    return {name: s_TK[before[-1]] for name, s_TK in of.items()} if len(before) else {}


def means_at_common_end(compared: Compared) -> dict[tuple[str, str], list[float]]:
    """(type, number) to its mean over the blocks in each run, at the last common moment; NaN where there is none."""
    spectra = [_spectra_at(compared, at) for at in range(len(compared.runs))]
    found: dict[tuple[str, str], list[float]] = {}
    for kind, names in by_type(dict.fromkeys(name for one in spectra for name in one)).items():
        for metric, label in METRICS[:3]:
            of_runs = [[_OF_SPECTRA[metric](one[name]) for name in names if name in one] for one in spectra]
            found[kind, label] = [float(np.mean(values)) if values else float("nan") for values in of_runs]
    return found


def _values(run: Run, metric: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Updates (T,) and the number of each matrix (T,): as logged, else computed from whole spectra."""
    logged = {name: values for name, values in matrix_scalars(run, "spec", metric).items() if np.isfinite(values).any()}
    if logged:
        return run.scalars["update"], logged
    measure = _OF_SPECTRA.get(metric)
    updates_T, of = series(run, "spec")
    if measure is None or not of:
        return np.empty(0), {}
    return updates_T, {name: np.array([measure(s_K) for s_K in s_TK]) for name, s_TK in of.items()}


def _panel(
    compared: Compared, title: str, label: str, curve: Callable[[int], Curve], x: str = "", *, log: bool = False
) -> list[Panel]:
    """The panel of what `curve` says of the run at a place; empty without a finite value."""
    lines = [line_of(group, [curve(at) for at in group.at]) for group in compared.groups]
    there = [line for line in lines if line]
    return [Panel(title, x or compared.axis, label, there, log)] if there else []
