"""The matrices that a monitor watches: copies of them, and what an earlier process of the run has stored of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.foreign import unwrapped
from lowrank_vit.ranks.world import Channel
from lowrank_vit.spectral.heads import Circuits, Heads, attention_blocks
from lowrank_vit.spectral.layers import layer_of, matrices_of, ranks_of_factors, targets_of_model
from lowrank_vit.spectral.measures.initial import FarEntry, far_entries_by_name
from lowrank_vit.spectral.measures.metrics import recorded_indices
from lowrank_vit.spectral.measures.updates import update_direction, why_no_direction
from lowrank_vit.spectral.select import Rename, Target, Targets, fused_of, take_targets
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.solving.solve import stack_by_shape
from lowrank_vit.spectral.watching.files import list_spectra, read_newest_circuits
from lowrank_vit.spectral.watching.refresh import DIRECTION, FOR_HEADS, MODEL, Memory, SpectralSettings, Stacks
from lowrank_vit.spectral.watching.store import Kept, SpectraStore

_ALIKE = 1e-9
"""Relative difference up to which two values count as the same; values this close may have changed places."""

_ROUNDING = 1e-12
"""Share of the greatest value up to which values are rounding, as those beyond the rank: their ratios mean nothing."""


class Watched:
    """The target matrices of a model and of its EMA; each rank copies and computes its share of them."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        targets: Targets,
        settings: SpectralSettings,
        ranks: Channel,
        split_qkv: bool = False,
        circuits: Circuits = "none",
        optimizer: Optimizer | None = None,
        rename: Rename | None = None,
    ) -> None:
        """Choose the matrices and this rank's share; `models` are by kind, `circuits` are those of their heads.

        With an `optimizer` its update directions of the model's matrices are copied too, where they are known.

        Raises:
            UserError: a target matches nothing or has no values, the heads have no such `circuits`, or model and EMA
                differ in their targets.
        """
        models = {kind: unwrapped(one) for kind, one in models.items()}
        self._models, self._optimizer = models, optimizer
        chosen = {kind: targets_of_model(one, targets, split_qkv, "", rename) for kind, one in models.items()}
        every = chosen[MODEL]
        weights = {kind: matrices_of(one, chosen[kind]) for kind, one in models.items()}
        for name, matrix in (named for of_kind in weights.values() for named in of_kind.items()):
            if matrix.is_meta:
                raise UserError(f"{name} has no values yet: it is on the device meta. Load the weights first.")
        shapes = {name: tuple(w.shape) for name, w in weights[MODEL].items()}
        for of_kind in weights.values():
            if list(of_kind) != list(shapes) or any(tuple(w.shape) != shapes[name] for name, w in of_kind.items()):
                raise UserError("ema_model: its targets differ from the model's; give the average of this model")
        self.matrices: dict[str, dict[str, Any]] = {
            name: {"shape": list(shape), **recorded_indices(min(shape), settings.topk, settings.interval)._asdict()}
            for name, shape in shapes.items()
        }
        """By name: "shape", and the recorded indices "top" and "last", 1-based."""
        self.keys = [f"{kind}/{name}" for kind in models for name in every]
        """The keys of all ranks, in the order in which they are stored."""
        shares = share_out(shapes, ranks.size)
        self._mine = {name: every[name] for name in shares[ranks.rank]}
        self._every = every if ranks.rank == 0 else {}
        self._num_ranks = ranks.size
        if rename is not None and circuits != "none":
            raise UserError("circuits name matrices as the model does, without rename: leave out rename, or circuits")
        blocks = attention_blocks(models[MODEL], circuits, "circuits")
        self.heads = Heads.shared_out(blocks, ranks.size)[ranks.rank] if blocks else None
        """This rank's share of the circuits."""
        self.num_workers = min(ranks.size, max(sum(map(bool, shares)), len(blocks)))
        """How many of the first ranks have a share of the work."""
        self._every_head = Heads(blocks, tuple(blocks)) if blocks else None

    @property
    def own(self) -> list[str]:
        """The matrices of this rank, by name."""
        return list(self._mine)

    def far_entries(self) -> dict[str, list[FarEntry]]:
        """On the first rank, single entries far out in the model's matrices, see `initial.far_entries`."""
        return far_entries_by_name(matrices_of(self._models[MODEL], self._every))

    def copies(self, update: int) -> tuple[Stacks, Kept | None]:
        """Copies of this rank's share of the weights as they are now, and on the first rank also of all weights."""
        stacks = self._stacks(self._mine, self.heads)
        if not self._every:
            return stacks, None
        weights = {
            f"{kind}/{name}": matrix
            for kind, of_kind in (
                self._stacks(self._every, self._every_head) if self._num_ranks > 1 else stacks
            ).items()
            for stack in of_kind
            for name, matrix in zip(stack.names, stack.matrices_NRC, strict=True)
        }
        return stacks, Kept(update, weights)

    def _stacks(self, watched: dict[str, Target], heads: Heads | None) -> Stacks:
        weights, fused = self._weights(watched, heads), fused_of(watched)
        ranks = {kind: ranks_of_factors(one, watched) for kind, one in self._models.items()}
        return {kind: stack_by_shape(of_kind, fused, ranks.get(kind)) for kind, of_kind in weights.items()}

    def _weights(self, watched: dict[str, Target], heads: Heads | None) -> dict[str, dict[str, Tensor]]:
        """The weights to copy, by kind and name; kinds with `FOR_HEADS` hold what circuits need in addition."""
        weights = {kind: matrices_of(one, watched) for kind, one in self._models.items()}
        if heads:  # with several ranks, this rank's matrices may not be those of its heads
            among = watched if self._num_ranks == 1 else ()
            weights |= {kind + FOR_HEADS: heads.others(one, among) for kind, one in self._models.items()}
        if self._optimizer is not None:
            weights[DIRECTION] = directions_of(self._models[MODEL], self._optimizer, watched)
        return weights

    def stacks_of(self, kept: Kept, heads: Heads | None = None) -> Stacks:
        """This rank's share of kept weights, as it would have copied them; empty if the matrices are different."""
        stacks: Stacks = {}
        for kind, own in self._weights(self._mine, heads).items():
            found = {name: kept.weights.get(f"{kind}/{name}") for name in own}
            if any(w is None or w.shape != own[name].shape for name, w in found.items()):
                if kind == DIRECTION or kind.endswith(FOR_HEADS):  # the process that kept the weights had none
                    continue
                return {}
            weights = {name: w.to(own[name]) for name, w in found.items() if w is not None}
            stacks[kind] = stack_by_shape(weights, fused_of(self._mine))
        return stacks

    def left_out(self, stacks: Stacks) -> list[str]:
        """In words, what would have been copied beside the matrices but is missing in the result of `stacks_of`."""
        kinds = [kind for kind in self._weights(self._mine, self.heads) if kind not in stacks]
        return list(dict.fromkeys("the optimizer's direction" if kind == DIRECTION else "circuits" for kind in kinds))

    def remember(self, store: SpectraStore, update: int, kept: Kept | None, say: Callable[[str], object]) -> Memory:
        """The memory from what an earlier process stored up to `update`, if it recorded the same vectors, and kept.

        If the kept snapshot's vectors are different, or the store's limit has thinned them out, only its weights are
        remembered. `say` reports if no first vectors are left to compare with.
        """
        stored = store.stored(update)
        keys = {f"{kind}/{name}": name for kind in self._models for name in self._mine}

        def fits(key: str, found: Solved) -> bool:
            matrix = self.matrices[keys[key]]
            ends = {"top": found.top, "last": found.last} if found.full else {"top": found.top}
            at = [i - 1 for i in matrix["top"]]  # with another interval there may be as many
            if found.top.s.size != len(at):
                return False
            rounding = _ROUNDING * float(found.s[0]) if found.s.size else 0.0
            is_whole = found.s.size == min(matrix["shape"])
            if is_whole and not np.allclose(found.s[at], found.top.s, _ALIKE, rounding, equal_nan=True):
                return False
            expected = [(side, len(matrix[end])) for end in ends for side in matrix["shape"]]
            shapes = [side.shape for end in ends.values() for side in (end.u, end.v)]
            return shapes == expected and (found.block is None or found.block.s.size == matrix["top"][-1])

        first, last, whole = (
            {key: one for key, one in of.items() if key in keys and fits(key, one)}
            for of in (stored.first, stored.last, stored.whole)
        )
        if self._every and stored.first and not first:  # the first rank reports it for all
            say(
                "the stored spectra are of other vectors or matrices, so cos0_* compare with the next whole refresh "
                "from now on."
            )
        memory = Memory(first, whole=whole, whole_update=stored.whole_update if whole else None)
        weights = self.stacks_of(kept) if kept else {}
        weights.pop(DIRECTION, None)
        if kept and weights and not (last and kept.update == stored.last_update):
            memory.last_update, memory.weights = kept.update, weights
            if kept.full:
                memory.whole, memory.whole_update = {}, kept.update
        elif last:
            memory.last, memory.last_update, memory.weights = last, stored.last_update, weights
        return memory


def directions_of(model: nn.Module, optimizer: Optimizer, watched: Mapping[str, Target]) -> dict[str, Tensor]:
    """The optimizer's update directions of watched matrices, by name; those without a known one are left out."""
    groups, found = _groups(optimizer), dict[str, Tensor]()
    for module in {target.module for target in watched.values()}:
        weight = _weight(model, Target(module))
        if weight is not None and weight in groups:
            direction = update_direction(optimizer, groups[weight], weight)
            found |= {} if direction is None else {module: direction}
    return take_targets(found.__getitem__, {name: of for name, of in watched.items() if of.module in found})


def remark_on_directions(model: nn.Module, optimizer: Optimizer, watched: Mapping[str, Target]) -> str:
    """A line for the log about the matrices that `directions_of` leaves out, and why; empty where it has all."""
    groups, without = _groups(optimizer), dict[str, list[str]]()
    for name, target in watched.items():
        weight = _weight(model, target)
        if weight is None:
            why = "the layer is factorised or has an adapter, and the optimizer steps those"
        else:
            why = why_no_direction(optimizer, groups[weight]) if weight in groups else "the optimizer does not step it"
        if why:
            without.setdefault(why, []).append(name)
    if not without:
        return ""
    parts = (
        "" if len(names) == len(watched) else f" for {len(names)} of {len(watched)} matrices (such as {names[0]})"
        for names in without.values()
    )
    of_each = ",".join(f"{which}: {why}" for which, why in zip(parts, without, strict=True))
    return f"--spec-updates: no spectra of the optimizer's direction{of_each}; spectra of changes are recorded"


def _groups(optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
    return {parameter: group for group in optimizer.param_groups for parameter in group["params"]}


def _weight(model: nn.Module, target: Target) -> nn.Parameter | None:
    """The target's parameter; None for a layer that is factorised, has an adapter or is parametrized."""
    layer = layer_of(model, target)
    owner, _, name = target.module.rpartition(".")
    layer, name = (layer_of(model, Target(owner)) if owner else model, name) if layer is None else (layer, "weight")
    return None if layer is None else dict(layer.named_parameters(recurse=False)).get(name)


def share_out(shapes: Mapping[str, Sequence[int]], world_size: int) -> list[list[str]]:
    """The names each rank computes: the costliest goes first, to the rank with the least work; the same on every rank.

    The cost of an (R, C) matrix is that of its Gram matrix and of the eigenvalues, L K^2 + 4/3 K^3 (L the long side, K
    the short one). Each list is in the order of `shapes`; if there are more ranks than names, the last have none.
    """
    costs = {name: max(shape) * min(shape) ** 2 + 4 / 3 * min(shape) ** 3 for name, shape in shapes.items()}
    loads, owner = [0.0] * world_size, dict[str, int]()
    for name in sorted(costs, key=lambda name: -costs[name]):  # stable: equal costs stay in the model's order
        owner[name] = min(range(world_size), key=lambda rank: loads[rank])
        loads[owner[name]] += costs[name]
    return [[name for name in shapes if owner[name] == rank] for rank in range(world_size)]


@dataclass
class TakenUp:
    """What an earlier process has left for a resumed run."""

    kept: Kept | None = None
    """The newest snapshot."""
    update: int = -1
    """Its update."""
    again: Stacks = field(default_factory=Stacks)
    """This rank's copies of it, if all ranks are to compute its refresh again."""
    memory: Memory = field(default_factory=Memory)
    """What the next refresh is compared with."""
    taken: int | None = None
    """The update of the last refresh taken, if all ranks know the same one."""


def begin_store(
    store: SpectraStore, resumed_update: int | None, circuits: str, say: Callable[[str], object], *, is_new: bool
) -> None:
    """On the first rank, make the store or go on with it.

    Args:
        store: the store of the run.
        resumed_update: see `SpectralMonitor`; None for a new run.
        circuits: those of the heads; empty without heads.
        say: called with warnings.
        is_new: whether to warn if a resumed run has no earlier spectra.
    """
    try:
        store.begin()
        if resumed_update is not None:
            if is_new and not list_spectra(store.path):
                say(f"warning: {store.path} has no spectra to go on from: they begin at update {resumed_update}.")
            store.forget_after(resumed_update)
            was = read_newest_circuits(store.path).circuits
            if circuits and was not in ("", circuits):
                say(
                    f"warning: circuits are {circuits} from update {resumed_update} on and were {was} before: "
                    "their curves mix the two."
                )
    except Exception as error:  # the cause may be gone before the next refresh
        say(f"warning: {error}. Training goes on.")


def take_up(
    watched: Watched,
    store: SpectraStore,
    ranks: Channel,
    resumed_update: int,
    recorded_update: int | None,
    is_due: Callable[[int], bool],
    say: Callable[[str], object],
) -> TakenUp:
    """Read what an earlier process has left for this one, which resumes from `resumed_update`; all ranks call it.

    `recorded_update`: see `SpectralMonitor`.
    """
    found, failure = TakenUp(), None
    try:
        kept = found.kept = store.kept(resumed_update)
        found.update = kept.update if kept else resumed_update
        if recorded_update is not None and found.update > recorded_update:
            if kept:
                found.again = watched.stacks_of(kept, watched.heads)
            elif is_due(resumed_update):  # no snapshot could be kept, but the model has the weights
                found.again, found.kept = watched.copies(resumed_update)
    except Exception as error:  # a broken store must not stop the training
        found, failure = TakenUp(), error
    if not _is_common(ranks, found.update if found.again else -1):
        found.again = {}
    if found.again and ranks.rank == 0 and (lost := watched.left_out(found.again)):
        say(
            f"warning: the refresh of update {found.update} is done again without {' and '.join(lost)}: "
            "its weights were kept with other options."
        )
    until, kept = resumed_update, found.kept
    if found.again:
        until, kept = found.update - 1, kept and kept.before
    try:
        found.memory = watched.remember(store, until, kept, say) if failure is None else Memory()
    except Exception as error:
        failure = error
    if failure is not None:
        say(f"warning: the earlier spectra in {store.path} cannot be read ({failure}). Training goes on without them.")
    if _is_common(ranks, -1 if found.memory.last_update is None else found.memory.last_update):
        found.taken = found.memory.last_update
    return found


def _is_common(ranks: Channel, number: int) -> bool:
    """Whether all ranks have the same number here."""
    try:
        greatest, least = ranks.agree(number)(), -ranks.agree(-number)()
    except RuntimeError:  # another rank is gone
        return False
    return greatest == least
