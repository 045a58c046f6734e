"""Cosines of known angles, of recorded vectors and of whole blocks, what chance gives, and what bounds a turn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from lowrank_vit.spectral.measures.metrics import recorded_indices, relative_change
from lowrank_vit.spectral.measures.subspaces import (
    block_energy,
    block_gap,
    chance_cosines,
    chance_level,
    chance_metrics,
    cosine_metrics,
    last_cosines,
    overlap,
    principal_cosines,
    turn_bound,
)
from lowrank_vit.spectral.solving.extremes import Solved, Triplets, not_finite
from tests.spectra import orthonormal, sine


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


def random_cosines(k: int, n: int, count: int) -> np.ndarray:
    """(count, k) principal cosines of pairs of random subspaces."""
    pairs = ((orthonormal(n, k, seed), orthonormal(n, k, seed + 10**6)) for seed in range(count))
    return np.array([principal_cosines(a, b) for a, b in pairs])


@pytest.mark.parametrize(("k", "n"), [(8, 96), (3, 7), (1, 5), (5, 7), (4, 4)])
def test_each_cosine_has_the_chance_value_of_random_subspaces(k: int, n: int) -> None:
    found, expected = random_cosines(k, n, 600), np.array(chance_cosines(k, n))
    error = found.std(axis=0) / 600**0.5
    assert (np.abs(found.mean(axis=0) - expected) <= 5 * error + 0.02 * expected).all()
    values = chance_metrics(k, k, (n, n))
    assert values["chance_u"] == chance_level(k, n) == pytest.approx(np.sqrt(np.mean(found**2)), rel=0.03)
    for stat, of_found in (("max", found.max(axis=1)), ("mean", found.mean(axis=1)), ("mean_sq", found**2)):
        assert values[f"chance_v_{stat}"] == pytest.approx(of_found.mean(), rel=0.03)
    assert values["block_chance_u_min"] == pytest.approx(found.min(axis=1).mean(), rel=0.12, abs=1e-12)
    assert values["block_chance_u_mean_sq"] == k / n


def test_chance_values_of_eight_vectors_of_96_and_of_many() -> None:
    """The first and the last ones from 400,000 simulated pairs."""
    cosines = np.array(chance_cosines(8, 96))
    assert cosines[[0, -1]] == pytest.approx([0.4917, 0.0255], rel=0.02)
    assert cosines.mean() == pytest.approx(0.2433, rel=0.005)
    chance_cosines.cache_clear()
    assert chance_cosines(8, 96) == tuple(cosines)
    for k, n in ((15, 3072), (150, 400), (384, 768), (500, 768), (768, 768)):
        many = np.array(chance_cosines(k, n))
        assert many.shape == (k,)
        assert (np.diff(many) <= 1e-12).all()
        # Of a large random subspace the cosines hardly vary, so that the squares of their means have the mean k/n.
        assert np.mean(many**2) == pytest.approx(k / n, rel=0.05)
        assert chance_cosines(k, n) == tuple(many)
    for k, n in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match="expected 1 <= k <= n"):
            chance_cosines(k, n)


def test_the_overlap_of_chance_is_zero_for_every_shape() -> None:
    for k, n in ((1, 4), (3, 12), (8, 96)):
        found = [overlap(float(np.mean(c**2)), k, n) for c in random_cosines(k, n, 300)]
        assert np.mean(found) == pytest.approx(0, abs=4 * np.std(found) / 300**0.5)
        assert overlap(1.0, k, n) == pytest.approx(1)
    assert np.isnan(overlap(1.0, 4, 4))


def solved(s: list[float], u: np.ndarray, v: np.ndarray, k: int, interval: int = 1) -> Solved:
    values, at = np.array(s), list(range(len(s)))
    every = Triplets(values, u, v, np.zeros(len(s)))
    whole = Solved(values, every, every.pick(at[::-1]), 0.0, "svd")
    return whole.recorded(recorded_indices(len(s), k, interval))


def solved_matrix(matrix: np.ndarray, k: int, interval: int = 1) -> Solved:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return solved(s.tolist(), u, vh.T, k, interval)


def test_metrics_name_both_sides_and_both_ends() -> None:
    u, v = orthonormal(9, 6, 0), orthonormal(6, 6, 1)
    s = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    before = solved(s, u, v, 2)
    after_u = u.copy()
    after_u[:, :2] = rotated(u[:, :2], np.array([0.1, 0.5]), 5)
    now = solved(s, after_u, v, 2)
    values = cosine_metrics("cos", before, now) | last_cosines("cos", before, now)
    assert len(values) == 4 * 2 + 2 * (4 + 4)
    assert (values["cos_u1"], values["cos_u2"]) == pytest.approx((np.cos(0.1), np.cos(0.5)))
    assert values["cos_u_max"] == values["cos_u1"]
    assert values["cos_u_mean"] == pytest.approx((np.cos(0.1) + np.cos(0.5)) / 2)
    mean_square = (np.cos(0.1) ** 2 + np.cos(0.5) ** 2) / 2
    assert values["cos_u_mean_sq"] == pytest.approx(mean_square)
    assert values["cos_u_overlap"] == pytest.approx((mean_square - 2 / 9) / (1 - 2 / 9))
    # At interval 1 the recorded vectors are the block.
    for stat in ("mean", "mean_sq", "overlap"):
        assert values[f"block_cos_u_{stat}"] == values[f"cos_u_{stat}"]
    assert values["block_cos_u_min"] == values["cos_u2"]
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


SPECTRUM = np.array([9.0, 8.99, 7.0, 6.99, 5.0, 2.0, 1.0, 0.5])


def test_mixing_of_neighbours_inside_of_the_block_is_no_turning() -> None:
    """Values 1, 2 and 3, 4 nearly cross; at interval 2 the recorded vectors are 1, 3 and 5."""
    u, v = orthonormal(12, 8, 0), orthonormal(9, 8, 1)
    mixed_u, mixed_v = u.copy(), v.copy()
    turn = np.array([[np.cos(1.2), -np.sin(1.2)], [np.sin(1.2), np.cos(1.2)]])
    for columns in ([0, 1], [2, 3]):
        mixed_u[:, columns], mixed_v[:, columns] = u[:, columns] @ turn, v[:, columns] @ turn
    before, now = (solved(SPECTRUM.tolist(), *vectors, 3, 2) for vectors in ((u, v), (mixed_u, mixed_v)))
    values = cosine_metrics("cos", before, now)
    assert values["cos_u_mean"] == pytest.approx((1 + 2 * np.cos(1.2)) / 3)
    for side, n in (("u", 12), ("v", 9)):
        for stat in ("mean", "min", "mean_sq", "overlap"):
            assert values[f"block_cos_{side}_{stat}"] == pytest.approx(1)
        recorded = (1 + 2 * np.cos(1.2) ** 2) / 3
        assert values[f"cos_{side}_overlap"] == pytest.approx((recorded - 3 / n) / (1 - 3 / n))
    weights = (mixed_u * SPECTRUM) @ mixed_v.T
    assert block_energy(before, now, weights) == pytest.approx(1)
    norm2 = float(np.linalg.norm((u * SPECTRUM) @ v.T - weights, 2))
    assert turn_bound(before, now, norm2) == pytest.approx(norm2 / 3)
    assert norm2 / 3 < 0.01
    assert block_gap(SPECTRUM, 5) == pytest.approx(0.6)


def test_a_crossing_at_the_end_of_the_block_turns_it_and_costs_no_energy() -> None:
    u, v = orthonormal(12, 8, 0), orthonormal(9, 8, 1)
    s = np.array([9.0, 7, 6, 5, 3, 2.999, 1, 0.5])
    order = [0, 1, 2, 3, 5, 4, 6, 7]
    before, now = solved(s.tolist(), u, v, 3, 2), solved(s.tolist(), u[:, order], v[:, order], 3, 2)
    weights = (u[:, order] * s) @ v[:, order].T
    norm2 = float(np.linalg.norm((u * s) @ v.T - weights, 2))
    assert cosine_metrics("cos", before, now)["block_cos_u_min"] == pytest.approx(0, abs=1e-7)
    assert block_energy(before, now, weights) == pytest.approx(1 - (9 - 2.999**2) / np.sum(s[:5] ** 2))
    assert turn_bound(before, now, norm2) == pytest.approx(1)
    assert block_gap(s, 5) == pytest.approx(0.001 / 3)
    risen = s.copy()
    risen[5] = risen[4] = 3.1
    assert turn_bound(before, solved(risen.tolist(), u, v, 3, 2), norm2) == np.inf


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(12, 12), (20, 9), (9, 20), (5, 5), (7, 3)]),
    k=st.integers(1, 5),
    interval=st.integers(1, 4),
    size=st.sampled_from([0.0, 1e-6, 1e-2, 0.1, 1.0]),
    scale=st.sampled_from([1.0, 1e-200, 1e200]),
    seed=st.integers(0, 99),
)
def test_the_bound_holds_and_the_energy_is_numpys(
    shape: tuple[int, int], k: int, interval: int, size: float, scale: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    a = scale * random.standard_normal(shape)
    b = a + scale * size * random.standard_normal(shape)
    before, now = solved_matrix(a, k, interval), solved_matrix(b, k, interval)
    p = recorded_indices(min(shape), k, interval).top[-1]
    (u_a, s_a, vh_a), (u_b, s_b, vh_b) = (np.linalg.svd(one, full_matrices=False) for one in (a, b))
    bound = turn_bound(before, now, float(np.linalg.norm(b - a, 2)))
    below = s_b[p] if p < min(shape) else 0.0
    assert np.isfinite(bound) == (s_a[p - 1] > below)
    for left, right in ((u_a[:, :p], u_b[:, :p]), (vh_a[:p].T, vh_b[:p].T)):
        assert sine(left, right) <= bound + 1e-7
    energy = np.linalg.norm(u_a[:, :p].T @ (b / scale)) ** 2 / np.sum((s_b[:p] / scale) ** 2)
    assert block_energy(before, now, b) == pytest.approx(energy, rel=1e-12)
    assert 0 <= block_energy(before, now, b) <= 1
    values = cosine_metrics("cos", before, now)
    expected = np.cos(subspace_angles(u_a[:, :p], u_b[:, :p]))
    assert values["block_cos_u_mean"] == pytest.approx(expected.mean(), abs=1e-7)
    assert values["block_cos_u_min"] == pytest.approx(expected.min(), abs=1e-7)
    assert values["block_cos_u_mean_sq"] == pytest.approx(np.mean(expected**2), abs=1e-7)
    assert block_gap(s_b, p) == pytest.approx((s_b[p - 1] - below) / s_b[p - 1], rel=1e-12)


def test_numbers_of_the_block_of_zero_and_bad_matrices_and_without_the_earlier_block() -> None:
    good, zero = np.random.default_rng(0).standard_normal((9, 6)), np.zeros((9, 6))
    of_good, of_zero = solved_matrix(good, 2, 3), solved_matrix(zero, 2, 3)
    bad = not_finite((9, 6), 4).recorded(recorded_indices(6, 2, 3))
    assert block_energy(of_good, of_zero, zero) == 1
    assert block_gap(of_zero.s, 4) == 0
    assert turn_bound(of_zero, of_good, 1.0) == np.inf
    for before, now in ((of_good, bad), (bad, of_good)):
        assert np.isnan(turn_bound(before, now, 1.0))
        assert np.isnan(block_energy(before, now, good))
        assert np.isnan(cosine_metrics("cos", before, now)["block_cos_v_min"])
    assert np.isnan(turn_bound(of_good, of_good, float("nan")))
    assert np.isnan(block_gap(bad.s, 4))
    stored_earlier = replace(of_good, block=None)
    values = cosine_metrics("cos", stored_earlier, of_good)
    assert values == {k: v for k, v in cosine_metrics("cos", of_good, of_good).items() if "block" not in k}
    assert np.isnan(block_energy(stored_earlier, of_good, good))
    assert np.isnan(turn_bound(stored_earlier, of_good, 0.0))
