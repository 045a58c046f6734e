"""Signals: the first is a wish, which may arrive several times; a later one is an order."""

from __future__ import annotations

import itertools
import os
import signal
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from lowrank_vit.ranks.world import CommonStep, World
from lowrank_vit.training.stop import SAME_REQUEST_S, SIGNALS, Stopped, StopRequest, UntilStopped


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lowrank_vit.training.stop.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish(clock, number):
    world = World()
    before = signal.getsignal(number)
    with StopRequest(world).noted() as stop:
        assert not stop.comes_after(1)
        os.kill(os.getpid(), number)
        assert stop.comes_after(2)
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_the_same_wish_may_come_twice_and_a_later_signal_is_an_order(clock):
    """Ranks get a signal of the terminal, and again from torchrun."""
    world = World()
    with StopRequest(world).noted():
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += SAME_REQUEST_S
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 0.1
        os.kill(os.getpid(), signal.SIGUSR1)  # never an order
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_nohup_has_a_run_go_on_when_its_terminal_is_closed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(World()).noted() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.comes_after(1)
    finally:
        signal.signal(signal.SIGHUP, before)


class Ranks:
    """Two ranks' sums: the other one's numbers are given."""

    def __init__(self, monkeypatch) -> None:
        self.theirs: list[float] = [0.0, 0.0]
        self.calls = 0
        monkeypatch.setattr("torch.distributed.all_reduce", self.all_reduce)

    def all_reduce(self, values: torch.Tensor, operation: object) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        self.calls += 1
        values.copy_(torch.maximum(values, torch.tensor(self.theirs, dtype=values.dtype)))


def test_ranks_agree_about_every_two_seconds_wherever_a_run_goes_on(clock, monkeypatch):
    """A machine that was booted a moment ago, and a run that has many updates behind it."""
    ranks = Ranks(monkeypatch)
    clock[0] = 0.5
    stop = StopRequest(World(size=2))
    clock[0] = 3.0  # all was made ready
    stop.begin(50_000)
    asked = []
    for update in range(50_001, 50_061):
        clock[0] += 0.1
        calls = ranks.calls
        assert not stop.comes_after(update)
        asked += [update] * (ranks.calls - calls)
    assert asked[0] == 50_001
    assert all(19 <= b - a <= 20 for a, b in itertools.pairwise(asked))
    ranks.theirs = [float(signal.SIGTERM), 0.0]
    assert [stop.comes_after(update) for update in range(asked[-1] + 1, asked[-1] + 21)].count(True) == 1
    assert stop.reason == "SIGTERM"


def test_a_signal_during_an_agreement_is_for_the_next(clock, monkeypatch):
    """Else this rank alone would end."""
    stop = StopRequest(World(size=2))

    class Late(Ranks):
        def all_reduce(self, values, operation):
            super().all_reduce(values, operation)
            stop.ask(signal.SIGINT)

    Late(monkeypatch)
    assert not stop.comes_after(1)
    assert stop.comes_after(2_000)


def test_the_common_step_comes_before_the_plan_where_steps_become_slow(clock, monkeypatch):
    ranks, world, store = Ranks(monkeypatch), World(size=2), HashStore()
    stop, other = StopRequest(world), CommonStep()
    stop.begin(0)
    for update in range(1, 50):
        clock[0] += 0.002
        assert not stop.comes_after(update)
        assert not other.is_here()
    calls = ranks.calls
    clock[0] += 60.0
    stop.ask(signal.SIGTERM)
    for _ in range(2):
        world.common_step.poll(store, 0, 2)
        other.poll(store, 1, 2)
    assert stop.comes_after(50)
    assert other.is_here()
    assert ranks.calls == calls + 1


def test_ranks_with_fewer_validation_batches_agree_as_often(clock, monkeypatch):
    class Loader:
        def __init__(self, count: int) -> None:
            self.count = count

        def batches(self, epoch: int):
            for n in range(self.count):
                clock[0] += 4.0
                yield n

    def validation(count: int) -> UntilStopped:
        loader: Any = Loader(count)
        return UntilStopped(loader, 5, StopRequest(World(size=2)))

    ranks = Ranks(monkeypatch)
    for count in (5, 4, 0):
        ranks.calls, ranks.theirs = 0, [0.0, 4.0]
        assert list(validation(count).batches(0)) == list(range(count))
        assert ranks.calls == 5
        ranks.theirs = [float(signal.SIGTERM), 4.0]
        with pytest.raises(Stopped):
            list(validation(count).batches(0))
