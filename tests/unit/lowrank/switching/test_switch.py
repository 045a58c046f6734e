"""The switch of a training: the model's answers, steps of the product, the EMA, the bias, and all or nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.switching.factors import NewFactors, make_factors, weight_of
from lowrank_vit.lowrank.switching.groups import KEY, regroup
from lowrank_vit.lowrank.switching.switch import prepare, work_out
from lowrank_vit.model.low_rank import LowRankLinear, product, ranks_of
from lowrank_vit.model.optimizer import create_optimizer, create_scheduler
from lowrank_vit.training.step import TrainStep
from tests.unit.lowrank.switching.test_factors import moments
from tests.unit.lowrank.switching.trained import ALL, LR, UPDATES_PER_EPOCH, Training, same, switch, training

NAME = "blocks.1.mlp.fc1"


def weights(model: torch.nn.Module, names: list[str] = ALL) -> dict[str, torch.Tensor]:
    return {name: weight_of(model.get_submodule(name)) for name in names}


def speeds_of(run: Training, count: int) -> dict[str, float]:
    """|dW| / |W| of each layer, the mean over some updates."""
    speeds = dict.fromkeys(ALL, 0.0)
    for _ in range(count):
        before = weights(run.model)
        run.go_on(1)
        for name, now in weights(run.model).items():
            speeds[name] += float((now - before[name]).norm() / before[name].norm()) / count
    return speeds


def test_layers_become_factors_and_nothing_else_changes():
    run = training()
    before, old = run.everything(), run.model.get_submodule(NAME)
    truncated = {name: make_factors(run.model, {name: 6})[name] for name in ALL[:5]}
    made = run.switch(dict.fromkeys(ALL[:5], 6))
    after = run.everything()
    assert ranks_of(run.model) == ranks_of(run.ema.module) == dict.fromkeys(ALL[:5], 6)
    for name, new in truncated.items():
        layer = run.model.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        assert torch.equal(layer.up, new.up)
        assert torch.equal(layer.down, new.down)
        assert layer.training
        assert not run.ema.module.get_submodule(name).training
        assert 0 < made.layers[name].error < made.layers[name].ema_error < 1
    for part in ("weights", "ema", "state"):
        kept = before[part].keys() & after[part].keys()
        assert len(kept) == len(before[part]) - 5
        assert all(same(after[part][name], before[part][name]) for name in kept)
    assert run.model.get_submodule(NAME) is old
    names = [name for group in after["groups"] for name in group["params"]]
    assert sorted(names) == sorted(name for name, _ in run.model.named_parameters())
    assert len(run.optimizer.state) == len(names)


def test_a_bias_that_makes_up_for_the_mean_input_does_so_in_the_average_too():
    run = training()
    known = {NAME: moments(96, 24)}
    mean, average = known[NAME].mean_C, run.ema.module.get_submodule(NAME)
    before, of_average = weights(run.model)[NAME], weights(run.ema.module)[NAME]
    bias, bias_of_average = run.model.get_submodule(NAME).bias, average.bias
    values = bias.detach().double(), bias_of_average.detach().double()
    state = copy.deepcopy(run.optimizer.state[bias])
    factors = make_factors(run.model, {NAME: 6}, "kfac", known)
    switch(run.model, run.ema.module, run.optimizer, run.scheduler, factors)
    for model, kept, weight, value in (
        (run.model, bias, before, values[0]),
        (run.ema.module, bias_of_average, of_average, values[1]),
    ):
        layer = model.get_submodule(NAME)
        assert layer.bias is kept
        answer = weight_of(layer) @ mean + layer.bias.detach().double()
        torch.testing.assert_close(answer, weight @ mean + value, rtol=1e-5, atol=1e-5)
    assert same(dict(run.optimizer.state[bias]), state)


@pytest.mark.parametrize(
    ("opt", "moments"),
    [(opt, "carry") for opt in ("adamw", "sgd", "lion", "nadamw", "lamb", "muon")] + [("adamw", "restart")],
)
def test_the_product_moves_as_fast_as_the_weight_did(opt, moments):
    """|d(A B)| / |A B| within 2 of |dW| / |W|, by the scale, and as measured in the updates that follow.

    It is compared with the weights of a run without a switch, in the same updates. A warm-up is slower first.
    """
    run, other = (training(f"--opt {opt}", updates=20) for _ in range(2))
    made = run.switch(moments=moments)
    if moments == "restart":
        run.go_on(20)
        other.go_on(20)
    speeds = [speeds_of(one, 8) for one in (run, other)]
    for name in ALL:
        one = made.layers[name]
        assert 0.5 < one.rate_after / one.rate_before < 2
        assert 0.5 < speeds[0][name] / speeds[1][name] < 2, name
    assert made.numbers()[f"{NAME}/rank"] == 6


@pytest.mark.parametrize(
    ("moments", "rank", "after", "limit"),
    [("carry", 6, 0, 0.71), ("restart", 3, 10, 0.6)],  # without looking ahead 0.65 and 0.45, with it 0.77 and 0.77
)
def test_scales_look_ahead_to_later_updates(moments: Any, rank: int, after: int, limit: float) -> None:
    """The slowest layer's |d(A B)| / |A B|, over ten updates, beside |dW| / |W| of a run without a switch."""
    run, other = training(updates=20), training(updates=20)
    run.switch(dict.fromkeys(ALL, rank), moments=moments)
    for one in (run, other):
        one.go_on(after)
    speeds, usual = (speeds_of(one, 10) for one in (run, other))
    assert limit < min(speeds[name] / usual[name] for name in ALL)


def test_the_average_follows_the_products_average_for_ten_updates():
    run = training(updates=12)
    run.switch(dict.fromkeys(ALL, 8))
    true = weights(run.ema.module)
    for _ in range(10):
        run.go_on(1)
        for name, now in weights(run.model).items():
            true[name].lerp_(now, 0.1)
    for name, found in weights(run.ema.module).items():
        assert float((found - true[name]).norm() / true[name].norm()) < 0.01


@pytest.mark.parametrize("opt", ["adamw", "momentum"])
def test_factors_shrink_and_their_averages_stay_those_of_the_gradient(opt):
    """What the optimizer keeps is projected once more: as if the layer had gone to the smaller rank at once."""
    run, at_once = training(f"--opt {opt}"), training(f"--opt {opt}")
    run.switch(dict.fromkeys(ALL, 8))
    run.switch({NAME: 3})
    at_once.switch({**dict.fromkeys(ALL, 8), NAME: 3})
    layer, other = run.model.get_submodule(NAME), at_once.model.get_submodule(NAME)
    torch.testing.assert_close(product(layer.up, layer.down), product(other.up, other.down), rtol=1e-4, atol=1e-6)
    key = "exp_avg" if opt == "adamw" else "momentum_buffer"
    m_up, m_down = (run.optimizer.state[one][key] for one in (layer.up, layer.down))
    n_up, n_down = (at_once.optimizer.state[one][key] for one in (other.up, other.down))
    torch.testing.assert_close(m_up @ layer.down, n_up @ other.down, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(layer.up @ m_down, other.up @ n_down, rtol=1e-3, atol=1e-7)
    run.go_on(3)


def test_a_layer_that_does_not_train_becomes_factors_that_do_not():
    run = training("--layer-decay 0.5 --layer-decay-no-opt-scale 0.3")
    assert not run.model.get_submodule(ALL[0]).weight.requires_grad
    made = run.switch(dict.fromkeys(ALL, 4))
    layer = run.model.get_submodule(ALL[0])
    assert not layer.up.requires_grad
    assert not layer.bias.requires_grad
    assert made.scales[ALL[0]] == 1
    run.go_on(2)
    assert layer.up.grad is None


def test_before_the_first_update_there_is_nothing_to_carry_over():
    run = training(updates=0)
    made = run.switch()
    assert set(made.scales.values()) == {1.0}
    assert f"{NAME}/rate_before" not in made.numbers()
    run.go_on(2)


def test_a_training_without_an_average_switches_too():
    run, other = training(), training()
    factors = make_factors(run.model, dict.fromkeys(ALL, 6))
    made = switch(run.model, None, run.optimizer, run.scheduler, factors)
    other.switch()
    assert same(run.everything()["state"], other.everything()["state"])
    assert f"{NAME}/ema_error" not in made.numbers()


def test_lookaheads_slow_weights_are_in_the_gauge_of_the_factors():
    run = training("--opt lookahead_adamw --weight-decay 0", updates=12)
    slow = run.optimizer._base_optimizer.state[run.model.get_submodule(NAME).weight]["lookahead_slow_buff"].double()
    run.switch({NAME: 10})
    layer = run.model.get_submodule(NAME)
    up, down = (run.optimizer._base_optimizer.state[one]["lookahead_slow_buff"] for one in (layer.up, layer.down))
    u, s, v = torch.linalg.svd(slow, full_matrices=False)
    nearest = (u[:, :10] * s[:10]) @ v[:10]
    assert float((product(up, down) - nearest).norm() / nearest.norm()) < 0.1
    assert float((up - layer.up.detach()).norm() / layer.up.detach().norm()) < 0.2
    run.go_on(8)


def spoiled(kind: str) -> tuple[Training, dict[str, NewFactors]]:
    """A training and factors that cannot be used, after ones that can."""
    run = training("--opt adafactor" if kind == "optimizer" else "")
    if kind == "grows":
        run.switch({NAME: 3})
    factors = make_factors(run.model, {name: 4 for name in ALL if name != NAME})
    bad = factors.pop(ALL[-1])
    if kind in ("nan", "no bias", "shape"):
        changes = {"nan": {"up": bad.up * float("nan")}, "no bias": {"bias": None}, "shape": {"down": bad.down[:, :5]}}
        factors[ALL[-1]] = bad._replace(**changes[kind])
    elif kind == "grows":
        factors[NAME] = make_factors(training().model, {NAME: 5})[NAME]
    elif kind == "no gain":
        factors[NAME] = make_factors(run.model, {NAME: 20})[NAME]
    elif kind == "class":
        factors["norm"] = bad
    elif kind == "name":
        factors["blocks.7.mlp.fc1"] = bad
    elif kind == "tied":
        run.model.get_submodule(ALL[0]).weight = run.model.get_submodule("blocks.1.attn.qkv").weight
        run.optimizer.param_groups[1]["params"].pop(0)  # of the weight that is gone
    elif kind == "weight":
        with torch.no_grad():
            run.model.get_submodule(ALL[4]).weight[0, 0] = float("inf")
    elif kind == "average":
        run.ema.requires_grad_(False)
        run.ema.module.get_submodule(ALL[4]).weight[0, 0] = float("inf")
    elif kind == "state":
        run.optimizer.state[run.model.get_submodule("blocks.1.attn.proj").weight]["exp_avg"][0, 0] = float("nan")
    elif kind == "unknown state":
        weight = run.model.get_submodule("blocks.1.attn.proj").weight
        run.optimizer.state[weight]["hessian"] = torch.zeros_like(weight)
    elif kind == "not trained":
        for group in run.optimizer.param_groups:
            group["params"] = [one for one in group["params"] if one is not run.model.get_submodule(ALL[0]).weight]
    return run, factors


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("optimizer", "Adafactor keeps"),
        ("nan", "fc2 has weights or factors with a NaN"),
        ("no bias", "must have a bias"),
        ("shape", "do not match"),
        ("grows", "has rank 3 already; it can only shrink, not go to 5"),
        ("no gain", "factors of rank 20 have at least as many weights"),
        ("class", "norm is of class LayerNorm"),
        ("name", "blocks.7.mlp.fc1 is not there"),
        ("tied", "shares its weight with another layer"),
        ("weight", "qkv has weights or factors with a NaN or an infinity"),
        ("average", "qkv: the optimizer's state or the EMA's weights hold a NaN"),
        ("state", "proj: the optimizer's state"),
        ("unknown state", "AdamW keeps `hessian` of a weight"),
        ("not trained", "is not among the optimizer's parameters"),
    ],
)
def test_what_cannot_be_switched_is_told_and_nothing_has_changed(kind, message):
    run, factors = spoiled(kind)
    before = run.everything()
    modules = dict(run.model.named_modules())
    with pytest.raises(UserError, match=message):
        switch(run.model, run.ema.module, run.optimizer, run.scheduler, factors)
    after = run.everything()
    for part, value in before.items():
        if kind not in ("average", "state", "weight"):  # a NaN is not equal to itself
            assert same(after[part], value), part
    assert dict(run.model.named_modules()) == modules


def test_every_rank_takes_the_numbers_of_the_first():
    """Whatever its own arithmetic gives: what was worked out on one is all that another needs."""
    first, other = training(), training()
    factors = make_factors(first.model, {NAME: 6})
    made = work_out(first.model, first.ema.module, first.optimizer, factors)
    with torch.no_grad():
        other.model.get_submodule(NAME).weight.mul_(1.01)
    for one in (first, other):
        prepare(one.model, one.ema.module, one.optimizer, one.scheduler, made).put()
    assert same(first.everything(), other.everything())


@pytest.mark.parametrize(
    ("opt", "more"),
    [
        ("adamw", "carry factors"),
        ("adamw", "restart product"),
        ("lamb", "restart product"),
        ("lookahead_adamw", "carry product"),
    ],
)
def test_a_run_that_is_resumed_after_a_switch_has_the_same_bits(opt, more):
    moments, decay = more.split()
    argv = f"--opt {opt} --layer-decay 0.75 --sched-on-updates --drop-path 0.1"
    run = training(argv, updates=6)
    run.switch(dict.fromkeys(ALL[:6], 5), moments=moments, decay=decay)
    run.go_on(4)
    saved = copy.deepcopy([run.optimizer.state_dict(), run.step.state_dict()])
    model, ema = copy.deepcopy(run.model), copy.deepcopy(run.ema)
    optimizer = create_optimizer(run.config.optim, model, LR)
    scheduler, _ = create_scheduler(run.config.optim, optimizer, UPDATES_PER_EPOCH)
    step = TrainStep(run.config, model, run.step._augment, optimizer, ema)
    step.position.num_updates = run.step.position.num_updates
    again = Training(run.config, model, ema, optimizer, scheduler, step, list(run.batches))
    regroup(optimizer, scheduler, model, saved[0]["param_groups"])
    optimizer.load_state_dict(saved[0])
    step.load_state_dict(saved[1])
    scheduler.step_update(step.position.num_updates)
    run.go_on(6)
    again.go_on(6)
    assert same(again.everything(), run.everything())
    assert any(KEY in group for group in optimizer.param_groups)
