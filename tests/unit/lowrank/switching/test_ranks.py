"""Two ranks whose training becomes low-rank: whatever fails on one of them, both go on alike, and neither waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_vit.lowrank.switching import change
from lowrank_vit.lowrank.switching import switch as switch_module
from lowrank_vit.lowrank.switching.controller import LowRankTraining
from lowrank_vit.model.low_rank import ranks_of
from lowrank_vit.ranks.world import World
from tests.settling import Told
from tests.unit.lowrank.switching.test_controller import EVIDENCE, SCHEDULED, SPAN, go, told, training, weight_of
from tests.waiting import LONG_S


class Met(World):
    """One of two ranks, each in a thread, which meet as processes do; one that waits alone is an error in the end."""

    def __init__(self, rank: int, meeting: threading.Barrier, values: list[Any]) -> None:
        """`meeting` and the two `values` are shared by both."""
        super().__init__(rank, size=2)
        self._meeting, self._values = meeting, values

    def gather(self, value: Any) -> list[Any]:
        """Both ranks' values."""
        self._values[self.rank] = value
        self._meeting.wait(LONG_S)
        values = list(self._values)
        self._meeting.wait(LONG_S)
        return values

    def from_first(self, value: Any) -> Any:
        """The first rank's value."""
        return self.gather(value)[0]


def on_both(play: Callable[[LowRankTraining, int], Any], options: Any = EVIDENCE, **changes: Any) -> list[Any]:
    """What it gives for the training of each rank, which is told of the rank, too."""
    meeting, values = threading.Barrier(2), [None, None]

    def one(rank: int) -> Any:
        settling: Any = Told(times=options.lowrank_settled, ranks=(3, 2, 1))
        return play(training(options, world=Met(rank, meeting, values), settling=settling, **changes), rank)

    with ThreadPoolExecutor(2) as pool:
        return [task.result(LONG_S) for task in [pool.submit(one, rank) for rank in (0, 1)]]


def shown(one: LowRankTraining, update: int) -> dict[str, Tensor]:
    """This rank's share of the copies: a layer of each block."""
    return {name: weight_of(one.model, name) for name in list(one.costs.layers)[one.world.rank :: 2]}


def go_on(one: LowRankTraining, updates: range, at: int, see: Callable[[LowRankTraining], object]) -> list[int]:
    """As `go`, of this rank's share; at update `at` the whole refresh comes to `see` in place of that."""
    changed: list[int] = []
    for update in updates[::2]:
        if one.at_refresh(update):
            changed.append(update)
        if update % SPAN.full_every == 0:
            see(one) if update == at else one.see(update, shown(one, update))
    return changed


def raising(*_: Any) -> Any:
    raise RuntimeError("out of luck")


FAILURES: dict[str, tuple[Callable[[LowRankTraining], object], str]] = {
    "no copies": (lambda one: one.see(4, torch.OutOfMemoryError("no room")), "OutOfMemoryError: no room"),
    "no judgement": (lambda one: one.see(4, dict.fromkeys(one.costs.layers, torch.ones(2))), "AssertionError"),
    "no worker": (lambda one: setattr(one, "wait", raising), "RuntimeError: out of luck"),
    "no call": (lambda one: None, "nothing was seen of it"),
}


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("kind", FAILURES)
def test_a_refresh_that_fails_on_one_rank_is_refused_on_both_which_go_on_and_save_alike(kind: str, failing: int):
    see, why = FAILURES[kind]

    def play(one: LowRankTraining, rank: int) -> Any:
        early = go_on(one, range(6), 4 if rank == failing else -1, see)
        saved = one.state_dict()
        late = go_on(one, range(6, 17), -1, see)
        return early, late, saved, ranks_of(one.model), told(one) if rank == 0 else {}

    first, second = on_both(play)
    assert first[:2] == second[:2]
    assert first[3] == second[3]
    assert first[2] == second[2]
    assert first[2]["seen"] == 4
    assert why in first[2]["failure"]
    assert first[0] == []
    refused = first[4]["refused"]
    assert refused[0]["update"] == 6
    assert "the refresh at update 4 could not be judged" in refused[0]["why"]
    assert why in refused[0]["why"]
    assert ("rank 1" in refused[0]["why"]) == (failing == 1)
    if kind == "no worker":  # which none can bring back
        assert first[1] == []
        assert len(refused) == 3
    else:
        assert first[1]
        assert len(refused) == 1


@pytest.mark.parametrize("kind", ["work", "memory on one"])
@pytest.mark.parametrize("options", [EVIDENCE, SCHEDULED])
def test_a_switch_that_fails_anywhere_switches_nowhere_and_training_goes_on(
    options: Any, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """Whether in the arithmetic of the first rank, or where another one has no room for what it is given."""
    in_factors, is_failing = switch_module._in_factors, True

    def tight(*given: Any) -> Any:
        if is_failing and threading.current_thread().name == "rank 1":
            raise torch.OutOfMemoryError("no room")
        return in_factors(*given)

    if kind == "work":
        monkeypatch.setattr(change.Trial, "made", lambda *_: raising() if is_failing else pytest.fail("is called"))
    else:
        monkeypatch.setattr(switch_module, "_in_factors", tight)

    def play(one: LowRankTraining, rank: int) -> Any:
        threading.current_thread().name = f"rank {rank}"
        before = {name: value.clone() for name, value in one.model.state_dict().items()}
        changed = go(one, range(7)) or one.at_epoch(1, 7)
        after, groups = one.model.state_dict(), one.optimizer.param_groups
        same = after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
        return changed, same, len(groups), one.state_dict(), told(one)

    first, second = on_both(play, options, rebuild=lambda: pytest.fail("nothing has changed"))
    assert first[:3] == second[:3] == (False, True, 1)
    assert first[3] == second[3]
    assert first[3]["num_switches"] == 0
    why = first[4]["refused"][0]["why"]
    assert why == ("RuntimeError: out of luck" if kind == "work" else "rank 1: OutOfMemoryError: no room")


def test_both_ranks_switch_to_the_first_ones_numbers():
    def play(one: LowRankTraining, rank: int) -> Mapping[str, Tensor]:
        with torch.no_grad():
            weight_of(one.model, "blocks.0.fc1").mul_(1 + 0.01 * rank)  # as another arithmetic would have it
        go(one, range(7))
        return one.model.state_dict()

    first, second = on_both(play)
    assert "blocks.0.fc1.up" in first
    assert all(torch.equal(first[name], second[name]) for name in first if "blocks.0" in name)


def test_what_a_slow_worker_sees_acts_as_early_as_that_of_a_fast_one():
    fast, slow, jobs = training(EVIDENCE), training(EVIDENCE), list[threading.Thread]()
    may_go_on = threading.Event()

    def wait() -> None:
        may_go_on.set()
        for job in jobs:
            job.join(LONG_S)
        jobs.clear()

    def see_late(update: int, weights: Mapping[str, Tensor]) -> None:
        assert may_go_on.wait(LONG_S)
        see(update, weights)

    def see_aside(update: int, weights: Mapping[str, Tensor]) -> None:
        may_go_on.clear()
        jobs.append(threading.Thread(target=see_late, args=(update, weights)))
        jobs[-1].start()

    see, slow.wait = slow.see, wait
    slow.see = see_aside  # type: ignore[method-assign]
    try:
        assert go(slow, range(12)) == go(fast, range(12)) == [6, 10]
    finally:
        wait()
    assert slow.state_dict() == fast.state_dict()
    assert [(one.update, one.values) for one in slow.events()] == [(one.update, one.values) for one in fast.events()]
    assert all(torch.equal(a, b) for a, b in zip(slow.model.parameters(), fast.model.parameters(), strict=True))
