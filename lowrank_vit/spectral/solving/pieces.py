"""Which matrices of a group are worked on together, so that the work takes a bounded room beside the group itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from lowrank_vit.common.devices import cuda_path
from lowrank_vit.spectral.solving.solve import MatrixStack

PIECE = 1 << 29
"""Bytes in float64 of the matrices that CUDA's batched routines get at once, at most; a single one may have more.

All 12 of any kind of ViT-B's, half of the 24 large ones of ViT-L's; more make a batch no faster by much (not yet run on
a GPU).
"""


def slices_of(matrices_NRC: Tensor, on_cpu: int | None = None) -> list[slice]:
    """Pieces of about the same size, in order: on CUDA within `PIECE`, on a CPU `on_cpu` matrices; default: all.

    On a CPU most work is matrix by matrix anyway. Where it copies several, these are to be as many as there are
    threads.
    """
    n, rows, cols = matrices_NRC.shape
    most = PIECE // max(1, 8 * rows * cols) if cuda_path(matrices_NRC) else on_cpu or n
    parts = -(-n // max(1, most)) or 1
    size = max(1, -(-n // parts))
    return [slice(first, min(first + size, n)) for first in range(0, max(1, n), size)]


def in_pieces(stack: MatrixStack, on_cpu: int | None = None) -> list[MatrixStack]:
    """The stack by `slices_of`, as views."""
    slices = slices_of(stack.matrices_NRC, on_cpu)
    if len(slices) == 1:
        return [stack]
    return [_of_names(stack, stack.names[one], stack.matrices_NRC[one]) for one in slices]


def some_of(stack: MatrixStack, which: list[int]) -> MatrixStack:
    """Copies of some matrices; the stack itself where these are all."""
    if len(which) == len(stack.names):
        return stack
    return _of_names(stack, tuple(stack.names[i] for i in which), stack.matrices_NRC[which])


def names_in_pieces(weights: Mapping[str, Tensor], on_cpu: int) -> Iterator[list[str]]:
    """Names of one shape, type and device, by the pieces that `in_pieces` makes of a stack of all of these."""
    groups: dict[object, list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault((weight.shape, weight.dtype, weight.device), []).append(name)
    for names in groups.values():
        for one in slices_of(weights[names[0]].expand(len(names), -1, -1), on_cpu):
            yield names[one]


def _of_names(stack: MatrixStack, names: tuple[str, ...], matrices_NRC: Tensor) -> MatrixStack:
    ranks = {name: rank for name, rank in stack.ranks.items() if name in names}
    return replace(stack, names=names, matrices_NRC=matrices_NRC, fused=stack.fused.intersection(names), ranks=ranks)
