"""The first singular triplets of matrices from directions near them; see `ends`.

A Chebyshev filter of the Gram matrix brings the directions near (Zhou & Saad, SIAM J. Matrix Anal. Appl. 29 (2007)).
On a CPU, matrix by matrix, Newton corrections then make them exact (Sleijpen & van der Vorst, SIAM Review 42 (2000)).
Both multiply by the Gram matrix, and neither needs exact products. So the Gram matrix is float32, and only residuals
are float64, from the matrix itself: each correction leaves about 1e-5 of the error. The Cholesky factor that proves the
indices is float32 too; its error is measured, see `index`.

On CUDA a whole stack goes through torch's batched routines at once; these run on any device. All is float64, which is
no slower there, so filters alone, with the columns orthonormalised between them, reach the vectors. Cholesky factors
orthonormalise, since a batched QR is slow.

Shape legend: see `ends`; L is the long side. Call `of_matrix` inside `lapack.one_blas_thread`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.spectral.solving.extremes import ABSOLUTE_LIMIT, EPS, LEAST
from lowrank_vit.spectral.solving.gram_stack import gram_stack
from lowrank_vit.spectral.solving.index import error_of_factor, factor_of_rest, images, probes, square_beyond
from lowrank_vit.spectral.solving.lapack import gram

DEGREE = 8
"""Greatest degree of the filter."""
PASSES, CORRECTIONS = 6, 3
"""Most passes of the filter, and most Newton corrections."""
PASSES_ON_DEVICE = 10
"""Most passes of the filter for a stack."""
_NEAR, _ROUNDED = 3e-4, 1e-6
"""Newton corrections converge from this residual over sigma_J^2 on; float32 reaches this residual over sigma_1^2."""
_FALLEN = LEAST**2 / 4
"""Least sigma_J^2 / sigma_1^2 that is still handled, since it may have fallen after the start was taken."""
_BESIDE = 3
"""So many of the next columns must be about as near, lest the true J-th direction be among them."""
_STEPS = 40
"""Most steps of conjugate gradients."""
_GAIN, _COLLAPSE = 14.0, 11.0
"""Logarithms: by how much the filter should lift the wanted directions over the rest, and by how much it may lift the
first over the J-th before all columns turn to the first."""
_COLLAPSE_ON_DEVICE = 25.0
"""Logarithm: by how much a stack's filter may lift the first columns over the last before all turn to the first."""
_CLEAR, _CLEAR_ON_DEVICE = 2e-4, 1e-8
"""Gaps between squares, over sigma_1^2, that float32 and float64 can prove."""


@dataclass
class Near:
    """The first J triplets of a matrix as found, float64, and what is known about the rest.

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
    """Number of first values, m or J, of which `beyond` says whether they are the greatest of all."""
    beyond: float
    """An upper bound of the square of the value after the `known` ones; infinite where none is proven."""
    frobenius: float
    """|A|_F."""


def of_matrix(a_RC: np.ndarray, start_KB: np.ndarray, m: int) -> Near:
    """The triplets near a start.

    Args:
        a_RC: finite float32 or float64, C-contiguous, greatest entry neither huge nor tiny; not changed.
        start_KB: float32, vectors on the short side, of m + `ends.GUARD` triplets a little earlier.
        m: triplets wanted.

    Raises:
        numpy.linalg.LinAlgError: the start is not near enough, or LAPACK fails.
    """
    j = m + 1
    lower_KK = gram(a_RC.astype(np.float32, copy=False))
    gram_KK = _whole(lower_KK)
    with np.errstate(all="ignore"):  # without convergence numbers overflow, and the result is refused below
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
    """Where to prove that nothing was missed: after J = m + 1 or m values, and the middle of the squares' gap there.

    Args:
        squares_J: the squares found.
        others: estimates of the next ones.
        m: triplets wanted.
        clear: the gap over sigma_1^2 that is enough.
    """
    gaps = squares_J[m - 1] - squares_J[m], squares_J[m] - others[0]
    known = m + 1 if gaps[1] >= min(gaps[0], clear * squares_J[0]) else m
    return known, float(squares_J[known - 1] - gaps[known - m] / 2)


def _whole(lower_KK: np.ndarray) -> np.ndarray:
    """A symmetric matrix from its lower triangle with zeros above; block by block for the cache."""
    whole_KK = lower_KK.copy(order="F")
    for i in range(0, len(lower_KK), 48):
        whole_KK[i : i + 48, i + 48 :] = lower_KK[i + 48 :, i : i + 48].T
        whole_KK[i : i + 48, i : i + 48] += np.tril(lower_KK[i : i + 48, i : i + 48], -1).T
    return whole_KK


def _filtered(gram_KK: np.ndarray, start_KB: np.ndarray, j: int) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values (B,), descending, float64, and vectors (K, B), float32, of filtered columns.

    Raises:
        numpy.linalg.LinAlgError: the first J columns did not converge.
    """
    block_KB = start_KB.astype(np.float32)
    image_KB = gram_KK @ block_KB
    squares_B = np.sort(np.einsum("kb,kb->b", image_KB, block_KB).astype(np.float64))[::-1]
    held = 0
    for number in range(PASSES):
        strong_KH, *rest = block_KB[:, :held], block_KB[:, held:], image_KB[:, held:], squares_B[held:]
        rest_KB = _chebyshev(gram_KK, *rest, j - held, strong_KH)
        block_KB = np.linalg.qr(np.concatenate([strong_KH, rest_KB], axis=1))[0]
        image_KB = gram_KK @ block_KB
        ascending, turn_BB = np.linalg.eigh((block_KB.T @ image_KB).astype(np.float64))
        squares_B, turn_BB = ascending[::-1].copy(), turn_BB[:, ::-1].astype(np.float32)
        if number and not squares_B[j - 1] > _FALLEN * squares_B[0]:  # after the first pass it may still be too small
            raise np.linalg.LinAlgError("the first values lie too far apart")
        block_KB, image_KB = block_KB @ turn_BB, image_KB @ turn_BB
        n = j + _BESIDE
        lengths = np.linalg.norm(image_KB[:, :n] - block_KB[:, :n] * squares_B[:n].astype(np.float32), axis=0)
        near = max(_NEAR * squares_B[j - 1], _ROUNDED * squares_B[0])
        if lengths[:j].max() <= near and lengths[j:].max() <= 4 * near:
            return squares_B, block_KB
        held = min(_strong(squares_B, j), int(np.argmax(lengths > near / 2)))
    raise np.linalg.LinAlgError("the last refresh's vectors are too far away")


def _strong(squares_B: np.ndarray, j: int) -> int:
    """How many of the first columns limit the filter's degree to less than the J-th one needs."""
    lifts_B = np.arccosh(np.maximum(2 * squares_B / squares_B[-1] - 1, 1.0))
    degree = min(_GAIN / max(lifts_B[j - 1], 1e-3), DEGREE)
    return int(np.sum(lifts_B[: j - 1] - lifts_B[j - 1] > _COLLAPSE / degree))


def _chebyshev(
    gram_KK: np.ndarray,
    block_KB: np.ndarray,
    image_KB: np.ndarray,
    squares_B: np.ndarray,
    j: int,
    strong_KH: np.ndarray,
) -> np.ndarray:
    """T_d of the Gram matrix times the block, [0, squares_B[-1]] mapped to [-1, 1], over its value at squares_B[0].

    The degree d is the one that the J-th column needs, see `_GAIN`. The orthonormal columns `strong_KH` are projected
    out. `block_KB` is overwritten.
    """
    greatest = float(squares_B[0])
    if not 0 < greatest < np.inf:
        raise np.linalg.LinAlgError("the first vectors vanish")
    cut = min(max(float(squares_B[-1]), _FALLEN * greatest), greatest)
    first, wanted = np.arccosh(np.maximum(2 * squares_B[[0, j - 1]] / cut - 1, 1.0)).tolist()
    degree = np.ceil(min(_GAIN / max(wanted, 1e-3), _COLLAPSE / max(first - wanted, 1e-3)))
    middle = cut / 2
    scale = ratio = middle / (greatest - middle)
    image_KB = image_KB - strong_KH @ (strong_KH.T @ image_KB)
    now_KB = (image_KB - np.float32(middle) * block_KB) * np.float32(scale / middle)
    for _ in range(int(np.clip(degree, 2, DEGREE)) - 1):
        following = 1 / (2 / ratio - scale)
        next_KB = gram_KK @ now_KB
        next_KB -= strong_KH @ (strong_KH.T @ next_KB)
        next_KB -= np.float32(middle) * now_KB
        next_KB *= np.float32(2 * following / middle)
        block_KB *= np.float32(scale * following)
        next_KB -= block_KB
        block_KB, now_KB, scale = now_KB, next_KB, following
    return now_KB


def _ritz(columns_KJ: np.ndarray, back_KJ: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squares (J,), descending, vectors (K, J) and residuals A^T A v - s^2 v, from orthonormal X and A^T A X."""
    if not np.isfinite(back_KJ).all():
        raise np.linalg.LinAlgError("the first values cannot be told from the next ones")
    squares_J, turn_JJ = np.linalg.eigh(columns_KJ.T @ back_KJ)
    squares_J, turn_JJ = squares_J[::-1], turn_JJ[:, ::-1]
    if not squares_J[-1] > 0:
        raise np.linalg.LinAlgError("the first vectors vanish")
    short_KJ = columns_KJ @ turn_JJ
    return squares_J, short_KJ, back_KJ @ turn_JJ - short_KJ * squares_J


def _triplets(
    columns_KJ: np.ndarray, image_LJ: np.ndarray, back_KJ: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Vectors on the long side, values, vectors on the short side and certificates, from X, A X and A^T A X.

    A^T u is computed as A^T (A X), rotated and divided by s. Its rounding is counted in: that of each image by its
    share in u, and A^T times the part of A v that is not s u.
    """
    long_LJ, s, turn_JJ = np.linalg.svd(image_LJ, full_matrices=False)
    short_KJ = columns_KJ @ turn_JJ.T
    ahead_J = np.linalg.norm(image_LJ @ turn_JJ.T - long_LJ * s, axis=0)
    behind_J = np.linalg.norm(back_KJ @ turn_JJ.T / s - short_KJ * s, axis=0)
    parts_J = np.linalg.norm(image_LJ, axis=0) @ np.abs(turn_JJ.T) / s
    rounding_J = EPS * len(long_LJ) ** 0.5 * s[0] * np.maximum(parts_J, 1.0) + ahead_J * s[0] / s
    return long_LJ, s, short_KJ, np.sqrt((ahead_J**2 + behind_J**2) / 2) + rounding_J


def _correction(
    gram_KK: np.ndarray, squares_B: np.ndarray, block_KB: np.ndarray, residual_KJ: np.ndarray, ratio: float
) -> np.ndarray:
    """Newton's change (K, J), float64, of each of the first J vectors of a block, by conjugate gradients in float32.

    It solves (s_i^2 - G) x = residual on the complement of the J vectors, where that is positive definite. The block's
    other columns, nearly eigenvectors, are the preconditioner.

    Args:
        gram_KK: G, float32.
        squares_B, block_KB: Ritz values and vectors.
        residual_KJ: of the first J.
        ratio: about the certificates over sigma_1; it sets how exact a change is worth its time.
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
    # A step leaves about the square of the error, so a tolerance below three times the error is not worth its time.
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


def of_stack(matrices_NRC: Tensor, starts_NKB: Tensor, m: int) -> list[Near | str]:
    """The triplets near the starts of each matrix, or the reason why there are none.

    Args:
        matrices_NRC: finite, scaled matrices of any float dtype.
        starts_NKB: on the same device; see `of_matrix`.
    """
    j = m + 1
    float64_NRC = matrices_NRC.double()
    tall_NLK = float64_NRC if matrices_NRC.shape[1] >= matrices_NRC.shape[2] else float64_NRC.mT
    gram_NKK = gram_stack(float64_NRC)
    block_NKB = _orthonormal(starts_NKB.double())
    squares_NB, block_NKB, image_NKB = _ritz_of_stack(gram_NKK, block_NKB)
    for _ in range(PASSES_ON_DEVICE):
        block_NKB = _orthonormal(_chebyshev_of_stack(gram_NKK, block_NKB, image_NKB, squares_NB))
        squares_NB, block_NKB, image_NKB = _ritz_of_stack(gram_NKK, block_NKB)
        residual_NKJ = image_NKB[..., :j] - block_NKB[..., :j] * squares_NB[:, None, :j]
        ratio_NJ = torch.linalg.vector_norm(residual_NKJ, dim=1) / (squares_NB[:, :j] * squares_NB[:, :1]).sqrt()
        if bool((ratio_NJ.amax(dim=1) <= ABSOLUTE_LIMIT / 2).all()):
            break
    image_NLJ = tall_NLK @ block_NKB[..., :j]
    q_NLJ = _orthonormal(image_NLJ)
    turn_NJJ, s_NJ, other_NJJ = torch.linalg.svd((q_NLJ.mT @ image_NLJ).nan_to_num())
    long_NLJ, short_NKJ = q_NLJ @ turn_NJJ, block_NKB[..., :j] @ other_NJJ.mT
    ahead_NJ = torch.linalg.vector_norm(image_NLJ @ other_NJJ.mT - long_NLJ * s_NJ[:, None], dim=1)
    behind_NJ = torch.linalg.vector_norm(tall_NLK.mT @ long_NLJ - short_NKJ * s_NJ[:, None], dim=1)
    certificate_NJ = ((ahead_NJ**2 + behind_NJ**2) / 2).sqrt() + EPS * tall_NLK.shape[1] ** 0.5 * s_NJ[:, :1]
    eye_JJ = torch.eye(j, dtype=torch.float64, device=s_NJ.device)
    off_N = torch.stack([(x.mT @ x - eye_JJ).abs().amax((1, 2)) for x in (long_NLJ, short_NKJ)]).amax(0)
    squares, others = (s_NJ**2).cpu().numpy(), squares_NB[:, j:].cpu().numpy()
    pairs = zip(squares, others, strict=True)
    known, mu = zip(*(boundary(one, next_, m, _CLEAR_ON_DEVICE) for one, next_ in pairs), strict=True)
    # A value of 0 deflates nothing.
    deflated_NJ = s_NJ * (torch.arange(j) < torch.tensor(known)[:, None]).to(s_NJ)
    beyond_N = square_beyond(float64_NRC, gram_NKK, torch.tensor(mu).to(s_NJ), deflated_NJ, short_NKJ)
    frobenius_N = torch.linalg.vector_norm(float64_NRC, dim=(1, 2))
    host = (
        x.cpu().numpy()
        for x in (s_NJ, long_NLJ, short_NKJ, certificate_NJ, off_N, block_NKB[..., j:].float(), beyond_N, frobenius_N)
    )
    found: list[Near | str] = []
    for number, (s, long, short, certificate, off, others_KB, beyond, frobenius) in enumerate(zip(*host, strict=True)):
        if not s[-1] > LEAST * s[0]:
            found.append("the first values lie too far apart")
            continue
        values = (float(off), others_KB, known[number], float(beyond), float(frobenius))
        found.append(Near(s, long, short, certificate, *values))
    return found


def _orthonormal(columns_NKB: Tensor) -> Tensor:
    """Orthonormal columns of the same spans, by three Cholesky factors (Fukaya et al., SIAM J. Sci. Comput. 42 (2020)).

    The first is of the columns' Gram matrix with a small shift, so that it exists however near the columns are to each
    other. NaN where they are too near all the same.
    """
    columns_NKB = columns_NKB / torch.linalg.vector_norm(columns_NKB, dim=1, keepdim=True)
    k, b = columns_NKB.shape[1:]
    shift = 11 * (k * b + b * (b + 1)) * EPS
    eye_BB = torch.eye(b, dtype=torch.float64, device=columns_NKB.device)
    for lift in (shift, 0.0, 0.0):
        factor_NBB, info_N = torch.linalg.cholesky_ex(columns_NKB.mT @ columns_NKB + lift * eye_BB)
        factor_NBB = torch.where(info_N[:, None, None] == 0, factor_NBB, torch.nan)
        columns_NKB = torch.linalg.solve_triangular(factor_NBB.mT, columns_NKB, upper=True, left=False)
    return columns_NKB


def _ritz_of_stack(gram_NKK: Tensor, columns_NKB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values (N, B), descending, vectors and their images (N, K, B) of orthonormal columns."""
    image_NKB = gram_NKK @ columns_NKB
    inner_NBB = columns_NKB.mT @ image_NKB
    squares_NB, turn_NBB = torch.linalg.eigh(torch.nan_to_num(inner_NBB, posinf=0.0, neginf=0.0))
    turn_NBB = turn_NBB.flip(-1)
    return squares_NB.flip(-1), columns_NKB @ turn_NBB, image_NKB @ turn_NBB


def _chebyshev_of_stack(gram_NKK: Tensor, block_NKB: Tensor, image_NKB: Tensor, squares_NB: Tensor) -> Tensor:
    """T_d of the Gram matrices times the blocks, see `_chebyshev`; one d for all, see `_COLLAPSE_ON_DEVICE`."""
    greatest_N11 = squares_NB[:, :1, None]
    middle_N11 = torch.maximum(squares_NB[:, -1:, None], _FALLEN * greatest_N11).minimum(greatest_N11) / 2
    first = float(torch.arccosh((greatest_N11 / middle_N11 - 1).nan_to_num(1.0)).max())
    degree = int(np.clip(_COLLAPSE_ON_DEVICE / max(first, 1e-3), 2, DEGREE))
    scale = ratio = middle_N11 / (greatest_N11 - middle_N11)
    now_NKB = (image_NKB - middle_N11 * block_NKB) * (scale / middle_N11)
    for _ in range(degree - 1):
        following = 1 / (2 / ratio - scale)
        next_NKB = (gram_NKK @ now_NKB - middle_N11 * now_NKB) * (2 * following / middle_N11)
        next_NKB -= block_NKB * (scale * following)
        block_NKB, now_NKB, scale = now_NKB, next_NKB, following
    return now_NKB
