"""How long each rank trained and waited, and what all ranks make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_vit.data.loader import LoaderStats
from lowrank_vit.ranks.world import World
from lowrank_vit.run.metrics import Meter
from lowrank_vit.run.speed import Clock, FirstUpdates, RankFigures, Speed, Stretch


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time in seconds, to be set."""
    time = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: time[0])
    return time


def slow_batches(now: list[float], count: int):
    for _ in range(count):
        now[0] += 3.0
        yield 1


def test_clock_counts_waiting_as_part_of_the_time(now):
    clock = Clock()
    for _ in clock.timed(slow_batches(now, 3)):
        now[0] += 1.0  # the step
    assert clock.train_s == pytest.approx(12.0)
    assert clock.wait_s == pytest.approx(9.0)


def test_stretches_are_those_since_the_last_look_and_since_the_restart(now, monkeypatch):
    monkeypatch.setattr("lowrank_vit.run.speed.bytes_read", lambda: 500 * now[0])
    clock, found = Clock(), []
    for n, _ in enumerate(clock.timed(slow_batches(now, 6)), 1):
        now[0] += 1.0
        clock.images += 10
        clock.tick()
        if n == 2:
            clock.restart()
        elif n in (3, 6):
            found.append(clock.stretches())
    one, three, four = Stretch(10, 4.0, 3.0, 2000), Stretch(30, 12.0, 9.0, 6000), Stretch(40, 16.0, 12.0, 8000)
    assert found == [(one, one), (three, four)]


class Stream:
    """Of `torch.cuda.Stream` what is used: its events are reached when all that was asked of it is done."""

    def __init__(self, now: list[float]) -> None:
        self._now, self.done_at = now, 0.0

    def ask(self, seconds: float) -> None:
        self.done_at = max(self._now[0], self.done_at) + seconds


class Event:
    """Of `torch.cuda.Event` what is used."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: Stream) -> None:
        self._now, self._at = stream._now, max(stream._now[0], stream.done_at)

    def query(self) -> bool:
        return self._now[0] >= self._at

    def synchronize(self) -> None:
        self._now[0] = max(self._now[0], self._at)

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._at - self._at)


def test_what_is_done_between_two_updates_is_no_part_of_the_time(now):
    clock = Clock()
    for _ in clock.timed(slow_batches(now, 3)):
        now[0] += 1.0
        with clock.paused(None):
            now[0] += 100.0
    assert (clock.train_s, clock.wait_s) == (pytest.approx(12.0), pytest.approx(9.0))


@pytest.mark.parametrize("held_s", [0.0, 4.0, 105.0])
@pytest.mark.parametrize("waits", [False, True])
def test_but_what_a_device_had_still_to_do_is(now, held_s, waits, monkeypatch):
    """It has 6 s of work an update, asked for in 1 s: 5 s of a pause are its own, whoever waits for it.

    Where the host does not wait, it asks for the next update meanwhile.
    """
    monkeypatch.setattr("torch.cuda.Event", Event)
    clock = Clock()
    stream: Any = Stream(now)
    for _ in clock.timed(iter(range(3))):
        now[0] += 1.0
        stream.ask(6.0)
        with clock.paused(stream):
            now[0] += held_s
            if waits:
                now[0] = max(now[0], stream.done_at)
    now[0] = max(now[0], stream.done_at)
    clock.tick()
    assert clock.train_s == pytest.approx(21.0 if waits or held_s > 5 else 19.0)


def of_all(*ranks: Stretch) -> Stretch:
    """As the log has it of all ranks."""
    return Stretch(*np.array(ranks).T)


def test_the_first_updates_are_handed_over_once_there_are_enough():
    first = FirstUpdates(100)
    assert first.add(of_all(Stretch(60, 6.0, 1.0), Stretch(60, 5.0, 2.0))) is None
    found = first.add(of_all(Stretch(50, 4.0, 0.0), Stretch(50, 5.0, 3.0)))
    assert np.transpose(found or ()).tolist() == [[110, 10.0, 1.0, 0], [110, 10.0, 5.0, 0]]
    assert first.add(of_all(Stretch(100, 9.0, 9.0), Stretch(100, 9.0, 9.0))) is None


def test_the_longest_waiting_of_all_ranks_and_the_slowest_clock_count():
    ranks = [Stretch(100, 10.0, 0.1), Stretch(100, 8.0, 6.0), Stretch(100, 9.0, 6.75)]
    assert Speed.of(of_all(*ranks)) == Speed(10.0, 0.75, 1)  # of equal ones the first
    assert Speed.of(ranks[0]) == Speed(10.0, 0.01, 0)
    assert Speed.of(of_all(Stretch(), Stretch())) == Speed(0.0, 0.0, 0)
    assert Speed.of(Stretch(1, 1.0, 2.0)).wait_share == 1.0  # host and GPU may wait at the same time


@dataclass
class Three(World):
    """The second of three ranks, whose sums the others add theirs to."""

    rank: int = 1
    size: int = 3

    def sum(self, values: Tensor) -> None:
        """The first has the sums of 2 and numbers of -1, the last has nothing."""
        others = torch.zeros_like(values)
        others[:2] = 2.0
        others[2 : 2 + (len(values) - 2) // 3] = -1.0
        values += others


def test_the_numbers_of_all_ranks_travel_with_the_sums():
    meter = Meter(torch.device("cpu"))
    meter.add(torch.tensor(1.0), torch.tensor(2), 2, 0, 0.1)
    means, numbers = meter.read_with([0.1, 3.5], Three())
    assert means == (1.0, 100.0)
    assert numbers.tolist() == [[-1.0, -1.0], [0.1, 3.5], [0.0, 0.0]]


def test_figures_are_the_same_behind_the_way():
    figures = RankFigures(Stretch(1, 0.1, 0.3), Stretch(2, 0.7, 1e-9), 1.5, LoaderStats(1.0, 2.0, 3.1, 4, 0.5))
    assert RankFigures.of(figures.numbers()) == figures
    of_all_ranks = RankFigures.of(np.array([figures.numbers()] * 3).T)
    assert of_all_ranks.epoch.train_s.tolist() == [0.7] * 3  # type: ignore[attr-defined]
    assert of_all_ranks.loading.bad_samples.tolist() == [4] * 3  # type: ignore[attr-defined]


def test_a_line_of_another_rank_carries_its_number(capsys):
    World().say("left out")
    World(rank=0, size=4).say("left out")
    World(rank=3, size=4).say("left out")
    assert capsys.readouterr().out == "left out\nleft out\nrank 3: left out\n"
