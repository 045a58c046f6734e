"""Which layers are due, and how many a switch waits for."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from lowrank_vit.lowrank.layers import Costs, Layer
from lowrank_vit.lowrank.switching.decision import decide, enough, share_of_due


class Seen(NamedTuple):
    rank: int
    settled: bool


COSTS = Costs({name: Layer(20, 20, 4) for name in "abcd"}, {"params": 100, "flops": 100})
"""Rank 9 is the greatest that saves anything."""


def test_settled_layers_are_due_where_their_rank_saves_something():
    verdicts = {"a": Seen(9, True), "b": Seen(10, True), "c": Seen(3, False), "x": Seen(3, True)}
    assert decide(verdicts, {}, COSTS) == {"a": 9}
    assert decide({"a": Seen(0, True)}, {}, COSTS) == {}


def test_a_layer_in_factors_shrinks_by_a_tenth_or_more_and_never_grows():
    ranks = dict.fromkeys("abcd", 8)
    verdicts = {"a": Seen(8, True), "b": Seen(9, True), "c": Seen(7, True), "d": Seen(3, False)}
    assert decide(verdicts, ranks, COSTS) == {"c": 7}


def test_what_is_due_counts_by_the_parameters_that_could_still_go():
    layers = {"a": Layer(20, 20, 4), "b": Layer(20, 60, 4), "row": Layer(1, 60, 4)}  # no rank of a row saves anything
    costs = Costs(layers, {"params": 0, "flops": 0})
    assert share_of_due({}, {}, costs) == 0.0
    assert share_of_due({"a": 3}, {}, costs) == 0.25
    assert share_of_due({"a": 3, "b": 3}, {}, costs) == 1.0
    assert share_of_due({"b": 3}, {"a": 5}, costs) == 1.0
    assert share_of_due({"a": 3}, {"a": 5}, costs) == 200 / 1400  # a has 200 by now
    assert share_of_due({"a": 3, "b": 3}, {"a": 5}, costs) == 1.0
    assert share_of_due({"a": 3}, {"a": 5, "b": 10}, costs) == 200 / 1000  # all are factorised, and may shrink
    assert share_of_due({"a": 3}, {"a": 5, "b": 1}, costs) == 1.0  # but for one of rank 1
    assert share_of_due({}, {"a": 1, "b": 1}, costs) == 0.0


@pytest.mark.parametrize("at_once", [None, 0.0, 0.25, 1.0])
def test_the_share_that_is_waited_for_falls_to_nothing_with_the_updates_that_are_left(at_once: float | None):
    for switches_left in (1, 2, 3):
        begin = 1 / switches_left if at_once is None else at_once
        waited = [enough(at_once, switches_left, left) for left in (1.0, 0.75, 0.5, 0.0)]
        assert waited == pytest.approx([begin, 0.75 * begin, 0.5 * begin, 0.0])


def _switches(settles_at: list[float], at_once: float | None, switches: int = 3, refreshes: int = 40) -> list[int]:
    """How many of layers alike go at each switch; each is due from a share of the run on, above 1 never."""
    costs = Costs({str(i): Layer(20, 20, 4) for i in range(len(settles_at))}, {"params": 0, "flops": 0})
    ranks: dict[str, int] = {}
    gone: list[int] = []
    for number in range(1, refreshes):
        at = number / refreshes
        due = decide({str(i): Seen(5, when <= at) for i, when in enumerate(settles_at)}, ranks, costs)
        left = switches - len(gone)
        if due and left and share_of_due(due, ranks, costs) >= enough(at_once, left, 1 - at):
            ranks |= due
            gone.append(len(due))
    return gone


def test_layers_that_settle_one_after_the_other_do_not_use_up_the_switches_by_ones_and_twos():
    one_by_one = [0.1 + 0.02 * i for i in range(16)]
    assert _switches(one_by_one, 0.0) == [1, 1, 1]
    gone = _switches(one_by_one, None)
    assert min(gone) >= 4
    assert sum(gone) >= 14  # the last of them settle when two thirds of the run are left, for which none wait


def test_layers_that_never_settle_hold_the_others_back_for_a_time_alone():
    assert _switches([0.1] * 4 + [2.0] * 12, None) == [4]
    assert _switches([0.1, *[2.0] * 15], 1.0) == [1]
    assert _switches([2.0] * 16, None) == []


def test_what_settles_late_goes_as_long_as_a_switch_is_left():
    assert sum(_switches([0.1] * 8 + [0.9] * 8, None)) == 16
    assert sum(_switches([0.1] * 6 + [0.5] * 5 + [0.95] * 5, None)) == 16
