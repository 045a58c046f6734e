"""Index certificates: proof that a recorded triplet is that of sigma_i, not only that of some singular value near it.

A factorisation F of A^T A is known with its eigenvalues x_1 >= ... >= x_K. By Weyl's theorem the squares of A's
singular values lie within d = |A^T A - F|_2 of them, index by index. d is not taken from an analysis of rounding, which
holds only if a library works as promised (for a Cholesky factor about K eps trace: Rump, "Verification of positive
definiteness", BIT 46 (2006)), but from products with random vectors (Freivalds, IFIP 1977): |(A^T A - F) z| >= |g| d, g
normal. So d is below `FACTOR` times the greatest of `PROBES` such products, except with a probability of
(0.8 / FACTOR)^PROBES = 1e-16. A wrong factorisation, whatever its cause, has a large d.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.spectral.solving.extremes import ABSOLUTE_LIMIT, RELATIVE_LIMIT, Solved
from lowrank_vit.spectral.solving.lapack import cholesky_in_place, product_less

PROBES, FACTOR = 16, 8.0
FEW, FEW_OF_FLOAT32 = 6, 10
"""Numbers of probes tried first on a CPU, where products are expensive. `enclosure` makes up for the missing ones by a
larger factor, for which the rounding of float32 leaves less room."""
_COLUMNS, _ROWS, _AT_ONCE = 64, 64, 16
"""Columns of a factor and rows of a matrix that are made float64 at a time, so that they stay in a core's cache, and
columns multiplied at once: small products are faster there."""
WRONG = 1e-9
"""A factorisation that differs by more than this share of sigma_1^2 is a fault, not rounding."""


def probes(k: int, count: int = PROBES) -> np.ndarray:
    """The random vectors (K, count), always the same: no other number's rounding depends on them."""
    return np.random.default_rng(0).standard_normal((count, k)).T


def enclosure(differences_KP: np.ndarray) -> float:
    """A bound of |A^T A - F|_2 from its products with `probes`: 8 times the greatest of 16, 370 times that of 6.

    Fewer products need a larger factor for the same probability.
    """
    count = differences_KP.shape[1]
    return (FACTOR / 0.8) ** (PROBES / count) * 0.8 * float(np.linalg.norm(differences_KP, axis=0).max())


def gram_times(a_RC: np.ndarray, columns_KP: np.ndarray) -> np.ndarray:
    """A^T A, or A A^T where that is smaller, times columns, from A itself; in the order that is fastest with BLAS."""
    a_LK = a_RC if a_RC.shape[0] >= a_RC.shape[1] else a_RC.T
    return ((columns_KP.T @ a_LK.T) @ a_LK).T


def images(
    a_RC: np.ndarray, columns_KJ: np.ndarray, less_RC: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """A X (L, J), A^T A X (K, J), A from the short side to the long one, and |A|_F, in float64; A is read once.

    `less_RC` is subtracted from A block by block; both may be float32.
    """
    is_tall = a_RC.shape[0] >= a_RC.shape[1]
    tall_LK = a_RC if is_tall else a_RC.T
    less_LK = less_RC if less_RC is None or is_tall else less_RC.T
    (long, k), j = tall_LK.shape, columns_KJ.shape[1]
    rows_JK = np.ascontiguousarray(columns_KJ.T)
    image_JL, back_JK = np.empty((j, long)), np.zeros((j, k))
    squares = 0.0
    for at in range(0, long, _ROWS):
        some_LK = tall_LK[at : at + _ROWS].astype(np.float64, order="C" if is_tall else "F")
        if less_LK is not None:
            some_LK -= less_LK[at : at + _ROWS].astype(np.float64, order="C" if is_tall else "F")
        for some in (slice(first, first + _AT_ONCE) for first in range(0, j, _AT_ONCE)):
            some_JL = rows_JK[some] @ some_LK.T
            image_JL[some, at : at + _ROWS] = some_JL
            back_JK[some] += some_JL @ some_LK
        flat = some_LK.ravel(order="K")
        squares += float(flat @ flat)
    return image_JL.T, back_JK.T, squares**0.5


def index_is_proven(solved: Solved, low_K: np.ndarray, high_K: np.ndarray) -> bool:
    """Whether each triplet of both ends is proven to be that of its index.

    It is if only its own enclosure meets [s - r, s + r], r the certificate. In a cluster it is if its own enclosure
    lies within `RELATIVE_LIMIT` s or `ABSOLUTE_LIMIT` sigma_1 of s, so that it does not matter which is which.

    Args:
        solved: triplets of both ends, as a solver returns them, or of the top alone.
        low_K, high_K: lower and upper bounds of sigma_1, sigma_2, ...
    """
    k, m = solved.s.size, solved.top.s.size
    own = np.concatenate([np.arange(m), np.arange(k - 1, k - 1 - solved.last.s.size, -1)])
    s, r = (np.concatenate([getattr(end, what) for end in (solved.top, solved.last)]) for what in ("s", "certificate"))
    met = (low_K[None, :] <= (s + r)[:, None]) & (high_K[None, :] >= (s - r)[:, None])
    alone = met[np.arange(own.size), own] & (met.sum(axis=1) == 1)
    greatest = float(solved.s[0]) if k else 0.0
    near = np.maximum(high_K[own] - s, s - low_K[own]) <= np.maximum(RELATIVE_LIMIT * s, ABSOLUTE_LIMIT * greatest)
    return bool((alone | near).all())


def square_beyond(matrices_NRC: Tensor, gram_NKK: Tensor, mu_N: Tensor, s_NM: Tensor, v_NKM: Tensor) -> Tensor:
    """An upper bound of sigma_{M+1}^2, (N,), a little above mu; infinite where no such bound is proven.

    The matrix mu I - A^T A + V diag(s^2) V^T = R R^T + E has a Cholesky factor R only if no eigenvalue of A^T A but M
    of them exceeds mu + |E|, whatever V is (Weyl). |E| is enclosed by products with the matrix itself, so it includes
    rounding and faults of Gram matrix, deflation and factor.

    Args:
        matrices_NRC: float64.
        gram_NKK: their Gram matrices on the short side.
        mu_N: above the square of the last found value.
        s_NM, v_NKM: the found values, descending, and vectors of the short side; M may be 0.
    """
    squares_NM, mu_N11 = s_NM**2, mu_N[:, None, None]
    k = gram_NKK.shape[-1]
    eye = torch.eye(k, dtype=gram_NKK.dtype, device=gram_NKK.device)
    factor, info = torch.linalg.cholesky_ex(mu_N11 * eye - gram_NKK + (v_NKM * squares_NM[:, None]) @ v_NKM.mT)
    z_KP = torch.from_numpy(probes(k)).to(gram_NKK)
    tall = matrices_NRC if matrices_NRC.shape[1] >= matrices_NRC.shape[2] else matrices_NRC.mT
    true = mu_N11 * z_KP - tall.mT @ (tall @ z_KP) + (v_NKM * squares_NM[:, None]) @ (v_NKM.mT @ z_KP)
    error_N = FACTOR * torch.linalg.vector_norm(true - factor @ (factor.mT @ z_KP), dim=1).amax(dim=1)
    return torch.where(info == 0, mu_N + error_N, torch.inf)


def factor_of_rest(gram_KK: np.ndarray, mu: float, found_KM: np.ndarray) -> np.ndarray | None:
    """R of R R^T, which is about mu I - A^T A + X X^T, in place of a float32 Gram matrix; None where there is none.

    The float32 twin of the factor in `square_beyond`: `error_of_factor` includes its larger rounding, and the bound is
    mu plus that error.

    Args:
        gram_KK: the Gram matrix as `lapack.gram` returns it; overwritten.
        mu: within the range of float32.
        found_KM: X, the vectors of the short side times their values.
    """
    rest_KK = product_less(found_KM.astype(np.float32, order="F"), gram_KK)
    rest_KK[np.diag_indices(len(rest_KK))] += np.float32(mu)
    return rest_KK if cholesky_in_place(rest_KK) else None


def error_of_factor(
    factor_KK: np.ndarray, mu: float, found_KM: np.ndarray, z_KP: np.ndarray, image_KP: np.ndarray
) -> float:
    """A bound of the error of R R^T. `z_KP` are the probes, `image_KP` is A^T A times them; float64."""
    difference_KP = mu * z_KP - image_KP + found_KM @ (found_KM.T @ z_KP)
    for at in range(0, len(factor_KK), _COLUMNS):  # only the triangle, made float64 within a core's cache
        columns_KB = factor_KK[at:, at : at + _COLUMNS].astype(np.float64)
        difference_KP[at:] -= columns_KB @ (columns_KB.T @ z_KP[at:])
    return enclosure(difference_KP)
