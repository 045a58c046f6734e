"""Gradients averaged over ranks: by one that joins alone they have the bits of one that has no others; and the cost."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.config.flags import parse
from lowrank_vit.data.batch import Batch
from lowrank_vit.model.optimizer import create_optimizer
from lowrank_vit.ranks.joining import joined
from lowrank_vit.ranks.world import World, collectives_begun
from lowrank_vit.training.step import TrainStep
from tests.unit.training.test_step import NUM_CLASSES, OPTIONS, batches, small_vit

CPU = torch.device("cpu")
UPDATES = 4


@pytest.fixture
def alone() -> Generator[World]:
    with joined(World(joins_alone=True), CPU) as world:
        yield world
    assert not dist.is_initialized()


def made(argv: str, world: World, device: torch.device) -> tuple[torch.nn.Module, TrainStep, list[Batch]]:
    """A model, its step, and the batches of some updates, all on one device."""
    model = small_vit().to(device)
    config = parse([*OPTIONS.split(), "--device", device.type, *argv.split()])
    augment = Augment((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), NUM_CLASSES, config.augment.smoothing).to(device)
    step = TrainStep(config, model, augment, create_optimizer(config.optim, model, 1e-2), None, world)
    of_updates = [
        replace(batch, images=batch.images.to(device), targets=batch.targets.to(device))
        for batch in batches(UPDATES * config.optim.grad_accum_steps)
    ]
    return model, step, of_updates


def train(
    argv: str, world: World, *, device: torch.device = CPU, keeps_grads: bool = False
) -> tuple[list[torch.Tensor], list[int]]:
    """The weights after each update, and how many collectives each batch has begun."""
    model, step, of_updates = made(argv, world, device)
    if keeps_grads:
        step.keep_grads()
    weights, collectives = [], []
    for batch in of_updates:
        before = collectives_begun()
        if step(batch):
            weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        collectives.append(collectives_begun() - before)
    return weights, collectives


WAYS = ("", "--grad-accum-steps 2", "--clip-grad 0.05", "--clip-grad 0.001 --clip-mode agc --grad-accum-steps 3")


@pytest.mark.parametrize("keeps_grads", [False, True])
@pytest.mark.parametrize("argv", WAYS)
def test_a_rank_that_joins_alone_has_the_same_bits(alone, argv, keeps_grads):
    """Also where gradients stay where they are from update to update, as those of CUDA graphs do."""
    expected, _ = train(argv, World())
    found, _ = train(argv, alone, keeps_grads=keeps_grads)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_with_the_wrapper_it_has_the_same_bits(alone, monkeypatch):
    """The step is captured with the wrapper, whose hooks average; its operations run one by one here."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, mode: compile(module, backend="eager"))
    expected, _ = train("--grad-accum-steps 2", World())
    found, _ = train("--compile --grad-accum-steps 2", alone)
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_ranks_talk_once_for_a_bucket_and_in_the_last_batch_of_an_update(alone):
    check_collectives(alone, CPU)


def check_collectives(alone: World, device: torch.device) -> None:
    """Of so small a model there is one bucket. After the first update its order is told, once."""
    _, collectives = train("--grad-accum-steps 3", alone, device=device)
    assert [number for n, number in enumerate(collectives) if n != 3] == [0, 0, 1, 0, 1] + [0, 0, 1] * (UPDATES - 2)


def test_gradients_are_views_of_the_buckets_that_travel(alone):
    check_views(alone, CPU)


def check_views(alone: World, device: torch.device) -> None:
    """So nothing is copied back; and where they are kept, they are added up there."""
    model, step, of_updates = made("--grad-accum-steps 2", alone, device)
    step.keep_grads()
    for batch in of_updates[:4]:
        step(batch)
    storages = {p: p.grad.untyped_storage().data_ptr() for p in model.parameters()}  # type: ignore[union-attr]
    assert len(set(storages.values())) == 1
    for batch in of_updates[4:]:
        step(batch)
        assert {p: p.grad.untyped_storage().data_ptr() for p in model.parameters()} == storages  # type: ignore[union-attr]
