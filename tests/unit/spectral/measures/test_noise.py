"""Marchenko-Pastur: the law, and how often its edge takes noise for something else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.linalg import eigvalsh_tridiagonal, get_lapack_funcs, svdvals

from lowrank_vit.spectral.measures.noise import (
    FALSE_ALARMS,
    bulk_density,
    chance_beyond,
    edge_over_sigma,
    marchenko_pastur,
    median_error,
    median_of_law,
    tracy_widom_beyond,
)
from tests.spectra import low_rank_and_noise

# qkv, one of its thirds (and proj), fc1 and fc2, and where it differs the patch embedding of ViT-Ti, S, B, L; then the
# quickstart's, and others that are small or odd.
VIT_SHAPES = [(factor * width, width) for width in (192, 384, 768, 1024) for factor in (3, 1, 4)]
SHAPES = [*VIT_SHAPES, (768, 384), (1024, 768), (96, 96), (288, 96), (384, 96), (48, 96), (97, 97)]


def gaussian_gram(long: int, short: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Diagonal and off-diagonal of a tridiagonal matrix with the eigenvalues of the Gram matrix of unit noise.

    Exact in law, without the noise: Dumitriu & Edelman, "Matrix models for beta ensembles", J. Math. Phys. 43 (2002).
    """
    d = rng.chisquare(np.arange(long, long - short, -1.0))
    e = rng.chisquare(np.arange(short - 1.0, 0, -1))
    diagonal = d.copy()
    diagonal[1:] += e
    return diagonal, np.sqrt(d[:-1] * e)


def ends_and_middles_of_noise(shape: tuple[int, int], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The squares of sigma_1 and of the median value of so many matrices of unit noise; by bisection, to 1e-7."""
    long, short = max(shape), min(shape)
    rng = np.random.default_rng([seed, long, short])
    bisect: Any = get_lapack_funcs("stebz", dtype=np.float64)
    middle = sorted({(short + 1) // 2, short // 2 + 1})
    found = []
    for _ in range(count):
        diagonal, off = gaussian_gram(long, short, rng)
        tolerance = 1e-7 * (long + short)
        top, *two = (bisect(diagonal, off, 2, 0.0, 0.0, i, i, tolerance, "E")[1][0] for i in (short, *middle))
        found.append((top, np.mean(np.sqrt(two)) ** 2))
    tops, medians = np.array(found).T
    return tops, medians


def greatest_over_sigma_of_noise(shape: tuple[int, int], count: int, seed: int) -> np.ndarray:
    """(sigma_1 / sigma)^2, sigma being what the median tells."""
    tops, medians = ends_and_middles_of_noise(shape, count, seed)
    return tops / medians * max(shape) * median_of_law(min(shape) / max(shape))


def false_alarms_are_as_many_as_promised(shape: tuple[int, int], count: int) -> None:
    edge = edge_over_sigma(max(shape), min(shape))
    alarms = np.count_nonzero(greatest_over_sigma_of_noise(shape, count, 0) > edge**2)
    # 3.3 standard deviations: one shape of a thousand would fail by chance, and the seed is fixed.
    assert abs(alarms - count * FALSE_ALARMS) <= 3.3 * (count * FALSE_ALARMS * (1 - FALSE_ALARMS)) ** 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_matrix_of_noise_in_a_hundred_has_a_value_beyond_the_edge(shape: tuple[int, int]) -> None:
    false_alarms_are_as_many_as_promised(shape, 200)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_that_is_so_of_two_thousand(shape: tuple[int, int]) -> None:
    false_alarms_are_as_many_as_promised(shape, 2000)


def test_over_all_shapes_false_alarms_are_one_percent_and_chances_are_uniform() -> None:
    chances = np.concatenate(
        [chance_beyond(greatest_over_sigma_of_noise((f * 192, 192), 1000, 1), f * 192, 192) for f in (1, 3, 4)]
    )
    for level in (0.01, 0.05, 0.2, 0.5):
        assert np.mean(chances < level) == pytest.approx(level, abs=3.3 * (level * (1 - level) / 3000) ** 0.5)


@pytest.mark.parametrize("shape", [(96, 96), (97, 97), (96, 288)])
def test_the_short_cuts_of_these_tests_are_the_spectra_that_a_matrix_has(shape: tuple[int, int]) -> None:
    """Against matrices of normal entries, decomposed, and through the function that everybody calls."""
    rng, long, short = np.random.default_rng(2), max(shape), min(shape)
    found = [svdvals(rng.standard_normal(shape)) for _ in range(150)]
    drawn = [np.sqrt(eigvalsh_tridiagonal(*gaussian_gram(long, short, rng))[::-1]) for _ in range(150)]
    for i in (0, short // 2, short - 1):
        a, b = (np.array([s[i] for s in of]) for of in (found, drawn))
        assert a.mean() == pytest.approx(b.mean(), abs=4 * a.std() / 8.7)
        assert a.std() == pytest.approx(b.std(), rel=0.3)
    for s in drawn[:20]:
        noise = marchenko_pastur(s, shape)
        assert noise.sigma == pytest.approx(np.median(s) / (long * median_of_law(short / long)) ** 0.5)
        assert noise.edge == pytest.approx(noise.sigma * edge_over_sigma(long, short))
        assert noise.outliers == np.count_nonzero(s > noise.edge)


@pytest.mark.parametrize("shape", [(96, 96), (97, 97), (288, 96), (768, 192)])
def test_the_medians_error_is_as_the_theory_says(shape: tuple[int, int]) -> None:
    long, short = shape
    tops, medians = ends_and_middles_of_noise(shape, 2000, 3)
    error = medians / (long * median_of_law(short / long)) - 1
    bias, variance, covariance = median_error(long, short)
    assert error.mean() == pytest.approx(bias, abs=3.3 * (variance / 2000) ** 0.5)
    assert error.var() == pytest.approx(variance, rel=0.11)
    spread = tops.std() / tops.mean()
    assert np.corrcoef(tops, error)[0, 1] == pytest.approx(covariance / (spread * variance**0.5), abs=0.07)


def test_tracy_and_widoms_law_is_the_tabulated_one() -> None:
    # Bejan, "Largest eigenvalues and sample covariance matrices" (2005), table 1, and the law's mean and variance.
    points = np.array([-3.8954, -3.1804, -2.7824, -1.9104, -1.2686, -0.5923, 0.4501, 0.9793, 2.0234])
    expected = [0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99]
    assert 1 - tracy_widom_beyond(points) == pytest.approx(expected, abs=2e-4)
    z = np.linspace(-8, 12, 20001)
    below = 1 - tracy_widom_beyond(z)
    density, middle = np.diff(below), (z[1:] + z[:-1]) / 2
    mean = float(np.sum(density * middle))
    assert (mean, float(np.sum(density * (middle - mean) ** 2))) == pytest.approx((-1.20653, 1.60778), abs=2e-3)
    assert 0 < tracy_widom_beyond(np.array([30.0]))[0] < 1e-40


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25, 0.05])
def test_the_median_is_that_of_large_random_matrices(beta: float) -> None:
    long = 800
    a = np.random.default_rng(1).standard_normal((long, int(beta * long)))
    eigenvalues = np.linalg.svd(a, compute_uv=False) ** 2 / long
    assert median_of_law(beta) == pytest.approx(np.median(eigenvalues), rel=0.02)


def test_the_median_is_gavish_and_donohos() -> None:
    # Their table of omega(beta) = lambda*(beta) / sqrt(mu_beta): 2.858 at beta = 1 with lambda* = 4 / sqrt(3).
    assert 4 / math.sqrt(3) / math.sqrt(median_of_law(1.0)) == pytest.approx(2.858, abs=5e-4)


@pytest.mark.parametrize("shape", [(300, 100), (100, 300), (150, 150)])
def test_the_density_integrates_to_one(shape: tuple[int, int]) -> None:
    values = np.linspace(1e-6, 0.1 * (shape[0] ** 0.5 + shape[1] ** 0.5), 200_001)
    density = bulk_density(values, shape, sigma=0.1)
    assert np.trapezoid(density, values) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("shape", [(300, 100), (100, 300), (200, 200)])
def test_planted_directions_are_counted_and_the_rest_fits_the_law(shape: tuple[int, int]) -> None:
    edge = 0.05 * (shape[0] ** 0.5 + shape[1] ** 0.5)
    planted = low_rank_and_noise(*shape, edge * np.array([4.0, 3.0, 2.0]), 0.05).numpy()
    found = marchenko_pastur(np.linalg.svd(planted, compute_uv=False), shape)
    assert found.outliers == 3
    assert found.sigma == pytest.approx(0.05, rel=0.03)
    assert found.ks < 0.06


@pytest.mark.parametrize("shape", [(96, 96), (768, 192), (1152, 384)])
def test_the_distance_from_the_law_is_of_noise_a_few_steps_and_of_a_bent_bulk_more(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    long, short = shape
    noise = [np.sqrt(eigvalsh_tridiagonal(*gaussian_gram(long, short, rng))[::-1]) for _ in range(20)]
    distances = [marchenko_pastur(s, shape).ks for s in noise]
    assert max(distances) < 6 / short
    assert min(distances) >= 0.5 / short  # half a step is the least there is
    bent = np.exp(-np.linspace(0, 3, short))
    assert marchenko_pastur(bent, shape).ks > 0.1
    # By the book: the values up to the edge, the law's share between them found by adding up its density.
    s = noise[0]
    found = marchenko_pastur(s, shape)
    grid = np.linspace(1e-9, found.edge, 200_001)
    share = np.cumsum(bulk_density(grid, shape, found.sigma))
    bulk = np.sort(s[s <= found.edge])
    law = np.interp(bulk, grid, share / share[-1])
    n = bulk.size
    by_hand = max(max(abs(law[i] - i / n), abs(law[i] - (i + 1) / n)) for i in range(n))
    assert found.ks == pytest.approx(by_hand, abs=1e-4)


def test_noise_is_undefined_for_a_vector_and_for_a_mostly_zero_matrix() -> None:
    for s, shape in ((np.array([2.0]), (5, 1)), (np.array([2.0, 1.0, 0, 0, 0]), (9, 5)), (np.full(5, np.nan), (9, 5))):
        assert all(math.isnan(value) for value in marchenko_pastur(s, shape))
