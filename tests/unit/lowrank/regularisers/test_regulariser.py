"""Regularisers of the loss do in an update what is said, of weights and of factors, on all ranks and after a resume."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.lowrank.layers import factorise
from lowrank_vit.lowrank.regularisers.polar import EDGE
from lowrank_vit.lowrank.regularisers.regulariser import Regulariser
from lowrank_vit.model.low_rank import LowRankLinear, low_rank_layers, product
from lowrank_vit.ranks.world import World
from tests.unit.lowrank.examples import TinyModel
from tests.unit.lowrank.regularisers.test_polar_and_first import exact_polar, stable_rank
from tests.unit.lowrank.switching.trained import ALL, training
from tests.unit.training.test_step import batches, make_step, small_vit

BLOCKS = "--reg-targets fc1,fc2 --device cpu"


def regulariser(argv: str, model: nn.Module, world: World | None = None) -> tuple[Regulariser, torch.optim.SGD]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return Regulariser(parse(f"{BLOCKS} {argv}".split()).lowrank, model, optimizer, world), optimizer


def first_layer(model: TinyModel, block: int) -> Any:
    return model.get_submodule(f"blocks.{block}.fc1")


def factors(model: TinyModel, parts: int) -> None:
    """Factorise the first layer of each block, not balanced."""
    torch.manual_seed(1)
    factorise(
        model,
        {f"blocks.{i}.fc1": (torch.randn(6, 1), 2 * torch.randn(parts, 12), torch.zeros(6)) for i in range(2)},
        anyway=True,
    )


def penalty(model: nn.Module, nuclear: float, rank: float) -> Tensor:
    """What the gradients are said to be those of, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for name, module in model.named_modules():
        if not name.endswith(("fc1", "fc2")):
            continue
        if isinstance(module, LowRankLinear):
            up, down = module.up.double(), module.down.double()
            total = total + nuclear * (up.square().sum() + down.square().sum()) / 2
            for a, b in zip(up.unflatten(0, (module.parts, -1)), down.unflatten(0, (module.parts, -1)), strict=True):
                total = total + rank * stable_rank(a @ b)
        else:
            weight: Any = module.weight
            total = total + nuclear * torch.linalg.svdvals(weight.double()).sum() + rank * stable_rank(weight.double())
    return total


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize(("nuclear", "rank"), [(0.1, 0.0), (0.0, 0.02), (0.1, 0.02)])
def test_penalties_are_taken_from_weights_as_decay_is(parts, nuclear, rank):
    torch.manual_seed(0)
    model = TinyModel()
    if parts:
        factors(model, parts)
    found, _ = regulariser(f"--reg-nuclear {nuclear} --reg-stable-rank {rank}", model)
    expected = {name: one.detach().clone() for name, one in model.named_parameters()}
    own = dict(model.named_parameters())
    penalty(model, nuclear, rank).backward()
    for name, one in own.items():
        if one.grad is not None:
            expected[name] -= 0.5 * one.grad
    found.before_step(0)
    for name, one in own.items():
        torch.testing.assert_close(one.detach(), expected[name], rtol=1e-4, atol=2e-5)
    noted = found.values()
    assert ("nuclear_norm" in noted, "stable_rank" in noted) == (nuclear > 0, rank > 0)
    if rank:
        assert 0 <= noted["stable_rank_error"] < 0.02
        assert noted["stable_rank_left_out"] == 0


def test_coupled_they_are_added_to_the_gradients():
    model = TinyModel()
    found, _ = regulariser("--reg-nuclear 0.1 --reg-coupled", model)
    before = copy.deepcopy(model.state_dict())
    weight = first_layer(model, 0).weight
    weight.grad = torch.ones_like(weight)
    found.before_step(0)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    torch.testing.assert_close(weight.grad, 1 + 0.1 * exact_polar(weight.detach()).float(), rtol=1e-4, atol=1e-5)
    assert first_layer(model, 1).weight.grad is None


def test_gradients_are_kept_between_refreshes_and_follow_the_learning_rate():
    model = TinyModel()
    found, optimizer = regulariser("--reg-nuclear 0.1 --reg-every 3", model)
    weight = first_layer(model, 0).weight
    steps = []
    for update in range(4):
        before = weight.detach().clone()
        found.before_step(update)
        steps.append(before - weight.detach())
        weight.data += torch.randn_like(weight)
        optimizer.param_groups[0]["lr"] /= 2
    torch.testing.assert_close(steps[0], 4 * steps[2], rtol=0, atol=1e-6)
    assert not torch.allclose(steps[2], 2 * steps[3], atol=1e-3)


def test_an_update_that_a_scaler_skips_takes_nothing_from_weights():
    model = TinyModel()
    found, _ = regulariser("--reg-nuclear 0.1 --reg-stable-rank 0.1", model)
    before = copy.deepcopy(model.state_dict())
    found.before_step(0, torch.tensor(1.0))
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    found.before_step(1, torch.tensor(0.0))
    assert not torch.equal(model.state_dict()["blocks.0.fc1.weight"], before["blocks.0.fc1.weight"])


def test_a_matrix_without_a_certificate_is_left_out_and_counted():
    model = TinyModel()
    with torch.no_grad():
        first_layer(model, 0).weight.zero_()
    found, _ = regulariser("--reg-stable-rank 0.1", model)
    other = first_layer(model, 1).weight.detach().clone()
    found.before_step(0)
    assert not first_layer(model, 0).weight.any()
    assert not torch.equal(first_layer(model, 1).weight, other)
    assert found.values()["stable_rank_left_out"] == 1
    assert all(np.isfinite(value) for value in found.values().values())


@pytest.mark.parametrize("parts", [0, 3])
def test_clipping_bounds_weights_and_the_products_of_factors(parts):
    torch.manual_seed(0)
    model = TinyModel()
    if parts:
        factors(model, parts)
    found, _ = regulariser("--spectral-clip 0.4 --reg-every 2", model)
    before = copy.deepcopy(model.state_dict())
    found.before_step(0)
    found.after_step(0)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    found.after_step(1)
    assert found.values()["clipped_values"] > 0
    for name, module in model.named_modules():
        if name.endswith(("fc1", "fc2")):
            weight: Any = module.weight if isinstance(module, nn.Linear) else None
            products = [weight.detach()] if weight is not None else []
            if isinstance(module, LowRankLinear):
                up, down = module.up.detach(), module.down.detach()
                pairs = zip(up.unflatten(0, (parts, -1)), down.unflatten(0, (parts, -1)), strict=True)
                products = [a @ b for a, b in pairs]
            assert all(torch.linalg.matrix_norm(one, 2) < 0.4 * (1 + 2 * EDGE) for one in products)
    assert torch.equal(model.head.weight, before["head.weight"])


class _Side(World):
    """One of two ranks in two threads."""

    def __init__(self, rank: int, shared: list[Tensor], barrier: threading.Barrier) -> None:
        super().__init__(rank=rank, size=2)
        self._shared, self._barrier = shared, barrier

    def sum(self, values: Tensor) -> None:
        self._shared[self.rank] = values.clone()
        self._barrier.wait(60)
        values.copy_(self._shared[0] + self._shared[1])
        self._barrier.wait(60)


def test_ranks_share_the_work_and_have_the_same_bits():
    torch.manual_seed(0)
    argv = "--reg-nuclear 0.1 --reg-stable-rank 0.01 --spectral-clip 0.5 --reg-every 1"
    model = TinyModel()
    alone, models = copy.deepcopy(model), [copy.deepcopy(model) for _ in range(2)]
    shared, barrier = [torch.empty(0)] * 2, threading.Barrier(2)

    def run(one: nn.Module, world: World) -> None:
        found = regulariser(argv, one, world)[0]
        for update in range(2):
            found.before_step(update)
            found.after_step(update)

    threads = [threading.Thread(target=run, args=(one, _Side(i, shared, barrier))) for i, one in enumerate(models)]
    for thread in threads:
        thread.start()
    run(alone, World())
    for thread in threads:
        thread.join()
    for name, one in alone.state_dict().items():
        a, b = (model.state_dict()[name] for model in models)
        assert torch.equal(a, b)
        torch.testing.assert_close(a, one, rtol=1e-5, atol=1e-6)


def test_after_a_switch_it_acts_on_the_factors():
    model = TinyModel()
    found, optimizer = regulariser("--reg-nuclear 0.1 --reg-every 100", model)
    found.before_step(0)
    factors(model, 1)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    found.follow(model, optimizer)
    assert found.state_dict()["kept"].numel() == 0
    layer: Any = first_layer(model, 0)
    before = layer.up.detach().clone()
    found.before_step(1)
    torch.testing.assert_close(layer.up.detach(), before * (1 - 0.5 * 0.1))


def test_a_switch_of_a_training_is_followed_and_balanced_factors_have_the_products_norm():
    """The penalty of the factors is the nuclear norm of the product as long as they are balanced."""
    made = training("--reg-nuclear 0.05 --reg-stable-rank 1e-3 --spectral-clip 3 --reg-every 3", updates=4)
    assert made.step.regulariser is not None
    made.switch()
    products = [product(layer.up, layer.down) for layer in low_rank_layers(made.model).values()]
    assert len(products) == len(ALL)
    made.go_on(1)
    noted = made.step.regulariser.values()
    exact = sum(float(torch.linalg.svdvals(one).sum()) for one in products)
    assert noted["nuclear_norm"] == pytest.approx(exact, rel=1e-4)
    assert noted["stable_rank"] == pytest.approx(
        float(np.mean([float(stable_rank(one)) for one in products])), rel=1e-4
    )
    made.go_on(6)
    assert all(bool(one.isfinite().all()) for one in made.model.state_dict().values())


@pytest.mark.parametrize("weight", [0.0, 1e-30, 1e-42, 1e38, 3e38, float("inf"), float("nan")])
def test_at_the_ends_of_float32_what_is_no_number_is_left_out(weight: float):
    """One matrix of four is filled so; the gradients and the numbers of the others are what they are without it."""
    argv = "--reg-nuclear 0.1 --reg-stable-rank 0.01 --spectral-clip 0.5 --reg-every 1"
    model = TinyModel()
    first_layer(model, 0).weight.data.fill_(weight)
    found, _ = regulariser(argv, model)
    found.before_step(0)
    found.after_step(0)
    noted = found.values()
    assert all(np.isfinite(value) for value in noted.values())
    assert 0 <= noted["clipped_values"] <= 4 * 6
    assert noted["stable_rank_left_out"] <= 1
    assert 1 <= noted["stable_rank"] <= 6
    assert 0 <= noted["stable_rank_error"] <= 0.02
    assert all(bool(one.isfinite().all()) for one in first_layer(model, 1).parameters())
    assert found.state_dict()["counts"].min() >= 0


@pytest.mark.parametrize("weight", [0.0, 1e38, float("nan")])
def test_of_matrices_without_any_certificate_no_stable_rank_is_told(weight: float):
    model = TinyModel()
    for parameter in model.blocks.parameters():
        parameter.data.fill_(weight)
    found, _ = regulariser("--reg-stable-rank 0.01", model)
    found.before_step(0)
    assert found.values() == {"stable_rank_left_out": 4}


@pytest.mark.parametrize("parts", [0, 3])
def test_the_host_reads_no_number_in_an_update(parts):
    """Tensors without values stand for a device's: reading one would be an error."""
    model = TinyModel()
    if parts:
        factors(model, parts)
    found, _ = regulariser(
        "--reg-nuclear 0.1 --reg-stable-rank 0.01 --spectral-clip 0.5 --reg-every 1", model.to("meta")
    )
    for update in range(2):
        found.before_step(update, torch.zeros((), device="meta"))
        found.after_step(update)
    with pytest.raises((RuntimeError, NotImplementedError)):
        found.values()


def test_what_it_does_is_said():
    found, _ = regulariser("--reg-nuclear 0.1 --spectral-clip 2 --reg-coupled", TinyModel())
    expected = "4 matrices regularised every 10 updates: nuclear norm 0.1, coupled; singular values clipped at 2.0"
    assert found.in_words() == expected


def test_frozen_and_unknown_targets_are_refused():
    model = TinyModel()
    with pytest.raises(UserError, match=r"^--reg-targets: 'nothing' matches no"):
        regulariser("--reg-nuclear 0.1 --reg-targets nothing", model)
    of_low_rank = parse("--reg-nuclear 0.1 --lowrank-targets nothing --device cpu".split()).lowrank
    with pytest.raises(UserError, match=r"^--lowrank-targets: 'nothing' matches no"):
        Regulariser(of_low_rank, model, torch.optim.SGD(model.parameters(), lr=0.5))
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="None of the weights that --reg-targets names is trained"):
        regulariser("--reg-nuclear 0.1", model)


def test_without_the_flags_there_is_none_and_losses_keep_their_bits():
    ours, _ = make_step("", small_vit())
    assert ours.regulariser is None
    assert "regulariser" not in ours.state_dict()


@pytest.mark.parametrize("argv", ["--opt adamw", "--opt momentum --reg-coupled --clip-grad 1", "--opt lion"])
@pytest.mark.parametrize("saved_at", [2, 3])
def test_a_resumed_run_has_the_same_bits(argv, saved_at):
    argv = f"{argv} --reg-nuclear 0.05 --reg-stable-rank 0.001 --spectral-clip 1 --reg-every 3"
    model = small_vit()
    step, _ = make_step(argv, model)
    assert step.regulariser is not None
    given = batches(6)
    for batch in given[:saved_at]:
        step(batch)
    saved = copy.deepcopy([model.state_dict(), step._optimizer.state_dict(), step.state_dict()])
    for batch in given[saved_at:]:
        step(batch)
    other = small_vit()
    again, _ = make_step(argv, other)
    other.load_state_dict(saved[0])
    again._optimizer.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    again.position.num_updates = saved_at
    for batch in given[saved_at:]:
        again(batch)
    assert all(torch.equal(one, other.state_dict()[name]) for name, one in model.state_dict().items())


def test_a_state_of_other_targets_is_refused():
    found, _ = regulariser("--reg-nuclear 0.1", TinyModel())
    with pytest.raises(UserError, match="damaged"):
        found.load_state_dict({"kept": torch.zeros(3), "counts": torch.zeros(2, dtype=torch.int64)})
    step, _ = make_step("--reg-nuclear 0.1", small_vit())
    with pytest.raises(UserError, match="lacks the state"):
        step.load_state_dict(make_step("", small_vit())[0].state_dict())


def test_float16_unscales_what_it_is_given_to():
    step, _ = make_step("--amp --amp-dtype float16 --reg-nuclear 0.1 --reg-coupled --lr 1e-3", small_vit())
    step(batches(1)[0])
    step, _ = make_step("--amp --amp-dtype float16 --reg-nuclear 0.1 --lr 1e-3", small_vit())
    for batch in batches(2):
        step(batch)
    assert step.regulariser is not None
    assert step.regulariser.values()["nuclear_norm"] > 0
