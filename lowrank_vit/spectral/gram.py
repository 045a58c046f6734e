"""The Gram solver in two ways to one result: matrix by matrix on a CPU, and a whole stack at once for CUDA.

For an (R, C) matrix with K = min(R, C) and long side L: Gram matrix on the short side L K^2 operations, tridiagonal
form 4/3 K^3, all eigenvalues about 30 K^2, 2 m vectors 8 K^2 m, two products with the matrix 8 L K m.

On the CPU one tridiagonalisation gives all values and only the wanted vectors. Matrices run side by side, each in one
thread: call inside `lapack.one_blas_thread`. Stacks go through torch's batched routines, on any device. torch >= 2.14
has a batched `eigh` for large matrices on CUDA (cusolverDnXsyevBatched). Older versions loop over the matrices inside
the same call: slower, and still on the side stream and in the worker thread, so still hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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


def all_values(a_RC: np.ndarray) -> np.ndarray:
    """The singular values (K,), descending, of a finite float64 matrix with entries of about 1; from its Gram."""
    d, e, _ = tridiagonalize(gram(a_RC))
    return np.sqrt(np.maximum(tridiagonal_values(d, e)[::-1], 0.0))


def solve_stack(matrices_NRC: Tensor, m: int) -> list[tuple[Solved, str]]:
    """As `solve_matrix`, of every matrix of a stack of finite, scaled matrices of any float dtype.

    The left vectors come from a QR factorisation of the matrix times the basis, and an SVD of its small factor.
    """
    n, rows, cols = matrices_NRC.shape
    tall = rows >= cols
    squares_NK, basis_NKM = _ends_of_gram(matrices_NRC, m)
    image, back = [], []
    for matrix, basis in zip(matrices_NRC, basis_NKM, strict=True):  # no float64 copy of the whole stack
        tall_LK = matrix.double() if tall else matrix.double().T
        image.append(tall_LK @ basis)
    image_NLM = torch.stack(image)
    q, triangle = torch.linalg.qr(image_NLM)
    turn, s_NM, other = torch.linalg.svd(triangle)
    long_NLM, short_NKM = q @ turn, basis_NKM @ other.mT
    for matrix, long in zip(matrices_NRC, long_NLM, strict=True):
        tall_LK = matrix.double() if tall else matrix.double().T
        back.append(tall_LK.T @ long)
    ahead_NM = torch.linalg.vector_norm(image_NLM @ other.mT - long_NLM * s_NM[:, None], dim=1)
    back_NM = torch.linalg.vector_norm(torch.stack(back) - short_NKM * s_NM[:, None], dim=1)
    residual_NM = torch.sqrt((ahead_NM**2 + back_NM**2) / 2)
    eye = torch.eye(2 * m, dtype=torch.float64, device=s_NM.device)
    off_N = torch.stack([(x.mT @ x - eye).abs().amax((1, 2)) for x in (long_NLM, short_NKM)]).amax(0)
    frobenius_N = torch.stack([torch.linalg.vector_norm(a, dtype=torch.float64) ** 2 for a in matrices_NRC])
    u, v = (long_NLM, short_NKM) if tall else (short_NKM, long_NLM)
    host = [x.cpu().numpy() for x in (squares_NK.flip(-1), u, s_NM, v, residual_NM, off_N, frobenius_N)]
    results: list[tuple[Solved, str]] = []
    for squares, u_RM, s_M, v_CM, residual, off, frobenius in zip(*host, strict=True):
        solved = assemble(squares.clip(0.0) ** 0.5, u_RM, s_M, v_CM, residual, float(off))
        results.append((solved, objection(solved, squares, float(frobenius))))
    assert len(results) == n
    return results


def _ends_of_gram(matrices_NRC: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N, K), ascending, of the Gram matrices on the short side, and the 2 m outer vectors (N, K, M)."""
    squares_NK, vectors_NKK = torch.linalg.eigh(gram_stack(matrices_NRC))
    return squares_NK, torch.cat([vectors_NKK[..., :m], vectors_NKK[..., -m:]], dim=-1).contiguous()


def gram_stack(matrices_NRC: Tensor) -> Tensor:
    """A^T A or A A^T on the short side of each, float64 (N, K, K). TF32 and autocast touch 32-bit inputs only."""
    n, rows, cols = matrices_NRC.shape
    k = min(rows, cols)
    gram_NKK = matrices_NRC.new_empty((n, k, k), dtype=torch.float64)
    # One product a matrix: a float64 copy of a whole stack would double the memory, and each is large enough alone.
    for matrix, out in zip(matrices_NRC, gram_NKK, strict=True):
        a = matrix.double()
        torch.mm(a, a.T, out=out) if rows < cols else torch.mm(a.T, a, out=out)
    return gram_NKK
