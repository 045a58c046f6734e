"""Which layers are due."""

from __future__ import annotations

from typing import NamedTuple

from lowrank_vit.lowrank.layers import Costs, Layer
from lowrank_vit.lowrank.switching.decision import decide


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
