"""The numbers that a run logs while it goes, as columns by update: lines of `metrics.jsonl`, scalars of the spectra."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.watching.scalars import ScalarHistory

T = TypeVar("T")

MAX_SNAPSHOTS = 240
"""More refreshes than a picture has columns for are thinned evenly to this many."""

SCALARS = frozenset(
    """sigma_max stable_rank effective_rank alpha alpha_sigma mp_outliers chance_u chance_v cos_u_mean cos_v_mean
    cos0_u_mean cos0_v_mean ema_cos_u_mean block_cos_u_overlap block_cos_v_overlap block_cos0_u_overlap
    block_cos0_v_overlap block_ema_cos_u_mean_sq block_chance_u_mean_sq block_energy turn_bound
    seconds skipped failed fallbacks full full_share""".split()
) | {
    f"{move}_{name}"
    for move in ("dw", "opt")
    for name in "stable_rank effective_rank top_u top_v top chance_u chance_v chance".split()
}
"""What the report shows of the scalars that a run logs of its spectra."""

Columns = dict[str, np.ndarray]
"""A table by column: name to float64 array, all of one length; NaN where a cell is empty."""


_SPEC_EVENT, _FLOW_EVENT = b'{"kind": "spec"', b'{"kind": "flow"'
_UPDATE = re.compile(rb'\{"kind": "[a-z]*", "update": (\d+)')


def read_train(path: Path, notes: list[str]) -> Columns:
    """Of the lines of kind train, by update; what is missing or damaged is added to `notes`."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        notes.append("metrics.jsonl is not there: no curve between the epochs.")
        return {}
    rows: list[dict[str, float]] = []
    damaged: list[int] = []
    for number, line in enumerate(lines, start=1):
        if line.startswith(_SPEC_EVENT) and line.endswith(b"}"):
            continue  # long, many, and read elsewhere
        try:
            event = json.loads(line)
        except ValueError:  # also a line cut inside a UTF-8 character
            damaged.append(number)
            continue
        if isinstance(event, dict) and event.get("kind") == "train":
            row = {key: as_float(value) for key, value in event.items() if key != "kind"}
            if not math.isnan(row.get("update", math.nan)):
                rows.append(row)
    if damaged == [len(lines)]:
        notes.append("The last line of metrics.jsonl is half written (the run was writing it or was cut off).")
    elif damaged:
        notes.append(f"metrics.jsonl has {len(damaged)} unreadable line(s), the first is line {damaged[0]}; left out.")
    return by_update(rows)


def read_scalars(log: Path, history: ScalarHistory) -> Columns:
    """`SCALARS` of each matrix, and what the log has of the same refreshes beside these: means, and how each went.

    At most MAX_SNAPSHOTS refreshes, evenly spaced, and the newest of whole spectra. Where there are none of matrices,
    those of the log.
    """
    wanted = {*thinned(history.updates, MAX_SNAPSHOTS), *history.full_updates[-1:]}
    lines = _read_lines(log, _SPEC_EVENT, lambda updates: wanted or thinned(updates, MAX_SNAPSHOTS), SCALARS)
    rows = {row["update"]: row for row in lines}
    for update in wanted:
        with contextlib.suppress(UserError):  # a run that goes on may have thinned it out meanwhile
            values = history.read(update).named(SCALARS)
            row = rows.setdefault(float(update), {"update": float(update)})
            row |= {key: value if math.isfinite(value) else math.nan for key, value in values.items()}
    return by_update(rows.values())


def read_flows(log: Path, *, every: bool = False) -> Columns:
    """All numbers of the lines of kind flow: of `every` one, or of at most MAX_SNAPSHOTS, evenly spaced."""
    rows = _read_lines(log, _FLOW_EVENT, lambda updates: updates if every else thinned(updates, MAX_SNAPSHOTS), None)
    return by_update(rows)


def _read_lines(
    path: Path, beginning: bytes, choose: Callable[[list[int]], Iterable[int]], metrics: Collection[str] | None
) -> list[dict[str, float]]:
    """The lines that begin so and are of updates that are chosen: of these `metrics`, or all.

    Damaged lines are noted with those of the training.
    """

    def lines() -> Iterable[tuple[int, bytes]]:
        with path.open("rb") as file:
            for line in file:
                if line.startswith(beginning) and (head := _UPDATE.match(line)):
                    yield int(head[1]), line

    rows: list[dict[str, float]] = []
    with contextlib.suppress(OSError):
        wanted = set(choose(list(dict.fromkeys(update for update, _ in lines()))))
        for update, line in lines():
            if update in wanted:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    shown = {k: v for k, v in event.items() if metrics is None or k.rpartition("/")[2] in metrics}
                    shown.pop("kind", None)
                    rows.append({key: as_float(value) for key, value in shown.items()} | {"update": float(update)})
    return rows


def thinned(items: Sequence[T], most: int) -> list[T]:
    """So many of them at most, evenly spaced, with both ends."""
    at = np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)
    return [items[i] for i in at]


def by_update(rows: Iterable[Mapping[str, float]]) -> Columns:
    """Rows to columns, sorted; of two rows of one update (a resumed run repeats some) the later one counts."""
    latest = {row["update"]: row for row in rows}
    ordered = [latest[update] for update in sorted(latest)]
    names = dict.fromkeys(name for row in ordered for name in row)
    return {name: np.array([row.get(name, math.nan) for row in ordered]) for name in names}


def as_float(value: object) -> float:
    """A number, or NaN for what is none."""
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return math.nan
