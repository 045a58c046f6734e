"""The power law against a plain twin, other people's numbers, and spectra whose law is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_vit.spectral.measures.metrics import power_law, stable_rank

spectra = st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=80, unique=True).map(lambda v: np.sort(np.array(v))[::-1])


def plain_power_law(s: np.ndarray) -> list[tuple[float, float, int]]:
    """(KS distance, alpha, values in the tail) for every x_min but the greatest, by the book."""
    x = np.sort(s**2)
    fits = []
    for i, x_min in enumerate(x[:-1]):
        tail = x[i:]
        alpha = 1 + tail.size / sum(math.log(value / x_min) for value in tail)
        fitted = [1 - (value / x_min) ** (1 - alpha) for value in tail]
        ks = max(abs(f - n / tail.size) for n, f in enumerate(fitted))
        fits.append((ks, alpha, tail.size))
    return fits


@given(spectra)
def test_the_fit_is_that_of_a_plain_loop(s: np.ndarray) -> None:
    fits, found = plain_power_law(s), power_law(s)
    assert found.ks == pytest.approx(min(fits)[0], rel=1e-6, abs=1e-9)
    # Of several tails that fit equally well rounding may choose another.
    same = [(alpha, n) for ks, alpha, n in fits if ks <= found.ks * (1 + 1e-6) + 1e-9]
    assert any(found.alpha == pytest.approx(alpha, rel=1e-6) and found.tail == n for alpha, n in same)
    assert found.sigma == pytest.approx((found.alpha - 1) / math.sqrt(found.tail))


@pytest.mark.parametrize("alpha", [2.0, 2.5, 4.0])
def test_a_sampled_power_law_is_found_again(alpha: float) -> None:
    uniform = np.random.default_rng(0).random(4000)
    s = np.sort(np.sqrt((1 - uniform) ** (-1 / (alpha - 1))))[::-1]  # density of s^2 is x^-alpha for x >= 1
    found = power_law(s)
    assert abs(found.alpha - alpha) < 5 * found.sigma
    assert found.ks < 0.03


def weightwatchers_matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "gauss 96x64": rng.standard_normal((96, 64)),
        "gauss 768x768": rng.standard_normal((768, 768)) * 0.02,
        "heavy 200x100": rng.standard_t(2.5, (200, 100)),
        "low rank 300x120": rng.standard_normal((300, 8)) @ rng.standard_normal((8, 120))
        + 0.3 * rng.standard_normal((300, 120)),
    }


# alpha, D, sigma, num_pl_spikes, stable_rank of WeightWatcher 0.7.7's `analyze(min_evals=2)` on linear layers with
# these weights in float32 (it does not install beside this project's versions, so its answers are kept here).
WEIGHTWATCHER = {
    "gauss 96x64": (7.544533, 0.166302, 2.181511, 9, 20.792060),
    "gauss 768x768": (14.056231, 0.122673, 2.512673, 27, 194.678491),
    "heavy 200x100": (4.586008, 0.087772, 0.994580, 13, 19.621552),
    "low rank 300x120": (1.548995, 0.187841, 0.051194, 115, 5.401000),
}


@pytest.mark.parametrize("name", WEIGHTWATCHER)
def test_weightwatcher_says_the_same(name: str) -> None:
    s = np.linalg.svd(weightwatchers_matrices()[name], compute_uv=False)
    found = power_law(s)
    alpha, ks, sigma, tail, stable = WEIGHTWATCHER[name]
    assert (found.alpha, found.ks, found.sigma) == pytest.approx((alpha, ks, sigma), rel=1e-5)
    assert found.tail == tail
    assert stable_rank(s) == pytest.approx(stable, rel=1e-6)


@pytest.mark.parametrize("s", [np.ones(9), np.array([3.0, 2.0, 1.0]), np.zeros(5), np.array([np.nan, 1, 1, 1, 1.0])])
def test_what_cannot_be_fitted_is_nan(s: np.ndarray) -> None:
    assert all(math.isnan(value) for value in power_law(s))
