"""Tests of fitted numbers: the power law's p-value and its rivals, spikes against noise, and a shuffled twin.

Offline only: a bootstrap takes seconds per matrix. Every draw comes from Philox keyed by the matrix's name, so a matrix
has the same numbers whatever else is analyzed, in any number of threads.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.spectral.measures.metrics import (
    LEAST_VALUES,
    above_rounding,
    is_of_full_rank,
    power_law,
    spectrum_metrics,
)
from lowrank_vit.spectral.measures.noise import FALSE_ALARMS, chance_beyond, deviation, scaled_thirds
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.solving.solve import MatrixStack, all_values
from lowrank_vit.spectral.watching.refresh import SpectralSettings

BOOTSTRAPS = 100
"""Default number of draws for the power law's p-value: its standard error is then at most 0.05."""
OF_TWIN = ("sigma_max", "stable_rank", "alpha", "alpha_sigma", "mp_outliers", "mp_ks")
"""Metrics that are given of the shuffled twin."""
_BOOTSTRAP, _TWIN = 0, 1


class Rival(NamedTuple):
    """The power law compared with another density on the same tail."""

    ratio: float
    """ln of the likelihood of the power law over the other's, over all values of the tail: positive favours it."""
    p: float
    """Probability of a ratio this far from 0 if both fit equally well; above about 0.1 its sign means nothing."""


def statistics_of(
    weights: Mapping[str, Tensor],
    solved: Mapping[str, Solved],
    settings: SpectralSettings,
    bootstraps: int = BOOTSTRAPS,
    fused: Collection[str] = (),
) -> dict[str, dict[str, float]]:
    """All numbers of this module, by matrix. `fused`: names of the matrices whose rows are Q, K and V.

    Returns:
        "alpha_p", "alpha_p_error" (see `bootstrap`); "lr_exponential", "lr_exponential_p", likewise "lr_lognormal" and
        "lr_truncated" (see `rivals`); "spike_p1".. "spike_p<topk>" and "spikes" (see `spike_chances`); and
        "shuffled_<metric>" of `OF_TWIN` (see `shuffled`). NaN where a fit or a scale is NaN. Fits and spikes are of the
        values above rounding, as in `spectrum_metrics`.
    """

    def one(name: str) -> dict[str, float]:
        found = solved[name]
        s, shape = above_rounding(found.s, (weights[name].shape[0], weights[name].shape[1]), found.eps)
        p, error = bootstrap(s, bootstraps, _generator(name, _BOOTSTRAP))
        values = {"alpha_p": p, "alpha_p_error": error}
        for rival, (ratio, chance) in rivals(s).items():
            values |= {f"lr_{rival}": ratio, f"lr_{rival}_p": chance}
        chances = spike_chances(found.thirds.s if found.thirds else s, shape)
        values |= {f"spike_p{i}": float(p) for i, p in enumerate(chances[: settings.topk], start=1)}
        values["spikes"] = float("nan") if np.isnan(chances).any() else float(np.count_nonzero(chances < FALSE_ALARMS))
        return values

    with ThreadPoolExecutor(settings.cpu_threads, thread_name_prefix="spectral-statistics") as pool:
        results = dict(zip(weights, pool.map(one, weights), strict=True))
    for name, weight in weights.items():
        results[name] |= {
            f"shuffled_{key}": value
            for key, value in shuffled(name, weight, solved[name], settings, is_fused=name in fused).items()
        }
    return results


def _generator(name: str, use: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([use, zlib.crc32(name.encode())], np.uint64)))


def bootstrap(s: np.ndarray, count: int, rng: np.random.Generator) -> tuple[float, float]:
    """The p-value of the power law fitted to sigma_i^2, and its standard error.

    The p-value is the share of `count` drawn spectra whose own fit has a KS distance as large or larger: a small one
    (0.1 or less) says that the tail is no power law. A drawn spectrum has as many values as `s`. Each comes from the
    fitted law with the tail's share as probability, otherwise from the values below x_min; x_min and alpha are fitted
    anew (Clauset, Shalizi & Newman, SIAM Review 51 (2009), section 4.1). The standard error is that of a share by
    Laplace's rule. NaN where nothing can be fitted.
    """
    fit = power_law(s)
    if np.isnan(fit.alpha):
        return float("nan"), float("nan")
    positive = s[s > 0]
    tail = int(fit.tail)
    body, least = positive[tail:], positive[tail - 1]
    as_far = 0
    for _ in range(count):
        in_tail = rng.random(positive.size) < tail / positive.size
        # sigma^2 is x_min (1 - u)^(-1 / (alpha - 1)), hence sigma with half the exponent.
        drawn = least * (1 - rng.random(positive.size)) ** (-0.5 / (fit.alpha - 1))
        if body.size:
            drawn = np.where(in_tail, drawn, body[rng.integers(body.size, size=positive.size)])
        as_far += not power_law(np.sort(drawn)[::-1]).ks < fit.ks
    likely = (as_far + 1) / (count + 2)  # not 0 where no draw was as far
    return as_far / count, (likely * (1 - likely) / count) ** 0.5


def rivals(s: np.ndarray) -> dict[str, Rival]:
    """The power law's tail against "exponential", "lognormal" and "truncated" (x^-alpha e^(-lambda x)), by likelihood.

    Each is fitted by maximum likelihood to the eigenvalues x = sigma^2 >= x_min of the power law's fit, as a density on
    x >= x_min. The p-value is Vuong's (Econometrica 57 (1989)); for the truncated law, of which the power law is a
    special case, it is that of a likelihood ratio test (Clauset, Shalizi & Newman 2009, appendix C). NaN where nothing
    can be fitted, or where the tail has fewer than 4 values.
    """
    fit = power_law(s)
    names = ("exponential", "lognormal", "truncated")
    if np.isnan(fit.alpha) or fit.tail < LEAST_VALUES:
        return dict.fromkeys(names, Rival(float("nan"), float("nan")))
    x = (s[: int(fit.tail)] / s[int(fit.tail) - 1]) ** 2  # in units of x_min: no ratio depends on the unit
    own = np.log(fit.alpha - 1) - fit.alpha * np.log(x)
    logs = (_exponential(x), _lognormal(x), _truncated(x, fit.alpha))
    return {name: _compared(own, other, nested=name == "truncated") for name, other in zip(names, logs, strict=True)}


def _compared(own: np.ndarray, other: np.ndarray, nested: bool) -> Rival:
    from scipy.special import chdtrc, erfc

    difference = own - other
    ratio = float(np.sum(difference))
    if nested:
        return Rival(min(ratio, 0.0), float(chdtrc(1, 2 * max(-ratio, 0.0))))
    spread = float(np.std(difference))
    return Rival(ratio, float(erfc(abs(ratio) / (2 * difference.size) ** 0.5 / spread)) if spread > 0 else 1.0)


def _exponential(x: np.ndarray) -> np.ndarray:
    """Log densities of lambda e^(-lambda (x - 1)), lambda = 1 / (mean - 1)."""
    rate = 1 / (np.mean(x) - 1)
    return np.log(rate) - rate * (x - 1)


def _lognormal(x: np.ndarray) -> np.ndarray:
    """Log densities of ln x normal with mean m and deviation d, given x >= 1."""
    from scipy.special import log_ndtr

    logs = np.log(x)

    def density(parameters: np.ndarray) -> np.ndarray:
        m, d = parameters[0], np.exp(np.clip(parameters[1], -30, 30))
        z = (logs - m) / d
        return -logs - np.log(d) - 0.5 * np.log(2 * np.pi) - z**2 / 2 - log_ndtr(m / d)

    return _fitted(density, np.array([np.mean(logs), np.log(np.std(logs))]))


def _truncated(x: np.ndarray, alpha: float) -> np.ndarray:
    """Log densities of x^-a e^(-b x) on x >= 1 with a > 1, normalised by an integral over u, x = e^u."""
    logs = np.log(x)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    nodes, weights = (nodes + 1) / 2, weights / 2

    def density(parameters: np.ndarray) -> np.ndarray:
        steep, b = np.exp(np.clip(parameters, -40, 30))
        end = 40 / (steep + b)  # beyond, the integrand is below e^-40 of its start
        u = nodes * end
        total = np.dot(weights, np.exp(-steep * u - b * np.expm1(u))) * end
        return -(1 + steep) * logs - b * (x - 1) - np.log(total)

    start = np.log(alpha - 1)
    fits = [_fitted(density, np.array([start + shift, rate])) for shift, rate in ((0.0, -12.0), (-1.0, 0.0))]
    return max(fits, key=lambda logs: float(np.sum(logs)))


def _fitted(density: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> np.ndarray:
    """Log densities at the parameters of greatest likelihood, searched from `start`."""
    from scipy.optimize import minimize

    def loss(parameters: np.ndarray) -> float:
        with np.errstate(all="ignore"):
            total = float(np.sum(density(parameters)))
        return -total if np.isfinite(total) else 1e300

    options = {"xatol": 1e-6, "fatol": 1e-7, "maxiter": 2000, "maxfev": 4000}
    found = minimize(loss, start, method="Nelder-Mead", options=options)
    return density(found.x)


def spike_chances(s: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(K,) the probability that noise has a value as great as the i-th, if the i - 1 greater ones are not noise.

    It is the Tracy-Widom law of noise with i - 1 fewer rows or columns on its short side, which bounds the i-th value
    beside i - 1 spikes (Johnstone, Annals of Statistics 29 (2001), proposition 1.2). The deviation is estimated from
    the median of all of `s`, and the error of that is allowed for. NaN where there is no deviation.
    """
    sigma = deviation(s, shape)
    long, short = max(shape), min(shape)
    chances = np.full(s.size, np.nan)
    if np.isnan(sigma):
        return chances
    chances[:] = 1.0
    for i in range(min(s.size, short - 1)):
        chances[i] = chance_beyond(np.array((s[i] / sigma) ** 2), long, short - i)
        if chances[i] > 0.5:  # the rest is bulk
            break
    return np.maximum.accumulate(chances)


def shuffled(
    name: str, weight: Tensor, solved: Solved, settings: SpectralSettings, *, is_fused: bool = False
) -> dict[str, float]:
    """The metrics `OF_TWIN` of a matrix with the same entries in random order; thirds of fused qkv are kept apart.

    A property that the twin shares comes from the distribution and number of the entries (a single huge entry, heavy
    tails), not from their arrangement. NaN where the matrix is not finite.
    """
    rng, shape = _generator(name, _TWIN), (weight.shape[0], weight.shape[1])
    entries = weight.detach().cpu()
    parts = 3 if is_fused else 1
    thirds = entries.reshape(parts, -1)
    order = torch.from_numpy(np.stack([rng.permutation(thirds.shape[1]) for _ in range(parts)]))
    twin = thirds.gather(1, order).reshape(1, *shape).to(weight.device)
    (s,) = all_values(twin)
    fused = {name: s} if is_fused and is_of_full_rank(s, shape, solved.eps) else {}
    found = scaled_thirds(MatrixStack((name,), twin), fused).get(name)
    values = spectrum_metrics(s, shape, settings.topk, settings.interval, solved.eps, found)
    return {key: values[key] for key in OF_TWIN}
