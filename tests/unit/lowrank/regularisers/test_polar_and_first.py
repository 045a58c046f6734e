"""Polar factors, clipping and first triplets of regularisers are those of exact SVDs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_vit.lowrank.regularisers.first import first_triplets, stable_rank_gradient
from lowrank_vit.lowrank.regularisers.polar import _STEPS, EDGE, FLOOR, clipped, polar


def with_values(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float32 matrix of these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64, generator=generator))[0]
        for size in (rows, columns)
    )
    return ((left * values) @ right.mT).float()


def exact_polar(matrix: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u * (s > 1e-5 * s[0])) @ v


def falling(count: int, condition: float) -> Tensor:
    return torch.logspace(0, -np.log10(condition), count, dtype=torch.float64)


def test_the_chain_of_quintics_makes_ones_of_all_values_down_to_the_floor():
    values = torch.logspace(np.log10(FLOOR), 0, 5000, dtype=torch.float64)
    for a, b, c in _STEPS:
        values = a * values + b * values**3 + c * values**5
    assert (values - 1).abs().max() < 1e-3


@pytest.mark.parametrize(("rows", "columns"), [(48, 48), (48, 192)])
@pytest.mark.parametrize(
    ("values", "error"),
    [
        (torch.ones(48, dtype=torch.float64), 1e-5),
        (falling(48, 1e2), 1e-4),
        (falling(48, 2e3), 1e-3),  # the bound is up to K^(1/4) above the greatest value
        (falling(12, 1e1), 5e-3),  # of rank a quarter: roundings of float32 are what is left of the others
        (falling(1, 1e0), 1e-2),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15])
def test_a_polar_factor_is_that_of_the_svd(rows, columns, values, error, scale):
    matrices = torch.stack([with_values(rows, columns, values, seed) * scale for seed in range(2)])
    for found, matrix in zip(polar(matrices), matrices, strict=True):
        expected = exact_polar(matrix)
        assert torch.linalg.matrix_norm(found - expected) < error * torch.linalg.matrix_norm(expected)
        nuclear = torch.linalg.svdvals(matrix.double()).sum()
        assert float((found.double() * matrix).sum()) == pytest.approx(float(nuclear), rel=1e-4)


def test_a_tail_below_the_floor_is_drawn_less_and_never_more():
    matrix = with_values(48, 96, torch.cat([torch.ones(24), torch.full((24,), 1e-6)]).double())
    values = torch.linalg.svdvals(polar(matrix[None])[0])
    assert values.max() < 1.001
    assert 0 < values[-1] < 0.2


def test_a_zero_matrix_has_no_polar_factor_and_no_first_triplet():
    zero = torch.zeros(1, 4, 6)
    assert torch.equal(polar(zero), zero)
    first = first_triplets(zero, torch.zeros(1, 4))
    assert not first.is_certified_N.any()


@pytest.mark.parametrize("share", [0.95, 0.5, 0.1])
def test_clipping_is_that_of_numpys_svd(share):
    matrix = torch.randn(40, 70, generator=torch.Generator().manual_seed(1))
    u, s, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    limit = float(s[0]) * share
    found = clipped(matrix[None], limit)
    expected = (u * s.clip(max=limit)) @ v
    assert np.linalg.norm(found.matrices_NKL[0].numpy() - expected) < 2e-4 * np.linalg.norm(expected)
    assert int(found.count_N) == (s > limit * (1 + EDGE)).sum()
    again = clipped(found.matrices_NKL, limit)
    assert torch.equal(again.matrices_NKL, found.matrices_NKL)
    assert int(again.count_N) == 0


def test_what_is_below_the_limit_keeps_its_bits():
    matrices = torch.stack([with_values(16, 24, falling(16, 1e5)), 3 * with_values(16, 24, falling(16, 1e5), 1)])
    found = clipped(matrices, 1.5)
    assert torch.equal(found.matrices_NKL[0], matrices[0])
    assert not torch.equal(found.matrices_NKL[1], matrices[1])
    tail = torch.linalg.svdvals(found.matrices_NKL[1].double())[1:]
    torch.testing.assert_close(tail[:4], torch.linalg.svdvals(matrices[1].double())[1:5], rtol=1e-3, atol=0)


@pytest.mark.parametrize("values", [falling(48, 10), falling(48, 1e6), torch.ones(48).double(), falling(1, 1)])
def test_a_first_value_is_certified_and_the_certificate_holds(values):
    matrix = with_values(48, 64, values)
    first = first_triplets(matrix[None] * 1e-18, torch.zeros(1, 48))
    exact = float(torch.linalg.svdvals(matrix.double())[0]) * 1e-18
    assert first.is_certified_N.all()
    value = float(first.value_N)
    assert value <= exact * (1 + 1e-6)
    assert exact <= value * (1 + float(first.error_N))


def test_a_triplet_that_was_overtaken_is_left_for_the_first_one():
    u, s, v = torch.linalg.svd(torch.randn(20, 30, generator=torch.Generator().manual_seed(2)).double())
    s[1] = 0.999 * s[0]
    matrix = ((u * s) @ v[:20]).float()
    first = first_triplets(matrix[None], u[None, :, 1].float().contiguous())
    assert float(first.value_N) == pytest.approx(float(s[0]), rel=1.1e-3)
    assert first.is_certified_N.all()
    s[1] = 0.5 * s[0]
    first = first_triplets(((u * s) @ v[:20]).float()[None], u[None, :, 1].float().contiguous())
    assert abs(float(first.left_NK[0].double() @ u[:, 0])) > 1 - 1e-6


def test_among_equal_values_it_stays_with_the_last_direction():
    u = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(3)))[0]
    first = first_triplets((u @ torch.eye(20, 30))[None], u[None, :, 7].contiguous())
    assert float(first.left_NK[0] @ u[:, 7]) > 1 - 1e-5


def stable_rank(matrix: Tensor) -> Tensor:
    return matrix.square().sum() / torch.linalg.svdvals(matrix)[0] ** 2


def test_the_stable_ranks_gradient_is_the_exact_one_and_finite_differences():
    matrix = with_values(12, 20, falling(12, 30)).requires_grad_()
    first = first_triplets(matrix.detach()[None], torch.zeros(1, 12))
    rank, gradient = stable_rank_gradient(matrix.detach()[None], first)
    exact = matrix.double()
    expected = torch.autograd.grad(stable_rank(exact), exact)[0]
    assert float(rank) == pytest.approx(float(stable_rank(exact.detach())), rel=1e-5)
    assert torch.linalg.matrix_norm(gradient[0] - expected) < 1e-4 * torch.linalg.matrix_norm(expected)
    way = torch.randn(12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ahead, back = (stable_rank(exact.detach() + by * way) for by in (1e-5, -1e-5))
    assert float((gradient[0] * way).sum()) == pytest.approx(float(ahead - back) / 2e-5, rel=1e-3)
