"""The bulk of a spectrum compared with a random matrix: the Marchenko-Pastur law, and the edge that noise stays below.

Float64. `s` is all K singular values, descending; L is the long side of the matrix, K the short one, beta = K / L.
x = s^2 / (sigma^2 L) is an eigenvalue in the units of the law, whose entries have deviation 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from lowrank_vit.spectral.solving.extremes import Thirds
from lowrank_vit.spectral.solving.pieces import in_pieces, some_of
from lowrank_vit.spectral.solving.solve import MatrixStack, all_values

FALSE_ALARMS = 0.01
"""The share of matrices of pure noise whose greatest singular value lies above the edge."""
SCALE_COLUMNS = 128
"""Columns of a third of a qkv matrix that give its scale; all columns where there are fewer than twice as many."""
ONE_SCALE = 1.02
"""Thirds whose scales differ by no more than this factor count as equal."""
_SPACING_VARIANCE = 0.286
"""Variance of the distance of neighbouring eigenvalues of a large real random matrix, mean distance 1 (Mehta 2004)."""


class Noise(NamedTuple):
    """The bulk of a spectrum seen as that of a random matrix."""

    sigma: float
    """Standard deviation of that matrix's entries."""
    edge: float
    """Its greatest singular value stays below this with 99 % probability."""
    outliers: float
    """How many singular values lie above `edge`."""
    ks: float
    """Greatest distance between the distribution of the values up to `edge` and the law, 0-1."""


def marchenko_pastur(s: np.ndarray, shape: tuple[int, int]) -> Noise:
    """How many singular values stand out of the bulk that a matrix of independent entries would have.

    The entries' deviation comes from `deviation`, the edge from `edge_over_sigma`, which allows for the error of that
    deviation. `ks` compares the values up to the edge with the law below it. All are NaN where the deviation is.
    """
    sigma = deviation(s, shape)
    if np.isnan(sigma):
        return Noise(*[float("nan")] * 4)
    long, short = max(shape), min(shape)
    edge = sigma * edge_over_sigma(long, short)
    bulk = s[s <= edge][::-1]
    return Noise(sigma, edge, float(s.size - bulk.size), _distance(bulk, edge, sigma, long, short))


def deviation(s: np.ndarray, shape: tuple[int, int]) -> float:
    """The standard deviation of noise's entries, from the median singular value, which a few outliers do not move.

    median(s) / sqrt(L mu), mu the median of the Marchenko-Pastur law (Gavish & Donoho, "The optimal hard threshold for
    singular values is 4/sqrt(3)", IEEE Trans. Inf. Theory 60 (2014), section III.E). NaN where the median is 0 or NaN,
    or a side is 1.
    """
    long, short = max(shape), min(shape)
    median = float(np.median(s)) if s.size else 0.0
    return median / (long * median_of_law(short / long)) ** 0.5 if median > 0 and short > 1 else float("nan")


def scaled_thirds(stack: MatrixStack, spectra: Mapping[str, np.ndarray], cpu_threads: int = 1) -> dict[str, Thirds]:
    """By name, the spectra of a stack's fused qkv matrices with Q, K and V brought to one scale of noise.

    The noise's deviation in a third comes from the median singular value of about `SCALE_COLUMNS` of its columns,
    evenly spaced, which costs a thirtieth of the spectrum. Its error, 0.4 % at a width of 768, hardly matters: in noise
    each third contributes equally to every direction, so to first order wrong ratios move bulk and edge together.
    Thirds that agree within `ONE_SCALE` are left as they are, which saves the second spectrum.

    Args:
        stack: matrices, some of them fused.
        spectra: name to (K,) values of the matrices to scale. They must have full numerical rank: otherwise the median
            of a third would be rounding.
        cpu_threads: how many matrices are solved at once on a CPU.
    """
    chosen = [i for i, name in enumerate(stack.names) if name in spectra]
    if not chosen or stack.matrices_NRC.shape[1] % 3:
        return {}
    found: dict[str, Thirds] = {}
    for one in in_pieces(stack, cpu_threads):
        found |= _thirds_of(one, spectra, cpu_threads)
    return found


def _thirds_of(stack: MatrixStack, spectra: Mapping[str, np.ndarray], cpu_threads: int) -> dict[str, Thirds]:
    """`scaled_thirds` of a few matrices, which are copied."""
    rows, cols = stack.matrices_NRC.shape[1:]
    chosen = [i for i, name in enumerate(stack.names) if name in spectra]
    n = len(chosen)
    if not chosen:
        return {}
    with torch.no_grad():
        fused_NRC = some_of(stack, chosen).matrices_NRC
        some = fused_NRC.reshape(3 * n, rows // 3, cols)[..., :: max(1, cols // SCALE_COLUMNS)]
        values = all_values(some, cpu_threads)
        deviations = np.array([deviation(s, (some.shape[1], some.shape[2])) for s in values]).reshape(n, 3)
        scales = deviations / np.sqrt(np.mean(deviations**2, axis=1, keepdims=True))
        usable = np.isfinite(scales).all(axis=1)
        differ = usable & (scales.max(axis=1) > ONE_SCALE * scales.min(axis=1))
        at = np.flatnonzero(differ)
        factors = torch.from_numpy(np.repeat(1 / scales[at], rows // 3, axis=1)).to(fused_NRC)
        scaled = all_values(fused_NRC[at] * factors[..., None], cpu_threads)
    names = [stack.names[i] for i in chosen]
    own = {name: Thirds(np.ones(3), spectra[name]) for name, ok in zip(names, usable, strict=True) if ok}
    return own | {names[i]: Thirds(scales[i], s) for i, s in zip(at, scaled, strict=True)}


def _distance(bulk: np.ndarray, edge: float, sigma: float, long: int, short: int) -> float:
    """The Kolmogorov-Smirnov distance of ascending values from the law between 0 and the edge."""
    _, x, below = _law(short / long)
    ends = np.concatenate([bulk, [edge]])
    expected = np.interp((ends / sigma) ** 2 / long, x[::-1], below[::-1])
    expected = expected[:-1] / expected[-1]
    steps = np.arange(bulk.size + 1) / bulk.size
    return float(max(np.max(steps[1:] - expected), np.max(expected - steps[:-1])))


@lru_cache(maxsize=256)
def edge_over_sigma(long: int, short: int) -> float:
    """The 99 % quantile of sigma_1 over sigma for a random matrix, sigma estimated from its own median.

    sigma_1^2 = m + w z, with z of the Tracy-Widom law for real matrices, m = (a + b)^2, w = (a + b) (1/a + 1/b)^(1/3),
    a = sqrt(L - 1/2), b = sqrt(K - 1/2) (Ma, "Accuracy of the Tracy-Widom limits for the extreme eigenvalues in white
    Wishart matrices", Bernoulli 18 (2012)). The median's estimate of the squared deviation is sigma^2 (1 + d), d
    normal, see `median_error`. Without d there would be two to three times as many false alarms.
    """
    centre, width = _greatest_of_noise(long, short)
    z = np.linspace(-2.0, 12.0, 1401)
    squares = centre + width * z
    return float(np.interp(FALSE_ALARMS, chance_beyond(squares, long, short)[::-1], squares[::-1])) ** 0.5


def chance_beyond(squares: np.ndarray, long: int, short: int) -> np.ndarray:
    """The probability that a matrix of pure noise has (sigma_1 / sigma)^2 above each of these numbers, 0-1.

    sigma is estimated from the median, and the error of that is allowed for. See `edge_over_sigma`.
    """
    centre, width = _greatest_of_noise(long, short)
    bias, variance, covariance = median_error(long, short)
    # Only the variance of the ratio matters, so d is treated as independent of sigma_1, with a smaller variance.
    deviation = max(variance - 2 * covariance, 0.0) ** 0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(31)
    factors = np.maximum(1 + bias + deviation * nodes, 0.0)
    z = (np.asarray(squares, float)[..., None] * factors - centre) / width
    return tracy_widom_beyond(z) @ (weights / weights.sum())


def _greatest_of_noise(long: int, short: int) -> tuple[float, float]:
    """Centre and width of the square of sigma_1 of unit noise."""
    a, b = (long - 0.5) ** 0.5, (short - 0.5) ** 0.5
    return (a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)


def median_error(long: int, short: int) -> tuple[float, float, float]:
    """Mean and variance of d, and its covariance with sigma_1^2 over the mean of that.

    The median squared singular value of unit noise is L mu (1 + d).

    With f the law's density at its median mu, h half its width, and cos(phi) the place of mu in it, -1 to 1:
    The number of eigenvalues below L mu has the mean K/2 + 1/4 - (pi - phi) / (2 pi) (Bai & Silverstein, Annals of
    Probability 32 (2004)) and the variance (ln(4 pi K f h sin(phi)^2) + gamma + 1 - pi^2/8) / pi^2 (Gustavsson, Ann.
    IHP 41 (2005); the constant as for the real Gaussian ensemble, Mehta 2004). An eigenvalue varies less than
    that number by 1/12 (French, Mello & Pandey, Annals of Physics 113 (1978)), the mean of two neighbours by a quarter
    of their distance's variance less. The covariance of the numbers below two places theta and phi is
    ln |sin((theta + phi)/2) / sin((theta - phi)/2)| / pi^2 (Johansson, Duke 91 (1998)); theta = 0 is the upper edge.
    """
    beta = short / long
    mu = median_of_law(beta)
    low, high = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2
    half = (high - low) / 2
    phi = np.arccos((mu - (high + low) / 2) / half)
    density = half * np.sin(phi) / (2 * np.pi * beta * mu)
    scale = short * density * mu
    more = 0.25 - (np.pi - phi) / (2 * np.pi)
    rigid = np.log(4 * np.pi * short * density * half * np.sin(phi) ** 2) + np.euler_gamma + 1 - np.pi**2 / 8
    variance = rigid / np.pi**2 - 1 / 12 - (_SPACING_VARIANCE / 4 if short % 2 == 0 else 0.0)
    covariance = beta**0.5 / np.tan(phi / 2) / (np.pi * short)
    return float(-more / scale), float(max(variance, 0.0) / scale**2), float(covariance / scale)


def tracy_widom_beyond(z: np.ndarray) -> np.ndarray:
    """1 - F_1(z), F_1 the Tracy-Widom law for real matrices; relative error about 1e-3, an upper bound above z = 16."""
    at, logs = _tracy_widom_table()
    slope = (logs[-1] - logs[-2]) / (at[-1] - at[-2])
    return np.exp(np.interp(z, at, logs) + slope * np.maximum(z - at[-1], 0.0))


@lru_cache(maxsize=1)
def _tracy_widom_table() -> tuple[np.ndarray, np.ndarray]:
    """Points, and ln(1 - F_1) there.

    F_1(z) = det(1 - B), B(x, y) = Ai(x + y + z) on the positive half-line (Ferrari & Spohn, J. Phys. A 38 (2005)), by
    Gauss-Legendre quadrature (Bornemann, Math. Comp. 79 (2010)).
    """
    from scipy.special import airy

    nodes, weights = np.polynomial.legendre.leggauss(20)
    x, root = 8 * (nodes + 1), np.sqrt(8 * weights)
    at = np.linspace(-8.0, 16.0, 241)
    kernels = airy(x[None, :, None] + x[None, None, :] + at[:, None, None])[0] * (root[:, None] * root)
    shares = np.linalg.eigvalsh(kernels)
    return at, np.log(-np.expm1(np.log1p(-np.minimum(shares, 1 - 1e-16)).sum(axis=1)))


@lru_cache(maxsize=64)
def median_of_law(beta: float) -> float:
    """The median of the Marchenko-Pastur law of unit variance and ratio 0 < beta <= 1, to about 1e-7."""
    t, x, below = _law(beta)
    return float(np.interp(0.5, below[::-1], x[::-1])) if t.size else float("nan")


def bulk_density(values: np.ndarray, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """The density of the singular values of noise with entries of deviation `sigma`, for drawing; 0 outside the bulk.

    Marchenko & Pastur, Math. USSR-Sbornik 1 (1967), transformed from sigma_i^2 / L to sigma_i.
    """
    long, short = max(shape), min(shape)
    beta = short / long
    x = (values / sigma) ** 2 / long
    low, high = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2
    inside = np.sqrt(np.clip((high - x) * (x - low), 0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(x > 0, inside / (2 * np.pi * beta * x), 0.0)
    return density * 2 * values / (sigma**2 * long)


@lru_cache(maxsize=64)
def _law(beta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Angles t from 0 to pi, the points x, descending, and the distribution up to each x.

    With x = 1 + beta + 2 sqrt(beta) cos t the distribution is the integral of 2 sin^2 t / (pi x) over t, smooth on
    [0, pi] (at beta = 1 its limit at t = pi is 2/pi).
    """
    t = np.linspace(0.0, np.pi, 20001)
    x = 1 + beta + 2 * beta**0.5 * np.cos(t)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = 2 * np.sin(t) ** 2 / (np.pi * x)
    rate[-1] = 2 / np.pi if beta == 1 else 0.0
    step = t[1] - t[0]
    above = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2 * step)])
    return t, x, 1 - above
