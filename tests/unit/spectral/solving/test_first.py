"""Any number of first triplets from a Gram matrix's eigenvectors, against numpy's float64 SVD; faults are noticed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_vit.spectral.solving import first, gram_stack, lapack
from lowrank_vit.spectral.solving import solve as solve_module
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.solving.solve import first_triplets, solve, solve_stack, stack_by_shape
from tests.device_path import CudaPath
from tests.spectra import low_rank_and_noise, nasty, orthonormal, sine, with_spectrum

EPS = float(np.finfo(np.float64).eps)
SHAPES = [(90, 60), (60, 90), (64, 64)]


@pytest.fixture(params=["one by one", "on a device"])
def path(request: pytest.FixtureRequest, on_cuda_path: CudaPath) -> Generator[None]:
    with on_cuda_path() if request.param == "on a device" else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _both_ways_to_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first, "_FEW_VECTORS", 35)


def check(solved: Solved, matrix: torch.Tensor, m: int) -> None:
    """All values, and the first m triplets with what they are certified to."""
    a = matrix.double().numpy()
    expected = np.linalg.svd(a, compute_uv=False)
    top, greatest = solved.top, expected[0]
    assert (solved.s.shape, top.u.shape, top.v.shape) == (expected.shape, (a.shape[0], m), (a.shape[1], m))
    assert (np.diff(solved.s) <= 0).all()
    assert np.abs((solved.s / greatest) ** 2 - (expected / greatest) ** 2).max() <= 64 * EPS * expected.size
    assert (np.abs(top.s - expected[:m]) <= top.certificate + 4 * EPS * greatest).all()
    ahead, back = np.linalg.norm(a @ top.v - top.u * top.s, axis=0), np.linalg.norm(a.T @ top.u - top.v * top.s, axis=0)
    assert (np.sqrt((ahead**2 + back**2) / 2) <= 1.0001 * top.certificate + 64 * EPS * greatest).all()
    for side in (top.u, top.v):
        assert np.abs(side.T @ side - np.eye(m)).max(initial=0.0) <= 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide", "square"])
@pytest.mark.usefixtures("path")
def test_any_number_up_to_all(shape: tuple[int, int]) -> None:
    matrix = 0.3 * low_rank_and_noise(*shape, np.array([9.0, 5.0, 3.0]), 0.1)
    for m in (0, 1, 30, min(shape)):
        solved = first_triplets("m", matrix, lambda _, m=m: m)
        check(solved, matrix, m)
        assert (solved.solver, solved.note, solved.index, solved.last.s.size) == ("gram64", "", True, 0)
        assert solved.certificate_max <= 1e-13


@pytest.mark.usefixtures("path")
def test_how_many_may_depend_on_the_values() -> None:
    matrix = low_rank_and_noise(60, 40, np.array([9.0, 5.0, 3.0]), 0.01)
    seen: list[np.ndarray] = []

    def above_one(s_K: np.ndarray) -> int:
        seen.append(s_K)
        return int(np.count_nonzero(s_K > 1))

    check(first_triplets("m", matrix, above_one), matrix, 3)
    np.testing.assert_allclose(seen[0], np.linalg.svd(matrix.numpy(), compute_uv=False), rtol=1e-9)


@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4])
@pytest.mark.usefixtures("path")
def test_the_far_end_is_as_exact_as_a_float64_gram_matrix_can_be(condition: float) -> None:
    s = np.geomspace(1, 1 / condition, 64)
    matrix = with_spectrum(s, 96, 64)
    u, _, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    solved = first_triplets("m", matrix, len)
    check(solved, matrix, 64)
    assert (solved.solver, solved.index) == ("gram64", True)
    assert (np.abs(solved.s / s - 1) <= 64 * EPS * (s[0] / s) ** 2 + 64 * EPS).all()
    assert (solved.top.certificate <= 64 * EPS * s[0] / s).all()
    for r in (32, 60):
        assert sine(solved.top.u[:, :r], u[:, :r]) <= 1e-12 * condition
        assert sine(solved.top.v[:, :r], vh[:r].T) <= 1e-12 * condition


def test_without_the_turn_the_far_end_would_not_be_orthogonal(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_spectrum(np.geomspace(1, 1e-4, 64), 96, 64)
    assert first_triplets("m", matrix, len).orthogonality <= 1e-10
    monkeypatch.setattr(first, "_turn", lambda products_MM: None)
    assert "orthogonal" in first_triplets("m", matrix, len).note


@pytest.mark.parametrize("name", [*nasty(64), "repeated", "orthogonal", "zero"])
@pytest.mark.usefixtures("path")
def test_hard_cases_are_right_or_go_to_an_svd_with_a_line_that_says_why(name: str) -> None:
    more = {
        "repeated": with_spectrum(np.repeat([5.0, 2.0, 1.0], 20), 90, 60),
        "orthogonal": torch.from_numpy(orthonormal(70, 70, 3)),
        "zero": torch.zeros(50, 40, dtype=torch.float64),
    }
    matrix = (nasty(64) | more)[name]
    matrix = matrix / max(float(matrix.abs().max()), 1e-300) * 0.7
    lines: list[str] = []
    solved = first_triplets(name, matrix, lambda s: int(np.count_nonzero(s > 2e-3 * s[0])), log=lines.append)
    m = solved.top.s.size
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(solved.top.s, expected[:m], rtol=1e-9)
    assert m == np.count_nonzero(expected > 2e-3 * expected[0])
    assert bool(solved.note) == bool(lines) == (solved.solver == "svd")


@settings(max_examples=40)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**16), st.data())
def test_any_shape_and_number(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    matrix = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)))
    m = data.draw(st.integers(0, min(rows, columns)))
    check(first_triplets("m", matrix, lambda _: m), matrix, m)


@pytest.mark.parametrize("wrong", ["gram", "all_tridiagonal_vectors", "_turn"])
def test_wrong_numbers_of_a_library_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(first, wrong)

    def slightly_wrong(*args: np.ndarray) -> np.ndarray:
        result = right(*args)
        if result is None:  # no turn is needed
            result = np.zeros_like(args[0])
        result.flat[0 if wrong == "gram" else -1] += 1e-3 * max(float(np.abs(result).max()), 1.0)
        return result

    monkeypatch.setattr(first, wrong, slightly_wrong)
    matrix, lines = low_rank_and_noise(150, 60, np.array([9.0, 5.0, 3.0]), 0.1), list[str]()
    solved = first_triplets("m", matrix, len, log=lines.append)
    assert (solved.solver, len(lines)) == ("svd", 1)
    check(solved, matrix, 60)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-6, 1e-4])
@pytest.mark.parametrize("beside", [3, 19, 20, 45], ids=["near", "far", "next to the last", "left out"])
@pytest.mark.usefixtures("path")
def test_certificates_cover_bases_that_are_wrong_beside_right_squares(
    angle: float, beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Squares, orthogonality and the index say nothing of a basis that is turned a little: the residual alone does."""
    m, turned, right = 20, 2, first._solved

    def with_wrong_basis(a_RC: Any, found: first.First) -> tuple[Solved, str]:
        basis_KM = torch.as_tensor(found.basis).clone()
        one_K = basis_KM[:, turned].clone()
        every_KK = torch.linalg.svd(torch.as_tensor(a_RC), full_matrices=False).Vh.T
        other_K = basis_KM[:, beside].clone() if beside < m else every_KK[:, beside].clone()
        basis_KM[:, turned] = np.cos(angle) * one_K + np.sin(angle) * other_K
        if beside < m:
            basis_KM[:, beside] = np.cos(angle) * other_K - np.sin(angle) * one_K
        basis = basis_KM.numpy() if isinstance(found.basis, np.ndarray) else basis_KM
        return right(a_RC, replace(found, basis=basis))

    monkeypatch.setattr(first, "_solved", with_wrong_basis)
    s = np.concatenate([np.array([9.0, 7.0, 5.0, 4.999]), np.geomspace(4, 0.5, 56)])
    matrix = with_spectrum(s, 90, 60)
    for step in (first._turn, lambda products_MM: None):
        monkeypatch.setattr(first, "_turn", step)
        solved = first_triplets("m", matrix, lambda _: m, log=lambda _: None)
        check(solved, matrix, m)
        if beside >= m and angle >= 1e-9:
            assert solved.note or solved.certificate_max > 0.1 * angle


def test_wrong_vectors_of_a_gpus_eigensolver_are_noticed(
    on_cuda_path: CudaPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gram_stack.GramStack.of

    def wrong(matrices_NRC: torch.Tensor) -> gram_stack.GramStack:
        found = right(matrices_NRC)
        found.vectors_NKK[:, 3, -2] += 1e-4
        return found

    monkeypatch.setattr(first, "GramStack", type("Wrong", (), {"of": staticmethod(wrong)}))
    matrix = low_rank_and_noise(80, 40, np.array([9.0, 5.0, 3.0]), 0.1)
    with on_cuda_path():
        solved = first_triplets("m", matrix, lambda _: 20)
    assert solved.solver == "svd"
    check(solved, matrix, 20)


def test_an_eigensolver_that_fails_gives_way_to_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise np.linalg.LinAlgError("info = 3")

    monkeypatch.setattr(lapack, "_lapack", fail)
    matrix = low_rank_and_noise(30, 20, np.array([9.0]), 0.1)
    solved = first_triplets("m", matrix, lambda _: 9)
    assert "info = 3" in solved.note
    check(solved, matrix, 9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_has_no_triplets(bad: float) -> None:
    solved = first_triplets("m", torch.full((4, 3), bad), len)
    assert np.isnan(solved.s).all()
    assert (solved.s.size, solved.top.s.size, solved.solver) == (3, 0, "none")


@pytest.mark.usefixtures("path")
def test_two_ends_of_half_a_spectrum_and_more_need_no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large matrices; small ones keep the bits that they have always had."""
    monkeypatch.setattr(solve_module, "LARGE", 40)
    weights = {"large": low_rank_and_noise(60, 40, np.array([9.0, 5.0]), 0.1), "small": torch.eye(39)}
    weights["hard"] = with_spectrum(np.geomspace(1, 1e-7, 40), 60, 40)
    for m in (20, 33, 40):
        solved = solve(weights, m)
        reference = solve(weights, m, "svd")
        assert [solved[name].solver for name in weights] == ["gram64", "svd", "svd"]
        for name, one in solved.items():
            assert (one.top.s.size, one.last.s.size) == (reference[name].top.s.size, reference[name].last.s.size)
            for end, other in ((one.top, reference[name].top), (one.last, reference[name].last)):
                np.testing.assert_allclose(end.s, other.s, rtol=1e-10, atol=1e-13 * other.s[0])
            assert one.index
    (stack,) = stack_by_shape({"nan": torch.full((60, 40), torch.nan)})
    assert solve_stack(stack, 20, log=lambda _: None)["nan"].solver == "none"
