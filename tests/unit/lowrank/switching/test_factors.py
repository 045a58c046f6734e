"""Factors of the weights as they are now: balanced, nearest by their method; and averages in their gauge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank import truncate
from lowrank_vit.lowrank.calibration import Moments
from lowrank_vit.lowrank.methods import METHODS
from lowrank_vit.lowrank.switching.factors import in_gauge, make_factors
from lowrank_vit.lowrank.truncate import decompose
from lowrank_vit.model.low_rank import LowRankLinear, product


def moments(rows: int, columns: int) -> Moments:
    """Of inputs far from the identity and from a mean of zero."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, columns, generator=generator).double() * torch.logspace(0, -3, columns).double() + 2
    gradients = torch.randn(400, rows, generator=generator).double() * torch.logspace(0, -2, rows).double()
    return Moments(
        100,
        400,
        inputs.mT @ inputs / 400,
        inputs.mean(0),
        inputs.abs().mean(0),
        gradients.mT @ gradients / 100,
        torch.rand(1, columns, generator=generator).double(),
    )


@pytest.mark.parametrize("method", ["svd", "kfac", "svdllm"])
@pytest.mark.parametrize("layer", ["linear", "factors", "parts"])
def test_factors_are_balanced_and_their_product_is_the_methods(method, layer):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(20, 30))
    if layer != "linear":
        parts = 3 if layer == "parts" else 1
        model[0] = LowRankLinear(torch.randn(30, 9), torch.randn(9 * parts, 20), torch.randn(30))
    old = model[0]
    weight = product(old.up, old.down) if isinstance(old, LowRankLinear) else old.weight.detach().double()
    parts = old.parts if isinstance(old, LowRankLinear) else 1
    known = {"0": moments(30, 20)}
    known["0"] = Moments(**{**vars(known["0"]), "fisher_PC": known["0"].fisher_PC.expand(parts, -1)})
    made = make_factors(model, {"0": 5}, method, known)["0"]
    assert made.up.dtype == made.down.dtype == torch.float32
    for up, down in zip(made.up.double().chunk(parts), made.down.double().chunk(parts), strict=True):
        inner, outer = up.mT @ up, down @ down.mT
        assert float((inner - outer).norm() / inner.norm()) < 1e-6
    expected = decompose(weight, old.bias, METHODS[method], known["0"], parts).factors(5)
    torch.testing.assert_close(product(made.up, made.down), product(*expected[:2]), rtol=1e-5, atol=1e-6)
    assert made.bias is not None
    assert expected[2] is not None
    torch.testing.assert_close(made.bias, expected[2].float())
    assert (made.mean is not None) is (method != "svd")


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("rank", [1, 9, 20])
def test_only_the_directions_that_are_kept_are_computed_and_their_product_is_the_svds(parts, rank, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(60, 20)
    whole = decompose(weight, None, METHODS["svd"], None, parts).factors(rank)
    monkeypatch.setattr(truncate, "_certified_svd", lambda matrix_RC: pytest.fail("an SVD of the whole"))
    found = decompose(weight, None, METHODS["svd"], None, parts, rank)
    assert [one.shape for one in found.directions[0]] == [(60 // parts, rank), (rank, 20)]
    torch.testing.assert_close(product(*found.factors(rank)[:2]), product(*whole[:2]), rtol=1e-5, atol=1e-6)
    exact = torch.stack([torch.linalg.svdvals(one.double()) for one in weight.chunk(parts)]).numpy()
    np.testing.assert_allclose(found.values_PK, exact, rtol=1e-9)


@pytest.mark.parametrize("weight", [torch.zeros(8, 6), torch.ones(8, 6), torch.eye(8)[:, :6], 1e-30 * torch.ones(8, 6)])
def test_weights_of_less_rank_than_is_kept_have_factors_all_the_same(weight):
    model: Any = nn.Sequential(nn.Linear(6, 8))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    done: list[int] = []
    made = make_factors(model, {"0": 3}, progress=done.append)["0"]
    assert (made.up.shape, made.down.shape, done) == ((8, 3), (3, 6), [1])
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    nearest = (u[:, :3] * s[:3]) @ vh[:3]
    if s[2] == s[3] > 0:  # any three of equal directions are nearest
        assert np.linalg.matrix_rank(product(made.up, made.down).numpy()) == 3
    else:
        np.testing.assert_allclose(product(made.up, made.down).numpy(), nearest, atol=1e-6 * max(s[0], 1e-30))


def test_methods_that_weigh_need_a_calibration_and_ranks_must_fit():
    model: Any = nn.Sequential(nn.Linear(20, 30), nn.ReLU())
    with pytest.raises(UserError, match="0 has not been calibrated"):
        make_factors(model, {"0": 5}, "kfac")
    with pytest.raises(UserError, match="0: Rank 21 does not fit"):
        make_factors(model, {"0": 21})
    with pytest.raises(UserError, match="1 is of class ReLU"):
        make_factors(model, {"1": 1})
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="0: The weights hold a NaN"):
        make_factors(model, {"0": 5})


@pytest.mark.parametrize("parts", [1, 2])
def test_another_weight_of_the_same_rows_and_columns_is_its_factors_exactly(parts):
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*shape, generator=generator).double() for shape in ((16, 3), (3 * parts, 10)))
    mixed = torch.randn(parts, 3, 3, generator=generator).double()
    other = (up.unflatten(0, (parts, -1)) @ mixed @ down.unflatten(0, (parts, -1))).flatten(0, 1)
    new_up, new_down = in_gauge(other, up, down)
    torch.testing.assert_close(product(new_up, new_down), other)
    torch.testing.assert_close(new_down, down)  # whose gauge it is


def test_averages_in_one_gauge_have_the_products_average_and_two_svds_rubbish():
    """Ten updates after a switch, of factors that move as a training's do."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 6).double())[0] for size in (40, 30))  # values that lie close
    weight = 30 * left @ right.mT + 0.05 * torch.randn(40, 30).double()
    average = weight + 0.1 * torch.randn(40, 30).double()
    model: Any = nn.Sequential(nn.Linear(30, 40, bias=False, dtype=torch.float64))
    results = []
    for is_in_gauge in (True, False):
        with torch.no_grad():
            model[0].weight.copy_(weight)
        up, down, *_ = make_factors(model, {"0": 6})["0"]
        of_average = in_gauge(average, up, down)
        if not is_in_gauge:
            with torch.no_grad():
                model[0].weight.copy_(average)
            of_average = make_factors(model, {"0": 6})["0"][:2]
        averages, true = [one.clone() for one in of_average], product(*of_average)
        generator = torch.Generator().manual_seed(1)
        for _ in range(10):
            up, down = (one + 0.01 * torch.randn(one.shape, generator=generator) for one in (up, down))
            for mean, value in zip(averages, (up, down), strict=True):
                mean.lerp_(value, 0.1)
            true.lerp_(product(up, down), 0.1)
        results.append(float((product(*averages) - true).norm() / true.norm()))
    assert results[0] < 2e-3
    assert results[1] > 100 * results[0]
