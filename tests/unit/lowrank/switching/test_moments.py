"""State of optimizers in factors: averages of gradients are those of training through W = A B; the rest is refused."""

from __future__ import annotations

import warnings

import pytest
import timm.optim
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.switching.moments import Projection, carried, check_can_switch, steps
from lowrank_vit.model.low_rank import product

R, C, RANK = 12, 8, 3


def optimizer_of(name: str, *parameters: torch.nn.Parameter, decay: float = 0.0, **more) -> torch.optim.Optimizer:
    own = {"use_muon": True} if name == "muon" else {}  # which small matrices are not by themselves
    named = [{"params": [one], **own} for one in parameters]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that kron recommends
        return timm.optim.create_optimizer_v2(named, opt=name, lr=1e-3, weight_decay=decay, momentum=0.9, **more)


def trained(name: str, parameters: list[torch.nn.Parameter], gradients: list[list[torch.Tensor]], **more):
    """An optimizer that has seen gradients, while the parameters stood still."""
    optimizer, before = optimizer_of(name, *parameters, **more), [one.detach().clone() for one in parameters]
    for of_update in gradients:
        for parameter, gradient in zip(parameters, of_update, strict=True):
            parameter.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
    return optimizer


def factors(parts: int, rank: int = RANK) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(rank)
    up, down = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((R, rank), (parts * rank, C))
    )
    return torch.nn.Parameter(up), torch.nn.Parameter(down)


def multiplied(up: torch.Tensor, down: torch.Tensor, parts: int) -> torch.Tensor:
    return (up.unflatten(0, (parts, -1)) @ down.unflatten(0, (parts, -1))).flatten(0, 1)


def gradients_through(
    up: torch.nn.Parameter, down: torch.nn.Parameter, parts: int, count: int = 6
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """Gradients of a loss, at the product as a parameter of its own, and by autograd at its factors."""
    generator, at_weight, at_factors = torch.Generator().manual_seed(1), [], []
    for _ in range(count):
        inputs, targets = torch.randn(20, C, generator=generator), torch.randn(20, R, generator=generator)
        weight = torch.nn.Parameter(multiplied(up, down, parts).detach())
        (inputs.double() @ weight.mT - targets.double()).square().sum().backward()
        at_weight.append([weight.grad])
        loss = (inputs.double() @ multiplied(up, down, parts).mT - targets.double()).square().sum()
        at_factors.append(list(torch.autograd.grad(loss, (up, down))))
    return at_weight, at_factors


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum", "lion", "nadamw", "lamb", "muon", "radam", "nadam"])
def test_averages_of_gradients_are_those_of_training_through_the_factors(name, parts):
    up, down = factors(parts)
    at_weight, at_factors = gradients_through(up, down, parts)
    weight = torch.nn.Parameter(product(up, down))
    more = {"max_grad_norm": None} if name == "lamb" else {}
    optimizer = trained(name, [weight], at_weight, **more)
    expected = trained(name, [up, down], at_factors, **more)
    right, left = down.detach().unflatten(0, (parts, -1)).mT, up.detach().unflatten(0, (parts, -1)).mT
    states = carried(optimizer, Projection(weight, weight, right, left), restart=False)
    for parameter, state in zip((up, down), states, strict=True):
        known = expected.state[parameter]
        assert state.keys() == known.keys()
        for key in state.keys() - {"exp_avg_sq"}:
            torch.testing.assert_close(state[key], known[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parts", [1, 3])
def test_averages_of_factors_that_shrink_are_exact_too(parts):
    """Of new factors whose product has rows and columns among those of the old one's, as a truncation has."""
    up, down = factors(parts, 4)
    generator = torch.Generator().manual_seed(9)
    s_Pqr = torch.randn(parts, 4, 2, generator=generator, dtype=torch.float64)
    t_Prq = torch.randn(parts, 2, 4, generator=generator, dtype=torch.float64)
    new_up = (up.detach().unflatten(0, (parts, -1)) @ s_Pqr).flatten(0, 1)
    new_down = (t_Prq @ down.detach().unflatten(0, (parts, -1))).flatten(0, 1)
    at_weight, at_factors = gradients_through(up, down, parts)
    optimizer = trained("adamw", [up, down], at_factors)
    state_up, state_down = carried(optimizer, Projection(up, down, t_Prq.mT, s_Pqr.mT), restart=False)
    through = [
        [
            (g.unflatten(0, (parts, -1)) @ new_down.unflatten(0, (parts, -1)).mT).flatten(0, 1),
            (new_up.unflatten(0, (parts, -1)).mT @ g.unflatten(0, (parts, -1))).flatten(0, 1),
        ]
        for (g,) in at_weight
    ]
    pair = [torch.nn.Parameter(new_up), torch.nn.Parameter(new_down)]
    expected = trained("adamw", pair, through)
    for parameter, state in zip(pair, (state_up, state_down), strict=True):
        torch.testing.assert_close(state["exp_avg"], expected.state[parameter]["exp_avg"])


def test_squares_are_carried_over_as_of_independent_entries():
    up, down = factors(1)
    weight = torch.nn.Parameter(product(up, down))
    optimizer = trained("adamw", [weight], [[torch.ones_like(weight)]])
    squares = optimizer.state[weight]["exp_avg_sq"] = torch.rand(R, C, dtype=torch.float64)
    state_up, state_down = carried(optimizer, Projection(weight, weight, down[None].mT, up[None].mT), restart=False)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(200_000, R, C, generator=generator) * squares.sqrt().float()
    found_up = (drawn @ down.detach().float().mT).square().mean(0)
    found_down = (up.detach().float().mT @ drawn).square().mean(0)
    torch.testing.assert_close(state_up["exp_avg_sq"].float(), found_up, rtol=0.03, atol=0.0)
    torch.testing.assert_close(state_down["exp_avg_sq"].float(), found_down, rtol=0.03, atol=0.0)


@pytest.mark.parametrize(("name", "begins"), [("adamw", True), ("nadam", True), ("lion", False), ("sgd", False)])
def test_what_keeps_squares_can_begin_anew(name, begins):
    up, down = factors(1)
    at_weight, _ = gradients_through(up, down, 1)
    weight = torch.nn.Parameter(product(up, down))
    optimizer = trained(name, [weight], at_weight)
    projection = Projection(weight, weight, down[None].mT, up[None].mT)
    carried_over = carried(optimizer, projection, restart=False)
    for state, kept in zip(carried(optimizer, projection, restart=True), carried_over, strict=True):
        for key, value in state.items():
            first = {"mu_product": 1.0}.get(key, 0.0)
            assert bool((value == first).all()) is begins, key
        if not begins:
            torch.testing.assert_close(state, kept)
    assert float(optimizer.state[weight].get("step", torch.tensor(6.0))) == 6


@pytest.mark.parametrize("name", ["adamw", "sgd", "nesterov", "lion", "lamb", "muon", "adam"])
def test_a_step_that_is_tried_is_the_optimizers_and_changes_nothing(name):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(R, C))
    gradient = torch.randn(R, C)
    more = {"max_grad_norm": None, "decay": 0.05} if name == "lamb" else {}
    optimizer = trained(name, [weight], [[gradient]] * 40, **more)
    group, state = optimizer.param_groups[0], optimizer.state[weight]
    kept = {key: torch.as_tensor(value).clone() for key, value in state.items()}
    before = weight.detach().clone()
    (tried,) = steps(optimizer, [(weight, state, group)])
    assert torch.equal(weight, before)
    assert all(torch.equal(torch.as_tensor(state[key]), value) for key, value in kept.items())
    group["weight_decay"] = 1e-12 if name == "lamb" else 0.0  # LAMB asks whether there is any
    weight.grad = gradient  # the average by now, so the next step leaves it
    optimizer.step()
    moved = (weight.detach() - before) / group["lr"]
    assert tried is not None
    assert float((tried - moved).norm() / moved.norm()) < 0.03


@pytest.mark.parametrize("name", ["adafactor", "adan", "kron", "madgrad", "adamuon", "lookahead_laprop", "rmsproptf"])
def test_optimizers_without_a_rule_are_refused_by_name_before_they_have_made_a_step(name):
    optimizer = optimizer_of(name, torch.nn.Parameter(torch.randn(R, C)))
    with pytest.raises(UserError, match="cannot be carried over to factors") as raised:
        check_can_switch(optimizer)
    text = str(raised.value)
    assert any(one in text.lower() for one in (name, name.removeprefix("lookahead_"), "rmsprop"))
    for able in ("adamw", "lion", "muon", "sgd"):
        assert f" {able}," in text
    assert " adafactor," not in text


def test_every_optimizer_that_is_said_to_have_a_rule_has_one_for_all_that_it_keeps():
    with pytest.raises(UserError) as raised:
        check_can_switch(optimizer_of("adafactor", torch.nn.Parameter(torch.randn(R, C))))
    names = str(raised.value).partition("--opt: ")[2].partition(";")[0].split(", ")
    assert len(names) > 10
    for name in names:
        weight = torch.nn.Parameter(torch.randn(R, C))
        optimizer = trained(name, [weight], [[torch.randn(R, C)]] * 2)
        check_can_switch(optimizer)
        up, down = torch.randn(1, R, RANK).double(), torch.randn(1, RANK, C).double()
        for state in carried(optimizer, Projection(weight, weight, down.mT, up.mT), restart=False):
            assert state.keys() == optimizer.state[weight].keys(), name


def test_what_no_rule_names_is_refused():
    weight = torch.nn.Parameter(torch.randn(R, C))
    optimizer = trained("adamw", [weight], [[torch.randn(R, C)]])
    optimizer.state[weight]["curvature"] = torch.zeros(R, C)
    projection = Projection(weight, weight, torch.zeros(1, C, 2).double(), torch.zeros(1, 2, R).double())
    with pytest.raises(UserError, match="AdamW keeps `curvature` of a weight"):
        carried(optimizer, projection, restart=False)
