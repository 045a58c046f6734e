"""The same as `gram` for a whole stack of matrices at once, by torch's batched routines: for CUDA, but on any device.

torch >= 2.12 has a batched `eigh` for large matrices on CUDA (cusolverDnXsyevBatched). Older versions loop over the
matrices inside the same call. That is slower, but still on the side stream and in the worker thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.spectral.solving.gram import (
    DEPTH,
    SPLIT,
    gram_floor,
    inverse_on,
    inverse_within,
    leans,
    needs_split,
    of_small,
)
from lowrank_vit.spectral.solving.index import FACTOR, probes


@dataclass
class StackEnds:
    """`Ends` of N matrices: `squares` (N, K) and `floor` (N,) on the host, `basis` (N, K, M) on the device.

    `inverses` has those of each matrix, as functions of tensors.
    """

    squares: np.ndarray
    basis: Tensor
    floor: np.ndarray
    inverses: list[tuple[Callable[[Tensor], Tensor], ...]]

    def take(self, which: list[int]) -> StackEnds:
        """The ends of some matrices, copied."""
        return StackEnds(self.squares[which], self.basis[which], self.floor[which], [self.inverses[i] for i in which])


@dataclass
class GramStack:
    """N matrices, and all eigenvalues (N, K), ascending, and eigenvectors (N, K, K) of their Gram matrices."""

    matrices_NRC: Tensor
    squares: np.ndarray
    vectors_NKK: Tensor

    @classmethod
    def of(cls, matrices_NRC: Tensor) -> GramStack:
        """By torch's batched eigensolver, on the device of the stack."""
        squares_NK, vectors_NKK = torch.linalg.eigh(gram_stack(matrices_NRC))
        return cls(matrices_NRC, squares_NK.cpu().numpy(), vectors_NKK)

    def ends(self, m: int, units: np.ndarray | None) -> StackEnds:
        """The ends from one Gram matrix each; for parts (`units` given) with `inverses`."""
        basis = torch.cat([self.vectors_NKK[..., :m], self.vectors_NKK[..., -m:]], dim=-1).contiguous()
        inverses: list[tuple[Callable[[Tensor], Tensor], ...]] = [()] * len(self.squares)
        for i in () if units is None else np.flatnonzero(leans(self.squares, units)).tolist():
            inverses[i] = (self._inverse(i, m),)
        return StackEnds(self.squares.copy(), basis, gram_floor(self.squares), inverses)

    def _inverse(self, i: int, below: int) -> Callable[[Tensor], Tensor]:
        vectors_KK, squares = self.vectors_NKK[i], self.squares[i, below:] + gram_floor(self.squares[i])
        return functools.partial(inverse_on, vectors_KK[:, below:], torch.from_numpy(1 / squares).to(vectors_KK))

    def errors(self) -> np.ndarray:
        """`Tridiagonal.error` of each matrix (N,), including the vectors' distance from orthonormal."""
        z_KP = torch.from_numpy(probes(self.squares.shape[1])).to(self.vectors_NKK)
        squares_NK1 = torch.from_numpy(self.squares.copy()).to(self.vectors_NKK)[..., None]
        found = self.vectors_NKK @ (squares_NK1 * (self.vectors_NKK.mT @ z_KP))
        tall = (_tall_float64(matrix) for matrix in self.matrices_NRC)
        true = torch.stack([tall_LK.T @ (tall_LK @ z_KP) for tall_LK in tall])
        off = self.vectors_NKK.mT @ (self.vectors_NKK @ z_KP) - z_KP
        # Eigenvalues of X diag(x) X^T are within |X^T X - I| x_1 of x (Ostrowski, Horn & Johnson 4.5.9).
        lengths = [torch.linalg.vector_norm(x, dim=1).amax(dim=1).cpu().numpy() for x in (found - true, off)]
        return FACTOR * (lengths[0] + lengths[1] * self.squares[:, -1])

    def split(self, ends: StackEnds, which: list[int], m: int, units: np.ndarray, depth: int = 0) -> None:
        """Put the split ends of the matrices `which` into `ends`; see `Tridiagonal.split`."""
        k = self.squares.shape[1]
        below = np.count_nonzero(self.squares < SPLIT**2 * self.squares[:, -1:], axis=1)
        for q in sorted(set(below[which].tolist()) - {0}):
            same = [i for i in which if below[i] == q]
            tall_NLK = (_tall_float64(self.matrices_NRC[i]) for i in same)
            rest = [tall_LK @ self.vectors_NKK[i, :, :q] for tall_LK, i in zip(tall_NLK, same, strict=True)]
            deeper, _ = ends_of_stack(torch.stack(rest), m, units[same], depth + 1)
            least = min(m, q)
            for at, i in enumerate(same):
                v_KK = self.vectors_NKK[i]
                basis_KM = v_KK[:, :q] @ deeper.basis[at]
                top = torch.cat([basis_KM[:, least:], v_KK[:, max(q, k - m) :]], dim=1)[:, -m:]
                basis_KM = torch.cat([basis_KM[:, :least], v_KK[:, q:m], top], dim=1)
                ends.basis[i] = torch.linalg.qr(basis_KM)[0]
                ends.squares[i] = np.sort(np.concatenate([deeper.squares[at], self.squares[i, q:]]))
                inverse = self._inverse(i, q)
                inner = (functools.partial(inverse_within, v_KK[:, :q], one) for one in deeper.inverses[at])
                ends.inverses[i] = (*inner, inverse)
            ends.floor[same] = deeper.floor


def ends_of_stack(
    matrices_NRC: Tensor, m: int, units: np.ndarray | None = None, depth: int = 0
) -> tuple[StackEnds, GramStack | None]:
    """`gram.ends_of_matrix` for a stack of finite, scaled matrices of any float dtype."""
    if 2 * m >= min(matrices_NRC.shape[1:]):
        return _ends_of_small_stack(matrices_NRC, m, units), None
    stack = GramStack.of(matrices_NRC)
    ends = stack.ends(m, units)
    if units is None:
        units = stack.squares[:, -1].copy()
    if depth < DEPTH:
        stack.split(ends, np.flatnonzero(needs_split(stack.squares, m, units, depth)).tolist(), m, units, depth)
    return ends, stack


def _ends_of_small_stack(matrices_NRC: Tensor, m: int, units: np.ndarray | None) -> StackEnds:
    tall = torch.stack([_tall_float64(matrix) for matrix in matrices_NRC])
    _, s_NK, vh_NKK = torch.linalg.svd(tall, full_matrices=False)
    host = s_NK.cpu().numpy(), vh_NKK.mT.cpu().numpy(), np.ones(len(tall)) if units is None else units
    each = [of_small(s, v, m, float(unit)) for s, v, unit in zip(*host, strict=True)]
    basis = torch.from_numpy(np.stack([one.basis for one in each])).to(tall)
    inverses: list[tuple[Callable[[Tensor], Tensor], ...]] = [()] * len(each)
    others = max(s_NK.shape[1] - m, 0)
    for i, one in enumerate(each):
        if one.inverses:
            inverse_squares = 1 / (s_NK[i, :others] ** 2 + one.floor)
            inverses[i] = (functools.partial(inverse_on, vh_NKK[i, :others].mT, inverse_squares),)
    squares, floor = (np.array([getattr(one, what) for one in each]) for what in ("squares", "floor"))
    return StackEnds(squares, basis, floor, inverses)


def gram_stack(matrices_NRC: Tensor) -> Tensor:
    """A^T A or A A^T on the short side of each, float64 (N, K, K). TF32 and autocast touch 32-bit inputs only."""
    n, rows, cols = matrices_NRC.shape
    k = min(rows, cols)
    gram_NKK = matrices_NRC.new_empty((n, k, k), dtype=torch.float64)
    # One product per matrix: a float64 copy of the whole stack would double the memory, and each is large enough alone.
    for matrix, out in zip(matrices_NRC, gram_NKK, strict=True):
        a = matrix.double()
        torch.mm(a, a.T, out=out) if rows < cols else torch.mm(a.T, a, out=out)
    return gram_NKK


def _tall_float64(matrix: Tensor) -> Tensor:
    return matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
