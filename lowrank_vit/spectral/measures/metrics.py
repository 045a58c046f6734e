"""Metrics of one spectrum, the power-law fit to its tail, and the change of its values.

Pure numpy, float64; `s` is always all K singular values, descending. k is the number of vectors recorded at an end, R
and C are the matrix's rows and columns.

Zero matrices have defined values where a formula has none (stated below); a spectrum with a NaN gives NaN everywhere.
`docs/spectra.md` tells how to read each number and when not to trust it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lowrank_vit.spectral.measures.noise import marchenko_pastur
from lowrank_vit.spectral.solving.extremes import EPS, Recorded, Solved, Thirds

LEAST_VALUES = 4
"""Fewer positive values than this are not fitted."""
_ROWS_AT_ONCE = 64
_NOTHING = -700.0
"""Its exp is negligible beside 1. Below it come subnormal numbers, with which a processor is up to 40 times slower."""


class PowerLaw(NamedTuple):
    """A fitted density p(x) ~ x^-alpha for x >= x_min, of the eigenvalues x = sigma^2."""

    alpha: float
    ks: float
    """Greatest distance between the fitted and the empirical distribution above x_min, 0-1: the goodness of fit."""
    sigma: float
    """Standard error of alpha."""
    tail: float
    """How many eigenvalues lie at or above x_min."""


def power_law(s: np.ndarray) -> PowerLaw:
    """Fit a power law to the eigenvalues sigma_i^2 by maximum likelihood, x_min chosen by the least KS distance.

    alpha = 1 + n / sum_{x >= x_min} ln(x / x_min), sigma = (alpha - 1) / sqrt(n) (Clauset, Shalizi & Newman, "Power-law
    distributions in empirical data", SIAM Review 51 (2009), eq. 3.1 and 3.2). Every eigenvalue but the greatest is
    tried as x_min, and the KS distance is taken at the data from below, as WeightWatcher 0.7.7 does (Martin & Mahoney,
    JMLR 22 (2021)), so that the numbers are the same. alpha does not depend on the scale of the matrix.

    NaN with fewer than 4 positive values, where all are equal, or where any is NaN.
    """
    none = PowerLaw(*[float("nan")] * 4)
    if np.isnan(s).any():
        return none
    logs = 2 * np.log(s[s > 0][::-1])
    n = logs.size
    if n < LEAST_VALUES or logs[0] == logs[-1]:
        return none
    counts = n - np.arange(n - 1)
    above = np.cumsum(logs[::-1])[::-1][:-1] - counts * logs[:-1]
    with np.errstate(divide="ignore"):
        alphas = np.where(above > 0, 1 + counts / above, np.inf)
    distances, places = np.ones(n - 1), np.arange(float(n))  # numpy divides whole numbers ten times as slowly
    room, below = np.empty((2, _ROWS_AT_ONCE * n)), np.tri(_ROWS_AT_ONCE, k=-1, dtype=bool)
    for start in range(0, n - 1, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, n - 1))
        usable = np.isfinite(alphas[rows])
        slope = np.where(usable, alphas[rows], 2.0)[:, None]
        difference, empirical = (part[: rows.size * (n - start)].reshape(rows.size, -1) for part in room)
        np.subtract(logs[start:], logs[rows, None], out=difference)
        np.maximum(difference, 0.0, out=difference)
        difference *= 1 - slope
        np.maximum(difference, _NOTHING, out=difference)
        np.subtract(1, np.exp(difference, out=difference), out=difference)  # fitted
        np.subtract(places[start:], places[rows, None], out=empirical)
        empirical /= counts[rows, None]
        difference -= empirical
        np.abs(difference, out=difference)
        difference[:, : rows.size][below[: rows.size, : rows.size]] = 0.0  # below x_min
        distances[rows] = np.where(usable, difference.max(axis=1), 1.0)
    best = int(np.argmin(distances))
    if not np.isfinite(alphas[best]):
        return none
    alpha, tail = float(alphas[best]), float(counts[best])
    return PowerLaw(alpha, float(distances[best]), (alpha - 1) / tail**0.5, tail)


FLOAT32_EPS = float(np.finfo(np.float32).eps)
ROUNDINGS = 8.0
"""A singular value up to this many times the norm of the entries' rounding is noise, see `numerical_rank`."""

FLOOR = 1e-12
"""The least denominator of `relative_change`, as a share of the earlier sigma_1: smaller values are rounding."""

ENERGIES = (90, 95, 99)
"""Percent of the squared Frobenius norm, for `energy_rank`."""


def recorded_indices(rank: int, topk: int, interval: int) -> Recorded:
    """The 1-based indices of the singular values that are logged one by one, in a descending spectrum of `rank` values.

    Returns:
        (top, last): 1, 1+interval, 1+2*interval, ... and rank, rank-interval, ...; `topk` of each, fewer where the
        spectrum is too short. The two may overlap.

    Raises:
        ValueError: an argument is below 1.
    """
    if min(rank, topk, interval) < 1:
        raise ValueError(f"rank, topk and interval must be at least 1, got {rank}, {topk}, {interval}")
    top = list(range(1, rank + 1, interval))[:topk]
    return Recorded(top, [rank + 1 - index for index in top])


def reach(topk: int, interval: int) -> int:
    """How many triplets of each end a solver must give for `recorded_indices`: 1 + (topk - 1) * interval."""
    return 1 + (topk - 1) * interval


def stable_rank(s: np.ndarray) -> float:
    """|W|_F^2 / sigma_1^2 = sum_i sigma_i^2 / sigma_1^2, between 1 and K; 0 for a zero matrix.

    Rudelson & Vershynin, "Sampling from large matrices", J. ACM 54 (2007).
    """
    relative = _relative_to_first(s)
    return float(np.sum(relative**2))


def effective_rank(s: np.ndarray) -> float:
    """exp(H(p)) with p_i = sigma_i / sum_j sigma_j and H the Shannon entropy in nats, between 1 and K.

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. The weights are the
    singular values themselves, not their squares. 0 for a zero matrix (undefined there).
    """
    relative = _relative_to_first(s)
    total = float(np.sum(relative))
    if total == 0.0:
        return 0.0
    p = relative / total
    p = p[p != 0.0]  # 0 log 0 = 0; a NaN passes and makes the result NaN
    return float(np.exp(-np.sum(p * np.log(p))))


def energy_rank(s: np.ndarray, percent: float) -> float:
    """The least k with sum_{i<=k} sigma_i^2 >= percent/100 * sum_i sigma_i^2: how many directions carry that share.

    The usual choice of components in principal component analysis (Jolliffe 2002, section 6.1.1). 0 for a zero matrix.
    """
    energy = np.cumsum(_relative_to_first(s) ** 2)
    if np.isnan(energy[-1]):
        return float("nan")
    if energy[-1] == 0.0:
        return 0.0
    # A hair less than asked, so that rounding of the sums cannot move an exact boundary.
    return float(np.searchsorted(energy, percent / 100 * energy[-1] * (1 - 1e-12)) + 1)


def nuclear_norm(s: np.ndarray) -> float:
    """sum_i sigma_i, in the unit of the weights (Ky Fan 1951; the convex envelope of the rank, Fazel 2002)."""
    return float(np.sum(s))


def numerical_rank(s: np.ndarray, shape: tuple[int, int], eps: float) -> float:
    """How many singular values are too large to come from rounding of the weights.

    Rounding an entry w to a type with the relative spacing `eps` moves it by |w| eps / sqrt(12) or less, root mean
    square; noise of deviation d has a spectral norm of about d (sqrt(R) + sqrt(C)). Up to `ROUNDINGS` times that counts
    as noise: weights that are a product also carry the rounding of its sums (up to 5 times was seen, with float32
    factors of 96 columns). A second floor is the rounding of the solver's float64, max(R, C) 2.2e-16 sigma_1, as in
    `numpy.linalg.matrix_rank`. That convention with the weights' own eps would count no value of a bfloat16 matrix.

    0 for a zero matrix, NaN with a NaN.
    """
    if np.isnan(s).any():
        return float("nan")
    relative = _relative_to_first(s)
    rows, cols = shape
    entry = float(np.sqrt(np.sum(relative**2) / 12)) * eps
    noise = max(ROUNDINGS * entry * (rows**-0.5 + cols**-0.5), max(shape) * EPS)
    return float(np.count_nonzero(relative > noise))


def is_of_full_rank(s: np.ndarray, shape: tuple[int, int], eps: float) -> bool:
    """Whether all values count in `numerical_rank`; not with a NaN."""
    return numerical_rank(s, shape, eps) == s.size


def condition_number(s: np.ndarray) -> float:
    """sigma_1 / sigma_K in the 2-norm, at least 1; infinite where sigma_K = 0 (Golub & Van Loan, section 2.6)."""
    if np.isnan(s[-1]):
        return float("nan")
    return float(s[0] / s[-1]) if s[-1] > 0 else float("inf")


def relative_gap(s: np.ndarray, indices: list[int]) -> float:
    """Min |sigma_i - sigma_j| / max(sigma_i, sigma_j) over i among `indices` (1-based) and j not among them, 0-1.

    For 1..k this is the gap at k, (sigma_k - sigma_{k+1}) / sigma_k. By Wedin's theorem (BIT 12, 1972) a change E of
    the matrix turns the subspace by at most about |E| / (gap * sigma_k): near a gap of 0 its cosines mean nothing.
    NaN where nothing is left outside, 0 between equal values.
    """
    inside = np.zeros(s.size, dtype=bool)
    inside[np.array(indices, dtype=int) - 1] = True
    if inside.all():
        return float("nan")
    # In a descending spectrum the smallest gap is between two neighbours, one inside and one outside.
    change = np.flatnonzero(inside[1:] != inside[:-1])
    upper, lower = s[change], s[change + 1]
    with np.errstate(invalid="ignore"):
        gaps = np.where(upper > 0, (upper - lower) / upper, np.where(np.isnan(upper), np.nan, 0.0))
    return float(np.min(gaps))


def spectrum_metrics(
    s: np.ndarray,
    shape: tuple[int, int],
    topk: int,
    interval: int,
    eps: float = FLOAT32_EPS,
    thirds: Thirds | None = None,
) -> dict[str, float]:
    """The scalars of one matrix that follow from its spectrum alone.

    Args:
        s: (K,) all singular values, descending.
        shape: (rows, columns) of the matrix.
        topk, interval: see `recorded_indices`.
        eps: relative spacing of the weights' own type, see `numerical_rank`.
        thirds: for a fused qkv matrix, the spectrum to compare with noise, see `noise.scaled_thirds`.

    Returns:
        "sigma_max"; "sv1".."sv<topk>", the recorded values from the top in order (sv2 is sigma_2 at interval 1,
        sigma_11 at interval 10); "sv_last1".."sv_last<topk>" likewise from the end (sv_last1 is the smallest);
        "gap_k" and "gap_last" of the recorded indices; "stable_rank", "effective_rank", "rank90", "rank95", "rank99",
        "nuclear_norm", "condition"; "alpha", "alpha_ks", "alpha_sigma", "alpha_tail" (see `power_law`);
        "mp_sigma", "mp_edge", "mp_outliers", "mp_ks" (see `noise.marchenko_pastur`), with `thirds` also "mp_sigma_q",
        "mp_sigma_k", "mp_sigma_v"; "numerical_rank". A short spectrum has fewer sv keys. "gap_last", "condition",
        "alpha*" and "mp_*" are of the values of `above_rounding`.

    Raises:
        ValueError: an empty or not one-dimensional spectrum, or an argument below 1.
    """
    if s.ndim != 1 or s.size == 0:
        raise ValueError(f"expected a non-empty one-dimensional spectrum, got shape {s.shape}")
    top, last = recorded_indices(s.size, topk, interval)
    values = {"sigma_max": float(s[0])}
    values |= {f"sv{k}": float(s[index - 1]) for k, index in enumerate(top, start=1)}
    values |= {f"sv_last{k}": float(s[index - 1]) for k, index in enumerate(last, start=1)}
    above, of_above = above_rounding(s, shape, eps)
    # A zero matrix has no value above rounding; its numbers are those of its zeros.
    rest = above if above.size else s
    gap_last = relative_gap(rest, recorded_indices(rest.size, topk, interval).last)
    values |= {"gap_k": relative_gap(s, top), "gap_last": gap_last, "numerical_rank": numerical_rank(s, shape, eps)}
    values |= {"stable_rank": stable_rank(s), "effective_rank": effective_rank(s)}
    values |= {f"rank{percent}": energy_rank(s, percent) for percent in ENERGIES}
    values |= {"nuclear_norm": nuclear_norm(s), "condition": condition_number(rest)}
    fit, noise = power_law(above), marchenko_pastur(thirds.s if thirds else above, of_above)
    values |= {"alpha": fit.alpha, "alpha_ks": fit.ks, "alpha_sigma": fit.sigma, "alpha_tail": fit.tail}
    values |= {f"mp_{name}": value for name, value in noise._asdict().items()}
    if thirds:
        values |= {f"mp_sigma_{part}": float(c) * noise.sigma for part, c in zip("qkv", thirds.scales, strict=True)}
    return values


def ends_metrics(s: np.ndarray, topk: int, interval: int, frobenius: float) -> dict[str, float]:
    """The metrics of `spectrum_metrics` that follow from the first values and |W|_F.

    Args:
        s: (K,) singular values, descending; NaN after the first known ones.
        topk, interval: see `recorded_indices`.
        frobenius: |W|_F, in the unit of `s`.

    Returns:
        "sigma_max", "sv1".."sv<topk>", "gap_k" (NaN where the value after the last recorded one is not known) and
        "stable_rank".
    """
    top = recorded_indices(s.size, topk, interval).top
    values = {"sigma_max": float(s[0])}
    values |= {f"sv{k}": float(s[index - 1]) for k, index in enumerate(top, start=1)}
    values |= {"gap_k": relative_gap(s, top)}
    return values | {"stable_rank": (frobenius / float(s[0])) ** 2 if s[0] != 0.0 else 0.0}


def above_rounding(
    s: np.ndarray, shape: tuple[int, int], eps: float = FLOAT32_EPS
) -> tuple[np.ndarray, tuple[int, int]]:
    """The first `numerical_rank` values, and the shape (long side, rank) of a matrix with only these.

    A spectrum with a NaN stays whole.
    """
    rank = numerical_rank(s, shape, eps)
    return (s, shape) if np.isnan(rank) or rank == s.size else (s[: int(rank)], (max(shape), int(rank)))


def _relative_to_first(s: np.ndarray) -> np.ndarray:
    """The values over sigma_1, so that squares neither overflow nor vanish; zeros for a zero matrix."""
    return s / s[0] if s[0] != 0.0 else np.zeros_like(s)


def relative_change(before: Solved, now: Solved) -> float:
    """Mean over the recorded top values of |sigma_i - sigma_i'| / max(sigma_i', FLOOR sigma_1'), ' being the earlier.

    0 where both are 0.
    """
    old, new = before.top.s, now.top.s
    scale = np.maximum(old, FLOOR * float(before.s[0]))
    difference = np.abs(new - old)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.mean(np.where(difference == 0, 0.0, difference / scale)))
