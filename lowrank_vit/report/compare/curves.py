"""Lines of several runs in one panel: over updates or epochs, and spectra at a moment that all have reached.

Shape legend: T moments, K singular values of a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_vit.report.compare.extract import METRICS, OF_SPECTRA, TIMES
from lowrank_vit.report.compare.groups import Compared, Group
from lowrank_vit.report.interactive.matrices import KINDS
from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.style import by_type, first_middle_last

Curve = tuple[np.ndarray, np.ndarray]
"""Positions on the axis, ascending, and values."""
INDICES = 96
"""Points of a spectrum: the first values, then ever wider spaced ones."""
_SCORES = (
    ("eval_top1", msg("Accuracy"), msg("top-1, %")),
    ("eval_ema_top1", msg("Accuracy of the EMA"), msg("top-1, %")),
    ("eval_loss", msg("Loss"), msg("cross-entropy, nats")),
    ("eval_ema_loss", msg("Loss of the EMA"), msg("cross-entropy, nats")),
    ("train_loss", msg("Training loss, epoch means"), msg("cross-entropy, nats")),
    ("img_per_s", msg("Throughput"), msg("images / s")),
)


@dataclass(frozen=True)
class Line:
    """The line of a group: a single run's, or the mean of its runs where all of them have a value."""

    group: Group
    x_T: np.ndarray
    y_T: np.ndarray
    deviation_T: np.ndarray | None
    """Standard deviation (n - 1); None for a single run."""


@dataclass(frozen=True)
class Panel:
    """Lines about one quantity."""

    title: str
    x: str
    y: str
    lines: list[Line]
    is_log: bool = False


Views = dict[str, list[Panel]]


@dataclass(frozen=True)
class Figure:
    """Panels in one view, or in several from which the reader chooses."""

    name: str
    """The name of its file, and its id in the page."""
    title: str
    note: str
    views: dict[str, Views]
    """By weights, those of the model or of its EMA."""

    @property
    def first(self) -> Views:
        """The views of the model, if there are any, else of the EMA."""
        return next(iter(self.views.values()))


def line_of(group: Group, curves: Sequence[Curve]) -> Line | None:
    """One line from the curves of a group's runs that have any values; None without a finite value."""
    known = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves if len(x)]
    if len(known) == 1:
        x, y = known[0]
        return Line(group, x, y, None) if len(x) else None
    # Rounded, since positions on an axis of epochs are quotients.
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

        panels += _panel(compared, tr(title), tr(label), curve)
    return Figure("scores", tr("Scores over time"), "", {"": {"all": panels}}) if panels else None


def type_figure(compared: Compared) -> Figure | None:
    """Means over the matrices of a type, a panel for each; the reader chooses the metric."""
    found: dict[str, Views] = {}
    for kind, weights in KINDS.items():
        types = by_type(names_of(compared, kind))
        views: Views = {}
        for metric, label in METRICS.items():
            panels: list[Panel] = []
            for one, members in types.items():

                def curve(at: int, metric: str = metric, kind: str = kind, members: Sequence[str] = members) -> Curve:
                    of = compared.numbers[at].over_time.get((kind, metric), {})
                    rows = [of[name] for name in members if name in of]
                    return _over_time(compared, at, np.mean(rows, axis=0) if rows else None)

                panels += _panel(compared, one, tr(label), curve)
            if any(len(line.x_T) > 1 for panel in panels for line in panel.lines):
                views[tr(label)] = panels
        if views:
            found[tr(weights)] = views
    return Figure("types", tr("Spectra by type of matrix"), tr("Means over the blocks."), found) if found else None


def layer_figure(compared: Compared, *, every: bool = True, times: int = TIMES) -> Figure | None:
    """For each layer that two runs have: metrics over time, and the whole spectrum at the last common moment.

    `every`: all such layers; else the first, middle and last of each type. `times`: most points of a line.
    """
    found: dict[str, Views] = {}
    for kind, weights in KINDS.items():
        spectra = [numbers.spectra.get(kind, {}) for numbers in compared.numbers]
        names = [name for name in names_of(compared, kind) if sum(name in of for of in spectra) > 1]
        if not every:
            names = [name for group in by_type(names).values() for name in first_middle_last(group)]
        if names:
            found[tr(weights)] = {name: _layer(compared, kind, name, times) for name in names}
    return Figure("layers", tr("Spectra of one layer"), tr("Choose a layer."), found) if found else None


def _layer(compared: Compared, kind: str, layer: str, times: int) -> list[Panel]:
    def spectrum(at: int) -> Curve:
        s_K = compared.numbers[at].spectra.get(kind, {}).get(layer, np.empty(0))
        index = np.unique(np.geomspace(1, len(s_K), INDICES).round().astype(int)) if len(s_K) else np.empty(0, int)
        return index.astype(float), np.where(s_K[index - 1] > 0, s_K[index - 1], np.nan)

    title = tr("spectrum, {moment}", moment=moment(compared))
    panels = _panel(compared, title, tr("singular value σᵢ"), spectrum, x=tr("index i"), log=True)
    for metric in OF_SPECTRA:

        def curve(at: int, metric: str = metric) -> Curve:
            return _over_time(compared, at, compared.numbers[at].over_time.get((kind, metric), {}).get(layer))

        for one in _panel(compared, tr(METRICS[metric]), tr(METRICS[metric]), curve):
            if any(len(line.x_T) > 1 for line in one.lines):
                panels.append(dataclasses.replace(one, lines=[_thinned(line, times) for line in one.lines]))
    return panels


def _thinned(line: Line, times: int) -> Line:
    keep = np.unique(np.linspace(0, len(line.x_T) - 1, min(len(line.x_T), times)).round().astype(int))
    deviation_T = None if line.deviation_T is None else line.deviation_T[keep]
    return Line(line.group, line.x_T[keep], line.y_T[keep], deviation_T)


def names_of(compared: Compared, kind: str) -> list[str]:
    """The matrices of all runs, in model order."""
    found: dict[str, None] = {}
    for numbers in compared.numbers:
        of = numbers.spectra.get(kind) or numbers.over_time.get((kind, "sigma_max"), {})
        found |= dict.fromkeys(of)
    return list(found)


def moment(compared: Compared) -> str:
    """The last common moment, in words."""
    if all(run.moment for run in compared.runs):
        return tr("of the analyses")
    if compared.axis == "epoch":
        return tr("epoch {n:.4g}", n=compared.end)
    return tr("update {n:,.0f}", n=compared.end)


def _over_time(compared: Compared, at: int, values_T: np.ndarray | None) -> Curve:
    updates_T = compared.numbers[at].updates_T
    if values_T is None or len(values_T) != len(updates_T):
        return np.empty(0), np.empty(0)
    return compared.on_axis(at, updates_T), values_T


def _panel(
    compared: Compared, title: str, label: str, curve: Callable[[int], Curve], x: str = "", *, log: bool = False
) -> list[Panel]:
    """The panel of the curves that `curve` gives for each run's place; empty without a finite value."""
    lines = [line_of(group, [curve(at) for at in group.at]) for group in compared.groups]
    there = [line for line in lines if line]
    return [Panel(title, x or tr(compared.axis), label, there, log)] if there else []
