"""The first triplets alone are right or refused: over shapes, conditions, faulty starts and libraries, bad input."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from lowrank_vit.spectral.solving import nearby
from lowrank_vit.spectral.solving.ends import GUARD, is_large_enough, solve_ends
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.solving.solve import Cancelled, MatrixStack, solve, solve_stack
from tests.device_path import CudaPath
from tests.spectra import low_rank_and_noise, nasty, orthonormal, with_spectrum

M, K = 5, 64
CLUSTER = np.concatenate([[9.0, 8.0, 5.0], np.full(12, 3.0), np.linspace(2, 1, K - 15)])
"""p = 5 lies in the cluster."""


@pytest.fixture(params=["threads", "stacks"])
def path(request: pytest.FixtureRequest, on_cuda_path: CudaPath) -> Generator[None]:
    """Which way matrices are solved: one by one as on a CPU, or a whole stack at once as on a GPU."""
    with on_cuda_path() if request.param == "stacks" else nullcontext():
        yield


def moved(matrix: torch.Tensor, share: float = 3e-3, seed: int = 5) -> torch.Tensor:
    """After an update of this share of its Frobenius norm."""
    change = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit = float(matrix.abs().max())
    scaled = matrix.double() / unit
    change *= share * torch.linalg.norm(scaled) / torch.linalg.norm(change)
    return ((scaled + change) * unit).to(matrix.dtype)


def starts_of(matrices: dict[str, torch.Tensor], m: int = M) -> dict[str, np.ndarray]:
    """Of whole spectra."""
    return {name: one.start for name, one in solve(matrices, m).items() if one.start is not None}


def ends(matrix: torch.Tensor, start: np.ndarray, m: int = M) -> Solved | None:
    return solve_ends(MatrixStack(("m",), matrix[None]), {"m": start}, m)["m"]


def check_against_numpy(solved: Solved, matrix: torch.Tensor, m: int = M) -> None:
    """Values, vectors and certificates of the first triplets; and what else is promised of them."""
    unit = float(matrix.abs().max())
    a = matrix.double().numpy() / unit
    s = np.linalg.svd(a, compute_uv=False)
    top = solved.top
    assert (top.u.shape, top.v.shape, solved.last.s.size) == ((a.shape[0], m), (a.shape[1], m), 0)
    assert (solved.solver, solved.full, solved.index, solved.note) == ("ends", False, True, "")
    assert solved.certificate_max <= 1e-12
    certificate, values = top.certificate / unit, top.s / unit
    assert (np.abs(values - s[:m]) <= certificate + 4e-16 * s[0]).all()
    np.testing.assert_allclose(values, s[:m], rtol=0, atol=2e-14 * s[0])
    exact, left, right = (x.astype(np.longdouble) for x in (a, top.u, top.v))
    ahead, behind = exact @ right - left * values, exact.T @ left - right * values
    assert (np.sqrt((np.sum(ahead**2, axis=0) + np.sum(behind**2, axis=0)) / 2) <= certificate).all()
    assert s[np.isfinite(solved.s).sum()] <= solved.beyond / unit < s[m - 1]
    assert max(np.abs(x.T @ x - np.eye(m)).max() for x in (top.u, top.v)) <= solved.orthogonality + 1e-15 <= 1e-10
    np.testing.assert_array_equal(solved.s[:m], top.s)
    assert np.isnan(solved.s[m]) or abs(solved.s[m] / unit - s[m]) <= 1e-12 * s[0]
    assert np.isnan(solved.s[m + 1 :]).all()
    np.testing.assert_allclose(solved.frobenius / unit, np.linalg.norm(a), rtol=1e-14)
    assert solved.start is not None
    assert (solved.start.shape, solved.start.dtype) == ((min(a.shape), m + GUARD), np.float32)


ORDINARY = {
    "tall": low_rank_and_noise(150, K, np.geomspace(9, 3, 12), 0.1).float(),
    "wide": low_rank_and_noise(K, 150, np.geomspace(9, 3, 12), 0.1).float(),
    "square": low_rank_and_noise(80, 80, np.geomspace(20, 3, 32), 0.1).float(),
    "noise": 0.02 * torch.randn(200, K, generator=torch.Generator().manual_seed(0)),
    "float64": low_rank_and_noise(K, 70, np.array([9.0, 5.0, 3.0]), 0.1),
    "bfloat16": low_rank_and_noise(150, K, np.geomspace(9, 3, 12), 0.1).bfloat16(),
    "a cluster within": with_spectrum(np.concatenate([[9.0, 5.0, 5.0, 5.0, 4.0, 3.5], np.linspace(3, 1, K - 6)]), K, K),
    "tiny entries": 1e-200 * low_rank_and_noise(K, 80, np.geomspace(9, 3, 12), 0.1),
    "huge entries": 1e200 * low_rank_and_noise(80, K, np.geomspace(9, 3, 12), 0.1),
    "entries at float32's end": 1e36 * low_rank_and_noise(80, K, np.geomspace(9, 3, 12), 0.1).float(),
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.usefixtures("path")
def test_the_first_triplets_are_those_of_the_whole_spectrum(name: str) -> None:
    start = starts_of({"m": ORDINARY[name]})["m"]
    for refresh in range(3):  # the second and third start from the one before
        matrix = moved(ORDINARY[name], seed=refresh)
        found, whole = ends(matrix, start), solve({"m": matrix}, M)["m"]
        assert found is not None
        check_against_numpy(found, matrix)
        assert (np.abs(found.top.s - whole.top.s) <= found.top.certificate + whole.top.certificate).all()
        assert np.abs(np.abs(np.sum(found.top.u * whole.top.u, axis=0)) - 1).max() < 1e-9 or name == "a cluster within"
        assert found.eps == whole.eps
        assert found.start is not None
        start = found.start


@pytest.mark.parametrize("count", [1, 4, M, M + 1])
@pytest.mark.parametrize("ratio", [10, 25, 50])
@pytest.mark.usefixtures("path")
def test_the_block_may_end_in_the_bulk_below_few_strong_directions(count: int, ratio: int) -> None:
    """The greatest is so many times the bulk's edge: near is what is near for the values of the bulk, too."""
    strong = np.geomspace(1, 1.3 / ratio, count) if count > 1 else np.ones(1)
    bulk = np.linspace(1, 0.1, K - count) / ratio
    matrix = with_spectrum(np.concatenate([strong, bulk]), 90, K).float()
    start = starts_of({"m": matrix})["m"]
    for refresh in range(2):
        now = moved(matrix, 1e-3, seed=refresh)
        found = ends(now, start)
        assert found is not None
        check_against_numpy(found, now)
        assert found.start is not None
        start = found.start


NASTY = nasty(K) | {
    "diagonal": torch.diag(torch.linspace(1, 50, K, dtype=torch.float64)),
    "orthogonal": torch.from_numpy(orthonormal(K, K, 3)),
    "cluster at p": with_spectrum(CLUSTER, 90, K),
    "cluster after p": with_spectrum(np.repeat([9.0, 5.0, 1.0], [M, 12, K - M - 12]), K, 90),
    "one direction": low_rank_and_noise(K, K, np.array([500.0]), 0.1),
    "one entry": torch.nn.functional.pad(torch.full((1, 1), 3.0, dtype=torch.float64), (5, K - 6, 7, K)),
}


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("share", [0.0, 1e-6])
@pytest.mark.usefixtures("path")
def test_of_a_nasty_matrix_the_numbers_are_right_or_there_are_none(name: str, share: float) -> None:
    matrix = moved(NASTY[name], share)
    vectors = np.linalg.svd(NASTY[name].double().numpy() / float(NASTY[name].abs().max()), full_matrices=False)
    short = vectors[2].T if NASTY[name].shape[0] >= NASTY[name].shape[1] else vectors[0]
    for start in (starts_of({"m": NASTY[name]}).get("m"), short[:, :M].astype(np.float32)):
        found = None if start is None else ends(matrix, start)
        if found is not None:
            check_against_numpy(found, matrix)
    assert name not in ("cluster at p", "orthogonal", "one entry", "all ones") or share or found is None


def test_what_ends_in_full_rank_and_a_gap_is_found_whatever_its_condition() -> None:
    for name in ("kahan", "graded to 1e-12", "half the columns", "rank 55, tall", "rank 32, wide", "rank 63, square"):
        assert ends(moved(NASTY[name], 1e-6), starts_of({"m": NASTY[name]})["m"]) is not None


@pytest.mark.usefixtures("path")
def test_faults_in_a_start_are_made_good_or_noticed() -> None:
    matrix = ORDINARY["tall"]
    start = starts_of({"m": matrix})["m"]
    full = ends(matrix, start)
    assert full is not None
    start = full.start
    assert start is not None
    faults = {
        "swapped": start[:, ::-1],
        "the first missing": np.concatenate([start[:, 1:], start[:, -1:]], axis=1),
        "the third missing": np.delete(start, 2, axis=1),
        "twice the same": np.repeat(start[:, :11], 2, axis=1),
        "another matrix": starts_of({"m": ORDINARY["noise"]})["m"],
        "zero": np.zeros_like(start),
        "not a number": np.full_like(start, np.nan),
        "huge": start * np.float32(1e30),
    }
    for name, fault in faults.items():
        found = ends(moved(matrix), fault)
        if found is not None:
            check_against_numpy(found, moved(matrix))
        assert (found is None) == (name in ("zero", "not a number")) or name in ("huge", "twice the same")


@pytest.mark.usefixtures("path")
def test_a_vector_missed_before_a_cluster_leads_to_the_whole_spectrum() -> None:
    matrix = with_spectrum(CLUSTER, 90, K)
    right = np.linalg.svd(matrix.numpy(), full_matrices=False)[2].T.astype(np.float32)
    assert ends(matrix, np.delete(right, 2, axis=1)[:, : M + GUARD]) is None
    assert ends(moved(matrix, 1e-8), np.delete(right, 2, axis=1)[:, : M + GUARD]) is None


@pytest.mark.parametrize("missed", [0, 2, 4])
def test_a_vector_that_the_filter_misses_is_noticed(missed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six true triplets with certificates at rounding, of which one is beyond the sixth."""
    matrix = with_spectrum(np.geomspace(9, 1, K), 90, K)
    vectors = np.delete(np.linalg.svd(matrix.numpy(), full_matrices=False)[2].T, missed, axis=1)[:, : M + GUARD]
    squares = np.delete(np.geomspace(9, 1, K), missed)[: M + GUARD] ** 2
    monkeypatch.setattr(nearby, "_filtered", lambda *_: (squares.copy(), vectors.astype(np.float32)))
    lines: list[str] = []
    start = {"m": vectors.astype(np.float32)}
    assert solve_ends(MatrixStack(("m",), matrix[None]), start, M, log=lines.append)["m"] is None
    assert "not told" in lines[0] or "certificate" in lines[0]


def test_a_value_that_rises_from_below_the_block_is_found_or_noticed() -> None:
    s = np.linspace(9, 1, K)
    crossed = s.copy()
    crossed[50] = 8.8
    before, now = with_spectrum(s, 90, K), with_spectrum(crossed, 90, K)
    found = ends(now, starts_of({"m": before})["m"])
    if found is not None:
        check_against_numpy(found, now)


@pytest.mark.parametrize("wrong", ["gram", "_whole", "_chebyshev", "images", "_correction"])
def test_wrong_numbers_on_the_way_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(nearby, wrong)

    def slightly_wrong(*args: np.ndarray):
        result = right(*args)
        first = result[0] if isinstance(result, tuple) else result
        first[0] += 1e-3 * np.abs(first).max()
        return result

    start = starts_of({"m": ORDINARY["square"]})["m"]
    monkeypatch.setattr(nearby, wrong, slightly_wrong)
    matrix = moved(ORDINARY["square"])
    found = ends(matrix, start)
    if found is not None:
        check_against_numpy(found, matrix)
    assert found is None or wrong != "images"


@pytest.mark.parametrize("routine", ["eigh", "cholesky_ex", "svd"])
def test_a_stale_workspace_of_a_batched_routine_costs_one_matrix(
    routine: str, monkeypatch: pytest.MonkeyPatch, on_cuda_path: CudaPath
) -> None:
    right = getattr(torch.linalg, routine)

    def stale(matrices: torch.Tensor):
        found = [part.clone() for part in right(matrices)]
        for part in found:
            part[1] = part[0]
        return found

    matrices = {f"m{i}": low_rank_and_noise(90, K, np.geomspace(9, 3, 12), 0.1, seed=3 * i) for i in range(3)}
    starts = starts_of(matrices)
    monkeypatch.setattr(torch.linalg, routine, stale)
    with on_cuda_path():
        found = solve_ends(MatrixStack(tuple(matrices), torch.stack(list(matrices.values()))), starts, M)
    assert [name for name, one in found.items() if one is None] == ["m1"]
    for name in ("m0", "m2"):
        one = found[name]
        assert one is not None
        check_against_numpy(one, matrices[name])


def test_both_ways_tell_the_same(on_cuda_path: CudaPath) -> None:
    for name in ("tall", "wide", "noise"):
        start, matrix = starts_of({"m": ORDINARY[name]})["m"], moved(ORDINARY[name])
        by_cpu = ends(matrix, start)
        with on_cuda_path():
            by_stack = ends(matrix, start)
        assert by_cpu is not None
        assert by_stack is not None
        np.testing.assert_allclose(by_stack.s, by_cpu.s, rtol=1e-13)


def test_the_bits_depend_neither_on_threads_nor_on_neighbours_nor_on_reduced_precision() -> None:
    weights = {f"m{i}": 0.02 * torch.randn(96, K, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    starts = starts_of(weights)
    now = {name: moved(matrix) for name, matrix in weights.items()}
    names = tuple(now)
    expected = solve_ends(MatrixStack(names, torch.stack(list(now.values()))), starts, M)
    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(3)
    try:
        stack = MatrixStack(names[::-1], torch.stack([now[name] for name in names[::-1]]))
        again = solve_ends(stack, starts, M, cpu_threads=3)
        again |= solve_ends(MatrixStack(("m0",), now["m0"][None]), starts, M)
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_num_threads(threads)
    for name, one in expected.items():
        other = again[name]
        assert one is not None
        assert other is not None
        for mine, its in ((one.s, other.s), (one.top.u, other.top.u), (one.top.v, other.top.v)):
            np.testing.assert_array_equal(mine, its)


@pytest.mark.usefixtures("path")
def test_matrices_without_a_start_small_ones_and_those_not_finite_are_left_to_others() -> None:
    matrix = ORDINARY["tall"]
    start = starts_of({"m": matrix})["m"]
    broken = matrix.clone()
    broken[3, 4] = float("nan")
    stack = MatrixStack(("good", "cold", "broken", "of another size"), torch.stack([matrix, matrix, broken, matrix]))
    starts = {"good": start, "broken": start, "of another size": start[:-1]}
    found = solve_ends(stack, starts, M)
    assert [name for name, one in found.items() if one is not None] == ["good"]
    assert not is_large_enough(2 * (M + GUARD) - 1, M)
    small = torch.randn(90, 20, generator=torch.Generator().manual_seed(0))
    assert ends(small, np.linalg.qr(small.numpy().T[:, :M])[0]) is None


@pytest.mark.parametrize("shape", [(K, 3 * K), (K, K)])
def test_a_whole_spectrum_hands_over_the_next_vectors_too_and_has_the_same_bits(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    stack = MatrixStack(("m",), matrix[None])
    without, found = (solve_stack(stack, M, guard=guard)["m"] for guard in (0, GUARD))
    for one, same in ((without.top, found.top), (without.last, found.last)):
        np.testing.assert_array_equal(one.u, same.u)
        np.testing.assert_array_equal(one.v, same.v)
        np.testing.assert_array_equal(one.certificate, same.certificate)
    np.testing.assert_array_equal(found.s, without.s)
    assert found.start is not None
    u, _, vh = np.linalg.svd(matrix.double().numpy())
    short = u if shape[0] < shape[1] else vh.T
    np.testing.assert_allclose(np.abs(found.start.T @ short[:, : M + GUARD]), np.eye(M + GUARD), atol=1e-5)
    assert ends(moved(matrix), found.start) is not None


def test_cancelling_stops_between_two_matrices() -> None:
    matrix = ORDINARY["tall"]
    start, asked = starts_of({"m": matrix})["m"], []
    stack = MatrixStack(("a", "b", "c"), matrix.expand(3, -1, -1))

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(Cancelled):
        solve_ends(stack, dict.fromkeys("abc", start), M, cancelled=cancelled)
    assert len(asked) == 3


def test_orthonormal_columns_of_nearly_dependent_ones() -> None:
    q = torch.from_numpy(orthonormal(K, 12, 0))
    for condition in (1.0, 1e4, 1e8, 1e12):
        columns = q * torch.from_numpy(np.geomspace(1, 1 / condition, 12)) @ torch.from_numpy(orthonormal(12, 12, 1))
        found = nearby._orthonormal(columns[None])[0]
        assert (found.mT @ found - torch.eye(12)).abs().max() < 1e-13
        assert torch.linalg.matrix_norm(columns - found @ (found.mT @ columns), 2) < 1e-14 * condition
