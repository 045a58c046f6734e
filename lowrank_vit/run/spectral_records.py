"""Which numbers of the spectra go to `metrics.jsonl`, to trackers and into a table, and how much space they take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from lowrank_vit.run.trackers.sending import plain_row
from lowrank_vit.run.trackers.tracker import Table
from lowrank_vit.spectral.measures.aggregates import CIRCUIT
from lowrank_vit.spectral.select import module_depth, module_type
from lowrank_vit.spectral.watching.files import ABOUT, StoredScalars
from lowrank_vit.spectral.watching.scalars import columns_of

Logged = Literal["means", "all"]
Sent = Literal["means", "types", "first-last", "all"]

MEANS = frozenset(
    """sigma_max stable_rank effective_rank numerical_rank alpha mp_outliers update_norm2 turn_bound block_energy
    block_cos_u_overlap block_cos0_u_overlap block_ema_cos_u_overlap""".split()
)
"""Metrics whose means by type are logged and sent by default."""
OF_EACH = frozenset(("sigma_max", "block_cos_u_mean"))
"""Metrics that are also sent for each matrix by default."""
_ASKED_FOR = ("dw_", "opt_")
"""Prefixes of metrics that only `--spec-updates` computes."""
_TYPE, _DEPTH = "type/", "depth/"


@cache
def _parts(key: str) -> tuple[str, str]:
    """Name and metric of a number; cached, as each refresh has the same few thousand keys."""
    group, _, metric = key.rpartition("/")
    return group.partition("/")[2], metric


@cache
def _is_mean(key: str) -> bool:
    """Whether a number describes the refresh, or is a mean by type of `MEANS` or of a metric with its own flag."""
    name, metric = _parts(key)
    is_shown = metric in MEANS or metric.startswith(_ASKED_FOR) or name == _TYPE + CIRCUIT
    return name == ABOUT or (name.startswith(_TYPE) and is_shown)


@cache
def _is_of_each(key: str) -> bool:
    name, metric = _parts(key)
    return metric in OF_EACH and not name.startswith((_TYPE, _DEPTH))


def logged(values: dict[str, Any], what: Logged) -> dict[str, Any]:
    """The part of a record for `metrics.jsonl`, which has no size limit: means by type, or everything."""
    return values if what == "all" else {key: value for key, value in values.items() if _is_mean(key)}


def sent(values: dict[str, Any], what: Sent) -> dict[str, Any]:
    """The part of a record for trackers.

    means: means by type of `MEANS`, and `OF_EACH` for each matrix; types: all means by type; first-last: these, and all
    numbers of the matrices in the first block, in the last block and in no block. All have the numbers about the
    refresh.
    """
    match what:
        case "all":
            return values
        case "means":
            return {key: value for key, value in values.items() if _is_mean(key) or _is_of_each(key)}
        case "types":
            groups = (_TYPE, ABOUT)
            return {key: value for key, value in values.items() if _parts(key)[0].startswith(groups)}
        case "first-last":
            names = [name for name in dict.fromkeys(_parts(key)[0] for key in values) if not name.startswith(_DEPTH)]
            depths = {name: "" if name.startswith((_TYPE, ABOUT)) else module_depth(name) for name in names}
            of_blocks = [depth for depth in depths.values() if depth]
            ends = {"", *of_blocks[:1], *of_blocks[-1:]}
            return {key: value for key, value in values.items() if depths.get(_parts(key)[0]) in ends}


class Prepared(NamedTuple):
    """A refresh ready to be written and sent, see `RunLog.log_spectra`."""

    line: str
    """A line of `metrics.jsonl` without its closing brace."""
    row: dict[str, float]
    """The row for trackers; empty without any."""
    num_values: int
    """How many values it was made of; values added later, about the refresh, go into both."""


@dataclass(frozen=True)
class Preparing:
    """Makes a `Prepared` from a record. This takes tens of ms, so the monitor's worker does it and no update waits."""

    log: Logged
    send: Sent | None
    """None without trackers."""

    def __call__(self, update: int, values: Mapping[str, float]) -> Prepared:
        """Prepare the scalars of a refresh."""
        of_record = dict(values)
        row = plain_row({"spec_update": update, **sent(of_record, self.send)}) if self.send else {}
        return Prepared(json_of("spec", update, logged(of_record, self.log))[:-1], row, len(of_record))


def json_of(kind: str, update: int, values: Mapping[str, Any]) -> str:
    """A line of `metrics.jsonl`. JSON has no NaN: a number that is not finite becomes null."""
    return json.dumps({"kind": kind, "update": update, **_finite(values)}, allow_nan=False)


def ended(line: str, values: Mapping[str, Any]) -> str:
    """`Prepared.line` completed with more values."""
    return f"{line}{''.join(f', {json.dumps(key)}: {json.dumps(_finite(one))}' for key, one in values.items())}}}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in cast(dict[str, Any], value).items()}
    return value if not isinstance(value, float) or math.isfinite(value) else None


def table_of(update: int, values: Mapping[str, float]) -> Table:
    """All numbers of a record as a table, with a row for each matrix, circuit and mean."""
    columns = columns_of([StoredScalars.of(update, values)])
    plain = [
        [None if isinstance(cell, float) and np.isnan(cell) else cell for cell in c.tolist()] for c in columns.values()
    ]
    return Table(list(columns), [list(row) for row in zip(*plain, strict=True)])


class Sizes(NamedTuple):
    """Bytes that a refresh takes."""

    store: float
    """Bytes in the store, before it is thinned out."""
    line: float
    """Bytes in `metrics.jsonl`."""


def expected_sizes(
    matrices: Mapping[str, Mapping[str, Any]], kinds: int, topk: int, interval: int, full_every: int, what: Logged
) -> Sizes:
    """Approximate size of a refresh, from the number of values in records; without circuits and changes.

    Args:
        matrices: by name, the "shape" of each; see `SpectralMonitor.matrices`.
        kinds: 2 with an EMA, else 1.
        topk, interval, full_every: see `SpectralSettings`.
        what: the part that is logged.
    """
    shapes = [one["shape"] for one in matrices.values()]
    types, depths = {module_type(name) for name in matrices}, {module_depth(name) for name in matrices}
    means = kinds * (len(types) + len(depths))
    whole = 1 / full_every
    per_matrix = whole * (_METRICS + _PER_INDEX * topk) + (1 - whole) * (_METRICS_FIRST + _PER_INDEX_FIRST * topk)
    scalars = 8 * (kinds * len(shapes) + means) * per_matrix
    spectra = 8 * sum(min(shape) for shape in shapes) * kinds
    reach = 1 + (topk - 1) * interval
    vectors = 8 * kinds * sum((min(reach, min(shape)) + whole * topk) * (sum(shape) + 2) for shape in shapes)
    numbers = _FILLED * (kinds * len(shapes) * per_matrix + means * (whole * _METRICS + (1 - whole) * _METRICS_FIRST))
    of_means = kinds * len(types) * len(MEANS) * (whole + (1 - whole) * _MEANS_FIRST)
    line = _BYTES_A_NUMBER * (numbers if what == "all" else of_means)
    return Sizes(scalars + spectra + vectors, line)


class Held(NamedTuple):
    """Bytes that a monitor holds during a refresh, besides the memory for solving."""

    copies: int
    """On the weights' device: copies of the monitored weights, now and at the previous refresh."""
    vectors: int
    """In host memory, at most: values and vectors of this refresh, the previous, the last complete and the first."""


def expected_held(
    matrices: Mapping[str, Mapping[str, Any]],
    kinds: int,
    item_bytes: int,
    topk: int,
    interval: int,
    *,
    ranks: int = 1,
    is_first: bool = True,
    updates: bool = False,
) -> Held:
    """Memory of a monitor's copies and vectors on a rank, from the shapes alone; without circuits.

    Args:
        matrices, kinds, topk, interval: see `expected_sizes`.
        item_bytes: bytes of a weight.
        ranks: number of ranks that share the work.
        is_first: whether this is the first rank, which has all the weights besides its share.
        updates: whether the optimizer's directions for the model are copied, too.
    """
    shapes = [one["shape"] for one in matrices.values()]
    weights = item_bytes * sum(rows * cols for rows, cols in shapes)
    share = -(-weights // ranks)
    copies = 2 * kinds * (share + (weights if is_first and ranks > 1 else 0)) + updates * share
    reach = 1 + (topk - 1) * interval
    vectors = 0
    for shape in shapes:
        short, long = min(shape), max(shape)
        ends = 2 * min(topk, short) + (min(reach, short) if interval > 1 else 0)
        vectors += 8 * (ends * (short + long + 2) + short) + 4 * short * min(reach + _GUARD, short)
    return Held(copies, 4 * kinds * -(-vectors // ranks))


def held_in_words(held: Held, free: int, place: str) -> str:
    """A warning if the copies need more memory than is free; otherwise empty."""
    if held.copies <= free:
        return ""
    return (
        f"warning: the monitor's copies of weights take {_bytes(held.copies)} on {place}, which has {_bytes(free)} "
        "free: the run may run out of memory. Monitor fewer layers with --spec-targets, leave out --model-ema or "
        "--spec-updates, or use more ranks."
    )


_GUARD = 18
"""Largest number of extra columns from which the next values are computed."""
_METRICS, _PER_INDEX = 95, 14
"""Numbers for a matrix in a complete refresh: in all, and for each recorded index."""
_METRICS_FIRST, _PER_INDEX_FIRST = 76, 7
"""The same for other refreshes."""
_MEANS_FIRST = 0.65
"""The share of `MEANS` in other refreshes."""
_FILLED = 0.87
"""Share of numbers that are present; an EMA lacks some."""
_BYTES_A_NUMBER = 57
"""Bytes of a number in JSON, with its name."""


def sizes_in_words(sizes: Sizes, refreshes: int, matrices: int, limit_gb: float, what: Logged) -> str:
    """A line for the start of a run with the expected size of its records."""
    store, log = refreshes * sizes.store, refreshes * sizes.line
    held = f"{_bytes(store)} in spectra/"
    if store > limit_gb * 1e9:
        held = f"thinned out in spectra/ to {_bytes(limit_gb * 1e9)} (--spec-store-gb; all would be {_bytes(store)})"
    unbounded = "; --spec-log means is small" if what == "all" else ""
    return (
        f"spectra: {refreshes:,} refreshes of {matrices:,} matrices, about {_bytes(sizes.store)} each, {held}; "
        f"metrics.jsonl gets about {_bytes(log)} of them{unbounded}"
    )


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.{2 - min(2, len(f'{count / size:.0f}') - 1)}f} {unit}"
    return f"{count / 1e3:.0f} kB"
