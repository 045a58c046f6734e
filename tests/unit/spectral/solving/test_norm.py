"""The spectral norm lies between its two ends, which are close, whatever the matrix, its scale and the way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch

from lowrank_vit.spectral.measures.updates import update_norms
from lowrank_vit.spectral.solving import norm
from lowrank_vit.spectral.solving.norm import BRACKET, SMALL, Norms, spectral_norms
from lowrank_vit.spectral.solving.solve import MatrixStack
from tests.device_path import CudaPath
from tests.spectra import low_rank_and_noise, orthonormal, with_spectrum

R, K = 300, 260
EPS = float(np.finfo(np.float64).eps)


def _entry(at: tuple[int, int]) -> torch.Tensor:
    matrix = torch.zeros(R, K, dtype=torch.float64)
    matrix[at] = -0.7
    return matrix


def _hidden() -> torch.Tensor:
    """Its first right vector is orthogonal to the first Lanczos vector, the other values are far below."""
    start = norm._start(K)  # pyright: ignore[reportPrivateUsage]
    v = np.linalg.qr(np.stack([start, orthonormal(K, 1, 3)[:, 0]], axis=1))[0]
    return torch.from_numpy(5 * np.outer(orthonormal(R, 1, 1), v[:, 1])) + 0.01 * with_spectrum(np.ones(K), R, K)


def _kahan() -> torch.Tensor:
    s, c = 0.99, (1 - 0.99**2) ** 0.5
    return torch.from_numpy(np.diag(s ** np.arange(K)) @ (np.eye(K) - c * np.triu(np.ones((K, K)), 1)))


MATRICES: dict[str, Callable[[], torch.Tensor]] = {
    "noise": lambda: low_rank_and_noise(R, K, np.array([1e-9]), 0.02),
    "wide noise": lambda: low_rank_and_noise(K, 500, np.array([1e-9]), 0.02),
    "square noise": lambda: low_rank_and_noise(K, K, np.array([1e-9]), 0.02),
    "a spike": lambda: low_rank_and_noise(R, K, np.array([9.0, 5.0]), 0.1),
    "two equal": lambda: with_spectrum(np.concatenate([[2.0, 2.0], np.linspace(1.9, 1, K - 2)]), R, K),
    "two nearly equal": lambda: with_spectrum(np.concatenate([[2.0, 2.0 - 1e-9], np.linspace(1.9, 1, K - 2)]), R, K),
    "all equal": lambda: with_spectrum(np.ones(K), R, K),
    "all close": lambda: with_spectrum(np.linspace(1, 0.999, K), R, K),
    "crowded": lambda: with_spectrum(1 - 0.1 * np.linspace(0, 1, K) ** 4, R, K),
    "condition 1e12": lambda: with_spectrum(np.geomspace(1, 1e-12, K), R, K),
    "rank 1": lambda: with_spectrum(np.ones(1), R, K),
    "rank 3": lambda: with_spectrum(np.array([1.0, 0.9999, 0.5]), R, K),
    "ones": lambda: torch.ones(R, K),
    "one entry": lambda: _entry((R - 1, K - 1)),
    "one column": lambda: torch.randn(R, 1, generator=torch.Generator().manual_seed(0)),
    "one row": lambda: torch.randn(1, K, generator=torch.Generator().manual_seed(0)),
    "one row of many": lambda: _entry((2, 3)) + torch.eye(R, 1, dtype=torch.float64),
    "one number": lambda: torch.tensor([[-3.0]]),
    "hidden from Lanczos": _hidden,
    "Kahan": _kahan,
    "Hilbert": lambda: torch.from_numpy(1.0 / (np.arange(R)[:, None] + np.arange(K) + 1.0)),
    "Laeuchli": lambda: torch.from_numpy(np.vstack([np.ones(K), 1e-9 * np.eye(K)])),
    "graded": lambda: torch.from_numpy(np.random.default_rng(0).standard_normal((R, K)) * np.geomspace(1, 1e-30, K)),
    "small": lambda: low_rank_and_noise(70, 40, np.array([9.0, 5.0]), 0.1),
    "of whole numbers": lambda: torch.arange(R * K).reshape(R, K) % 7,
}
"""Each made when it is first asked for: all of them take seconds, which collecting the tests would take."""


@cache
def matrix_of(name: str) -> torch.Tensor:
    return MATRICES[name]()


def assert_encloses(found: Norms, true: list[float], closeness: float = 1e-5) -> None:
    """As numpy's own error allows."""
    for value, low, high, sigma in zip(*found, true, strict=True):
        assert low * (1 - 8 * EPS) <= sigma <= high * (1 + 8 * EPS)
        assert low <= value <= high <= low * (1 + BRACKET)
        assert value == pytest.approx(sigma, rel=closeness)


@pytest.mark.parametrize("name", MATRICES)
def test_both_ends_enclose_numpys_norm(name: str, on_cuda_path: CudaPath) -> None:
    matrix = matrix_of(name)
    true = float(np.linalg.norm(matrix.double().numpy(), 2))
    for way in (nullcontext, on_cuda_path):
        with way():
            assert_encloses(spectral_norms(matrix[None]), [true])
    assert_encloses(spectral_norms(matrix[None], "svd"), [true], 1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-30, 1e30, 1e200, 1e300])
def test_any_scale_beside_zeros_and_what_is_not_finite(scale: float, on_cuda_path: CudaPath) -> None:
    usual, spike = matrix_of("noise"), matrix_of("a spike")
    bad = usual.clone()
    bad[3, 4] = torch.nan
    infinite = usual.clone()
    infinite[0, 0] = -torch.inf
    stack = torch.stack([usual * scale, torch.zeros_like(usual), bad, spike, infinite, spike * scale])
    expected = [float(np.linalg.norm(one.numpy(), 2)) for one in (usual, spike)]
    for way, solver in ((nullcontext, "gram64"), (on_cuda_path, "gram64"), (nullcontext, "svd")):
        with way():
            found = spectral_norms(stack, solver)  # type: ignore[arg-type]
        assert [part[1] for part in found] == [0, 0, 0]
        assert np.isnan([part[[2, 4]] for part in found]).all()
        finite = Norms(*(part[[0, 3, 5]] for part in found))
        assert_encloses(finite, [expected[0] * scale, expected[1], expected[1] * scale])


def test_a_matrixs_bits_depend_on_nothing_else(on_cuda_path: CudaPath) -> None:
    names = ("noise", "crowded", "rank 3", "all equal", "hidden from Lanczos")
    stack = torch.stack([matrix_of(name) for name in names])
    together = spectral_norms(stack, cpu_threads=3)
    backwards = spectral_norms(stack.flip(0))
    for i, name in enumerate(names):
        alone = spectral_norms(matrix_of(name)[None])
        assert [part[i] for part in together] == [part[0] for part in alone] == [part[-1 - i] for part in backwards]
    with on_cuda_path():
        assert_encloses(spectral_norms(stack), np.linalg.norm(stack.numpy(), 2, axis=(1, 2)).tolist())


def test_ordinary_matrices_need_no_spectrum(monkeypatch: pytest.MonkeyPatch, on_cuda_path: CudaPath) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("all values were asked for")

    monkeypatch.setattr(norm, "Tridiagonal", refuse)
    monkeypatch.setattr(norm, "GramStack", refuse)
    names = ("noise", "a spike", "two nearly equal", "rank 1", "rank 3", "ones", "one entry", "all equal")
    stack = torch.stack([*(matrix_of(name).double() for name in names), torch.zeros(R, K, dtype=torch.float64)])
    true = np.linalg.norm(stack.numpy(), 2, axis=(1, 2)).tolist()
    for way in (nullcontext, on_cuda_path):
        with way():
            assert_encloses(spectral_norms(stack), true, 1e-9)


@pytest.mark.parametrize("fault", ["vector", "gram", "factor"])
def test_what_goes_wrong_on_the_way_is_noticed(
    fault: str, monkeypatch: pytest.MonkeyPatch, on_cuda_path: CudaPath
) -> None:
    """A wrong first vector, a wrong Gram matrix and a factor of another matrix: all values are computed then."""
    right_vector, right_vectors, right_gram = norm._ritz_vector, norm._ritz_vectors, norm.gram  # pyright: ignore[reportPrivateUsage]
    right_stack, right_factor = norm.gram_stack, torch.linalg.cholesky_ex
    matrix = matrix_of("a spike")
    if fault == "vector":
        monkeypatch.setattr(norm, "_ritz_vector", lambda g: np.roll(right_vector(g), 1))
        monkeypatch.setattr(norm, "_ritz_vectors", lambda g: right_vectors(g).roll(1, dims=1))
    elif fault == "gram":
        monkeypatch.setattr(
            norm, "gram", lambda a: right_gram(a) * np.float32(0.9) if a.dtype == np.float32 else right_gram(a)
        )
        monkeypatch.setattr(norm, "gram_stack", lambda a: 0.9 * right_stack(a))
    else:
        monkeypatch.setattr("lowrank_vit.spectral.solving.index.cholesky_in_place", lambda lower: True)
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: (0.9 * right_factor(a)[0], right_factor(a)[1]))
    true = float(np.linalg.norm(matrix.numpy(), 2))
    for way in (nullcontext, on_cuda_path):
        with way():
            found = spectral_norms(matrix[None])
        assert_encloses(found, [true], 1e-12)
        assert found.high[0] <= found.low[0] * (1 + 1e-10)


def test_of_no_matrices_and_of_empty_ones() -> None:
    assert [part.shape for part in spectral_norms(torch.zeros(0, R, SMALL))] == [(0,)] * 3
    assert [part.tolist() for part in spectral_norms(torch.zeros(2, 0, 5))] == [[0, 0]] * 3


def test_the_norms_of_a_change_are_the_same_bits_of_float32_weights_and_of_their_float64_copies() -> None:
    """As the monitor and an offline comparison see them; the weights stay what they are."""
    before = torch.stack([matrix_of("noise"), matrix_of("a spike")]).float()
    now = before + 0.003 * before.flip(0)
    copies = before.clone(), now.clone()
    names = ("a", "b")
    online = update_norms(MatrixStack(names, before), MatrixStack(names, now), 2)
    doubles = before.double(), now.double()
    assert online == update_norms(MatrixStack(names, doubles[0]), MatrixStack(names, doubles[1]))
    for kept, part, double in zip(copies, (before, now), doubles, strict=True):
        assert torch.equal(kept, part)
        assert torch.equal(kept.double(), double)
    for i, name in enumerate(names):
        change = (doubles[1][i] - doubles[0][i]).numpy()
        ends = [np.array([online[name][f"update_norm2{end}"]]) for end in ("", "_low", "_high")]
        assert_encloses(Norms(*ends), [float(np.linalg.norm(change, 2))])


def test_the_norms_of_a_change_between_matrices_that_are_not_finite_are_nan_without_a_word() -> None:
    infinite = matrix_of("noise").clone()
    infinite[0, 0] = torch.inf
    names = ("kept", "bad", "changed")
    before, now = (torch.stack([matrix_of("noise"), infinite, last]) for last in (infinite, matrix_of("noise")))
    found = update_norms(MatrixStack(names, before), MatrixStack(names, now))
    assert set(found["kept"].values()) == {0.0}
    assert np.isnan([found[name][f"update_norm2{end}"] for name in names[1:] for end in ("", "_low", "_high")]).all()
