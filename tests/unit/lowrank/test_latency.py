"""Times are taken in turns beside the first's; a layer gets faster below the first rank that is not."""

from __future__ import annotations

import itertools

import pytest
import torch

from lowrank_vit.lowrank import latency
from lowrank_vit.lowrank.latency import LayerSpeed, layer_speeds, time_in_turns

CPU = torch.device("cpu")


class Clock:
    """Time that passes only in the calls that are timed."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, list[str]()

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.now += seconds
            self.order.append(name)

        return run

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(latency, "time", made)
    return made


def test_calls_are_timed_in_turns(clock):
    ticks: list[int] = []
    calls = [clock.call("a", 0.02), clock.call("b", 0.01), clock.call("c", 0.04)]
    first, second, third = time_in_turns(calls, CPU, rounds=3, tick=ticks.append)
    assert (first.ms, first.ratio) == (pytest.approx(20), pytest.approx(1))
    assert (second.ms, second.ratio) == (pytest.approx(10), pytest.approx(0.5))
    assert (third.ratio, third.low, third.high) == (pytest.approx(2), pytest.approx(2), pytest.approx(2))
    assert [name for name, _ in itertools.groupby(clock.order)][3:] == ["a", "b", "c"] * 3  # behind the warm-up
    assert sum(ticks) == 9


def test_short_calls_are_repeated_within_a_sample(clock):
    time_in_turns([clock.call("a", 0.001)], CPU, rounds=2, tick=lambda count: None)
    assert len(clock.order) == 2 + 2 * 10


@pytest.mark.parametrize(
    ("ratios", "faster"),
    [({1: 0.2, 8: 0.9, 16: 1.1}, 8), ({1: 1.2, 8: 0.9}, None), ({1: 0.2, 8: 1.0, 16: 0.9}, 1), ({}, None)],
)
def test_up_to_which_rank_a_layer_is_faster(ratios, faster):
    speed = LayerSpeed(8, 8, 1, 1, ratios, 4)
    assert speed.faster_below == faster
    assert speed.content()["faster_up_to"] == faster


def test_each_shape_is_timed_once_at_ranks_that_pay():
    count: list[int] = []
    one, other = layer_speeds([(12, 4, 1), (5, 40, 1), (12, 4, 1)], 3, CPU, tick=count.append)
    assert ((one.rows, one.columns, one.pays), (other.rows, other.columns, other.pays)) == ((12, 4, 2), (5, 40, 4))
    assert (list(one.ratios), list(other.ratios)) == ([1, 2], [1, 2, 3, 4])
    assert all(ratio > 0 for ratio in (*one.ratios.values(), *other.ratios.values()))


def test_rows_in_parts_are_timed_as_such():
    (found,) = layer_speeds([(48, 16, 3)], 3, CPU, tick=lambda count: None)
    assert (found.parts, found.pays, max(found.ratios)) == (3, 7, 7)
    assert found.content()["parts"] == 3
