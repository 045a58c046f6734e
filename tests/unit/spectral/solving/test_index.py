"""Index certificates: given where they are due, and faults that are planted in solvers are noticed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from lowrank_vit.spectral.solving import gram
from lowrank_vit.spectral.solving.extremes import RELATIVE_LIMIT, Solved, Solver, Triplets
from lowrank_vit.spectral.solving.index import (
    FEW,
    FEW_OF_FLOAT32,
    PROBES,
    enclosure,
    index_is_proven,
    probes,
    square_beyond,
)
from lowrank_vit.spectral.solving.solve import solve
from tests.device_path import CudaPath
from tests.spectra import low_rank_and_noise, orthonormal, with_spectrum

M = 5
CLUSTER = np.concatenate([[9.0, 8.0, 5.0], np.full(12, 3.0), np.linspace(2, 1, 25)])
"""p = 5 lies in the cluster."""
MATRICES = {
    "noise": low_rank_and_noise(70, 40, np.array([9.0, 5.0]), 0.1),
    "wide": low_rank_and_noise(40, 90, np.array([9.0, 5.0]), 0.1),
    "cluster at p": with_spectrum(CLUSTER, 60, 40),
    "zero": torch.zeros(50, 40, dtype=torch.float64),
    "orthogonal": torch.from_numpy(orthonormal(40, 40, 3)),
    "condition 1e3": with_spectrum(np.geomspace(1, 1e-3, 40), 40, 40),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("solver", ["gram64", "svd"])
def test_indices_of_ordinary_matrices_are_proven_both_ways(name: str, solver: Solver, on_cuda_path: CudaPath) -> None:
    for way in (nullcontext, on_cuda_path):
        with way():
            found = solve({"m": MATRICES[name]}, M, solver)["m"]
        assert found.index
        assert found.note == ""


def test_a_matrix_that_is_split_has_none() -> None:
    found = solve({"m": with_spectrum(np.array([3.0, 2.0, 1.0]), 60, 40)}, M)["m"]
    assert (found.solver, found.index) == ("gram64", False)


def proven(matrix: torch.Tensor, top: list[int], last: list[int]) -> bool:
    """Of true triplets under the indices 1.. and K, K-1, ...; enclosures from the right eigenvalues."""
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)

    def pick(at: list[int]) -> Triplets:
        return Triplets(s[at], u[:, at], vh[at].T, np.full(len(at), 1e-13))

    return index_is_proven(Solved(s, pick(top), pick(last), 0.0, "gram64"), s - 1e-12, s + 1e-12)


def test_true_triplets_under_wrong_indices_are_noticed() -> None:
    matrix = MATRICES["cluster at p"]
    top, last = [0, 1, 2, 3, 4], [39, 38, 37, 36, 35]
    assert proven(matrix, top, last)
    assert proven(matrix, [0, 1, 2, 9, 4], last)  # another of the same value: nobody can tell
    assert not proven(matrix, [0, 2, 1, 3, 4], last)
    assert not proven(matrix, [0, 1, 3, 4, 5], last)  # the third was missed
    assert not proven(matrix, top, [39, 37, 36, 35, 34])


def test_an_enclosure_holds_the_norm_of_what_it_probes() -> None:
    for rank in (1, 3, 40):
        difference = orthonormal(40, rank, rank) @ orthonormal(40, rank, 7).T
        for count, most in ((PROBES, 200), (FEW_OF_FLOAT32, 1000), (FEW, 10_000)):
            assert 1 <= enclosure(difference @ probes(40, count)) < most
    assert np.array_equal(probes(40, FEW), probes(40)[:, :FEW])


@pytest.mark.parametrize("name", ["noise", "wide", "cluster at p"])
def test_a_cholesky_factor_proves_that_no_value_was_missed(name: str) -> None:
    matrix = MATRICES[name]
    _, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    gram_matrix = matrix.mT @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mT
    short = vh.mT if matrix.shape[0] >= matrix.shape[1] else torch.linalg.svd(matrix, full_matrices=False)[0]
    right = [0, 1, 2, 3, 4]
    stale = torch.linalg.qr(torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    found = {
        "right": (s[right], short[:, right]),
        "the third missed": (s[[0, 1, 3, 4, 5]], short[:, [0, 1, 3, 4, 5]]),
        "the first missed": (s[1:6], short[:, 1:6]),
        "swapped vectors": (s[right], short[:, [1, 0, 2, 3, 4]]),
        "stale vectors": (s[right], stale),
    }
    values, vectors = (torch.stack(parts) for parts in zip(*found.values(), strict=True))
    n = len(found)

    def is_proven(gram_NKK: torch.Tensor, s_NM: torch.Tensor, v_NKM: torch.Tensor) -> list[bool]:
        least_N = s_NM[:, -1] ** 2
        mu_N = least_N * (1 + RELATIVE_LIMIT)
        square_N = square_beyond(matrix.expand(len(s_NM), -1, -1), gram_NKK, mu_N, s_NM, v_NKM)
        assert (square_N >= s[5] ** 2).all()
        return (square_N <= least_N * (1 + 2 * RELATIVE_LIMIT)).tolist()

    proven = is_proven(gram_matrix.expand(n, -1, -1), values, vectors)
    assert dict(zip(found, proven, strict=True)) == {what: what == "right" for what in found}
    assert is_proven(0.9 * gram_matrix[None], s[None, :5], short[None, :, :5]) == [False]


@pytest.mark.parametrize("fault", ["all", "inner", "last"])
def test_a_stale_workspace_of_the_batched_eigensolver_is_noticed(
    fault: str, monkeypatch: pytest.MonkeyPatch, on_cuda_path: CudaPath
) -> None:
    """CuSOLVER 11.7.1.2 gave vectors of another matrix without a word (pytorch #192483)."""
    right = torch.linalg.eigh
    columns = {"all": slice(None), "inner": slice(M + 3, -M - 3), "last": slice(1, 2)}[fault]

    def stale(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = right(matrices)
        vectors = vectors.clone()
        if len(vectors) == 3:
            vectors[1, :, columns] = vectors[0, :, columns]
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", stale)
    matrices = {f"m{i}": low_rank_and_noise(70, 40, np.array([9.0, 5.0]), 0.1, seed=i) for i in range(3)}
    with on_cuda_path():
        found = solve(matrices, M)
    assert [one.solver for one in found.values()] == ["gram64", "svd", "gram64"]
    assert found["m1"].note
    expected = np.linalg.svd(matrices["m1"].numpy(), compute_uv=False)
    np.testing.assert_allclose(found["m1"].s, expected, rtol=1e-12)
    assert all(one.index for one in found.values())


def test_a_vector_missed_before_a_cluster_is_found_by_the_full_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The basis has vectors 1, 2, 4, 5, 6: five true triplets, of which the third is not sigma_3."""
    right = gram.ends_of_matrix

    def without_the_third(a_RC: np.ndarray, m: int) -> tuple[gram.Ends, gram.Tridiagonal | None]:
        ends, found = right(a_RC, m)
        more = right(a_RC, m + 1)[0].basis[:, -m - 1 :]
        return replace(ends, basis=np.concatenate([ends.basis[:, :m], np.delete(more, -3, axis=1)], axis=1)), found

    monkeypatch.setattr("lowrank_vit.spectral.solving.refine.ends_of_matrix", without_the_third)
    found = solve({"m": MATRICES["cluster at p"]}, M)["m"]
    np.testing.assert_allclose(found.top.s, CLUSTER[:M], rtol=1e-12)
    assert found.index


def test_wrong_values_beside_the_ends_do_not_pass_sturms_count(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gram.tridiagonal_values

    def shifted(d: np.ndarray, e: np.ndarray) -> np.ndarray:
        values = right(d, e)
        change = 1e-3 * values[-M - 1]
        values[-M - 1] += change
        values[-M - 8] -= change  # the sum stays
        return np.sort(values)

    monkeypatch.setattr(gram, "tridiagonal_values", shifted)
    found = solve({"m": MATRICES["noise"]}, M)["m"]
    assert found.solver == "svd"
    assert "Sturm" in found.note
