"""The data of each run for a comparison: bounded, and read refresh by refresh, so that ten long runs fit into memory.

Shape legend: T moments, K singular values of a matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.report.events import thinned
from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.read import Run
from lowrank_vit.spectral.measures.metrics import effective_rank, stable_rank
from lowrank_vit.spectral.watching.files import StoredScalars
from lowrank_vit.spectral.watching.stored import Spectra, store_dir_of

if TYPE_CHECKING:
    from lowrank_vit.report.compare.groups import Compared

METRICS: Mapping[str, str] = {
    "sigma_max": msg("largest singular value σ₁"),
    "stable_rank": msg("stable rank, Σ σ² / σ₁²"),
    "effective_rank": msg("effective rank, exp(entropy of σ / Σ σ)"),
    "alpha": msg("power-law exponent α of the tail"),
    "mp_outliers": msg("values beyond the noise edge"),
    "block_cos0_u_overlap": msg("left vectors: overlap with the start (0: chance)"),
}
"""Metrics of a matrix, and their labels."""
OF_SPECTRA: Mapping[str, Callable[[np.ndarray], float]] = {
    "sigma_max": lambda s: float(s[0]),
    "stable_rank": stable_rank,
    "effective_rank": effective_rank,
}
"""The metrics that follow from whole spectra."""
TIMES = 120
"""Most refreshes of a run whose numbers are read."""
_MEANS = ("type/", "depth/", "circuit/", "flow/", "refresh")
"""Beginnings of names that are of no matrix."""

OfMatrices = dict[str, np.ndarray]
"""By name of a matrix."""


@dataclass(frozen=True)
class Numbers:
    """The numbers of one run's matrices over time, and whole spectra at the moment of the comparison."""

    updates_T: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    over_time: dict[tuple[str, str], OfMatrices] = field(default_factory=dict)
    """By kind, "spec" or "spec_ema", and metric: (T,) of each matrix, NaN where it is not known."""
    spectra: dict[str, OfMatrices] = field(default_factory=dict)
    """By kind: (K,) of each matrix."""
    last: int = -1
    """The last place in `updates_T` up to that moment; -1 without one."""

    def at_end(self, kind: str, metric: str) -> dict[str, float]:
        """A metric of each matrix at that moment: from the whole spectra, else as last logged."""
        measure, spectra = OF_SPECTRA.get(metric), self.spectra.get(kind)
        if measure and spectra:
            return {name: measure(s_K) for name, s_K in spectra.items()}
        logged = self.over_time.get((kind, metric), {}) if self.last >= 0 else {}
        return {name: float(values_T[self.last]) for name, values_T in logged.items()}


def read_numbers(compared: Compared) -> tuple[list[Numbers], float, list[str]]:
    """The numbers of each run, the position on the common axis of the comparison, and notes on damaged files."""
    notes: list[str] = []
    stores = [None if run.moment else Spectra(store_dir_of(run.path)) for run in compared.runs]
    full = [store.full_updates if store else [] for store in stores]
    places = [compared.on_axis(at, np.array(of[-1:])) for at, of in enumerate(full)]
    end = min((float(of[0]) for of in places if of.size), default=0.0)
    chosen: dict[int, list[int]] = {}
    for group in compared.groups:
        chosen |= _times({at: _updates(store) for at in group.at if (store := stores[at])})
    found: list[Numbers] = []
    for at, (run, store) in enumerate(zip(compared.runs, stores, strict=True)):
        if store is None:
            found.append(_of_analysis(run))
            continue
        if not store.updates:
            notes.append(tr("{run}: there are no spectra.", run=compared.names[at]))

        def reached(updates: Sequence[int], at: int = at) -> list[int]:
            return [u for u in updates if compared.on_axis(at, np.array([u]))[0] <= end + 1e-6]

        before = reached(_updates(store))
        updates = sorted({*chosen[at], *before[-1:]})
        spectra: dict[str, OfMatrices] = {}
        for update in reversed(reached(full[at])):
            try:
                spectra = _by_kind(store.refresh(update).spectra)
                break
            except UserError:
                file = store.file(update).name
                notes.append(tr("{run}: {file} is damaged, left out.", run=compared.names[at], file=file))
        last = updates.index(before[-1]) if before else -1
        found.append(Numbers(np.array(updates, np.int64), _over_time(store, updates), spectra, last))
    return found, end, notes


def _updates(store: Spectra) -> list[int]:
    """The updates with numbers: logged ones, or those of an older run's whole spectra."""
    return store.scalar_updates or store.full_updates


def _times(of_runs: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """By run, the updates to read: those that all seeds have, so that there is a mean; else each run's own."""
    there = [set(updates) for updates in of_runs.values() if updates]
    common = sorted(set[int]().union(*there[:1]).intersection(*there[1:]))
    return {at: thinned(common if len(common) > 1 else updates, TIMES) for at, updates in of_runs.items()}


def _by_kind(spectra: Mapping[str, np.ndarray]) -> dict[str, OfMatrices]:
    found: dict[str, OfMatrices] = {}
    for key, s_K in spectra.items():
        kind, _, name = key.partition("/")
        if s_K.size:
            found.setdefault(kind, {})[name] = s_K
    return found


def _over_time(store: Spectra, updates: Sequence[int]) -> dict[tuple[str, str], OfMatrices]:
    found: dict[tuple[str, str], OfMatrices] = {}
    is_logged = bool(store.scalar_updates)
    for t, update in enumerate(updates):
        with contextlib.suppress(UserError):  # damaged, or thinned out in the meantime
            one = store.history.read(update) if is_logged else _measured(store, update)
            wanted = [(column, metric) for column, metric in enumerate(one.metrics) if metric in METRICS]
            for row, key in enumerate(one.keys):
                kind, _, name = key.partition("/")
                if name.startswith(_MEANS):
                    continue
                for column, metric in wanted:
                    value = one.values_NM[row, column]
                    of = found.setdefault((kind, metric), {})
                    if np.isfinite(value) or name in of:
                        of.setdefault(name, np.full(len(updates), np.nan))[t] = value
    return {which: of for which, of in found.items() if of}


def _measured(store: Spectra, update: int) -> StoredScalars:
    """The metrics that follow from the spectra, for runs that logged none."""
    spectra = {key: s_K for key, s_K in store.refresh(update).spectra.items() if s_K.size}
    values = {f"{key}/{metric}": of(s_K) for key, s_K in spectra.items() for metric, of in OF_SPECTRA.items()}
    return StoredScalars.of(update, values)


def _of_analysis(run: Run) -> Numbers:
    """The numbers of an analysis: of one moment, without a position on the axis."""
    over_time: dict[tuple[str, str], OfMatrices] = {}
    for key, values in run.scalars.items():
        kind, _, rest = key.partition("/")
        name, _, metric = rest.rpartition("/")
        if name and metric in METRICS:
            over_time.setdefault((kind, metric), {})[name] = values
    spectra = _by_kind(run.spectra[0].spectra) if run.spectra else {}
    return Numbers(np.empty(0, np.int64), over_time, spectra, 0)
