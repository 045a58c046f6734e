"""Two fits to a whole spectrum: a power law to its tail, and Marchenko and Pastur's law to its bulk. Pure numpy."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

LEAST_VALUES = 4
"""Fewer positive values than this are not fitted."""
TRACY_WIDOM_99 = 2.0234
"""The 99 % point of the Tracy-Widom law for real matrices (Bejan 2005, table 1)."""
_ROWS_AT_ONCE = 64


class PowerLaw(NamedTuple):
    """A fitted density p(x) ~ x^-alpha for x >= x_min, of the eigenvalues x = sigma^2."""

    alpha: float
    ks: float
    """Greatest distance between the fitted and the empirical distribution above x_min, 0-1: the goodness of fit."""
    sigma: float
    """Standard error of alpha."""
    tail: float
    """How many eigenvalues lie at or above x_min."""


class Noise(NamedTuple):
    """The bulk of a spectrum seen as that of a random matrix."""

    sigma: float
    """Standard deviation of that matrix's entries."""
    edge: float
    """What its greatest singular value stays below with 99 % probability."""
    outliers: float
    """How many singular values lie above `edge`."""


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
    distances = np.ones(n - 1)
    for start in range(0, n - 1, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, n - 1))
        usable = np.isfinite(alphas[rows])
        slope = np.where(usable, alphas[rows], 2.0)[:, None]
        columns = np.arange(start, n)
        fitted = 1 - np.exp((1 - slope) * np.maximum(logs[None, columns] - logs[rows, None], 0.0))
        empirical = (columns[None, :] - rows[:, None]) / counts[rows, None]
        difference = np.where(columns[None, :] >= rows[:, None], np.abs(fitted - empirical), 0.0)
        distances[rows] = np.where(usable, difference.max(axis=1), 1.0)
    best = int(np.argmin(distances))
    if not np.isfinite(alphas[best]):
        return none
    alpha, tail = float(alphas[best]), float(counts[best])
    return PowerLaw(alpha, float(distances[best]), (alpha - 1) / tail**0.5, tail)


def marchenko_pastur(s: np.ndarray, shape: tuple[int, int]) -> Noise:
    """How many singular values stand out of the bulk that a matrix of independent entries would have.

    The entries' deviation comes from the median value, which a few outliers do not move: sigma = median(s) /
    sqrt(L mu_beta), with L the long side, beta = K / L, mu_beta the median of the Marchenko-Pastur law (Gavish, Donoho,
    "The optimal hard threshold for singular values is 4/sqrt(3)", IEEE Trans. Inf. Theory 60 (2014), section III.E).
    The edge is sigma sqrt(m + 2.0234 w), m = (sqrt(L-1) + sqrt(K))^2, w = (sqrt(L-1) + sqrt(K)) (1/sqrt(L-1) +
    1/sqrt(K))^(1/3): the 99 % point of the largest value of pure noise (Johnstone, Annals of Statistics 29 (2001)).

    NaN where the median is 0 or NaN, or a side is 1.
    """
    long, short = max(shape), min(shape)
    median = float(np.median(s))
    if not median > 0 or short < 2:
        return Noise(*[float("nan")] * 3)
    sigma = median / (long * median_of_law(short / long)) ** 0.5
    reach = (long - 1) ** 0.5 + short**0.5
    width = reach * ((long - 1) ** -0.5 + short**-0.5) ** (1 / 3)
    edge = sigma * (reach**2 + TRACY_WIDOM_99 * width) ** 0.5
    return Noise(sigma, edge, float(np.count_nonzero(s > edge)))


@lru_cache(maxsize=64)
def median_of_law(beta: float) -> float:
    """The median of the Marchenko-Pastur law of unit variance and ratio 0 < beta <= 1, to about 1e-7.

    With x = 1 + beta + 2 sqrt(beta) cos t the distribution is the integral of 2 sin^2 t / (pi x) over t, smooth on
    [0, pi] (at beta = 1 its limit at t = pi is 2/pi).
    """
    t, x, below = _law(beta)
    return float(np.interp(0.5, below[::-1], x[::-1])) if t.size else float("nan")


def bulk_density(values: np.ndarray, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """The density of the singular values of noise with entries of deviation `sigma`, for drawing; 0 outside the bulk.

    Marchenko & Pastur, Math. USSR-Sbornik 1 (1967), of sigma_i instead of sigma_i^2 / L.
    """
    long, short = max(shape), min(shape)
    beta = short / long
    x = (values / sigma) ** 2 / long
    low, high = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2
    inside = np.sqrt(np.clip((high - x) * (x - low), 0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(x > 0, inside / (2 * np.pi * beta * x), 0.0)
    return density * 2 * values / (sigma**2 * long)


def _law(beta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Angles t from 0 to pi, the points x, descending, and the distribution up to each x."""
    t = np.linspace(0.0, np.pi, 20001)
    x = 1 + beta + 2 * beta**0.5 * np.cos(t)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = 2 * np.sin(t) ** 2 / (np.pi * x)
    rate[-1] = 2 / np.pi if beta == 1 else 0.0
    step = t[1] - t[0]
    above = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2 * step)])
    return t, x, 1 - above
