"""Parameter groups and schedules after a switch: those of an optimizer made for the factors, but for their scales."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.switching.groups import (
    KEY,
    WARM_UPDATES,
    decay_product,
    decay_products,
    regroup,
    step_of_factors,
)
from lowrank_vit.model.low_rank import product
from lowrank_vit.model.optimizer import create_optimizer, create_scheduler
from tests.unit.lowrank.switching.trained import ALL, LR, UPDATES_PER_EPOCH, Training, training

SCHEDULES = [
    "--sched cosine --warmup-epochs 4 --warmup-lr 1e-5",
    "--sched cosine --warmup-epochs 4 --sched-on-updates --layer-decay 0.75",
    "--sched step --decay-epochs 3 --sched-on-updates",
    "--sched multistep --decay-milestones 3 5",
    "--sched poly --warmup-epochs 3 --warmup-prefix",
    "--sched tanh --warmup-epochs 5 --lr-noise 0.1 0.9",
    "--sched none",
]


def fresh(run: Training) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer and a schedule made for the model as it is now."""
    optimizer = create_optimizer(run.config.optim, run.model, LR)
    return optimizer, create_scheduler(run.config.optim, optimizer, UPDATES_PER_EPOCH)[0]


def by_name(run: Training, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The group of each parameter, without its parameters."""
    names = {id(one): name for name, one in run.model.named_parameters()}
    return {
        names[id(one)]: {key: value for key, value in group.items() if key not in ("params", KEY)}
        for group in optimizer.param_groups
        for one in group["params"]
    }


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_after_a_switch_are_those_of_a_schedule_made_for_the_factors_times_their_scale(schedule):
    run = training(schedule, updates=6)
    scales = run.switch().scales
    assert len(set(scales.values())) > 1
    optimizer, scheduler = fresh(run)
    for _ in range(20):
        run.step.position.count_update()
        done = run.step.position.num_updates
        for one in (scheduler, run.scheduler):
            one.step_update(done)
            one.step(done // UPDATES_PER_EPOCH)
        found, expected = by_name(run, run.optimizer), by_name(run, optimizer)
        assert found.keys() == expected.keys()
        for name, group in expected.items():
            layer, _, last = name.rpartition(".")
            scale = scales[layer] if last in ("up", "down") else 1.0
            assert found[name]["lr"] == pytest.approx(group["lr"] * scale, rel=1e-12), name
            assert found[name]["lr"] * found[name]["weight_decay"] == pytest.approx(
                group["lr"] * group["weight_decay"], rel=1e-12
            )
        if schedule != "--sched none":
            assert run.step.lr == max(group["lr"] for group in optimizer.param_groups)


@pytest.mark.parametrize("opt", ["adamw", "lamb", "muon", "lookahead_adamw", "adamc"])
def test_a_run_that_is_resumed_has_the_same_groups_in_the_same_order(opt):
    """Also after a second switch, in which some layers shrink and others become factors, each its own way."""
    run = training(f"--opt {opt} --layer-decay 0.75 --muon-fallback --sched-on-updates", updates=5)
    before = list(run.optimizer.param_groups)
    run.switch(dict.fromkeys(ALL[:5], 7), moments="restart")
    assert all(old is new for old, new in zip(before, run.optimizer.param_groups, strict=False))
    run.go_on(4)
    run.switch({ALL[1]: 4, ALL[5]: 6, ALL[6]: 5}, moments="carry", decay="product")
    run.go_on(3)
    saved = copy.deepcopy(run.optimizer.state_dict())
    optimizer, scheduler = fresh(run)
    regroup(optimizer, scheduler, run.model, saved["param_groups"])
    optimizer.load_state_dict(saved)
    assert [g["params"] for g in optimizer.param_groups] == [g["params"] for g in run.optimizer.param_groups]
    for values in ("base_values", "warmup_steps"):
        assert getattr(scheduler, values) == getattr(run.scheduler, values)
    scheduler.step_update(40)
    run.scheduler.step_update(40)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in run.optimizer.param_groups]
    own = [group[KEY] for group in run.optimizer.param_groups if KEY in group]
    assert sorted(name for about in own for name in about["layers"]) == sorted(ALL[:7])
    assert {about["decay"] for about in own} == {"factors", "product"}


@pytest.mark.parametrize(
    "about",
    [
        None,
        {},
        {"layers": ["blocks.0.attn.qkv"]},
        {"of": 0, "scale": float("nan"), "decay": "factors", "warm_from": -1, "layers": ["blocks.0.attn.qkv"]},
        {"of": 0, "scale": 1.0, "decay": "some", "warm_from": -1, "layers": ["blocks.0.attn.qkv"]},
        {"of": 9, "scale": 1.0, "decay": "factors", "warm_from": -1, "layers": ["blocks.0.attn.qkv"]},
        {"of": 0, "scale": 1.0, "decay": "factors", "warm_from": -1, "layers": ["head"]},
        {"of": 0, "scale": 1.0, "decay": "factors", "warm_from": -1, "layers": 5},
    ],
)
def test_damaged_groups_are_told(about):
    run = training(updates=1)
    run.switch({ALL[0]: 4})
    optimizer, scheduler = fresh(run)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError, match="group"):
        regroup(optimizer, scheduler, run.model, [*optimizer.param_groups, {"params": [], KEY: about}])
    assert optimizer.state_dict() == before


def test_groups_without_factors_stay_as_they_are():
    run = training(updates=1)
    optimizer, scheduler = fresh(run)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    regroup(optimizer, scheduler, run.model, [*before, "rubbish"])
    assert optimizer.state_dict()["param_groups"] == before


def test_layers_with_the_same_scale_share_a_group_so_that_a_step_has_few():
    run = training()
    scales = run.switch().scales
    own = [group for group in run.optimizer.param_groups if KEY in group]
    assert len(own) == len(set(scales.values()))
    assert [group["params"] for group in run.optimizer.param_groups if KEY not in group][1]  # embeddings, head


def test_factors_that_begin_anew_warm_up_and_the_schedule_goes_on():
    run = training("--sched-on-updates", updates=5)
    run.switch({ALL[0]: 4}, moments="restart")
    (group,) = (group for group in run.optimizer.param_groups if KEY in group)
    rate = group["lr"]
    seen = []
    for done in range(5, 5 + WARM_UPDATES + 2):
        with step_of_factors(run.optimizer, done):
            seen.append(group["lr"] / rate)
        assert group["lr"] == rate
    assert seen == pytest.approx([min(1.0, (n + 1) / WARM_UPDATES) for n in range(WARM_UPDATES + 2)])
    run.go_on(1)
    assert group["lr"] / group["lr_scale"] == pytest.approx(run.step.lr)


@pytest.mark.parametrize("parts", [1, 2])
def test_decay_of_the_product_is_the_gradient_of_its_norm(parts):
    torch.manual_seed(0)
    factors = [torch.nn.Parameter(torch.randn(10, 3)), torch.nn.Parameter(torch.randn(3 * parts, 8))]
    up, down = (one.detach().clone().requires_grad_() for one in factors)
    whole = (up.unflatten(0, (parts, -1)) @ down.unflatten(0, (parts, -1))).flatten(0, 1)
    (0.5 * whole.square().sum()).backward()
    decay_products(factors, 0.01)
    for found, before in zip(factors, (up, down), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(found.detach(), before.detach() - 0.01 * before.grad)


def test_decay_of_the_product_has_the_strength_that_the_weight_had_whatever_the_scale():
    run = training("--weight-decay 0.3")
    scales = run.switch(decay="product").scales
    name = next(name for name, scale in scales.items() if scale != 1)
    layer, lr = run.model.get_submodule(name), run.step.lr
    before, expected = product(layer.up, layer.down), [layer.up.detach().clone(), layer.down.detach().clone()]
    decay_products(expected, lr * 0.3)
    with step_of_factors(run.optimizer, run.step.position.num_updates):
        pass
    torch.testing.assert_close(product(layer.up, layer.down), product(*expected))
    assert float((product(layer.up, layer.down) - before).norm()) > 0
    (group,) = (group for group in run.optimizer.param_groups if name in group.get(KEY, {}).get("layers", ()))
    assert group["weight_decay"] == 0


def test_factors_that_a_run_begins_with_can_have_the_decay_of_their_product():
    """They have no scale, and a run that is resumed finds the same groups."""
    run = training(updates=3)
    run.switch()  # a model in factors, for an optimizer made for it
    optimizer, scheduler = fresh(run)
    decay_product(optimizer, scheduler, run.model)
    (group,) = (group for group in optimizer.param_groups if KEY in group)
    assert group[KEY]["layers"] == ALL
    assert (group["lr"], group["weight_decay"]) == (optimizer.param_groups[1]["lr"], 0)
    again, schedule_again = fresh(run)
    regroup(again, schedule_again, run.model, optimizer.state_dict()["param_groups"])
    assert again.state_dict() == optimizer.state_dict()
    assert schedule_again.base_values == scheduler.base_values
    layer = run.model.get_submodule(ALL[0])
    before, strength = layer.up.detach().clone(), group["lr"] * optimizer.param_groups[1]["weight_decay"]
    decay_products(expected := [layer.up.detach().clone(), layer.down.detach().clone()], strength)
    with step_of_factors(optimizer, 0):
        pass
    assert torch.equal(layer.up, expected[0])
    assert not torch.equal(layer.up, before)


def test_the_host_reads_no_number_in_the_step_of_factors():
    """Tensors without values stand for a device's: reading one would be an error."""
    factors = [
        torch.nn.Parameter(torch.empty(10, 3, device="meta")),
        torch.nn.Parameter(torch.empty(3, 8, device="meta")),
    ]
    decay_products(factors, 0.1, torch.zeros((), device="meta"))
    values = [torch.ones(10, 3), torch.ones(3, 8)]
    decay_products(values, 0.1, torch.ones(()))
    assert all(bool((one == 1).all()) for one in values)  # of a step that is skipped
    decay_products(values, 0.1, torch.zeros(()))
    assert not any(bool((one == 1).any()) for one in values)
