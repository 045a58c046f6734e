"""A step after layers have become factors: ranks that share gradients, kept gradients, one compilation a switch."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter

from lowrank_vit.ranks.joining import joined
from lowrank_vit.ranks.world import World, collectives_begun
from tests.forked import Forked
from tests.unit.lowrank.switching.trained import ALL, same, training
from tests.unit.training.test_step import NUM_CLASSES

CPU = torch.device("cpu")


def small_model() -> torch.nn.Module:
    """Compiled in a moment; its layer "3" is factorised."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(768, 24), torch.nn.ReLU(), torch.nn.Linear(24, 24), torch.nn.Linear(24, NUM_CLASSES)
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)


def test_a_compiled_step_is_compiled_once_for_each_of_ten_switches(monkeypatch):
    """Torch would run it uncompiled from the eighth version of the same code on, without a word."""
    compile, counter = torch.compile, CompileCounter()
    monkeypatch.setattr(torch, "compile", lambda module, mode: compile(module, backend=counter))
    torch._dynamo.reset()
    run = training("--compile", updates=2, model=small_model())
    counts = [counter.frame_count]
    for rank in range(11, 1, -1):
        run.switch({"3": rank})
        run.go_on(2)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts == list(range(1, 12))


def test_kept_gradients_and_the_scale_of_float16_go_on():
    run, other = training("--grad-accum-steps 2", updates=0), training("--grad-accum-steps 2", updates=0)
    run.step.keep_grads()
    for one in (run, other):
        one.go_on(8)
        one.switch()
    assert all(p.grad is not None and not p.grad.any() for p in run.model.parameters())
    kept = {name: p.grad for name, p in run.model.named_parameters()}
    scaler = run.step._scaler
    for one in (run, other):
        one.go_on(8)
    assert all(p.grad is kept[name] for name, p in run.model.named_parameters())
    assert run.step._scaler is scaler
    assert same(run.everything(), other.everything())


def test_a_step_in_float16_that_overflows_leaves_factors_as_they_are():
    run = training("--amp --amp-dtype float16 --weight-decay 0.5 --opt momentum", updates=3)
    run.switch({ALL[0]: 4}, decay="product")
    before = run.everything()["weights"]
    run.step._scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    run.go_on(1)
    assert same(run.everything()["weights"], before)
    run.step._scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    run.go_on(1)
    assert not same(run.everything()["weights"], before)


@pytest.mark.parametrize("argv", ["", "--grad-accum-steps 2", "--compile"])
def test_a_rank_that_joins_alone_has_the_same_bits_and_one_wrapper(argv, monkeypatch):
    """The wrapper before is gone with its hooks: what is told for an update is told once."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, mode: compile(module, backend="eager"))
    expected = training(argv, updates=4, model=small_model())
    expected.switch({"3": 5})
    expected.go_on(8)
    with joined(World(joins_alone=True), CPU) as world:
        run = training(argv, updates=4, world=world, model=small_model())
        run.switch({"3": 5})
        run.go_on(4)
        before = collectives_begun()
        run.go_on(4)
        counted = collectives_begun() - before
    torch._dynamo.reset()
    assert not dist.is_initialized()
    assert same(run.everything(), expected.everything())
    assert counted == (2 if "accum" in argv else 4)


def rank(folder: Path, number: int) -> None:
    """One of two ranks: a switch, then as many updates as before, and the weights to a file."""
    try:
        store = dist.FileStore(str(folder / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=number, world_size=2)
        run = training("", updates=4, world=World(number, size=2))
        torch.manual_seed(number)
        run.switch(world=World(number, size=2))
        run.go_on(4)
        found = run.everything()
        torch.save([found[part] for part in ("weights", "ema", "state")], folder / f"{number}.pt")
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def test_two_ranks_switch_together_and_stay_the_same(tmp_path):
    processes = [Forked(rank, tmp_path, number) for number in range(2)]
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))
    assert same(first, second)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have; sums of several threads are rounded otherwise
    alone = training(updates=4)
    alone.switch()
    alone.go_on(4)
    torch.set_num_threads(threads)
    # Both ranks have had its batches, so their mean is its gradient.
    assert same(first[0], alone.everything()["weights"])
