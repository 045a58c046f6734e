"""Signals: the first is a wish, which may arrive several times; a later one is an order."""

from __future__ import annotations

import os
import signal

import pytest

from lowrank_vit.engine.distributed import World
from lowrank_vit.engine.stop import ONE_WISH_S, SIGNALS, StopRequest


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lowrank_vit.engine.stop.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish(clock, number):
    world = World()
    before = signal.getsignal(number)
    with StopRequest(world).noted():
        assert not world.stops_after(1)
        os.kill(os.getpid(), number)
        assert world.stops_after(2)
        assert world.stop_reason == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_the_same_wish_may_come_twice_and_a_later_signal_is_an_order(clock):
    """Ranks get a signal of the terminal, and again from torchrun."""
    world = World()
    with StopRequest(world).noted():
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += ONE_WISH_S
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 0.1
        os.kill(os.getpid(), signal.SIGUSR1)  # never an order
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
