"""The numbers that a run logs, as columns by update: lines of `metrics.jsonl` and scalars of the spectra."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.report.language import tr
from lowrank_vit.spectral.watching.scalars import ScalarHistory

T = TypeVar("T")

MAX_SNAPSHOTS = 240
"""More refreshes than this are thinned evenly: a picture has no more columns."""

SCALARS = frozenset(
    """sigma_max stable_rank effective_rank alpha alpha_sigma mp_outliers chance_u chance_v cos_u_mean cos_v_mean
    cos0_u_mean cos0_v_mean ema_cos_u_mean block_cos_u_overlap block_cos_v_overlap block_cos0_u_overlap
    block_cos0_v_overlap block_ema_cos_u_mean_sq block_chance_u_mean_sq block_energy turn_bound
    seconds skipped failed fallbacks full full_share
    alpha_ks alpha_tail mp_ks mp_edge mp_sigma numerical_rank nuclear_norm condition rank90 rank95 rank99 delta_sv_rel
    gap_k gap_last block_gap certificate_max update_normF update_norm2 block_ema_cos_u_overlap block_ema_cos_v_overlap
    block_cos_u_min block_cos_v_min block_chance_u_min block_chance_v_min cos_u_max cos_v_max chance_u_max chance_v_max
    chance_u_mean chance_v_mean ema_cos_v_mean""".split()
) | {
    f"{move}_{name}"
    for move in ("dw", "opt")
    for name in "stable_rank effective_rank top_u top_v top chance_u chance_v chance".split()
}
"""The scalars of the spectra that the report shows."""

Columns = dict[str, np.ndarray]
"""A table by column: name to float64 array, all of one length; NaN where a cell is empty."""


_SPEC_EVENT, _FLOW_EVENT = b'{"kind": "spec"', b'{"kind": "flow"'
_UPDATE = re.compile(rb'\{"kind": "[a-z]*", "update": (\d+)')


def read_train(path: Path, notes: list[str]) -> Columns:
    """The lines of kind train, by update. Notes on missing or damaged ones are added to `notes`."""
    rows: list[dict[str, float]] = []
    damaged: list[int] = []
    number = 0
    try:
        with path.open("rb") as file:  # line by line: the lines of spectra may be gigabytes
            for number, line in enumerate(file, start=1):
                if line.startswith(_SPEC_EVENT) and line.rstrip().endswith(b"}"):
                    continue  # long, many, and read elsewhere
                try:
                    event = json.loads(line)
                except ValueError:  # also a line cut inside a UTF-8 character
                    damaged.append(number)
                    continue
                if isinstance(event, dict) and event.get("kind") == "train":
                    row = {sys.intern(key): as_float(value) for key, value in event.items() if key != "kind"}
                    if not math.isnan(row.get("update", math.nan)):
                        rows.append(row)
    except OSError:
        notes.append(tr("metrics.jsonl is not there: no curve between the epochs."))
        return {}
    if damaged == [number]:
        notes.append(tr("The last line of metrics.jsonl is half written (the run was writing it or was cut off)."))
    elif damaged:
        notes.append(
            tr(
                "metrics.jsonl has {n} unreadable line(s), the first is line {first}; left out.",
                n=len(damaged),
                first=damaged[0],
            )
        )
    return by_update(rows)


def read_scalars(log: Path, history: ScalarHistory) -> Columns:
    """`SCALARS` of each matrix, and from the log the means and the scalars about each refresh.

    At most MAX_SNAPSHOTS refreshes, evenly spaced, and the newest of whole spectra. Without scalars of matrices, only
    those of the log.
    """
    wanted = {*thinned(history.updates, MAX_SNAPSHOTS), *history.full_updates[-1:]}
    found = _read_lines(log, _SPEC_EVENT, lambda updates: wanted or thinned(updates, MAX_SNAPSHOTS), SCALARS)
    for update in wanted:
        with contextlib.suppress(UserError):  # a running training may have thinned it out in the meantime
            values = history.read(update).named(SCALARS)
            found.put(update, {key: value if math.isfinite(value) else math.nan for key, value in values.items()})
    return found.columns()


def read_flows(log: Path, *, every: bool = False) -> Columns:
    """All numbers of the lines of kind flow: of `every` line, or of at most MAX_SNAPSHOTS, evenly spaced."""
    choose = list[int] if every else (lambda updates: thinned(updates, MAX_SNAPSHOTS))
    return _read_lines(log, _FLOW_EVENT, choose, None).columns()


class _Rows:
    """A table that is filled row by row, for updates that are known beforehand; in arrays, since rows are long."""

    def __init__(self, updates: Iterable[int]) -> None:
        self._row = {update: row for row, update in enumerate(sorted(set(updates)))}
        self._columns: Columns = {}
        self._filled: set[int] = set()

    def put(self, update: int, values: Mapping[str, float]) -> None:
        """Add values to the row of an update."""
        row = self._row[update]
        self._filled.add(row)
        for key, value in values.items():
            column = self._columns.get(key)
            if column is None:
                column = self._columns[key] = np.full(len(self._row), math.nan)
            column[row] = value

    def clear(self, update: int) -> None:
        """Clear the row of an update: a resumed run logs it again."""
        if self._row[update] in self._filled:
            for column in self._columns.values():
                column[self._row[update]] = math.nan

    def columns(self) -> Columns:
        """The rows that were filled, by update; empty without any."""
        at = sorted(self._filled)
        updates = np.array(sorted(self._row), float)
        return {key: column[at] for key, column in (self._columns | {"update": updates}).items()} if at else {}


def _read_lines(
    path: Path, beginning: bytes, choose: Callable[[list[int]], Iterable[int]], metrics: Collection[str] | None
) -> _Rows:
    """The lines with this beginning, of the updates that `choose` picks; only `metrics`, or all numbers with None.

    `read_train` makes the note on damaged lines.
    """

    def lines() -> Iterable[tuple[int, bytes]]:
        with contextlib.suppress(OSError), path.open("rb") as file:
            for line in file:
                if line.startswith(beginning) and (head := _UPDATE.match(line)):
                    yield int(head[1]), line

    wanted = set(choose(list(dict.fromkeys(update for update, _ in lines()))))
    rows = _Rows(wanted)
    for update, line in lines():
        if update in wanted:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                shown = {k: v for k, v in event.items() if metrics is None or k.rpartition("/")[2] in metrics}
                shown.pop("kind", None)
                rows.clear(update)
                rows.put(update, {key: as_float(value) for key, value in shown.items()})
    return rows


def thinned(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced, with both ends."""
    at = np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)
    return [items[i] for i in at]


def by_update(rows: Iterable[Mapping[str, float]]) -> Columns:
    """Rows to columns, sorted; if an update has two rows (a resumed run repeats some), the later one counts."""
    latest = {row["update"]: row for row in rows}
    ordered = [latest[update] for update in sorted(latest)]
    names = dict.fromkeys(name for row in ordered for name in row)
    return {name: np.array([row.get(name, math.nan) for row in ordered]) for name in names}


def as_float(value: object) -> float:
    """The value as a float; NaN if it is no number."""
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return math.nan
