"""Numbers read off known spectra."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_vit.spectral.measures.metrics import (
    effective_rank,
    energy_rank,
    numerical_rank,
    recorded_indices,
    relative_gap,
    spectrum_metrics,
    stable_rank,
)

sizes = st.integers(1, 60)


@pytest.mark.parametrize(
    ("rank", "topk", "interval", "top", "last"),
    [
        (768, 3, 1, [1, 2, 3], [768, 767, 766]),
        (768, 3, 10, [1, 11, 21], [768, 758, 748]),
        (5, 8, 3, [1, 4], [5, 2]),
        (1, 8, 1, [1], [1]),
        (4, 4, 1, [1, 2, 3, 4], [4, 3, 2, 1]),
    ],
)
def test_recorded_indices_by_hand(rank: int, topk: int, interval: int, top: list[int], last: list[int]) -> None:
    assert recorded_indices(rank, topk, interval) == (top, last)


@given(rank=sizes, topk=sizes, interval=sizes)
def test_recorded_indices_stay_inside_and_mirror_each_other(rank: int, topk: int, interval: int) -> None:
    top, last = recorded_indices(rank, topk, interval)
    assert top[0] == 1
    assert last[0] == rank
    assert all(1 <= index <= rank for index in top + last)
    assert all(b - a == interval for a, b in itertools.pairwise(top))
    assert [rank + 1 - index for index in last] == top
    assert len(top) == min(topk, math.ceil(rank / interval))


@pytest.mark.parametrize("arguments", [(0, 1, 1), (4, 0, 1), (4, 1, 0), (4, -1, 1)])
def test_recorded_indices_below_one_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        recorded_indices(*arguments)


def test_ranks_of_spectra_with_a_known_answer() -> None:
    flat = np.full(7, 0.3)
    assert stable_rank(flat) == pytest.approx(7)
    assert effective_rank(flat) == pytest.approx(7)
    one = np.array([5.0, 0.0, 0.0])
    assert stable_rank(one) == 1
    assert effective_rank(one) == 1
    # p = (2/3, 1/3): H = ln 3 - (2/3) ln 2; |W|_F^2 / s1^2 = 5/4
    two = np.array([2.0, 1.0])
    assert stable_rank(two) == pytest.approx(1.25)
    assert effective_rank(two) == pytest.approx(3 / 2 ** (2 / 3))


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.sampled_from([1e-200, 1e-3, 1e3, 1e200]))
def test_ranks_lie_between_1_and_k_are_ordered_and_do_not_depend_on_scale(values: list[float], scale: float) -> None:
    s = np.sort(np.array(values))[::-1]
    stable, effective = stable_rank(s), effective_rank(s)
    # The stable rank counts squares, so it can only be the smaller: exp(H(p)) >= exp(H_inf(p)) = sum(s)/s1 >= it.
    assert 1 - 1e-9 <= stable <= effective * (1 + 1e-9)
    assert effective <= s.size * (1 + 1e-9)
    assert stable_rank(s * scale) == pytest.approx(stable)
    assert effective_rank(s * scale) == pytest.approx(effective)


SHAPE = (9, 5)


def test_metrics_name_the_right_values() -> None:
    s = np.array([9.0, 7.0, 5.0, 3.0, 1.0])
    metrics = spectrum_metrics(s, SHAPE, topk=2, interval=2)
    assert {k: v for k, v in metrics.items() if k.startswith(("sigma", "sv"))} == {
        "sigma_max": 9.0,
        "sv1": 9.0,
        "sv2": 5.0,
        "sv_last1": 1.0,
        "sv_last2": 5.0,
    }
    assert metrics["stable_rank"] == stable_rank(s)
    assert metrics["effective_rank"] == effective_rank(s)
    assert metrics["nuclear_norm"] == 25
    assert metrics["condition"] == 9
    assert all(type(value) is float for value in metrics.values())
    names = (
        "gap_k gap_last rank90 rank95 rank99 alpha alpha_ks alpha_sigma alpha_tail mp_sigma mp_edge mp_outliers mp_ks "
        "numerical_rank"
    )
    assert set(names.split()) <= set(metrics)


def test_short_spectra_have_fewer_keys() -> None:
    keys = {k for k in spectrum_metrics(np.array([2.0, 1.0]), (3, 2), topk=8, interval=1) if k.startswith("sv")}
    assert keys == {"sv1", "sv2", "sv_last1", "sv_last2"}


def test_zero_and_nan_spectra_have_defined_values() -> None:
    zero = spectrum_metrics(np.zeros(5), SHAPE, topk=2, interval=1)
    undefined = {k for k, v in zero.items() if v != 0}
    assert undefined == {
        "condition",
        "alpha",
        "alpha_ks",
        "alpha_sigma",
        "alpha_tail",
        "mp_sigma",
        "mp_edge",
        "mp_outliers",
        "mp_ks",
    }
    assert zero["condition"] == np.inf
    nan = spectrum_metrics(np.full(5, np.nan), SHAPE, topk=2, interval=1)
    assert all(math.isnan(value) for value in nan.values())
    assert nan.keys() == zero.keys()


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def product(rank: int, dtype: torch.dtype, shape: tuple[int, int] = (160, 96)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    rows, cols = (torch.randn(side, rank, generator=generator).to(dtype) for side in shape)
    return rows @ cols.T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 8, 48, 88])
def test_rounding_of_the_weights_is_no_rank(rank: int, dtype: torch.dtype) -> None:
    for shape in ((160, 96), (96, 160), (96, 96)):
        matrix = product(rank, dtype, shape) if rank else torch.zeros(shape, dtype=dtype)
        s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        metrics = spectrum_metrics(s, shape, 4, 1, torch.finfo(dtype).eps)
        if rank < 88 or dtype != torch.bfloat16:  # there the last of them are rounding, too
            assert metrics["numerical_rank"] == rank
        if rank:
            assert metrics["condition"] == s[0] / s[int(metrics["numerical_rank"]) - 1]
            assert not metrics["mp_outliers"] > rank


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 96), (torch.bfloat16, 93), (torch.float64, 96)])
def test_random_weights_have_full_rank(dtype: torch.dtype, least: int) -> None:
    for seed in range(5):
        matrix = torch.randn(96, 96, generator=torch.Generator().manual_seed(seed)).to(dtype)
        s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        assert numerical_rank(s, (96, 96), torch.finfo(dtype).eps) >= least


def test_a_few_directions_are_described_by_themselves() -> None:
    """What the tail and the end of a low-rank matrix say is about its rank, not about rounding."""
    rows = torch.zeros(768, 96)
    rows[[1, 50, 300, 500, 700]] = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    for matrix, rank in ((product(8, torch.float32), 8), (torch.ones(160, 96), 1), (rows, 5)):
        shape = (matrix.shape[0], matrix.shape[1])
        s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        metrics = spectrum_metrics(s, shape, topk=3, interval=1)
        assert metrics["numerical_rank"] == rank
        assert metrics["condition"] < 10
        assert not metrics["mp_outliers"] > rank
        assert not metrics["alpha_tail"] > rank
        if rank > 3:
            assert metrics["gap_last"] == relative_gap(s[:rank], [rank - 2, rank - 1, rank]) > 0.01
        else:
            assert math.isnan(metrics["alpha"])
            assert math.isnan(metrics["gap_last"])


@pytest.mark.parametrize("shape", [(0,), (2, 2)])
def test_what_is_no_spectrum_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one-dimensional spectrum"):
        spectrum_metrics(np.zeros(shape), SHAPE, topk=1, interval=1)


spectra = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40).map(lambda values: np.sort(np.array(values))[::-1])


@given(spectra, st.sampled_from([50, 90, 95, 99, 100]))
def test_energy_rank_is_the_least_number_of_values_with_that_share(s: np.ndarray, percent: float) -> None:
    k = int(energy_rank(s, percent))
    total = math.fsum(s**2)
    assert math.fsum(s[:k] ** 2) >= percent / 100 * total * (1 - 1e-9)
    assert math.fsum(s[: k - 1] ** 2) < percent / 100 * total * (1 + 1e-9)


def test_energy_ranks_by_hand() -> None:
    s = np.sqrt([80.0, 10.0, 5.0, 5.0])
    assert [energy_rank(s, p) for p in (50, 80, 90, 95, 96, 100)] == [1, 1, 2, 3, 4, 4]


@given(spectra, st.data())
def test_the_gap_is_the_least_over_all_pairs_inside_and_outside(s: np.ndarray, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(1, s.size), min_size=1, unique=True))
    outside = [j for j in range(1, s.size + 1) if j not in indices]
    expected = [abs(s[i - 1] - s[j - 1]) / max(s[i - 1], s[j - 1]) for i in indices for j in outside]
    gap = relative_gap(s, indices)
    if expected:
        assert gap == pytest.approx(min(expected), abs=1e-12)
    else:
        assert math.isnan(gap)


def test_gaps_at_both_ends_by_hand() -> None:
    s = np.array([10.0, 9.0, 6.0, 3.0, 1.0, 0.5])
    assert relative_gap(s, [1, 2]) == pytest.approx(3 / 9)
    assert relative_gap(s, [6, 5]) == pytest.approx(2 / 3)
    assert relative_gap(np.array([2.0, 0.0, 0.0]), [1, 2]) == 0
    assert relative_gap(np.array([2.0, 2.0]), [1]) == 0
