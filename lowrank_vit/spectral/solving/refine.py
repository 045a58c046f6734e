"""Certified triplets and all values of matrices from the directions that Gram matrices give (Rayleigh-Ritz).

There are two ways to one result: matrix by matrix on a CPU, and a whole stack at once for CUDA. The directions only
span the two ends. Values, left and right vectors come from the SVD of the matrix times that basis, which does not
square the condition number again, and whose left vectors are orthogonal whatever the values are. That takes two
products with the matrix, 8 L K m operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.spectral.solving.extremes import EPS, Solved, assemble, objection, start_of
from lowrank_vit.spectral.solving.gram import Array, Ends, Tridiagonal, ends_of_matrix
from lowrank_vit.spectral.solving.gram_stack import StackEnds, ends_of_stack
from lowrank_vit.spectral.solving.index import FEW, PROBES, WRONG, index_is_proven

Inverses = Iterable[Callable[[Array], Array]]

BLANK = EPS**2
"""The length over |A|_F of an image that represents 0: below all rounding."""


def solve_matrix(a_RC: np.ndarray, m: int, guard: int = 0) -> tuple[Solved, str]:
    """All values of one matrix and the first and last m triplets; and an objection, empty where all checks passed.

    A matrix for which one Gram matrix is not accurate enough is split and tried once more.

    Args:
        a_RC: finite float64, C-contiguous, greatest entry about 1; not changed. Call inside `lapack.one_blas_thread`.
        m: 1 <= m and 2 m < K.
        guard: how many of the next columns go into `Solved.start`, if they are cheap; 2 m + `guard` < K.
    """
    ends, taken_apart = ends_of_matrix(a_RC, m)
    solved, problem = _refined(a_RC, ends)
    if problem and taken_apart is not None and not ends.inverses:
        ends = taken_apart.split(m, float(taken_apart.squares[-1]))
        solved, problem = _refined(a_RC, ends)
    if taken_apart is None or ends.inverses or problem:
        return solved, problem
    if not taken_apart.has_right_values(m):
        return solved, "its eigenvalues do not agree with the counts of Sturm sequences"
    for count in (FEW, PROBES):
        solved, problem = _with_index(solved, taken_apart.squares, taken_apart.error(count))
        if solved.index:
            break
    return _with_start(solved, taken_apart, guard), problem


def _with_start(solved: Solved, taken_apart: Tridiagonal, guard: int) -> Solved:
    """The same with the vectors after the first ones in its start. They change nothing else, and may be missing."""
    start = start_of(solved.s, solved.top) if guard else None
    if start is None:
        return solved
    end = len(start) - solved.top.s.size
    with contextlib.suppress(np.linalg.LinAlgError):
        next_KG = taken_apart.vectors(np.arange(end - guard, end))[:, ::-1].astype(np.float32)
        start = np.concatenate([start, next_KG], axis=1)
    return replace(solved, start=start)


def _with_index(solved: Solved, squares: np.ndarray, error: float) -> tuple[Solved, str]:
    """The same with its index certificate, and an objection if the factorisation is wrong. `squares` ascending."""
    if error > WRONG * squares[-1]:
        return solved, f"its eigenvalues do not fit its Gram matrix, by {error / squares[-1]:.0e}"
    low, high = (np.sqrt(np.maximum(squares[::-1] + side, 0.0)) for side in (-error, error))
    return replace(solved, index=index_is_proven(solved, low, high)), ""


def _refined(a_RC: np.ndarray, ends: Ends) -> tuple[Solved, str]:
    tall_LK = a_RC if a_RC.shape[0] >= a_RC.shape[1] else a_RC.T
    basis_KM, frobenius_squared = ends.basis, float(np.vdot(a_RC, a_RC))
    image_LM = _times(tall_LK, basis_KM)
    directed_LM = image_LM
    if ends.inverses:
        m = basis_KM.shape[1] // 2
        _upright(tall_LK, basis_KM, image_LM, ends.squares[:m], ends.inverses)
        basis_KM, triangle = np.linalg.qr(basis_KM)
        image_LM = np.linalg.solve(triangle.T, image_LM.T).T
        directed_LM = image_LM.copy()
        blank = np.flatnonzero(np.linalg.norm(image_LM[:, :m], axis=0) <= EPS * frobenius_squared**0.5)
        random = np.random.default_rng(0).standard_normal((len(tall_LK), blank.size))
        directed_LM[:, blank] = _null_directions(tall_LK, random, ends.inverses) * BLANK * frobenius_squared**0.5
    long_LM, s_M, turn = np.linalg.svd(directed_LM, full_matrices=False)
    short_KM = basis_KM @ turn.T
    ahead = np.linalg.norm(image_LM @ turn.T - long_LM * s_M, axis=0)
    back = np.linalg.norm(_times(tall_LK.T, long_LM) - short_KM * s_M, axis=0)
    off = max(_off_identity(long_LM), _off_identity(short_KM))
    residual = np.sqrt((ahead**2 + back**2) / 2)
    u, v = (long_LM, short_KM) if tall_LK is a_RC else (short_KM, long_LM)
    descending = ends.squares[::-1]
    solved = assemble(np.sqrt(np.maximum(descending, 0.0)), u, s_M, v, residual, off)
    return solved, objection(solved, descending, frobenius_squared, ends.floor)


def _times(matrix: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The matrix times few columns, computed as the transposed product where BLAS is faster that way.

    OpenBLAS gives the same bits both ways, except in its kernels for small products and odd rows, which sum in another
    order. Those products are left as they are.
    """
    if matrix.shape[0] % 8 or matrix.size * columns.shape[1] < 2**21:
        return matrix @ columns
    return (np.ascontiguousarray(columns).T @ matrix.T).T


def _upright(tall_LK: Array, basis_KM: Array, image_LM: Array, squares: Array, inverses: Inverses[Array]) -> None:
    """Remove from a basis's last m columns and their images, in place, the components of greater values.

    Rounding leaves in A v components of leading left vectors of relative size eps sigma_1 / sigma_i. They show as
    A^T A v - sigma_i^2 v and are removed part by part, the greatest values last: each step has a rounding error of
    eps sigma_1 times what it removes.
    """
    last_KJ, seen_LJ = basis_KM[:, : len(squares)], image_LM[:, : len(squares)]
    for inverse in inverses:
        lean_KJ = inverse(tall_LK.T @ seen_LJ - last_KJ * squares)
        seen_LJ -= tall_LK @ lean_KJ
        last_KJ -= lean_KJ


def _null_directions(tall_LK: Array, random_LJ: Array, inverses: Inverses[Array]) -> Array:
    """Columns of about unit length that the transpose maps nearly to 0: left vectors for values of 0."""
    for inverse in [*inverses] * 2:
        random_LJ = random_LJ - tall_LK @ inverse(tall_LK.T @ random_LJ)
    return random_LJ / len(random_LJ) ** 0.5


def _off_identity(vectors: np.ndarray) -> float:
    return float(np.abs(vectors.T @ vectors - np.eye(vectors.shape[1])).max())


def solve_stack(matrices_NRC: Tensor, m: int) -> list[tuple[Solved, str]]:
    """`solve_matrix` for every matrix of a stack of finite, scaled matrices of any float dtype.

    The left vectors come from a QR factorisation of the matrix times the basis, and an SVD of its small factor.
    """
    ends, stack = ends_of_stack(matrices_NRC, m)
    results = _refined_stack(matrices_NRC, ends)
    again = [i for i, (_, problem) in enumerate(results) if problem and not ends.inverses[i]]
    if again and stack is not None:
        stack.split(ends, again, m, stack.squares[:, -1])
        for i, result in zip(again, _refined_stack(matrices_NRC[again], ends.take(again)), strict=True):
            results[i] = result
    if stack is not None:
        for i, error in enumerate(stack.errors()):
            if not results[i][1] and not ends.inverses[i]:
                results[i] = _with_index(results[i][0], stack.squares[i], float(error))
    return results


def _refined_stack(matrices_NRC: Tensor, ends: StackEnds) -> list[tuple[Solved, str]]:
    tall, basis_NKM = matrices_NRC.shape[1] >= matrices_NRC.shape[2], ends.basis
    image, directed, back, m = [], [], [], basis_NKM.shape[2] // 2
    for i, (matrix, basis_KM) in enumerate(zip(matrices_NRC, basis_NKM, strict=True)):  # no float64 copy of all
        tall_LK = matrix.double() if tall else matrix.double().T
        image_LM = tall_LK @ basis_KM
        directed.append(image_LM)
        if inverses := ends.inverses[i]:
            _upright(tall_LK, basis_KM, image_LM, torch.from_numpy(ends.squares[i, :m].copy()).to(basis_KM), inverses)
            basis_KM[...], triangle = torch.linalg.qr(basis_KM)
            image_LM = torch.linalg.solve_triangular(triangle, image_LM, upper=True, left=False)
            directed[i] = image_LM.clone()
            frobenius = torch.linalg.vector_norm(tall_LK)
            blank = torch.nonzero(torch.linalg.vector_norm(image_LM[:, :m], dim=0) <= EPS * frobenius)[:, 0]
            random = np.random.default_rng(0).standard_normal((len(tall_LK), len(blank)))
            directed[i][:, blank] = (
                _null_directions(tall_LK, torch.from_numpy(random).to(tall_LK), inverses) * BLANK * frobenius
            )
        image.append(image_LM)
    image_NLM = torch.stack(image)
    q, triangle = torch.linalg.qr(torch.stack(directed))
    turn, s_NM, other = torch.linalg.svd(triangle)
    long_NLM, short_NKM = q @ turn, basis_NKM @ other.mT
    for matrix, long in zip(matrices_NRC, long_NLM, strict=True):
        tall_LK = matrix.double() if tall else matrix.double().T
        back.append(tall_LK.T @ long)
    ahead_NM = torch.linalg.vector_norm(image_NLM @ other.mT - long_NLM * s_NM[:, None], dim=1)
    back_NM = torch.linalg.vector_norm(torch.stack(back) - short_NKM * s_NM[:, None], dim=1)
    residual_NM = torch.sqrt((ahead_NM**2 + back_NM**2) / 2)
    eye = torch.eye(s_NM.shape[1], dtype=torch.float64, device=s_NM.device)
    off_N = torch.stack([(x.mT @ x - eye).abs().amax((1, 2)) for x in (long_NLM, short_NKM)]).amax(0)
    frobenius_N = torch.stack([torch.linalg.vector_norm(a, dtype=torch.float64) ** 2 for a in matrices_NRC])
    u, v = (long_NLM, short_NKM) if tall else (short_NKM, long_NLM)
    host = [x.cpu().numpy() for x in (u, s_NM, v, residual_NM, off_N, frobenius_N)]
    results: list[tuple[Solved, str]] = []
    for squares, floor, u_RM, s_M, v_CM, residual, off, frobenius in zip(
        ends.squares[:, ::-1], ends.floor, *host, strict=True
    ):
        solved = assemble(squares.clip(0.0) ** 0.5, u_RM, s_M, v_CM, residual, float(off))
        results.append((solved, objection(solved, squares, float(frobenius), float(floor))))
    return results
