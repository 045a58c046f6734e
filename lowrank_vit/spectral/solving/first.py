"""Certified first triplets of a matrix, any number up to all, at about the cost of its Gram matrix's eigenvectors.

Matrix by matrix; on a CPU by LAPACK's steps in float64, on CUDA by torch's `eigh`. Shape legend: see `solve`; L is the
long side, K the short one, M the number of triplets.

The other solvers refine two ends by the SVD of the matrix times their basis. For half of a spectrum or more this takes
as long as an SVD of the whole. But the images A v_i of a Gram matrix's eigenvectors are already orthogonal up to a
relative eps sigma_1^2 / (sigma_i sigma_j). Their inner products, computed from the images themselves, give that small
rest to within eps sigma_i sigma_j, and one Jacobi-like step rotates the basis so that it vanishes (`_turn`). Left
vectors are then images over their lengths. Certificates are about eps sigma_1^2 / sigma_i, as with two ends; where that
is not enough, below 3e-5 sigma_1, the matrix is solved by an SVD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.spectral.solving.extremes import (
    ABSOLUTE_LIMIT,
    EPS,
    ORTHOGONALITY_LIMIT,
    RELATIVE_LIMIT,
    TRACE_LIMIT,
    Solved,
    Triplets,
)
from lowrank_vit.spectral.solving.gram import Array, Tridiagonal
from lowrank_vit.spectral.solving.gram_stack import GramStack
from lowrank_vit.spectral.solving.index import FEW, PROBES, WRONG, index_is_proven
from lowrank_vit.spectral.solving.lapack import all_tridiagonal_vectors, gram, is_in_blocks

Count = Callable[[np.ndarray], int]
"""From a matrix's singular values (K,), descending, to the number of triplets wanted, 0 to K."""
_FEW_VECTORS = 192
"""Up to so many vectors of a T of one block, inverse iteration is faster than divide and conquer for all."""
_ORTHOGONAL = 1e-12
"""Images that are orthogonal to this are left as they are."""
_GREATEST_TURN = 1e-4
"""The step is of second order: a larger turn would leave an error above `ORTHOGONALITY_LIMIT`."""


@dataclass(frozen=True)
class First:
    """The Gram matrix's eigenvalues, a bound of their errors, and the directions of the first M values."""

    squares: np.ndarray
    """(K,), ascending."""
    error: Callable[[int], float]
    """The bound from a number of probes, see `index.enclosure`."""
    basis: np.ndarray | Tensor
    """(K, M) directions on the short side, that of the greatest value first."""


def solve_matrix(a_RC: np.ndarray, count: Count) -> tuple[Solved, str]:
    """All values of one matrix and the first triplets; and an objection, empty where all checks passed.

    Args:
        a_RC: finite float64, C-contiguous, greatest entry about 1; not changed. Call inside `lapack.one_blas_thread`.
        count: tells how many triplets are wanted.

    Raises:
        numpy.linalg.LinAlgError: LAPACK fails.
    """
    found = Tridiagonal.of(a_RC, gram(a_RC))
    k = found.squares.size
    m = count(values_of(found.squares))
    if m == 0:
        basis_KM = np.empty((k, 0))
    elif m <= _FEW_VECTORS and not is_in_blocks(found.d, found.e):
        basis_KM = found.vectors(np.arange(k - m, k))
    else:
        of_form = all_tridiagonal_vectors(found.d, found.e)[:, k - m :]
        basis_KM = found.turned(np.array(of_form, order="F"))
    return _solved(a_RC, First(found.squares, found.error, np.ascontiguousarray(basis_KM[:, ::-1])))


def solve_on_device(matrix_RC: Tensor, count: Count) -> tuple[Solved, str]:
    """As `solve_matrix`, of a finite, scaled tensor of any float dtype, on its device.

    Raises:
        torch.linalg.LinAlgError: the eigensolver fails.
    """
    stack = GramStack.of(matrix_RC[None])
    squares = stack.squares[0]
    m = count(values_of(squares))
    basis_KM = stack.vectors_NKK[0, :, squares.size - m :].flip(-1).contiguous()
    return _solved(matrix_RC.double(), First(squares, lambda _: float(stack.errors()[0]), basis_KM))


def values_of(squares: np.ndarray) -> np.ndarray:
    """Singular values, descending, of ascending squares, which rounding may have made negative."""
    return np.sqrt(np.maximum(squares[::-1], 0.0))


def both_ends(solved: Solved, m: int) -> Solved:
    """The first and last m triplets of a result with all K, as the other solvers return them."""
    k = solved.s.size
    return replace(solved, top=solved.top.pick(list(range(m))), last=solved.top.pick(list(range(k - 1, k - m - 1, -1))))


def _solved(a_RC: Array, first: First) -> tuple[Solved, str]:
    tall = a_RC.shape[0] >= a_RC.shape[1]
    tall_LK = a_RC if tall else a_RC.T
    basis_KM = first.basis
    image_LM = tall_LK @ basis_KM
    products_MM = _on_host(image_LM.T @ image_LM)
    if (turn_MM := _turn(products_MM)) is not None:
        turn = _as(turn_MM, a_RC)
        basis_KM, image_LM = basis_KM + basis_KM @ turn, image_LM + image_LM @ turn
        products_MM = _on_host(image_LM.T @ image_LM)
    s_M = np.sqrt(products_MM.diagonal())
    m = s_M.size
    values = values_of(first.squares)
    allowance = EPS * max(a_RC.shape) ** 0.5 * float(values[0])
    if m and not s_M.min() > allowance:
        return _without(values), f"{np.count_nonzero(s_M <= allowance)} of the first {m} values are 0"
    scale = _as(s_M, a_RC)
    long_LM = image_LM / scale
    back_KM = tall_LK.T @ long_LM - basis_KM * scale
    residual = _on_host((back_KM * back_KM).sum(0) / 2) ** 0.5
    eye = np.eye(m)
    of_long, of_short = products_MM / np.outer(s_M, s_M), _on_host(basis_KM.T @ basis_KM)
    off = max((float(np.abs(one - eye).max(initial=0.0)) for one in (of_long, of_short)), default=0.0)
    order = np.argsort(-s_M, kind="stable")
    long, short = (_on_host(one)[:, order] for one in (long_LM, basis_KM))
    u, v = (long, short) if tall else (short, long)
    top = Triplets(s_M[order], u, v, (residual + allowance)[order])
    merged = np.sort(np.concatenate([top.s, values[m:]]))[::-1].copy()
    nothing = Triplets(np.empty(0), u[:, :0], v[:, :0], np.empty(0))
    solved = Solved(merged, top, nothing, off, "gram64")
    frobenius_squared = float((a_RC * a_RC).sum())
    problem = _objection(solved, first.squares, frobenius_squared)
    if problem or first.squares[-1] <= 0:
        return solved, problem
    for probes in (FEW, PROBES):
        error = first.error(probes)
        if not error <= WRONG * first.squares[-1]:
            return solved, f"its eigenvalues do not fit its Gram matrix, by {error / first.squares[-1]:.0e}"
        low, high = (np.sqrt(np.maximum(first.squares[::-1] + side, 0.0)) for side in (-error, error))
        if index_is_proven(solved, low, high):
            return replace(solved, index=True), ""
    return solved, ""


def _turn(products_MM: np.ndarray) -> np.ndarray | None:
    """X such that basis (1 + X) has orthogonal images, given the images' inner products; None where they already are.

    To first order X is antisymmetric with X_ij = E_ij / (d_j - d_i), d the diagonal of the products and E the rest.
    Adding half of its square keeps the basis orthonormal up to terms of fourth order. Pairs too close for that are left
    alone: their images are as orthogonal as rounding allows.
    """
    d = products_MM.diagonal()
    if not d.min(initial=np.inf) > 0:
        return None
    beside = products_MM - np.diag(d)
    if np.abs(beside / np.sqrt(np.outer(d, d))).max(initial=0.0) <= _ORTHOGONAL:
        return None
    distance = d[None, :] - d[:, None]
    near = np.abs(beside) >= _GREATEST_TURN * np.abs(distance)
    x = np.where(near, 0.0, beside / np.where(near, 1.0, distance))
    x = (x - x.T) / 2
    return x + x @ x / 2


def _objection(solved: Solved, squares_K: np.ndarray, frobenius_squared: float) -> str:
    """Why a result must not be trusted, in words; see `extremes.objection`, which has the same limits."""
    s, top = solved.s, solved.top
    if frobenius_squared == 0.0:
        return ""
    if not solved.orthogonality <= ORTHOGONALITY_LIMIT:
        return f"vectors are orthogonal only to {solved.orthogonality:.0e}"
    if not abs(float(np.sum(squares_K)) / frobenius_squared - 1) <= TRACE_LIMIT:
        return "the sum of the squared values is not the squared Frobenius norm"
    allowed = np.maximum(RELATIVE_LIMIT * top.s, ABSOLUTE_LIMIT * s[0])
    if not (top.certificate <= allowed).all():
        worst = int(np.argmax(top.certificate / allowed))
        return f"certificate {top.certificate[worst] / s[0]:.0e} at value {top.s[worst] / s[0]:.0e} (of sigma_1)"
    if not np.abs(top.s**2 - squares_K[::-1][: top.s.size]).max(initial=0.0) <= 1e-11 * squares_K[-1]:
        return "the values from the two steps of the method differ"
    return ""


def _without(values: np.ndarray) -> Solved:
    none = Triplets(np.empty(0), np.empty((0, 0)), np.empty((0, 0)), np.empty(0))
    return Solved(values, none, none, 0.0, "gram64")


def _on_host(x: np.ndarray | Tensor) -> np.ndarray:
    return x.cpu().numpy() if isinstance(x, Tensor) else x


def _as(x: np.ndarray, like: Array) -> Array:
    return torch.from_numpy(x).to(like) if isinstance(like, Tensor) else x  # pyright: ignore[reportReturnType]
