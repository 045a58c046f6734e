"""Cosines of known angles, their invariances, chance level and relative change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from lowrank_vit.spectral.extremes import Solved, Triplets
from lowrank_vit.spectral.metrics import chance_level, cosine_metrics, principal_cosines, relative_change
from tests.spectra import orthonormal


def rotated(a_NK: np.ndarray, angles: np.ndarray, seed: int) -> np.ndarray:
    """A subspace at these principal angles to that of `a_NK`: each column turned towards a direction outside."""
    n, k = a_NK.shape
    rest = np.random.default_rng(seed).standard_normal((n, k))
    outside, _ = np.linalg.qr(rest - a_NK @ (a_NK.T @ rest))
    return a_NK * np.cos(angles) + outside * np.sin(angles)


@given(st.lists(st.floats(0, np.pi / 2), min_size=1, max_size=6), st.integers(0, 99))
def test_known_angles_come_back_whatever_the_order_signs_and_basis(angles: list[float], seed: int) -> None:
    a = orthonormal(20, len(angles), seed)
    b = rotated(a, np.array(angles), seed + 1)
    expected = np.sort(np.cos(angles))[::-1]
    np.testing.assert_allclose(principal_cosines(a, b), expected, atol=1e-12)
    turned = b @ orthonormal(len(angles), len(angles), seed + 2)
    signs = np.random.default_rng(seed).choice([-1, 1], len(angles))
    for other in (turned, b * signs, b[:, ::-1]):
        np.testing.assert_allclose(principal_cosines(a, other), expected, atol=1e-12)
        np.testing.assert_allclose(principal_cosines(other, a), expected, atol=1e-12)


@given(st.integers(1, 6), st.integers(0, 50))
def test_scipy_agrees(k: int, seed: int) -> None:
    a, b = orthonormal(17, k, seed), orthonormal(17, k, seed + 1)
    np.testing.assert_allclose(principal_cosines(a, b), np.cos(subspace_angles(a, b))[::-1], atol=1e-9)


def test_the_chance_level_is_the_rms_over_random_subspaces() -> None:
    k, n = 8, 96
    cosines = [principal_cosines(orthonormal(n, k, seed), orthonormal(n, k, seed + 1000)) for seed in range(400)]
    assert np.sqrt(np.mean(np.square(cosines))) == pytest.approx(chance_level(k, n), rel=0.01)


def solved(s: list[float], u: np.ndarray, v: np.ndarray, k: int) -> Solved:
    values, at = np.array(s), list(range(len(s)))
    every = Triplets(values, u, v, np.zeros(len(s)))
    return Solved(values, every.pick(at[:k]), every.pick(at[::-1][:k]), 0.0, "svd")


def test_metrics_name_both_sides_and_both_ends() -> None:
    u, v = orthonormal(9, 6, 0), orthonormal(6, 6, 1)
    s = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    before = solved(s, u, v, 2)
    after_u = u.copy()
    after_u[:, :2] = rotated(u[:, :2], np.array([0.1, 0.5]), 5)
    values = cosine_metrics("cos", before, solved(s, after_u, v, 2))
    assert len(values) == 4 * 2 + 4
    assert (values["cos_u1"], values["cos_u2"]) == pytest.approx((np.cos(0.1), np.cos(0.5)))
    assert values["cos_u_max"] == values["cos_u1"]
    assert values["cos_u_mean"] == pytest.approx((np.cos(0.1) + np.cos(0.5)) / 2)
    for name in ("cos_v1", "cos_v2", "cos_u_last1", "cos_u_last2", "cos_v_last1", "cos_v_last2", "cos_v_mean"):
        assert values[name] == pytest.approx(1.0)


def test_a_nan_is_nan_and_not_an_error() -> None:
    u, v = orthonormal(9, 4, 0), orthonormal(4, 4, 1)
    good, bad = solved([4.0, 3, 2, 1], u, v, 2), solved([np.nan] * 4, np.full((9, 4), np.nan), v, 2)
    values = cosine_metrics("cos0", good, bad)
    assert np.isnan(values["cos0_u1"])
    assert values["cos0_v1"] == pytest.approx(1.0)
    assert np.isnan(relative_change(good, bad))


def test_relative_change_by_hand() -> None:
    u, v = orthonormal(9, 4, 0), orthonormal(4, 4, 1)
    before, after = solved([4.0, 2, 1, 0], u, v, 2), solved([5.0, 1.5, 1, 0], u, v, 2)
    assert relative_change(before, after) == pytest.approx((0.25 + 0.25) / 2)
    zero = solved([0.0] * 4, u, v, 2)
    assert relative_change(zero, zero) == 0
    floored = solved([4.0, 0.0, 0, 0], u, v, 2)
    assert relative_change(floored, solved([4.0, 4e-12, 0, 0], u, v, 2)) == pytest.approx((0 + 1) / 2)
