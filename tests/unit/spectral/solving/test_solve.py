"""Both solvers against numpy's float64 SVD, over shapes, conditions and bad input; certificates that hold."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowrank_vit.spectral.solving import gram, lapack, refine
from lowrank_vit.spectral.solving.extremes import Solved, Solver
from lowrank_vit.spectral.solving.solve import Cancelled, all_values, solve, solve_stack, stack_by_shape
from tests.device_path import CudaPath
from tests.spectra import low_rank_and_noise, nasty, orthonormal, sine, with_spectrum

EPS = float(np.finfo(np.float64).eps)
SOLVERS: list[Solver] = ["gram64", "svd"]


@pytest.fixture(params=["threads", "stacks"])
def path(request: pytest.FixtureRequest, on_cuda_path: CudaPath) -> Generator[None]:
    """Which way matrices are solved: one by one as on a CPU, or a whole stack at once as on a GPU."""
    with on_cuda_path() if request.param == "stacks" else nullcontext():
        yield


def check_against_numpy(solved: Solved, matrix: torch.Tensor, m: int) -> None:
    """Values, certificates and residuals against numpy's SVD of the same float64 matrix."""
    a = matrix.double().numpy()
    expected = np.linalg.svd(a, compute_uv=False)
    k = expected.size
    m = min(m, k)
    assert solved.s.dtype == np.float64
    assert (np.diff(solved.s) <= 0).all()
    unit = max(expected[0], 1e-300)  # so that no square overflows
    assert np.abs((solved.s / unit) ** 2 - (expected / unit) ** 2).max() <= 16 * max(a.shape) * EPS * min(a.shape)
    numpys_own = 4 * EPS * expected[0]  # what is certified is the distance to the truth
    for end, true in ((solved.top, expected[:m]), (solved.last, expected[::-1][:m])):
        assert end.u.shape == (a.shape[0], m)
        assert end.v.shape == (a.shape[1], m)
        distance = np.abs(end.s[:, None] - expected[None, :]).min(axis=1)
        assert (distance <= end.certificate + numpys_own).all()
        np.testing.assert_allclose(end.s, true, rtol=1e-6, atol=1e-12 * expected[0])
        b, s = a / unit, end.s / unit
        residual = np.hypot(
            np.linalg.norm(b @ end.v - end.u * s, axis=0), np.linalg.norm(b.T @ end.u - end.v * s, axis=0)
        ) / np.sqrt(2)
        assert (residual <= 1.0001 * end.certificate / unit + 64 * EPS).all()


matrices = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=st.floats(-1e3, 1e3, width=32))
)


@settings(max_examples=80)
@given(st.lists(matrices, min_size=1, max_size=4), st.integers(1, 3), st.sampled_from(SOLVERS))
@example([np.array([[7.1e-9, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])], 1, "gram64")  # 5e-9 is not the last value
def test_any_matrices_agree_with_numpy(arrays: list[np.ndarray], m: int, solver: Solver) -> None:
    solved = solve({str(i): torch.from_numpy(a) for i, a in enumerate(arrays)}, m, solver)
    assert list(solved) == [str(i) for i in range(len(arrays))]
    for a, one in zip(arrays, solved.values(), strict=True):
        check_against_numpy(one, torch.from_numpy(a), m)


CASES = {
    "tall": low_rank_and_noise(150, 60, np.array([9.0, 5.0, 3.0]), 0.1),
    "wide": low_rank_and_noise(60, 150, np.array([9.0, 5.0, 3.0]), 0.1),
    "square": low_rank_and_noise(80, 80, np.array([9.0, 5.0, 3.0]), 0.1),
    "diagonal": torch.diag(torch.linspace(1, 50, 50, dtype=torch.float64)),
    "orthogonal": torch.from_numpy(orthonormal(70, 70, 3)),
    "repeated": with_spectrum(np.repeat([5.0, 2.0, 1.0], 20), 90, 60),
    "rank 3 of 40": with_spectrum(np.array([2.0, 1.0, 0.5]), 80, 40),
    "zero rows": torch.cat([low_rank_and_noise(50, 40, np.ones(2), 0.3), torch.zeros(30, 40, dtype=torch.float64)]),
    "zero": torch.zeros(50, 40, dtype=torch.float64),
    "one entry": torch.nn.functional.pad(torch.full((1, 1), 3.0, dtype=torch.float64), (5, 34, 7, 42)),
    "condition 1e3": with_spectrum(np.geomspace(1, 1e-3, 64), 96, 64),
    "condition 1e5": with_spectrum(np.geomspace(1, 1e-5, 64), 64, 96),
    "condition 1e6": with_spectrum(np.geomspace(1, 1e-6, 64), 64, 64),
    "condition 1e7": with_spectrum(np.geomspace(1, 1e-7, 64), 96, 64),
    "tiny entries": 1e-170 * low_rank_and_noise(60, 40, np.ones(2), 0.3),
    "huge entries": 1e160 * low_rank_and_noise(60, 40, np.ones(2), 0.3),
}  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("path")
def test_hard_cases_keep_their_accuracy_and_their_certificates(name: str, solver: Solver) -> None:
    check_against_numpy(solve({name: CASES[name]}, 6, solver, cpu_threads=2)[name], CASES[name], 6)


@pytest.mark.parametrize("name", CASES)
def test_the_batched_solver_agrees_or_objects(name: str) -> None:
    """What runs on CUDA, here on the CPU: nothing is accepted that is not right."""
    matrix = CASES[name]
    if "entries" in name:
        matrix = matrix / matrix.abs().max()
    other = with_spectrum(np.linspace(2, 1, min(matrix.shape)), *matrix.shape)
    (solved, objection), (neighbour, no_objection) = refine.solve_stack(torch.stack([matrix, other]), 6)
    assert not no_objection
    check_against_numpy(neighbour, other, 6)
    if not objection:
        check_against_numpy(solved, matrix, 6)
    assert bool(objection) == bool(solve({"m": matrix}, 6)["m"].note) or "condition" in name


NASTY = nasty(64)


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.usefixtures("path")
def test_what_one_gram_matrix_does_not_tell_comes_from_several(name: str) -> None:
    lines: list[str] = []
    (stack,) = stack_by_shape({name: NASTY[name]})
    solved = solve_stack(stack, 8, log=lines.append)[name]
    check_against_numpy(solved, NASTY[name], 8)
    assert (solved.solver, lines) == ("gram64", [])
    expected = np.linalg.svd(NASTY[name].double().numpy() / float(NASTY[name].abs().max()), compute_uv=False)
    interior = np.abs(solved.s / float(NASTY[name].abs().max()) - expected)
    assert (interior <= np.maximum(1e-3 * expected, 1e-12 * expected[0])).all()


def test_both_ways_tell_the_same_of_matrices_that_are_split(on_cuda_path: CudaPath) -> None:
    for name in ("kahan", "rank 8, tall", "rank 32, wide", "rank 63, square", "graded to 1e-8"):
        by_cpu = solve({name: NASTY[name]}, 8)[name]
        with on_cuda_path():
            by_stack = solve({name: NASTY[name]}, 8)[name]
        np.testing.assert_allclose(by_stack.s, by_cpu.s, rtol=1e-6, atol=1e-12 * by_cpu.s[0])


def test_the_last_values_of_hilberts_matrix_against_a_hundred_digits() -> None:
    import mpmath

    k, m = 24, 6
    with mpmath.workdps(100):
        exact = mpmath.matrix(k)
        for i in range(k):
            for j in range(k):
                exact[i, j] = mpmath.mpf(float(1 / (i + j + 1.0)))  # the float64 entries, exactly
        squares = mpmath.eigsy(exact.T * exact, eigvals_only=True)
        true = np.array(sorted((float(mpmath.sqrt(abs(x))) for x in squares), reverse=True))
    matrix = 1 / (np.arange(k)[:, None] + np.arange(k)[None, :] + 1.0)
    solved = solve({"m": torch.from_numpy(matrix)}, m)["m"]
    assert np.abs(solved.top.s / true[:m] - 1).max() <= 1e-12
    assert np.abs(solved.last.s - true[::-1][:m]).max() <= 1e-12 * true[0]
    assert (np.abs(solved.last.s - true[::-1][:m]) <= solved.last.certificate).all()


def test_top_and_last_values_and_subspaces_at_condition_1e6() -> None:
    matrix = with_spectrum(np.geomspace(1, 1e-6, 96), 160, 96)
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    solved = solve({"m": matrix}, 8)["m"]
    assert np.abs(solved.top.s / s[:8] - 1).max() <= 1e-12
    assert np.abs(solved.last.s / s[::-1][:8] - 1).max() <= 1e-6
    for end, left, right in ((solved.top, u[:, :8], vh[:8].T), (solved.last, u[:, -8:], vh[-8:].T)):
        assert sine(end.u, left) <= 1e-6
        assert sine(end.v, right) <= 1e-6


def test_a_float32_gram_matrix_would_not_do() -> None:
    s = np.geomspace(1.0, 2e-6, 48)
    matrix = with_spectrum(s, 64, 48)
    assert np.abs(solve({"m": matrix}, 8)["m"].s / s - 1).max() <= 1e-6
    gram32 = (matrix.float().T @ matrix.float()).double()
    float32 = torch.linalg.eigvalsh(gram32).clamp_min(0).sqrt().flip(-1).numpy()
    assert np.abs(float32 / s - 1)[-8:].min() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (48, 48)], ids=["tall", "wide", "square"])
@pytest.mark.usefixtures("path")
def test_random_weights_of_every_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weights = {
        f"m{i}": (torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.02).to(dtype) for i in range(3)
    }
    for name, solved in solve(weights, 4).items():
        check_against_numpy(solved, weights[name], 4)
        assert solved.solver == "gram64"


def test_the_svd_has_the_same_bits_on_a_gpus_way_but_for_torchs_threads(on_cuda_path: CudaPath) -> None:
    threads = torch.get_num_threads()
    (expected,) = solve({"m": 0.3 * CASES["tall"]}, 6, "svd").values()
    with on_cuda_path():
        (found,) = solve({"m": 0.3 * CASES["tall"]}, 6, "svd").values()
    np.testing.assert_allclose(found.s, expected.s, rtol=1e-12)
    assert torch.get_num_threads() == threads


def test_matrices_too_small_for_two_ends_go_through_the_svd_without_a_word(caplog) -> None:
    solved = solve({"m": torch.eye(5, 7) * torch.arange(1, 6)[:, None]}, 8)["m"]
    np.testing.assert_allclose(solved.top.s, [5, 4, 3, 2, 1])
    np.testing.assert_allclose(solved.last.s, [1, 2, 3, 4, 5])
    assert (solved.solver, solved.note, caplog.records) == ("svd", "", [])


def test_a_failed_certificate_falls_back_with_a_line_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(solved: Solved, *_: object) -> str:
        return "certificate 1e-01 at value 1e-07" if solved.s[-1] < 1e-6 * solved.s[0] else ""

    monkeypatch.setattr(refine, "objection", refuse)
    lines: list[str] = []
    (stack,) = stack_by_shape({"blocks.0.attn.proj": CASES["condition 1e7"], "good": CASES["condition 1e3"]})
    solved = solve_stack(stack, 6, log=lines.append)
    assert [one.solver for one in solved.values()] == ["svd", "gram64"]
    (line,) = lines
    assert "blocks.0.attn.proj" in line
    assert "solved by float64 SVD instead" in line
    assert solved["blocks.0.attn.proj"].note in line
    assert solved["good"].note == ""


def test_an_eigensolver_that_fails_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise np.linalg.LinAlgError("info = 3")

    monkeypatch.setattr(lapack, "_lapack", fail)
    solved = solve({"m": CASES["tall"]}, 6)["m"]
    assert "info = 3" in solved.note
    check_against_numpy(solved, CASES["tall"], 6)


@pytest.mark.parametrize("wrong", ["gram", "tridiagonalize", "tridiagonal_values", "tridiagonal_vectors"])
def test_wrong_numbers_of_a_library_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(gram, wrong)

    def slightly_wrong(*args: np.ndarray):
        result = right(*args)
        first = result[0] if isinstance(result, tuple) else result
        first.flat[0] = first.flat[0] * 1.001 + 1e-3 * np.abs(first).max()
        return result

    monkeypatch.setattr(gram, wrong, slightly_wrong)
    solved = solve({"m": CASES["tall"]}, 6)["m"]
    assert solved.solver == "svd"
    check_against_numpy(solved, CASES["tall"], 6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_matrix_with_a_bad_entry_is_nan_and_its_neighbours_are_untouched(solver: Solver, bad: float) -> None:
    good = {"a": torch.randn(20, 14, generator=torch.Generator().manual_seed(0)), "c": torch.ones(20, 14)}
    broken = torch.ones(20, 14)
    broken[2, 3] = bad
    solved = solve({"a": good["a"], "b": broken, "c": good["c"]}, 3, solver)
    assert np.isnan(solved["b"].s).all()
    assert np.isnan(solved["b"].top.u).all()
    assert (solved["b"].s.shape, solved["b"].last.v.shape, solved["b"].solver) == ((14,), (14, 3), "none")
    for name, expected in solve(good, 3, solver).items():
        np.testing.assert_array_equal(solved[name].s, expected.s)


def test_the_bits_depend_neither_on_threads_nor_on_neighbours_nor_on_reduced_precision() -> None:
    weights = {f"m{i}": torch.randn(96, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    expected = solve(weights, 5)
    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(3)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = solve(dict(reversed(weights.items())), 5, cpu_threads=3) | solve({"m0": weights["m0"]}, 5)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_num_threads(threads)
    for name, one in expected.items():
        np.testing.assert_array_equal(again[name].s, one.s)
        np.testing.assert_array_equal(again[name].top.u, one.top.u)
        np.testing.assert_array_equal(again[name].last.v, one.last.v)


def test_order_is_kept_over_mixed_shapes_and_dtypes_and_gradients_are_not_asked_for() -> None:
    weights = {
        "a": torch.nn.Parameter(torch.eye(3)),
        "b": torch.eye(2),
        "c": 2 * torch.eye(3),
        "d": 3 * torch.eye(2, dtype=torch.float64),
        "e": torch.zeros(0, 3),
    }
    solved = solve(weights, 1)
    assert list(solved) == ["a", "b", "c", "d", "e"]
    assert [one.s[0] for one in list(solved.values())[:4]] == [1.0, 1.0, 2.0, 3.0]
    assert solved["e"].s.shape == (0,)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "factors", [(1.0, 3.0, 1e-5), (0.7, 1e-170, 0.0), (0.011, 1e160, torch.nan)], ids=["usual", "tiny", "not finite"]
)
def test_values_alone(factors: tuple[float, ...], dtype: torch.dtype) -> None:
    """Also where nothing needs scaling, and with greatest entries that are no power of two."""
    matrices = [(factor * CASES["tall"]).to(dtype) for factor in factors]
    expected = [float(np.linalg.norm(one.double().numpy(), 2)) if one.isfinite().all() else np.nan for one in matrices]
    np.testing.assert_allclose(all_values(torch.stack(matrices))[:, 0], expected, rtol=1e-14)


def test_cancelling_stops_between_two_matrices() -> None:
    asked: list[int] = []
    (stack,) = stack_by_shape({f"m{i}": CASES["tall"] for i in range(5)})

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(Cancelled):
        solve_stack(stack, 6, cancelled=cancelled)
    assert len(asked) == 4


def test_stacks_are_copies() -> None:
    weight = torch.ones(2, 3)
    (stack,) = stack_by_shape({"w": weight})
    weight.zero_()
    assert stack.matrices_NRC.sum() == 6


def test_a_tensor_that_is_no_matrix_is_named() -> None:
    with pytest.raises(ValueError, match=r"conv has shape \(2, 3, 4\)"):
        solve({"conv": torch.zeros(2, 3, 4)}, 1)


def test_numpys_and_scipys_threads_are_put_back() -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    def threads() -> set[int]:
        """Of these two: OpenCV, for one, has a BLAS of its own."""
        ours = ("numpy.libs", "scipy.libs")
        return {one["num_threads"] for one in threadpool_info() if Path(one["filepath"]).parent.name in ours}

    with threadpool_limits(limits=2, user_api="blas"):
        assert threads() == {2}
        with lapack.one_blas_thread(), lapack.one_blas_thread():
            assert threads() == {1}
        assert threads() == {2}
