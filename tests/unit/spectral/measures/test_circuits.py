"""Circuits of heads against explicit products and numpy's SVD, and their chance values against simulation."""

from __future__ import annotations

import numpy as np
import pytest

from lowrank_vit.spectral.measures.circuits import (
    BlockCircuits,
    HeadWeights,
    as_arrays,
    chance_spread,
    chance_stable_rank,
    circuit_metrics,
    circuits_of,
    of_arrays,
)
from lowrank_vit.spectral.measures.metrics import stable_rank
from tests.spectra import orthonormal


def heads(seed: int, h: int, d: int, n: int, dtype: type = np.float64) -> HeadWeights:
    rng = np.random.default_rng(seed)
    return HeadWeights(*(rng.standard_normal((h, d, n)).astype(dtype) for _ in range(4)))


def products(one: HeadWeights) -> tuple[np.ndarray, np.ndarray]:
    """Each head's W_Q^T W_K and W_O W_V as whole n x n matrices."""
    q, k, v, o = (x.astype(np.float64).swapaxes(1, 2) for x in one)
    return q @ k.swapaxes(1, 2), o @ v.swapaxes(1, 2)


@pytest.mark.parametrize(
    ("h", "d", "n", "g", "dtype"),
    [(3, 5, 17, 3, np.float32), (1, 7, 7, 1, np.float64), (2, 11, 6, 4, np.float64), (1, 1, 3, 2, np.float32)],
)
def test_values_and_scores_are_those_of_the_whole_products(h: int, d: int, n: int, g: int, dtype: type) -> None:
    """Odd head dimensions, one head, heads wider than the stream, another number of heads before."""
    before, now = heads(0, g, d + 1, n, dtype), heads(1, h, d, n, dtype)
    first, found = circuits_of([before, now])
    (alone,) = circuits_of([now], before)
    assert all(np.array_equal(a, b) for a, b in zip(found, alone, strict=True))
    assert first.q_HG.shape == first.k_HG.shape == (g, 0)
    qk, ov = products(now)
    written = products(before)[1]
    k = min(d, n)
    assert found.width == n
    for values, whole in ((found.qk_HK, qk), (found.ov_HK, ov)):
        expected = np.linalg.svd(whole, compute_uv=False)
        np.testing.assert_allclose(values, expected[:, :k], rtol=0, atol=1e-13 * expected[:, :1].max() * d)
        assert (expected[:, k:] < 1e-12 * expected[:, :1]).all()
    norm = np.linalg.norm
    for i in range(h):
        for j in range(g):
            scale = norm(qk[i]) * norm(written[j])
            assert found.k_HG[i, j] == pytest.approx(norm(qk[i] @ written[j]) / scale, rel=1e-12)
            assert found.q_HG[i, j] == pytest.approx(norm(qk[i].T @ written[j]) / scale, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e120])
def test_a_scale_changes_values_alone(scale: float) -> None:
    one = heads(2, 2, 3, 8)
    scaled = HeadWeights(one.q_HDn * scale, one.k_HDn / scale, one.v_HDn, one.o_HDn * scale)
    (_, plain), (_, found) = circuits_of([one, one]), circuits_of([scaled, scaled])
    np.testing.assert_allclose(found.qk_HK, plain.qk_HK, rtol=1e-12)
    np.testing.assert_allclose(found.ov_HK, plain.ov_HK * scale, rtol=1e-12)
    for scores, expected in ((found.q_HG, plain.q_HG), (found.k_HG, plain.k_HG), (found.spread_HG, plain.spread_HG)):
        np.testing.assert_allclose(scores, expected, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_head_that_is_not_finite_leaves_the_others_alone(bad: float) -> None:
    before, now = heads(3, 3, 4, 9, np.float32), heads(4, 2, 4, 9, np.float32)
    expected = circuits_of([now], before)[0]
    now.k_HDn[1, 2, 3], before.o_HDn[0, 0, 0] = bad, bad
    (found,) = circuits_of([now], before)
    assert np.isnan(found.qk_HK[1]).all()
    np.testing.assert_array_equal(found.qk_HK[0], expected.qk_HK[0])
    np.testing.assert_array_equal(found.ov_HK, expected.ov_HK)
    for scores, plain in ((found.q_HG, expected.q_HG), (found.k_HG, expected.k_HG)):
        assert np.isnan(scores[1]).all()
        assert np.isnan(scores[:, 0]).all()
        np.testing.assert_allclose(scores[0, 1:], plain[0, 1:], rtol=1e-14)
    assert np.isnan(found.means_2).all()
    values = circuit_metrics(found)
    assert np.isnan([values["qk_sigma_max"], values["k_composition_max"], values["q_composition_z"]]).all()
    assert np.isfinite(values["ov_stable_rank_mean"])


def test_zero_circuits_have_no_rank_and_no_score() -> None:
    zero = HeadWeights(*[np.zeros((2, 3, 5), np.float32)] * 4)
    _, found = circuits_of([zero, heads(5, 2, 3, 5)])
    assert np.isnan(found.k_HG).all()
    values = circuit_metrics(circuits_of([zero])[0])
    assert set(values.values()) == {0.0}


def test_in_a_stream_of_one_direction_all_composes_and_chance_has_no_spread() -> None:
    _, found = circuits_of([heads(6, 2, 3, 1), heads(7, 2, 3, 1)])
    np.testing.assert_allclose(found.q_HG, 1.0, rtol=1e-14)
    values = circuit_metrics(found)
    assert values["composition_chance"] == 1.0
    assert np.isnan([values["q_composition_z"], values["k_composition_max_z"]]).all()


@pytest.mark.parametrize(
    ("a", "b", "n"), [((3.0, 1.0, 0.5), (2.0, 1.0), 10), ((1.0,), (1.0,), 5), ((1, 1, 1), (1, 1), 4)]
)
def test_unrelated_directions_have_the_chance_value_and_its_spread(a: tuple[float], b: tuple[float], n: int) -> None:
    """Given spectra, with one side turned at random: mean 1 / n and the stated variance, exactly."""
    draws = 4000
    rng = np.random.default_rng(n)
    turns = np.linalg.qr(rng.standard_normal((draws, n, n)))[0][:, : len(a), : len(b)]
    weighted = turns * np.array(a)[:, None] * np.array(b)
    squares = np.sum(weighted**2, axis=(1, 2)) / (np.sum(np.square(a)) * np.sum(np.square(b)))
    p, q = (np.array([np.sum(np.power(s, 4)) / np.sum(np.square(s)) ** 2]) for s in (a, b))
    spread = float(chance_spread(p, q, n)[0, 0])
    assert abs(np.mean(squares) - 1 / n) < 4 * spread / draws**0.5
    assert np.std(squares) == pytest.approx(spread, rel=0.08)


def test_of_flat_spectra_that_fill_the_stream_the_score_is_the_chance_value() -> None:
    eye = np.eye(6)[None]
    one = HeadWeights(eye, orthonormal(6, 6, 1)[None], eye, orthonormal(6, 6, 2)[None])
    _, found = circuits_of([one, one])
    assert found.k_HG[0, 0] ** 2 == pytest.approx(1 / 6, rel=1e-12)
    assert found.spread_HG[0, 0] < 1e-9


@pytest.mark.parametrize(
    ("shared", "h", "d", "within"),
    [
        ("nothing", 3, 4, 24),
        ("some of the stream's dimensions", 4, 3, 8),
        ("one head's OV", 4, 3, 24),
        ("one head's Q", 4, 3, 24),
        ("a stream that they fill", 2, 12, 24),
    ],
)
def test_under_a_common_rotation_the_deviation_of_the_mean_has_spread_one(
    shared: str, h: int, d: int, within: int
) -> None:
    """The weights stay, and what is written is turned at random against what is read, for all heads alike."""
    n, draws = 24, 300
    before, now = heads(13, h, d, n), heads(14, h, d, n)
    for one in (*before, *now):
        one[:, :, within:] = 0
    if shared == "one head's OV":
        before.o_HDn[:] = before.o_HDn[:1]
    elif shared == "one head's Q":
        now.q_HDn[:] = now.q_HDn[:1]
    rng = np.random.default_rng(15)
    turns = [orthonormal(n, n, int(seed)) for seed in rng.integers(2**31, size=draws)]
    found = [circuits_of([now], before._replace(o_HDn=before.o_HDn @ turn))[0] for turn in turns]
    for name in ("q", "k"):
        z = np.array([circuit_metrics(one)[f"{name}_composition_z"] for one in found])
        assert abs(np.mean(z)) < 4 / draws**0.5
        assert np.std(z) == pytest.approx(1.0, rel=0.2)


def test_the_greatest_deviation_is_that_of_a_pair() -> None:
    _, found = circuits_of([heads(8, 3, 4, 16), heads(9, 2, 4, 16)])
    values = circuit_metrics(found)
    assert values["k_composition_max"] == found.k_HG.max()
    assert values["k_composition_max_z"] == ((found.k_HG**2 - 1 / 16) / found.spread_HG).max()
    assert values["q_composition_mean_sq"] == np.mean(found.q_HG**2)
    assert values["qk_stable_rank_max"] == max(stable_rank(s) for s in found.qk_HK)


@pytest.mark.parametrize(("n", "d"), [(48, 8), (6, 9)])
def test_the_chance_stable_rank_is_that_of_gaussian_factors(n: int, d: int) -> None:
    spectra = circuits_of([heads(10, 200, d, n)])[0].qk_HK
    ranks = np.array([stable_rank(s) for s in spectra])
    assert chance_stable_rank(n, d) == pytest.approx(ranks.mean(), rel=0.05)


def test_files_give_back_what_they_were_given() -> None:
    found: dict[str, BlockCircuits] = dict(
        zip("ab", circuits_of([heads(11, 2, 3, 5), heads(12, 2, 3, 5)]), strict=True)
    )
    again, circuits = of_arrays(as_arrays(found, "folded"))
    assert circuits == "folded"
    assert list(again) == ["a", "b"]
    for key, one in found.items():
        assert all(np.array_equal(x, y) for x, y in zip(one, again[key], strict=True))
