"""How weights move, against numpy on explicit matrices and against steps of the optimizers themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
from torch import nn

from lowrank_vit.spectral.measures.updates import update_direction, update_metrics, why_no_direction
from lowrank_vit.spectral.solving.extremes import Triplets

RANDOM = np.random.default_rng(5)


def block_of(matrix_RC: np.ndarray, p: int) -> Triplets:
    u, s, vt = np.linalg.svd(matrix_RC, full_matrices=False)
    return Triplets(s[:p], u[:, :p], vt[:p].T, np.zeros(p))


def described(change_RC: np.ndarray, block: Triplets | None) -> dict[str, float]:
    s = np.linalg.svd(change_RC, compute_uv=False) if np.isfinite(change_RC).all() else np.full(4, np.nan)
    found = update_metrics("dw", torch.from_numpy(change_RC), s, block)
    assert all(name.startswith("dw_") for name in found)
    return {name.removeprefix("dw_"): value for name, value in found.items()}


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_shares_are_those_of_explicit_products(scale):
    weight, change = RANDOM.standard_normal((2, 12, 7))
    block = block_of(weight, 3)
    numbers = described(scale * change, block)
    whole, s = np.sum(change**2), np.linalg.svd(change, compute_uv=False)
    assert numbers["top_u"] == pytest.approx(np.sum((block.u.T @ change) ** 2) / whole)
    assert numbers["top_v"] == pytest.approx(np.sum((change @ block.v) ** 2) / whole)
    assert numbers["top"] == pytest.approx(np.sum((block.u.T @ change @ block.v) ** 2) / whole)
    assert numbers["most"] == pytest.approx(np.sum(s[:3] ** 2) / whole)
    assert numbers["stable_rank"] == pytest.approx(whole / s[0] ** 2)
    assert (numbers["chance_u"], numbers["chance_v"], numbers["chance"]) == (3 / 12, 3 / 7, 9 / 84)
    assert numbers["top"] <= min(numbers["top_u"], numbers["top_v"]) <= numbers["most"]


def test_chance_is_the_mean_over_random_blocks_for_a_change_of_any_kind():
    change = np.outer(RANDOM.standard_normal(10), RANDOM.standard_normal(6))  # the least isotropic there is
    drawn = [described(change, block_of(RANDOM.standard_normal((10, 6)), 2)) for _ in range(2000)]
    for name in ("_u", "_v", ""):
        shares = np.array([one[f"top{name}"] for one in drawn])
        assert abs(shares.mean() - drawn[0][f"chance{name}"]) < 4 * shares.std() / 2000**0.5


def test_a_change_along_the_block_is_all_in_it_and_one_across_is_not():
    weight = RANDOM.standard_normal((9, 6))
    block = block_of(weight, 2)
    along = described(block.u @ np.diag([2.0, 1.0]) @ block.v.T, block)
    assert [along[n] for n in ("top_u", "top_v", "top", "most")] == pytest.approx([1.0] * 4)
    across = described(weight - (block.u * block.s) @ block.v.T, block)
    assert [across[n] for n in ("top_u", "top_v", "top")] == pytest.approx([0.0] * 3, abs=1e-20)


def test_no_change_no_block_and_numbers_that_are_not_finite_have_defined_values():
    block = block_of(RANDOM.standard_normal((5, 4)), 2)
    zero = described(np.zeros((5, 4)), block)
    assert (zero["stable_rank"], zero["effective_rank"], zero["rank90"]) == (0, 0, 0)
    assert np.isnan([zero[name] for name in ("top_u", "top_v", "top", "most")]).all()
    bad = described(np.full((5, 4), np.nan), block)
    assert np.isnan([value for name, value in bad.items() if "chance" not in name]).all()
    assert set(described(np.ones((5, 4)), None)) == {"stable_rank", "effective_rank", "rank90"}


def left_by_muon(parameters: list[nn.Parameter], **options: Any) -> timm.optim.Muon:
    return timm.optim.Muon([{"params": parameters, "use_fallback": True}], **options)


def stepped(make: Any, shape: tuple[int, ...] = (6, 4), **options: Any) -> tuple[Any, nn.Parameter, torch.Tensor]:
    """An optimizer after three steps, whose gradients are gone, its parameter and the last step."""
    random = torch.Generator().manual_seed(2)
    parameter = nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64))
    optimizer, before = make([parameter], lr=0.01, **options), parameter.detach()
    for _ in range(3):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(shape, generator=random, dtype=torch.float64)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, parameter, before - parameter.detach()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.0}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "fused": True, "betas": (0.8, 0.95), "eps": 0.1}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "amsgrad": True}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
        (timm.optim.Muon, {}),
        (timm.optim.Muon, {"momentum": 0.5, "ns_coefficients": "polar_express", "adjust_lr_fn": "original"}),
        (timm.optim.Muon, {"shape": (6, 4, 2, 3)}),
        (timm.optim.Muon, {"shape": (6, 4, 2, 3), "conv_mode": "batched"}),
        (left_by_muon, {"betas": (0.8, 0.95)}),
        (timm.optim.Muon, {"shape": (6,)}),
    ],
)
def test_the_direction_times_the_learning_rate_is_the_step(make, options):
    optimizer, parameter, step = stepped(make, **options)
    (group,) = optimizer.param_groups
    state = {name: torch.as_tensor(value).clone() for name, value in optimizer.state[parameter].items()}
    direction = update_direction(optimizer, group, parameter)
    assert direction is not None
    torch.testing.assert_close(0.01 * direction, step, rtol=1e-6, atol=1e-15)
    direction.zero_()  # it is a copy
    assert all(torch.equal(value, torch.as_tensor(optimizer.state[parameter][name])) for name, value in state.items())
    assert why_no_direction(optimizer, group) == ""


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (torch.optim.NAdam, {}, "that of torch.optim.nadam.NAdam is not known"),
        (timm.optim.Lion, {}, "that of timm.optim.lion.Lion is not known"),
        (torch.optim.SGD, {}, "SGD without momentum stores none"),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, "Nesterov momentum includes the last gradient"),
        (timm.optim.Muon, {"nesterov": True}, "Nesterov momentum"),
        (left_by_muon, {"nesterov": True}, "Nesterov momentum"),
        (timm.optim.Muon, {"algo": "adamuon"}, "that of timm.optim.muon.Muon as 'adamuon' is not known"),
        (timm.optim.Muon, {"algo": "adamuon", "nesterov": True}, "that of timm.optim.muon.Muon as 'adamuon'"),
    ],
)
def test_of_others_there_is_none_and_a_line_says_why(make, options, why):
    optimizer, parameter, _ = stepped(make, **options)
    (group,) = optimizer.param_groups
    assert update_direction(optimizer, group, parameter) is None
    assert why_no_direction(optimizer, group).startswith(why)


def test_before_the_first_step_there_is_none():
    parameter = nn.Parameter(torch.ones(2, 2))
    for optimizer in (torch.optim.AdamW([parameter]), torch.optim.SGD([parameter], momentum=0.9)):
        assert update_direction(optimizer, optimizer.param_groups[0], parameter) is None
        assert parameter not in optimizer.state
