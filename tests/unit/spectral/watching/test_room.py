"""What a refresh takes beside the copies that are kept: counted, allocation by allocation, in torch and in numpy."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_vit.spectral.solving import pieces
from lowrank_vit.spectral.solving.extremes import Solver
from lowrank_vit.spectral.solving.solve import stack_by_shape
from lowrank_vit.spectral.watching.refresh import DIRECTION, MODEL, Memory, SpectralSettings, Stacks, refresh
from tests.device_path import CudaPath

SHAPE = (600, 256)
LARGEST = 8 * SHAPE[0] * SHAPE[1]
"""Bytes of a matrix in float64."""
AT_ONCE = 2
"""Matrices of a piece on CUDA's way."""


class Room(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while they are there, and of numpy's arrays."""

    def __init__(self, *kept: Tensor) -> None:
        super().__init__()
        self._kept = {one.untyped_storage().data_ptr() for one in kept}
        self._uses, self.now, self.most = Counter[int](), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                if (at := storage.data_ptr()) not in self._kept:
                    self.now += 0 if self._uses[at] else storage.nbytes()
                    self._uses[at] += 1
                    weakref.finalize(one, self._gone, at, storage.nbytes())
        self.most = max(self.most, self.now + tracemalloc.get_traced_memory()[0])
        return made

    def _gone(self, at: int, size: int) -> None:
        self._uses[at] -= 1
        self.now -= 0 if self._uses[at] else size

    def __enter__(self) -> Any:
        gc.collect()
        tracemalloc.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        left, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.left = self.now + left
        self.most = max(self.most, most)


def room_of(count: int, solver: Solver, *, full: bool) -> tuple[int, int]:
    """Bytes at most, and those of the results, of a refresh of so many matrices with a refresh before it."""
    settings = SpectralSettings(topk=2, solver=solver, full_every=2, updates=True)
    generator = torch.Generator().manual_seed(0)

    def stacks(size: float) -> Stacks:
        names = [f"blocks.{i}.attn.qkv" for i in range(count)]
        scales = torch.tensor([1.0, 1.2, 1.5]).repeat_interleave(SHAPE[0] // 3)[:, None]
        made = {name: size * scales * torch.randn(SHAPE, generator=generator) for name in names}
        return {MODEL: stack_by_shape(made, names), DIRECTION: stack_by_shape(made)}

    before, now = stacks(1.0), stacks(0.003)
    now[MODEL][0].matrices_NRC.add_(before[MODEL][0].matrices_NRC)
    memory = Memory()
    refresh(0, before, settings, memory)
    kept = [one.matrices_NRC for of in (before, now) for of_kind in of.values() for one in of_kind]
    with Room(*kept) as room:
        found = refresh(1, now, settings, memory, full=full)
    assert len(found.solved) == count
    return room.most, room.left


@pytest.mark.parametrize(
    ("way", "solver", "full"),
    [
        ("cpu", "gram64", True),
        ("cpu", "gram64", False),
        ("cpu", "svd", True),
        ("cuda", "gram64", True),
        ("cuda", "gram64", False),
    ],
)
def test_a_refresh_takes_a_room_that_does_not_grow_with_the_number_of_matrices(
    way: str, solver: Solver, full: bool, monkeypatch: pytest.MonkeyPatch, on_cuda_path: CudaPath
) -> None:
    monkeypatch.setattr(pieces, "PIECE", AT_ONCE * LARGEST)
    with on_cuda_path() if way == "cuda" else nullcontext():
        _, few, many = (room_of(count, solver, full=full) for count in (1, 4, 6))  # the first makes what is kept
    beside = [(most - left) / LARGEST for most, left in (few, many)]
    assert beside[1] == pytest.approx(beside[0], abs=0.1)
    assert beside[1] < (4 * AT_ONCE if way == "cuda" else 4)
