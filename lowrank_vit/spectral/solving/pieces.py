"""Groups of matrices in pieces that are worked on together, so that the work needs bounded extra memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from lowrank_vit.common.devices import cuda_path
from lowrank_vit.spectral.solving.solve import MatrixStack

PIECE = 1 << 29
"""Most bytes, in float64, of the matrices that CUDA's batched routines get at once; a single one may have more.

That is all 12 matrices of any kind in ViT-B, or half of the 24 large ones in ViT-L. Larger batches are hardly faster
(not yet run on a GPU).
"""


def slices_of(matrices_NRC: Tensor, on_cpu: int | None = None) -> list[slice]:
    """Pieces of about the same size, in order: within `PIECE` on CUDA, up to `on_cpu` matrices (None: all) on a CPU.

    On a CPU most work is matrix by matrix anyway. Where it copies several, pass the number of threads.
    """
    n, rows, cols = matrices_NRC.shape
    most = PIECE // max(1, 8 * rows * cols) if cuda_path(matrices_NRC) else on_cpu or n
    parts = -(-n // max(1, most)) or 1
    size = max(1, -(-n // parts))
    return [slice(first, min(first + size, n)) for first in range(0, max(1, n), size)]


def in_pieces(stack: MatrixStack, on_cpu: int | None = None) -> list[MatrixStack]:
    """The stack's pieces by `slices_of`, as views."""
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
    """Names of matrices of one shape, dtype and device, in the pieces that `in_pieces` makes of their stack."""
    groups: dict[object, list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault((weight.shape, weight.dtype, weight.device), []).append(name)
    for names in groups.values():
        for one in slices_of(weights[names[0]].expand(len(names), -1, -1), on_cpu):
            yield names[one]


def _of_names(stack: MatrixStack, names: tuple[str, ...], matrices_NRC: Tensor) -> MatrixStack:
    ranks = {name: rank for name, rank in stack.ranks.items() if name in names}
    return replace(stack, names=names, matrices_NRC=matrices_NRC, fused=stack.fused.intersection(names), ranks=ranks)
