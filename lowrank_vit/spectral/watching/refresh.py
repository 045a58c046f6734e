"""From copies of the weights to every number about them, for the monitor and the offline analysis.

A key is "<kind>/<name>": kind "spec" (the model) or "spec_ema" (its moving average), name a matrix's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from lowrank_vit.common.arguments import check_choice, check_whole
from lowrank_vit.common.devices import cuda_path
from lowrank_vit.spectral.measures.circuits import BlockCircuits
from lowrank_vit.spectral.measures.metrics import (
    ends_metrics,
    is_of_full_rank,
    reach,
    recorded_indices,
    relative_change,
    spectrum_metrics,
)
from lowrank_vit.spectral.measures.noise import scaled_thirds
from lowrank_vit.spectral.measures.subspaces import (
    block_gap,
    blocks_of,
    chance_metrics,
    cosine_metrics,
    last_cosines,
    turn_bound,
)
from lowrank_vit.spectral.measures.updates import block_energies, paired, update_norms, update_spectra
from lowrank_vit.spectral.solving.ends import GUARD, solve_ends
from lowrank_vit.spectral.solving.extremes import Solved, Solver
from lowrank_vit.spectral.solving.norm import spectral_norms
from lowrank_vit.spectral.solving.pieces import in_pieces, slices_of, some_of
from lowrank_vit.spectral.solving.solve import (
    LOG,
    MatrixStack,
    never,
    side_by_side,
    solve_stack,
)

MODEL, EMA = "spec", "spec_ema"
FOR_HEADS = ":heads"
"""Ending of a kind in a snapshot: the weights that circuits need in addition to the kind's own matrices."""
DIRECTION = "direction"
"""A further kind in a snapshot: the optimizer's update directions of some of the model's matrices."""
Stacks = dict[str, list[MatrixStack]]
"""Kind to the copies of its matrices."""


@dataclass(frozen=True)
class SpectralSettings:
    """What is computed of each matrix.

    Example:
        >>> SpectralSettings(topk=2, interval=10)  # records indices 1 and 11, the last, and the tenth before it
        SpectralSettings(topk=2, interval=10, solver='gram64', on_cpu=False, cpu_threads=1, full_every=1, updates=False)
    """

    topk: int = 8
    """How many singular values and vectors to record from each end; all values are computed."""
    interval: int = 1
    """Distance between the recorded indices: 1, 1+i, 1+2i, ..."""
    solver: Solver = "gram64"
    """gram64: float64 Gram matrix, certified; svd: the slow reference, a float64 SVD."""
    on_cpu: bool = False
    """Move copies from a GPU to the CPU first."""
    cpu_threads: int = 1
    """How many matrices are solved at once on a CPU; changes no bit of the result."""
    full_every: int = 1
    """One refresh in so many computes the whole spectra, the others the first values alone; only for the monitor."""
    updates: bool = False
    """Also describe the model's changes between refreshes and its optimizer's direction, see `update_spectra`."""

    def __post_init__(self) -> None:
        """Raise `UserError` for a value out of range."""
        check_whole(topk=self.topk, interval=self.interval, cpu_threads=self.cpu_threads, full_every=self.full_every)
        check_choice(get_args(Solver), solver=self.solver)
        check_choice((False, True), on_cpu=self.on_cpu, updates=self.updates)


@dataclass
class Refreshed:
    """The results of one refresh, or one rank's share of them; every dictionary is by key."""

    update: int
    solved: dict[str, Solved] = field(default_factory=dict)
    """With the recorded triplets only."""
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    circuits: dict[str, BlockCircuits] = field(default_factory=dict)
    """By "<kind>/circuit/<block>"."""
    full: bool = True
    """Whether these are whole spectra."""


@dataclass
class Memory:
    """What the next refresh is compared with."""

    first: dict[str, Solved] = field(default_factory=dict)
    """The first refresh of whole spectra, usually at initialisation."""
    last: dict[str, Solved] = field(default_factory=dict)
    """The last refresh, with `Solved.start` for the next search of the first values."""
    last_update: int | None = None
    weights: Stacks = field(default_factory=dict)
    """Copies of the last refresh; empty after a restart without them. If `last` is empty, it is solved from these."""
    whole: dict[str, Solved] = field(default_factory=dict)
    """The last refresh of whole spectra. Empty also where that is the one to be solved again."""
    whole_update: int | None = None

    def keep(self, found: Refreshed, stacks: Stacks) -> None:
        """A refresh that has succeeded becomes the last one."""
        self.last, self.last_update = found.solved, found.update
        self.weights = {kind: of_kind for kind, of_kind in stacks.items() if kind != DIRECTION}
        if found.full:
            self.first = found.solved | self.first
            self.whole, self.whole_update = found.solved, found.update


def solve_all(
    stacks: Iterable[MatrixStack],
    settings: SpectralSettings,
    *,
    cancelled: Callable[[], bool] = never,
    log: Callable[[str], object] = LOG.warning,
) -> dict[str, Solved]:
    """Name to the solved matrix with its recorded triplets. Raises `Cancelled`."""
    solved: dict[str, Solved] = {}
    m, guard = reach(settings.topk, settings.interval), GUARD if settings.full_every > 1 else 0
    options: dict[str, Any] = {"cpu_threads": settings.cpu_threads, "cancelled": cancelled, "log": log}
    for stack in itertools.chain.from_iterable(map(in_pieces, stacks)):
        found = solve_stack(stack, m, settings.solver, guard=guard, **options)
        for name, one in found.items():
            solved[name] = one.recorded(recorded_indices(one.s.size, settings.topk, settings.interval))
        shape = (stack.matrices_NRC.shape[1], stack.matrices_NRC.shape[2])
        fused = {name: found[name].s for name in stack.fused if is_of_full_rank(found[name].s, shape, found[name].eps)}
        for name, thirds in scaled_thirds(stack, fused, settings.cpu_threads).items():
            solved[name] = replace(solved[name], thirds=thirds)
    return solved


def solve_first(
    stacks: Iterable[MatrixStack],
    settings: SpectralSettings,
    starts: Mapping[str, np.ndarray | None],
    *,
    cancelled: Callable[[], bool] = never,
    log: Callable[[str], object] = LOG.warning,
) -> dict[str, Solved]:
    """As `solve_all`, but the first values alone, searched from `starts` by name.

    The whole spectrum is computed where the values found are not proven to be the first, where there is no start, for a
    product of rank m or less, and always with the solver svd. Otherwise the result's `solver` is "ends". A start of
    None stays None until the next whole refresh. On a CPU, where trying costs about as much as the whole spectrum, a
    start that failed becomes None too.
    """
    solved: dict[str, Solved] = {}
    m = reach(settings.topk, settings.interval)
    for stack in itertools.chain.from_iterable(map(in_pieces, stacks)):
        found: dict[str, Solved | None] = {}
        k = min(stack.matrices_NRC.shape[1:])
        if settings.solver != "svd":
            ranks = stack.ranks  # a product of rank m or less has no next value to tell its first ones from
            known = {name: start for name, start in starts.items() if start is not None and ranks.get(name, k) > m}
            found = solve_ends(stack, known, m, cpu_threads=settings.cpu_threads, cancelled=cancelled, log=log)
        left = [i for i, name in enumerate(stack.names) if found.get(name) is None]
        whole: dict[str, Solved] = {}
        unfused = replace(stack, fused=frozenset[str]())
        on_cpu = settings.cpu_threads if len(left) < len(stack.names) else None  # only some are copied
        for one in slices_of(stack.matrices_NRC[: len(left)], on_cpu):
            rest = some_of(unfused, left[one])
            whole |= solve_all([rest], settings, cancelled=cancelled, log=log) if rest.names else {}
        for name in stack.names:
            if (one := found.get(name)) is None:
                in_vain = name in starts and (starts[name] is None or not cuda_path(stack.matrices_NRC))
                solved[name] = replace(whole[name].first_alone(), **({"start": None} if in_vain else {}))
            else:
                solved[name] = one.recorded(recorded_indices(one.s.size, settings.topk, settings.interval))
    return solved


def matrix_metrics(solved: Solved, settings: SpectralSettings) -> dict[str, float]:
    """All scalars of one matrix at one moment.

    Returns:
        `metrics.spectrum_metrics` (`metrics.ends_metrics` if not `full`), `subspaces.chance_metrics`, "block_gap" (see
        `subspaces.block_gap`), "certificate_max" (`Solved.certificate_max`, relative to sigma_1), "certificate_index"
        (1 if `Solved.index`, else 0; NaN if not solved) and "orthogonality".
    """
    shape = (solved.top.u.shape[0], solved.top.v.shape[0])
    if solved.full:
        values = spectrum_metrics(solved.s, shape, settings.topk, settings.interval, solved.eps, solved.thirds)
    else:
        values = ends_metrics(solved.s, settings.topk, settings.interval, solved.frobenius)
    index = float("nan") if solved.solver == "none" else float(solved.index)
    values |= {"certificate_max": solved.certificate_max, "certificate_index": index}
    values |= {"orthogonality": solved.orthogonality}
    k, p = solved.top.s.size, (solved.block or solved.top).s.size
    return values | {"block_gap": block_gap(solved.s, p)} | chance_metrics(k, p, shape)


def drift_metrics(
    before: Solved, now: Solved, of_weights: Mapping[str, float], whole: Solved | None
) -> dict[str, float]:
    """The scalars of what changed in a matrix between two moments.

    Args:
        before: the earlier spectrum, or its first values alone.
        now: the later spectrum.
        of_weights: results of `update_norms` and `block_energies`, where the weights are there.
        whole: the newest whole spectrum before `now`; None without.

    Returns:
        "cos_*" and "block_cos_*" (`subspaces.cosine_metrics`), "delta_sv_rel" (`metrics.relative_change`), all of
        `of_weights`, and if these have "update_norm2_high", "turn_bound" (`subspaces.turn_bound`). Metrics of the block
        are absent where `before` has none. If `now` is a whole spectrum, also `subspaces.last_cosines` with `whole`.
    """
    values = cosine_metrics("cos", before, now) | dict(of_weights) | {"delta_sv_rel": relative_change(before, now)}
    if now.full and whole is not None:
        values |= last_cosines("cos", whole, now)
    if "update_norm2_high" in of_weights and blocks_of(before, now):
        values["turn_bound"] = turn_bound(before, now, of_weights["update_norm2_high"])
    return values


def refresh(
    update: int,
    stacks: Stacks,
    settings: SpectralSettings,
    memory: Memory,
    *,
    cancelled: Callable[[], bool] = never,
    log: Callable[[str], object] = LOG.warning,
    full: bool = True,
    describing: Callable[..., dict[str, dict[str, float]]] | None = None,
) -> Refreshed:
    """Solve the copies, compare them with `memory`, and store them in it once everything has succeeded.

    Args:
        update: number of updates so far.
        stacks: the copies by kind.
        settings: what is computed.
        memory: earlier refreshes; changed in place.
        cancelled: called before each matrix; True ends the refresh.
        log: called with a line when a matrix is not solved as asked.
        full: whether to compute the whole spectra or the first values alone.
        describing: called in place of `describe`, for example to run it in another process.

    Raises:
        Cancelled: `cancelled()` was true.
    """

    def solved_of(kind: str, of_kind: list[MatrixStack], full: bool) -> dict[str, Solved]:
        of_log: dict[str, Any] = {"cancelled": cancelled, "log": lambda line: log(f"{kind}: {line}")}
        if full:
            return solve_all(of_kind, settings, **of_log)
        known = {key.removeprefix(f"{kind}/"): one.start for key, one in memory.last.items()}
        starts = {name: known[name] for stack in of_kind for name in stack.names if name in known}
        return solve_first(of_kind, settings, starts, **of_log)

    if memory.weights and not memory.last:
        before, memory.weights = memory.weights, {}  # if solving them fails, it is not tried again
        for kind, of_kind in before.items():
            memory.last |= {f"{kind}/{name}": one for name, one in solved_of(kind, of_kind, True).items()}
        memory.weights = before
        if memory.whole_update == memory.last_update:
            memory.whole = memory.last
    result = Refreshed(update, full=full)
    of_weights: dict[str, dict[str, float]] = {}
    for kind, of_kind in stacks.items():
        if kind == DIRECTION:
            continue
        found = solved_of(kind, of_kind, full)
        last = {name: memory.last[f"{kind}/{name}"] for name in found if f"{kind}/{name}" in memory.last}
        result.solved |= {f"{kind}/{name}": one for name, one in found.items()}
        is_described, threads = settings.updates and kind == MODEL, settings.cpu_threads
        blocks = {name: both[0] for name in last if (both := blocks_of(last[name], found[name]))}
        parts: list[dict[str, dict[str, float]]] = []
        for before, now in paired(memory.weights.get(kind, ()), of_kind):
            parts.append(of_pair := update_norms(before, now, threads, settings.solver))
            if is_described:
                norms = None if full else [values["update_norm2"] for values in of_pair.values()]
                parts.append(update_spectra("dw", now, blocks, threads, norms, before.matrices_NRC))
        if is_described:
            tops = {name: one.block or one.top for name, one in found.items()}
            for of in itertools.chain.from_iterable(map(in_pieces, stacks.get(DIRECTION, ()))):
                norms = None if full else spectral_norms(of.matrices_NRC, settings.solver, threads).value.tolist()
                parts.append(update_spectra("opt", of, tops, threads, norms))
        for part in parts + [block_energies(last, found, stack, settings.cpu_threads) for stack in of_kind]:
            for name, values in part.items():
                of_weights.setdefault(f"{kind}/{name}", {}).update(values)
    compared = Memory(memory.first, memory.last, whole=memory.whole)
    result.values = (describing or describe)(result.solved, of_weights, compared, settings)
    memory.keep(result, stacks)
    return result


def describe(
    solved: Mapping[str, Solved],
    of_weights: Mapping[str, Mapping[str, float]],
    memory: Memory,
    settings: SpectralSettings,
) -> dict[str, dict[str, float]]:
    """All scalars of one refresh's matrices: of each alone, compared with those in `memory`, and with the EMA's.

    All dictionaries are by key. `of_weights`: see `drift_metrics`.
    """

    def described_by(key: str) -> dict[str, float]:
        one = solved[key]
        values = matrix_metrics(one, settings) | dict(of_weights.get(key, {}))
        if key in memory.last:
            values |= drift_metrics(memory.last[key], one, of_weights.get(key, {}), memory.whole.get(key))
        if key in memory.first:
            values |= _cosines("cos0", memory.first[key], one)
        kind, _, name = key.partition("/")
        if kind == MODEL and f"{EMA}/{name}" in solved:
            values |= _cosines("ema_cos", solved[f"{EMA}/{name}"], one)
        return values

    return dict(zip(solved, side_by_side(described_by, solved, settings.cpu_threads), strict=True))


def _cosines(prefix: str, before: Solved, now: Solved) -> dict[str, float]:
    values = cosine_metrics(prefix, before, now)
    return values | last_cosines(prefix, before, now) if before.full and now.full else values
