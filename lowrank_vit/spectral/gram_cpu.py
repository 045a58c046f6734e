"""The Gram solver on the CPU: one tridiagonalisation gives all values and only the wanted vectors.

For an (R, C) matrix with K = min(R, C) and long side L: Gram matrix on the short side L K^2 operations, tridiagonal
form 4/3 K^3, all eigenvalues about 30 K^2, 2 m vectors 8 K^2 m, two products with the matrix 8 L K m. Matrices run
side by side, each in one thread: call inside `lapack.one_blas_thread`.
"""

from __future__ import annotations

import numpy as np

from lowrank_vit.spectral.extremes import Solved, assemble, objection
from lowrank_vit.spectral.lapack import (
    apply_reflectors,
    gram,
    tridiagonal_values,
    tridiagonal_vectors,
    tridiagonalize,
)


def solve_matrix(a_RC: np.ndarray, m: int) -> tuple[Solved, str]:
    """All values of one matrix and the first and last m triplets; and an objection, empty where all checks passed.

    Args:
        a_RC: finite float64, C-contiguous, greatest entry about 1 (see `solve.scale_of`); not changed.
        m: 1 <= m and 2 m < K.

    The eigenvectors of the Gram matrix only span the two ends: values, left and right vectors come from the SVD of the
    matrix times that basis (Rayleigh-Ritz), which does not square the condition number again, and whose left vectors
    are orthogonal whatever the values are.
    """
    tall_LK = a_RC if a_RC.shape[0] >= a_RC.shape[1] else a_RC.T
    gram_KK = gram(a_RC)
    d, e, tau = tridiagonalize(gram_KK)
    squares = tridiagonal_values(d, e)
    k = squares.size
    chosen = np.concatenate([np.arange(m), np.arange(k - m, k)])
    basis_KM = apply_reflectors(gram_KK, tau, tridiagonal_vectors(d, e, squares, chosen))
    image_LM = tall_LK @ basis_KM
    long_LM, s_M, turn = np.linalg.svd(image_LM, full_matrices=False)
    short_KM = basis_KM @ turn.T
    ahead = np.linalg.norm(image_LM @ turn.T - long_LM * s_M, axis=0)
    back = np.linalg.norm(tall_LK.T @ long_LM - short_KM * s_M, axis=0)
    off = max(_off_identity(long_LM), _off_identity(short_KM))
    frobenius_squared = float(np.vdot(a_RC, a_RC))
    residual = np.sqrt((ahead**2 + back**2) / 2)
    u, v = (long_LM, short_KM) if tall_LK is a_RC else (short_KM, long_LM)
    descending = squares[::-1]
    solved = assemble(np.sqrt(np.maximum(descending, 0.0)), u, s_M, v, residual, off)
    return solved, objection(solved, descending, frobenius_squared)


def _off_identity(vectors: np.ndarray) -> float:
    return float(np.abs(vectors.T @ vectors - np.eye(vectors.shape[1])).max())


def largest_value(a_RC: np.ndarray) -> float:
    """sigma_1 of a finite float64 matrix with entries of about 1, from all eigenvalues of its Gram matrix."""
    d, e, _ = tridiagonalize(gram(a_RC))
    return float(np.sqrt(max(tridiagonal_values(d, e)[-1], 0.0)))
