"""The spectral norm |A|_2 = sigma_1 of a matrix with proven lower and upper bounds, without the rest of the spectrum.

Lanczos steps with the Gram matrix find a unit vector v with |A v| near sigma_1, and |A v| is at most sigma_1 (Golub &
Van Loan, section 10.1). For the upper bound a Cholesky factor proves that no square of a singular value is much above
|A v|^2, see `index.square_beyond`. That takes no tridiagonal form and no eigenvalues, which are most of the cost of a
spectrum. On a CPU a Gram matrix and a factor in float32 suffice: their errors are measured in float64. Where the two
bounds are not close, all values are computed. Shape legend: see `solve`; L is the long side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.common.devices import cuda_path
from lowrank_vit.spectral.solving.extremes import EPS, Solver
from lowrank_vit.spectral.solving.gram import Tridiagonal
from lowrank_vit.spectral.solving.gram_stack import GramStack, gram_stack
from lowrank_vit.spectral.solving.index import (
    FEW_OF_FLOAT32,
    PROBES,
    error_of_factor,
    factor_of_rest,
    images,
    probes,
    square_beyond,
)
from lowrank_vit.spectral.solving.lapack import gram, symmetric_times, tridiagonal_values, tridiagonal_vectors
from lowrank_vit.spectral.solving.pieces import slices_of
from lowrank_vit.spectral.solving.solve import (
    as_float64,
    as_numpy,
    divided_by,
    one_torch_thread,
    powers_above,
    scales_of,
    side_by_side,
    svd_error,
)

BRACKET = 1e-4
"""The two bounds differ by this share at most."""
SMALL = 256
"""Matrices with a shorter short side have all their values computed, which takes no longer."""
LIFT = 3e-5
"""mu over |A v|^2, minus 1: above the errors of float32 and Lanczos, and within `BRACKET` for a square."""
STEPS = 80
"""Most Lanczos steps on a CPU; after every `_LOOK` steps they end if the residual is below `_RESIDUAL`."""
STEPS_ON_DEVICE = 50
USUAL = 2.0**40
"""No scaling is needed if the greatest entry is between 1 over this and this: float32 holds the sums of squares."""
_LOOK, _RESIDUAL = 10, 1e-5
_EXHAUSTED = 1e-6
"""A residual of this share of the greatest value so far is rounding: no direction is left."""


class Norms(NamedTuple):
    """Spectral norms of N matrices, float64 (N,), in the unit of their entries."""

    value: np.ndarray
    """The best estimate."""
    low: np.ndarray
    """A proven lower bound."""
    high: np.ndarray
    """A proven upper bound."""


def spectral_norms(matrices_NRC: Tensor, solver: Solver = "gram64", cpu_threads: int = 1) -> Norms:
    """sigma_1 of each matrix and its bounds, for any dtype and device; NaN if not finite, 0 for an empty matrix.

    With `gram64` the bounds differ by a relative `BRACKET` at most, and by about 1e-12 where K < `SMALL` or all values
    were computed. The estimate is |A v|, whose error is the square of the residual: relatively about 1e-10, and 1e-6 to
    1e-5 where hundreds of values crowd below the first. The rounding of results below 1e-307, where float64 has fewer
    digits, is not counted. With `svd` all numbers come from `torch.linalg.svd` in float64.

    On a CPU a matrix's numbers depend neither on its neighbours nor on the number of threads or cores.
    """
    n = len(matrices_NRC)
    with torch.no_grad():
        if _is_by_matrix(matrices_NRC, solver):
            each = side_by_side(lambda i: _on_cpu(as_numpy(matrices_NRC[i]))[:3], range(n), cpu_threads)
            return Norms(*np.array(each).reshape(n, 3).T)
        scales = scales_of(matrices_NRC) if 0 not in matrices_NRC.shape else np.ones(len(matrices_NRC))
        usable = np.isfinite(scales)
        found = np.full((len(scales), 3), np.nan)
        if 0 in matrices_NRC.shape:
            found[:] = 0.0
        elif solver == "svd":
            for i in np.flatnonzero(usable).tolist():
                found[i] = _by_svd(as_float64(matrices_NRC[i], scales[i])) * scales[i]
        else:
            divided, divisors = divided_by(matrices_NRC, scales)
            found[usable] = (_on_device(divided) * divisors[:, None])[usable]
    return Norms(*found.T)


def norms_of_changes(
    before_NRC: Tensor, now_NRC: Tensor, solver: Solver = "gram64", cpu_threads: int = 1
) -> tuple[Norms, np.ndarray]:
    """`spectral_norms` of the float64 differences, and their Frobenius norms (N,), with as few copies as possible."""
    with torch.no_grad():
        if _is_by_matrix(now_NRC, solver):

            def one(i: int) -> np.ndarray:
                return _on_cpu(as_numpy(now_NRC[i]), as_numpy(before_NRC[i]))

            each = np.array(side_by_side(one, range(len(now_NRC)), cpu_threads)).reshape(-1, 4).T
            return Norms(*each[:3]), each[3]
        parts: list[np.ndarray] = []
        for some in slices_of(now_NRC, on_cpu=1):
            change_NRC = now_NRC[some].to(torch.float64, copy=True).sub_(before_NRC[some])
            frobenius_N = torch.linalg.vector_norm(change_NRC, dim=(1, 2)).cpu().numpy()
            parts.append(np.array([*spectral_norms(change_NRC, solver, cpu_threads), frobenius_N]))
        *ends, frobenius_N = np.concatenate(parts, axis=1)
        return Norms(*ends), frobenius_N


def _is_by_matrix(matrices_NRC: Tensor, solver: Solver) -> bool:
    return solver == "gram64" and not cuda_path(matrices_NRC) and 0 not in matrices_NRC.shape


def _on_cpu(a_RC: np.ndarray, less_RC: np.ndarray | None = None) -> np.ndarray:
    """Value, low, high and |A - B|_F (4,) of A, or of the float64 difference A - B; NaN where that is not finite.

    For float32 matrices the float32 difference is the rounded float64 one, so large ones get no float64 copy.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # if not finite, the norms are NaN
        rounded_RC = (a_RC if less_RC is None else a_RC - less_RC).astype(np.float32, copy=False)
    if min(a_RC.shape) >= SMALL and _is_usual(rounded_RC):
        found = _by_factor(rounded_RC, a_RC, less_RC)
        if _is_close(found[:3]):
            return found
    with np.errstate(invalid="ignore", over="ignore"):
        change_RC = np.subtract(a_RC, 0.0 if less_RC is None else less_RC, dtype=np.float64)
    greatest = np.maximum(change_RC.max(), -change_RC.min())
    if greatest == 0 or not np.isfinite(greatest):
        return np.full(4, 0.0 if greatest == 0 else np.nan)
    scale = float(powers_above(greatest))
    if not 1 / USUAL <= scale <= USUAL:
        return _on_cpu(change_RC * (1 / scale)) * scale
    form = Tridiagonal.of(change_RC, gram(change_RC))
    around = _of_squares(form.squares[-1:], np.array([form.error()]))[0]
    return np.append(around, np.sqrt(np.vdot(change_RC, change_RC)))


def _is_usual(a_RC: np.ndarray) -> bool:
    return bool(1 / USUAL <= np.maximum(a_RC.max(), -a_RC.min()) <= USUAL)


def _by_factor(rounded_RC: np.ndarray, a_RC: np.ndarray, less_RC: np.ndarray | None) -> np.ndarray:
    """`_on_cpu` by Lanczos and a Cholesky factor of the float32 difference; the bounds may lie far apart."""
    gram_KK = gram(rounded_RC)
    k = len(gram_KK)
    v_K, none_K0 = _ritz_vector(gram_KK), np.empty((k, 0))
    factor_KK, found = None, np.empty(4)
    for count in (FEW_OF_FLOAT32, PROBES):
        image, back, frobenius = images(a_RC, np.column_stack([v_K, probes(k, count)]), less_RC)
        length = float(np.linalg.norm(image[:, 0]))
        mu = length**2 * (1 + LIFT)
        if factor_KK is None:
            factor_KK = factor_of_rest(gram_KK, mu, none_K0)
        square = np.inf
        if factor_KK is not None:
            square = mu + error_of_factor(factor_KK, mu, none_K0, probes(k, count), back[:, 1:])
        found = np.append(_ends(np.array([length]), np.array([square]), a_RC.shape)[0], frobenius)
        if factor_KK is None or _is_close(found[:3]):
            break
    return found


def _on_device(matrices_NRC: Tensor) -> np.ndarray:
    """Value, low and high (N, 3) of a stack: products and Cholesky factors of all at once, in float64.

    Float32 would be no faster there, and torch may be set to use TF32 for it.
    """
    n, k = len(matrices_NRC), min(matrices_NRC.shape[1:])
    found = np.zeros((n, 3))
    left = matrices_NRC.flatten(1).any(dim=1).cpu().numpy()
    if k >= SMALL:
        float64_NRC = matrices_NRC.double()
        gram_NKK = gram_stack(float64_NRC)
        v_NK1 = _ritz_vectors(gram_NKK)[..., None]
        is_tall = matrices_NRC.shape[1] >= matrices_NRC.shape[2]
        lengths_N = torch.linalg.vector_norm((float64_NRC if is_tall else float64_NRC.mT) @ v_NK1, dim=(1, 2))
        none_NM, none_NKM = gram_NKK.new_empty(n, 0), gram_NKK.new_empty(n, k, 0)
        squares_N = square_beyond(float64_NRC, gram_NKK, lengths_N**2 * (1 + LIFT), none_NM, none_NKM)
        ends = _ends(lengths_N.cpu().numpy(), squares_N.cpu().numpy(), tuple(matrices_NRC.shape[1:]))
        found[left] = ends[left]
        left &= ~_is_close(ends)
    if left.any():
        stack = GramStack.of(matrices_NRC[torch.from_numpy(np.flatnonzero(left)).to(matrices_NRC.device)])
        found[left] = _of_squares(stack.squares[:, -1], stack.errors())
    return found


def _by_svd(a_RC: Tensor) -> np.ndarray:
    with one_torch_thread(a_RC):
        try:
            u, s, vh = torch.linalg.svd(a_RC, full_matrices=False)
        except torch.linalg.LinAlgError:
            return np.full(3, np.nan)
        value, error = float(s[0]), svd_error(a_RC, u, s, vh)
    return np.array([value, max(value - error, 0.0), value + error])


def _ends(lengths_N: np.ndarray, squares_N: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Value, low and high (N, 3) from |A v|, v a unit vector, and upper bounds of sigma_1^2.

    The error of a sum of K products is at most K eps times the sum of their sizes (Higham, Accuracy and Stability,
    section 3.1), so that of A v is at most K eps |A|_F, and |A|_F is at most sqrt(K) sigma_1.
    """
    high_N = np.sqrt(squares_N) * (1 + 2 * EPS)
    rounding = EPS * (max(shape) + min(shape) ** 1.5 + 8)
    return np.stack([lengths_N, lengths_N - rounding * np.where(np.isinf(high_N), 0.0, high_N), high_N], axis=1)


def _is_close(ends: np.ndarray) -> np.ndarray:
    return ends[..., 2] <= ends[..., 1] * (1 + BRACKET)


def _of_squares(squares_N: np.ndarray, errors_N: np.ndarray) -> np.ndarray:
    """Value, low and high (N, 3) from sigma_1^2 and a bound of its error."""
    around = np.stack([squares_N, squares_N - errors_N, squares_N + errors_N], axis=1)
    return np.sqrt(np.maximum(around, 0.0)) * [1, 1 - 2 * EPS, 1 + 2 * EPS]


def _start(k: int) -> np.ndarray:
    """The first vector: always the same, and different from those of `index.probes`."""
    start_K = np.random.default_rng(1).standard_normal(k)
    return start_K / np.linalg.norm(start_K)


def _ritz_vector(gram_KK: np.ndarray) -> np.ndarray:
    """A unit vector near the first eigenvector, float64, by Lanczos in float32, each vector orthogonal to all before.

    Args:
        gram_KK: the lower triangle, as `lapack.gram` gives it.
    """
    k = len(gram_KK)
    basis_JK = np.empty((STEPS, k), np.float32)
    d, e, next_K = np.zeros(STEPS), np.zeros(STEPS), _start(k).astype(np.float32)
    y_J = np.ones(1)
    for j in range(STEPS):
        basis_JK[j] = next_K
        image_K, so_far = symmetric_times(gram_KK, next_K), basis_JK[: j + 1]
        d[j] = image_K @ next_K
        for _ in range(2):
            image_K -= (so_far @ image_K) @ so_far
        e[j] = np.linalg.norm(image_K)
        is_exhausted = e[j] <= _EXHAUSTED * d.max()
        if is_exhausted or (j + 1) % _LOOK == 0:
            value, y_J = _first_of_tridiagonal(d[: j + 1], e[:j])
            if is_exhausted or e[j] * abs(y_J[-1]) <= _RESIDUAL * value:
                break
        next_K = image_K / np.float32(e[j])
    v_K = y_J @ basis_JK[: y_J.size].astype(np.float64)
    return v_K / np.linalg.norm(v_K)


def _ritz_vectors(gram_NKK: Tensor) -> Tensor:
    """`_ritz_vector` (N, K) of whole Gram matrices, in float64 and with `STEPS_ON_DEVICE` steps."""
    n, k = len(gram_NKK), gram_NKK.shape[-1]
    basis_NJK = gram_NKK.new_zeros(n, STEPS_ON_DEVICE, k)
    d_NJ, e_NJ = gram_NKK.new_zeros(2, n, STEPS_ON_DEVICE)
    next_NK = torch.from_numpy(_start(k)).to(gram_NKK).expand(n, k)
    for j in range(STEPS_ON_DEVICE):
        basis_NJK[:, j] = next_NK
        image_NK1, so_far = gram_NKK @ next_NK[..., None], basis_NJK[:, : j + 1]
        d_NJ[:, j] = (image_NK1[..., 0] * next_NK).sum(dim=1)
        for _ in range(2):
            image_NK1 = image_NK1 - so_far.mT @ (so_far @ image_NK1)
        length_N = torch.linalg.vector_norm(image_NK1, dim=(1, 2))
        # Once no direction is left, only zeros follow.
        goes_on = length_N > _EXHAUSTED * d_NJ.amax(dim=1)
        e_NJ[:, j] = torch.where(goes_on, length_N, 0.0)
        next_NK = torch.where(goes_on[:, None], image_NK1[..., 0] / length_N[:, None], 0.0)
    each = zip(d_NJ.cpu().numpy(), e_NJ.cpu().numpy(), strict=True)
    y_NJ = torch.from_numpy(np.stack([_first_of_tridiagonal(d, e[:-1])[1] for d, e in each])).to(gram_NKK)
    v_NK = (y_NJ[:, None] @ basis_NJK)[:, 0]
    return v_NK / torch.linalg.vector_norm(v_NK, dim=1, keepdim=True)


def _first_of_tridiagonal(d: np.ndarray, e: np.ndarray) -> tuple[float, np.ndarray]:
    """The greatest eigenvalue of a tridiagonal matrix, and its vector; infinity and (1, 0, ...) if LAPACK fails.

    A wrong vector costs only time: the bounds would not be close.
    """
    try:
        values = tridiagonal_values(d, e)
        return float(values[-1]), tridiagonal_vectors(d, e, values, np.array([d.size - 1]))[:, 0]
    except np.linalg.LinAlgError:
        return float("inf"), np.eye(1, d.size)[0]
