"""The Gram solver against numpy's float64 SVD, over shapes, conditions and bad input."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_vit.spectral.solve import singular_values, singular_values_svd, stack_by_shape

EPS = float(np.finfo(np.float64).eps)


def with_spectrum(s: np.ndarray, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """A float64 matrix with these singular values, to rounding."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((rows, s.size)))
    v, _ = np.linalg.qr(rng.standard_normal((cols, s.size)))
    return torch.from_numpy((u * s) @ v.T)


matrices = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=st.floats(-1e3, 1e3, width=32))
)


@settings(max_examples=150, deadline=None)
@given(st.lists(matrices, min_size=1, max_size=4))
def test_squares_agree_with_numpy_to_rounding_of_the_gram_matrix(arrays: list[np.ndarray]) -> None:
    solved = singular_values({str(i): torch.from_numpy(a) for i, a in enumerate(arrays)})
    assert list(solved) == [str(i) for i in range(len(arrays))]
    for a, s in zip(arrays, solved.values(), strict=True):
        assert s.dtype == np.float64
        assert s.shape == (min(a.shape),)
        assert (np.diff(s) <= 0).all()
        expected = np.linalg.svd(a, compute_uv=False)
        assert np.abs(s**2 - expected**2).max() <= 16 * max(a.shape) * EPS * np.sum(a**2)


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (48, 48)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_agree_with_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weights = {
        f"m{i}": (torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.02).to(dtype) for i in range(3)
    }
    for name, s in singular_values(weights).items():
        expected = np.linalg.svd(weights[name].double().numpy(), compute_uv=False)
        np.testing.assert_allclose(s, expected, rtol=1e-10 if shape[0] != shape[1] else 1e-7)
        np.testing.assert_allclose(s[:8], expected[:8], rtol=1e-14)


def test_known_spectra_come_back() -> None:
    s = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    weights = {
        "tall": with_spectrum(s, 12, 5),
        "wide": with_spectrum(s, 5, 12),
        "diagonal": torch.diag(torch.tensor([1.0, -3.0, 2.0])),
    }
    solved = singular_values(weights)
    np.testing.assert_allclose(solved["tall"], s, rtol=1e-13)
    np.testing.assert_allclose(solved["wide"], s, rtol=1e-13)
    np.testing.assert_array_equal(solved["diagonal"], [3.0, 2.0, 1.0])


def test_ill_conditioned_values_keep_the_stated_accuracy_and_a_float32_gram_would_not() -> None:
    s = np.geomspace(1.0, 2e-6, 48)  # condition 5e5
    matrix = with_spectrum(s, 64, 48)
    tolerance = 1e-13 + 16 * EPS * (s[0] / s) ** 2
    assert (np.abs(singular_values({"m": matrix})["m"] / s - 1) <= tolerance).all()
    gram32 = (matrix.float().T @ matrix.float()).double()
    float32 = torch.linalg.eigvalsh(gram32).clamp_min(0).sqrt().flip(-1).numpy()
    assert (np.abs(float32 / s - 1) > tolerance).any()


def test_rank_deficient_matrices_show_the_noise_floor_and_the_twin_does_not() -> None:
    s = np.array([2.0, 1.0, 0.5])
    matrix = with_spectrum(s, 40, 20)
    fast, slow = singular_values({"m": matrix})["m"], singular_values_svd({"m": matrix})["m"]
    np.testing.assert_allclose(fast[:3], s, rtol=1e-13)
    assert fast[3:].max() <= 16 * np.sqrt(EPS) * s[0]
    assert slow[3:].max() <= 100 * EPS * s[0]


def test_zero_matrices_and_empty_ones() -> None:
    solved = singular_values({"zero": torch.zeros(4, 6), "empty": torch.zeros(0, 3)})
    np.testing.assert_array_equal(solved["zero"], np.zeros(4))
    assert solved["empty"].shape == (0,)


@pytest.mark.parametrize("solve", [singular_values, singular_values_svd])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_matrix_with_a_bad_entry_is_nan_and_its_neighbours_are_untouched(solve, bad: float) -> None:
    good = {"a": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), "c": torch.ones(6, 4)}
    broken = torch.ones(6, 4)
    broken[2, 3] = bad
    solved = solve({"a": good["a"], "b": broken, "c": good["c"]})
    assert np.isnan(solved["b"]).all()
    assert solved["b"].shape == (4,)
    for name, expected in solve(good).items():
        np.testing.assert_array_equal(solved[name], expected)


def test_neither_autocast_nor_reduced_precision_settings_touch_the_bits() -> None:
    weights = {"m": torch.randn(64, 48, generator=torch.Generator().manual_seed(1))}
    expected = singular_values(weights)["m"]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = singular_values(weights)["m"]
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(actual, expected)


def test_order_is_kept_over_mixed_shapes_and_dtypes_and_gradients_are_not_asked_for() -> None:
    weights = {
        "a": torch.nn.Parameter(torch.eye(3)),
        "b": torch.eye(2),
        "c": 2 * torch.eye(3),
        "d": 3 * torch.eye(2, dtype=torch.float64),
    }
    assert {name: s[0] for name, s in singular_values(weights).items()} == {"a": 1.0, "b": 1.0, "c": 2.0, "d": 3.0}
    assert list(singular_values(weights)) == ["a", "b", "c", "d"]


def test_stacks_are_copies() -> None:
    weight = torch.ones(2, 3)
    (stack,) = stack_by_shape({"w": weight})
    weight.zero_()
    assert stack.matrices_NRC.sum() == 6


@pytest.mark.parametrize("solve", [singular_values, singular_values_svd])
def test_a_tensor_that_is_no_matrix_is_named(solve) -> None:
    with pytest.raises(ValueError, match=r"conv has shape \(2, 3, 4\)"):
        solve({"conv": torch.zeros(2, 3, 4)})
