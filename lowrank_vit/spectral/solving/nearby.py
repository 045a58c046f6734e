"""The first singular triplets of a matrix from directions near them, on a CPU, matrix by matrix; see `ends`.

A Chebyshev filter of the Gram matrix makes the directions near (Zhou & Saad, SIAM J. Matrix Anal. Appl. 29 (2007)).
Then Newton's correction of what they still err by makes them exact (Sleijpen & van der Vorst, SIAM Review 42 (2000)).
Both take products with the Gram matrix, and neither takes them exact. So that matrix is float32, and only residuals are
float64, from the matrix itself: each correction leaves about 1e-5 of the error. The Cholesky factor that proves the
indices is float32, too; what it errs by is measured, see `index`.

Shape legend: see `ends`; L is the long side. Call inside `lapack.one_blas_thread`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_vit.spectral.solving.extremes import ABSOLUTE_LIMIT, EPS, LEAST
from lowrank_vit.spectral.solving.index import error_of_factor, factor_of_rest, images, probes
from lowrank_vit.spectral.solving.lapack import gram

DEGREE = 8
"""Of the filter at most."""
PASSES, CORRECTIONS = 6, 3
"""Of the filter and of Newton at most."""
_NEAR = 1e-4
"""The residual over sigma_1^2 from which on Newton's corrections converge."""
_BESIDE = 3
"""So many of the next columns must be about as near: the J-th may not be one of these."""
_STEPS = 40
"""Of conjugate gradients at most."""
_GAIN, _COLLAPSE = 14.0, 11.0
"""Logarithms: by how much the filter is to lift the wanted directions over the rest, and may lift the first over the
J-th, before all columns turn to the first."""
_CLEAR = 2e-4
"""A gap between squares, over sigma_1^2, that float32 proves."""


@dataclass
class Near:
    """The first J triplets of a matrix, float64, as far as they were found, and what is known of the rest.

    `s` (J,), descending, unit vectors on the long and the short side, `certificate` (J,) as in `extremes.Triplets`.
    """

    s: np.ndarray
    long_LJ: np.ndarray
    short_KJ: np.ndarray
    certificate: np.ndarray
    orthogonality: float
    """See `extremes.Solved`."""
    others_KB: np.ndarray
    """Float32: vectors on the short side that are nearly the next ones, `ends.GUARD` - 1."""
    known: int
    """The first so many, m or J, are the greatest of all values but for those that `beyond` bounds."""
    beyond: float
    """What the square of the value after them cannot exceed; infinite where that is not known."""
    frobenius: float
    """|A|_F."""


def of_matrix(a_RC: np.ndarray, start_KB: np.ndarray, m: int) -> Near:
    """The triplets near a start.

    Args:
        a_RC: finite float32 or float64, C-contiguous, greatest entry neither huge nor tiny; not changed.
        start_KB: float32, vectors on the short side, of m + `ends.GUARD` triplets a little earlier.
        m: triplets wanted.

    Raises:
        numpy.linalg.LinAlgError: they are not near enough, or LAPACK fails.
    """
    j = m + 1
    lower_KK = gram(a_RC.astype(np.float32, copy=False))
    gram_KK = _whole(lower_KK)
    with np.errstate(all="ignore"):  # what does not converge overflows, and is refused below
        squares_B, block_KB = _filtered(gram_KK, start_KB, j)
        z_KP = probes(len(start_KB))
        columns_KJ = np.linalg.qr(block_KB[:, :j].astype(np.float64))[0]
        image, back, frobenius = images(a_RC, np.concatenate([columns_KJ, z_KP], axis=1))
        image_LJ, back_KJ, probed_KP = image[:, :j], back[:, :j], back[:, j:]
        for left in reversed(range(CORRECTIONS + 1)):
            squares_B[:j], short_KJ, residual_KJ = _ritz(columns_KJ, back_KJ)
            block_KB[:, :j] = short_KJ
            ratio = float((np.linalg.norm(residual_KJ, axis=0) / squares_B[:j] ** 0.5).max() / squares_B[0] ** 0.5)
            if ratio <= ABSOLUTE_LIMIT / 2 or not left:
                break
            columns_KJ = np.linalg.qr(short_KJ + _correction(gram_KK, squares_B, block_KB, residual_KJ, ratio))[0]
            image_LJ, back_KJ, _ = images(a_RC, columns_KJ)
        long_LJ, s, short_KJ, certificate = _triplets(columns_KJ, image_LJ, back_KJ)
        known, mu = boundary(s**2, squares_B[j:], m, _CLEAR)
        found_KM = short_KJ[:, :known] * s[:known]
        factor_KK = factor_of_rest(lower_KK, mu, found_KM)
        beyond = np.inf if factor_KK is None else mu + error_of_factor(factor_KK, mu, found_KM, z_KP, probed_KP)
    eye = np.eye(j)
    off = max(float(np.abs(x.T @ x - eye).max()) for x in (long_LJ, short_KJ))
    return Near(s, long_LJ, short_KJ, certificate, off, block_KB[:, j:], known, beyond, frobenius)


def boundary(squares_J: np.ndarray, others: np.ndarray, m: int, clear: float) -> tuple[int, float]:
    """Where to prove that nothing was missed: after how many, J = m + 1 or m, and the middle of the squares' gap there.

    Args:
        squares_J, others: squares found, and what the next ones are about.
        clear: the gap over sigma_1^2 that is enough.
    """
    gaps = squares_J[m - 1] - squares_J[m], squares_J[m] - others[0]
    known = m + 1 if gaps[1] >= min(gaps[0], clear * squares_J[0]) else m
    return known, float(squares_J[known - 1] - gaps[known - m] / 2)


def _whole(lower_KK: np.ndarray) -> np.ndarray:
    """A symmetric matrix of which the lower triangle is given, and 0 above it; block by block for the cache."""
    whole_KK = lower_KK.copy(order="F")
    for i in range(0, len(lower_KK), 48):
        whole_KK[i : i + 48, i + 48 :] = lower_KK[i + 48 :, i : i + 48].T
        whole_KK[i : i + 48, i : i + 48] += np.tril(lower_KK[i : i + 48, i : i + 48], -1).T
    return whole_KK


def _filtered(gram_KK: np.ndarray, start_KB: np.ndarray, j: int) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values (B,), descending, float64, and vectors (K, B), float32, of filtered columns.

    Raises:
        numpy.linalg.LinAlgError: the first J did not come near.
    """
    block_KB = start_KB.astype(np.float32)
    image_KB = gram_KK @ block_KB
    squares_B = np.sort(np.einsum("kb,kb->b", image_KB, block_KB).astype(np.float64))[::-1]
    for _ in range(PASSES):
        block_KB = np.linalg.qr(_chebyshev(gram_KK, block_KB, image_KB, squares_B, j))[0]
        image_KB = gram_KK @ block_KB
        ascending, turn_BB = np.linalg.eigh((block_KB.T @ image_KB).astype(np.float64))
        squares_B, turn_BB = ascending[::-1].copy(), turn_BB[:, ::-1].astype(np.float32)
        if not squares_B[j - 1] > LEAST**2 * squares_B[0]:
            raise np.linalg.LinAlgError("the first values lie too far apart")
        block_KB, image_KB = block_KB @ turn_BB, image_KB @ turn_BB
        n = j + _BESIDE
        lengths = np.linalg.norm(image_KB[:, :n] - block_KB[:, :n] * squares_B[:n].astype(np.float32), axis=0)
        if lengths[:j].max() <= _NEAR * squares_B[0] and lengths[j:].max() <= 4 * _NEAR * squares_B[0]:
            return squares_B, block_KB
    raise np.linalg.LinAlgError("the last refresh's vectors are too far away")


def _chebyshev(
    gram_KK: np.ndarray, block_KB: np.ndarray, image_KB: np.ndarray, squares_B: np.ndarray, j: int
) -> np.ndarray:
    """T_d of the Gram matrix times the block, [0, squares_B[-1]] mapped to [-1, 1], over its value at squares_B[0].

    The degree d is what is needed for the J-th column; see `_GAIN`. `block_KB` is overwritten.
    """
    greatest = float(squares_B[0])
    if not 0 < greatest < np.inf:
        raise np.linalg.LinAlgError("the first vectors come to nothing")
    cut = min(max(float(squares_B[-1]), LEAST**2 * greatest), greatest)
    first, wanted = np.arccosh(np.maximum(2 * squares_B[[0, j - 1]] / cut - 1, 1.0)).tolist()
    degree = np.ceil(min(_GAIN / max(wanted, 1e-3), _COLLAPSE / max(first - wanted, 1e-3)))
    middle = cut / 2
    scale = ratio = middle / (greatest - middle)
    now_KB = (image_KB - np.float32(middle) * block_KB) * np.float32(scale / middle)
    for _ in range(int(np.clip(degree, 2, DEGREE)) - 1):
        following = 1 / (2 / ratio - scale)
        next_KB = gram_KK @ now_KB
        next_KB -= np.float32(middle) * now_KB
        next_KB *= np.float32(2 * following / middle)
        block_KB *= np.float32(scale * following)
        next_KB -= block_KB
        block_KB, now_KB, scale = now_KB, next_KB, following
    return now_KB


def _ritz(columns_KJ: np.ndarray, back_KJ: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squares (J,), descending, vectors (K, J) and residuals A^T A v - s^2 v of X, orthonormal, and A^T A X."""
    if not np.isfinite(back_KJ).all():
        raise np.linalg.LinAlgError("the first values are not told from the next ones")
    squares_J, turn_JJ = np.linalg.eigh(columns_KJ.T @ back_KJ)
    squares_J, turn_JJ = squares_J[::-1], turn_JJ[:, ::-1]
    if not squares_J[-1] > 0:
        raise np.linalg.LinAlgError("the first vectors come to nothing")
    short_KJ = columns_KJ @ turn_JJ
    return squares_J, short_KJ, back_KJ @ turn_JJ - short_KJ * squares_J


def _triplets(
    columns_KJ: np.ndarray, image_LJ: np.ndarray, back_KJ: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Left vectors on the long side, values, vectors on the short side and certificates of X, A X and A^T A X.

    A^T u is A^T (A X) turned and divided by s. The rounding of that product counts by how much of which image is in u.
    """
    long_LJ, s, turn_JJ = np.linalg.svd(image_LJ, full_matrices=False)
    short_KJ = columns_KJ @ turn_JJ.T
    ahead_J = np.linalg.norm(image_LJ @ turn_JJ.T - long_LJ * s, axis=0)
    behind_J = np.linalg.norm(back_KJ @ turn_JJ.T / s - short_KJ * s, axis=0)
    parts_J = np.linalg.norm(image_LJ, axis=0) @ np.abs(turn_JJ.T) / s
    rounding_J = EPS * len(long_LJ) ** 0.5 * s[0] * np.maximum(parts_J, 1.0)
    return long_LJ, s, short_KJ, np.sqrt((ahead_J**2 + behind_J**2) / 2) + rounding_J


def _correction(
    gram_KK: np.ndarray, squares_B: np.ndarray, block_KB: np.ndarray, residual_KJ: np.ndarray, ratio: float
) -> np.ndarray:
    """Newton's change (K, J), float64, of each of the first J vectors of a block, by conjugate gradients in float32.

    It solves (s_i^2 - G) x = residual on what is orthogonal to the J vectors, where that is positive definite. The
    block's other columns, nearly eigenvectors, are the preconditioner.

    Args:
        ratio: what the certificates are about over sigma_1; it says how exact a change is of use.
    """
    j = residual_KJ.shape[1]
    lengths_J = np.maximum(np.linalg.norm(residual_KJ, axis=0), np.finfo(np.float64).tiny)
    left_KJ = (residual_KJ / lengths_J).astype(np.float32)
    squares_J = squares_B[:j]
    gaps_BJ = np.maximum(squares_J - squares_B[:, None], EPS * squares_B[0])
    weights_BJ = (1 / gaps_BJ - 1 / squares_J).astype(np.float32)
    shift_J, inverse_J = squares_J.astype(np.float32), (1 / squares_J).astype(np.float32)
    weights_BJ[:j] = -inverse_J

    def preconditioned() -> np.ndarray:
        return left_KJ * inverse_J + block_KB @ (weights_BJ * (block_KB.T @ left_KJ))

    change_KJ, step_KJ = np.zeros_like(left_KJ), preconditioned()
    product_J = first_J = np.einsum("kj,kj->j", left_KJ, step_KJ)
    # A step leaves about the square of the error, so less than three times the error is not worth its time.
    tolerance = max(ABSOLUTE_LIMIT / 5 / ratio, min(3 * ratio, 1e-3))
    goes_on_J = product_J > 0
    for _ in range(_STEPS):
        image_KJ = step_KJ * shift_J - gram_KK @ step_KJ
        curvature_J = np.einsum("kj,kj->j", step_KJ, image_KJ)
        share_J = np.where(goes_on_J & (curvature_J > 0), product_J / curvature_J, np.float32(0.0))
        change_KJ += step_KJ * share_J
        left_KJ -= image_KJ * share_J
        next_KJ = preconditioned()
        before_J, product_J = product_J, np.einsum("kj,kj->j", left_KJ, next_KJ)
        goes_on_J &= product_J > tolerance**2 * first_J
        if not goes_on_J.any():
            break
        step_KJ = next_KJ + step_KJ * np.where(goes_on_J, product_J / before_J, np.float32(0.0))
    return change_KJ.astype(np.float64) * lengths_J
