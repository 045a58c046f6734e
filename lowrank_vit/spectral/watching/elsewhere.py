"""The parts of a refresh that another process can do: module-level functions, and stacks as arrays to be sent to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch

from lowrank_vit.spectral.measures.aggregates import aggregates, circuit_values
from lowrank_vit.spectral.measures.circuits import BlockCircuits
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.solving.solve import MatrixStack
from lowrank_vit.spectral.watching.refresh import Memory, Refreshed, SpectralSettings, Stacks, refresh
from lowrank_vit.spectral.watching.store import SpectraStore

Prepare = Callable[[int, Mapping[str, float]], Any]


def flattened(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The scalars of a refresh and their means by "<key>/<metric>"."""
    groups = (values, aggregates(values))
    return {f"{key}/{metric}": v for group in groups for key, found in group.items() for metric, v in found.items()}


def flattened_circuits(circuits: Mapping[str, BlockCircuits]) -> dict[str, float]:
    """The scalars of all circuits and their means by "<key>/<metric>"."""
    return {f"{key}/{metric}": v for key, found in circuit_values(circuits).items() for metric, v in found.items()}


def saved(
    store: SpectraStore, found: Refreshed, scalars: Mapping[str, float], prepare: Prepare | None
) -> tuple[SpectraStore, Any]:
    """Save one refresh with `SpectraStore.save`; return the store, maybe another process's copy, and what is prepared.

    The latter is `prepare` of the update and the scalars, called here because nobody waits for this process.
    """
    store.save(found.update, found.solved, full=found.full, circuits=found.circuits, scalars=scalars)
    return store, prepare and prepare(found.update, scalars)


Arrays = dict[str, list[tuple[tuple[str, ...], frozenset[str], dict[str, int], np.ndarray, torch.dtype]]]
"""Stacks as they are sent to another process: names, fused names, ranks, bytes (N, R, C x item size), and dtype."""


def as_arrays(stacks: Stacks) -> Arrays:
    """Stacks on a CPU as `Arrays`: views of their memory."""

    def of(stack: MatrixStack) -> tuple[tuple[str, ...], frozenset[str], dict[str, int], np.ndarray, torch.dtype]:
        matrices = stack.matrices_NRC
        as_bytes = matrices.contiguous().view(torch.uint8).numpy()
        return stack.names, stack.fused, dict(stack.ranks), as_bytes, matrices.dtype

    return {kind: [of(stack) for stack in of_kind] for kind, of_kind in stacks.items()}


def as_stacks(arrays: Arrays) -> Stacks:
    """The inverse of `as_arrays`."""
    return {
        kind: [
            MatrixStack(names, torch.from_numpy(array).view(dtype), fused, ranks)
            for names, fused, ranks, array, dtype in of
        ]
        for kind, of in arrays.items()
    }


def refreshed_aside(
    tell: Callable[[str], object],
    update: int,
    full: bool,
    stacks: Arrays,
    memory: Memory,
    settings: SpectralSettings,
) -> tuple[Refreshed, dict[str, Solved]]:
    """A refresh in another process. `tell` gets log lines, and an empty line before each matrix.

    The second result is the memory's `whole` where that was empty, since the refresh may have solved it again.
    """

    def goes_on() -> bool:
        tell("")
        return False

    torch.set_num_threads(1)
    memory.weights = as_stacks(cast(Arrays, memory.weights))
    had_whole = bool(memory.whole)
    found = refresh(update, as_stacks(stacks), settings, memory, full=full, cancelled=goes_on, log=tell)
    return found, {} if had_whole else memory.whole
