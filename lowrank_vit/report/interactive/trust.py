"""The table by matrix: newest numbers, their changes, and which of them should not be trusted, with the reason.

The reasons are those of `docs/spectra.md`, "when not to trust it". Shape legend: N matrices, T refreshes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_vit.report.interactive.packing import Packer
from lowrank_vit.report.language import tr

FIT_KS, BULK_KS, LEAST_TAIL, NO_GAP, LOOSE = 0.1, 0.05, 20, 0.01, 1e-6
_RATIOS = frozenset("sigma_max stable_rank effective_rank nuclear_norm update_normF mp_edge condition".split())
"""Metrics whose change is given as a factor, not as a difference."""


@dataclass(frozen=True)
class Numbers:
    """The metrics of each matrix over the refreshes."""

    names: list[str]
    updates: np.ndarray
    """(T,) int64."""
    values: dict[str, dict[str, np.ndarray]]
    """By kind, "spec" or "spec_ema", and metric: (N, T) float64, NaN where not known."""
    shapes: dict[str, tuple[int, int]]

    def newest(self, kind: str, metric: str) -> np.ndarray:
        """(N,): the last finite value of each matrix; NaN without one, or without such a metric."""
        values_NT = self.values.get(kind, {}).get(metric)
        return np.full(len(self.names), np.nan) if values_NT is None else _at(values_NT, _last(values_NT))


def matrix_table(
    numbers: Numbers,
    kinds: Mapping[str, str],
    metrics: Sequence[str],
    labels: Mapping[str, str],
    first: Sequence[str],
    pack: Packer,
) -> dict[str, Any]:
    """The table's data. Rows are pairs of a matrix and a kind; `doubts` maps part and "row,column" to `reasons`."""
    rows: list[list[int]] = []
    parts: dict[str, list[np.ndarray]] = {"newest": [], "change": []}
    doubts: dict[str, dict[str, list[int]]] = {"newest": {}, "change": {}}
    reasons: list[str] = []
    for place, kind in enumerate(kinds):
        of_kind = [numbers.values[kind].get(metric) for metric in metrics]
        nowhere = np.full((len(numbers.names), len(numbers.updates)), np.nan)
        newest = np.array([_at(v, _last(v)) for v in (nowhere if v is None else v for v in of_kind)]).T
        oldest = np.array([_at(v, _first(v)) for v in (nowhere if v is None else v for v in of_kind)]).T
        ratios = np.array([metric in _RATIOS for metric in metrics])
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.where(ratios, newest / np.where(oldest > 0, oldest, np.nan), newest - oldest)
        if len(numbers.updates) < 2:
            change = np.full_like(change, np.nan)
        start = len(rows)
        rows.extend([at, place] for at in range(len(numbers.names)))
        parts["newest"].append(newest)
        parts["change"].append(change)
        for column, metric in enumerate(metrics):
            for part, at, reason in _doubts(numbers, kind, metric, change[:, column]):
                reasons += [reason] if reason not in reasons else []
                doubts[part].setdefault(f"{start + at},{column}", []).append(reasons.index(reason))
    return {
        "note": tr(
            "Newest number, and its change since the first refresh that has it. Click a heading to sort; "
            "a question mark says that a number should not be trusted, and why."
        ),
        "columns": [
            {"label": labels.get(metric, metric), "ratio": metric in _RATIOS, "first": metric in first}
            for metric in metrics
        ],
        "rows": rows,
        **{part: pack(np.concatenate(of)) for part, of in parts.items()},
        "doubts": doubts,
        "reasons": reasons,
    }


def _doubts(numbers: Numbers, kind: str, metric: str, change_N: np.ndarray) -> list[tuple[str, int, str]]:
    """(part, matrix, reason) of one column."""
    values_NT = numbers.values[kind].get(metric)
    if values_NT is None:
        return []
    found: list[tuple[str, int, str]] = []

    def mark(where_N: np.ndarray, reason: str, part: str = "newest") -> None:
        found.extend((part, int(at), reason) for at in np.flatnonzero(where_N))

    updates, last, first = numbers.updates, _last(values_NT), _first(values_NT)
    known = np.asarray(np.isfinite(values_NT).any(axis=1))
    begins_with_nan = metric.startswith(("cos", "block_cos", "delta", "update", "turn", "block_energy", "dw"))
    mark(np.logical_not(known), tr("It is not finite at any refresh on this page."))
    for at in set(last[known & (last < len(updates) - 1)].tolist()):
        mark(
            known & (last == at),
            tr("It is of update {n:,}: later refreshes did not compute it, or it was not finite.", n=updates[at]),
        )
    for at in set(first[known & (first > 0)].tolist()) - ({1} if begins_with_nan else set()):
        since = tr("The change is since update {n:,}, the first that has it.", n=updates[at])
        mark(known & (first == at), since, "change")
    of = {name: numbers.newest(kind, name) for name in ("alpha_ks", "alpha_tail", "alpha_sigma", "mp_ks", "gap_k")}
    of |= {name: numbers.newest(kind, name) for name in ("block_gap", "turn_bound", "certificate_max")}
    if metric in ("alpha", "alpha_sigma", "alpha_tail"):
        mark(of["alpha_ks"] > FIT_KS, tr("The fit's KS distance is above {n}: the tail is no power law.", n=FIT_KS))
        mark(of["alpha_tail"] < LEAST_TAIL, tr("The power law was fitted to fewer than {n} values.", n=LEAST_TAIL))
    if metric == "alpha":
        mark(
            np.asarray(np.abs(change_N) < of["alpha_sigma"]),
            tr("The change is smaller than the standard error of α."),
            "change",
        )
    if metric.startswith("mp_") and metric != "mp_ks":
        mark(
            of["mp_ks"] > BULK_KS,
            tr("The bulk's KS distance to noise is above {n}: edge and outliers say little.", n=BULK_KS),
        )
    if metric.startswith("block_cos"):
        # An infinite or missing bound proves nothing.
        mark(
            (of["block_gap"] < NO_GAP) & ~(of["turn_bound"] < 1),
            tr(
                "The block is not well defined: the gap after it is below {n:g}, and its turn has no bound below 1.",
                n=NO_GAP,
            ),
        )
    if metric.startswith(("cos_", "cos0_", "ema_cos_")):
        text = tr("A gap beside a recorded value is below {n:g}: neighbours swap their vectors.", n=NO_GAP)
        mark(of["gap_k"] < NO_GAP, text)
    if metric in ("sigma_max", "stable_rank"):
        text = tr("The proven error of a recorded value is above {n:g} of σ₁.", n=LOOSE)
        mark(of["certificate_max"] > LOOSE, text)
    if metric == "condition":
        square = np.array([len(set(numbers.shapes.get(name, (0, 1)))) == 1 for name in numbers.names])
        mark(square & known, tr("The condition number of a square matrix is random at the start and says nothing."))
    return found


def _last(values_NT: np.ndarray) -> np.ndarray:
    """(N,): place of the last finite value; the last place without one."""
    return values_NT.shape[1] - 1 - np.argmax(np.isfinite(values_NT)[:, ::-1], axis=1)


def _first(values_NT: np.ndarray) -> np.ndarray:
    return np.argmax(np.isfinite(values_NT), axis=1)


def _at(values_NT: np.ndarray, place_N: np.ndarray) -> np.ndarray:
    found = values_NT[np.arange(len(values_NT)), place_N]
    return np.where(np.isfinite(found), found, np.nan)
