"""An epoch's order is a permutation, random, known piece by piece, and frozen."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import yaml
from scipy import stats

from lowrank_vit.augment.recipe import train_rules
from lowrank_vit.config.flags import parse, to_yaml
from lowrank_vit.plan.order import MOST_SORTED, ROUNDS, Order, grid, permuted, round_keys, subset
from lowrank_vit.plan.philox import Stream, philox
from lowrank_vit.plan.plans import EvalPlan, TrainPlan, TrainRules
from lowrank_vit.training.resume import as_resumed
from tests.runs import checkpoint_of
from tests.slots import joined

KEY = np.uint64(7)
ALMOST_2_32 = 2**32 - 1


def keys(epoch: int = 0, rounds: int = ROUNDS) -> np.ndarray:
    return round_keys(KEY, rounds, epoch, Stream.ORDER_KEYS)


def sizes_around_powers_of_two(low: int, high: int) -> list[int]:
    return [2**power + more for power in range(low, high) for more in (-1, 0, 1)]


@pytest.mark.parametrize("num_samples", [*range(1, 40), *sizes_around_powers_of_two(6, 14)])
def test_any_size_has_a_keyed_permutation(num_samples):
    for epoch in range(3):
        made = permuted(keys(epoch), num_samples, np.arange(num_samples))
        assert np.array_equal(np.sort(made), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [65_535, 65_536, 65_537, *sizes_around_powers_of_two(17, 20)])
def test_an_order_is_a_permutation_whichever_way_it_is_made(num_samples):
    order = Order.of(KEY, num_samples, 1, Stream.ORDER, "keyed")
    assert (order.all is None) == (num_samples > MOST_SORTED)
    made = order.at(np.arange(num_samples))
    assert np.array_equal(np.bincount(made, minlength=num_samples), np.ones(num_samples))
    assert np.array_equal(order.at(np.array([[5, 3], [9, 0]])), [[made[5], made[3]], [made[9], made[0]]])


class Twin:
    """The same network in Python's whole numbers, and its way back."""

    def __init__(self, keys: np.ndarray, num_samples: int) -> None:
        self.keys, self.num_samples = keys.tolist(), num_samples
        self.rows = math.isqrt(num_samples - 1) + 1
        self.columns = -(-num_samples // self.rows)

    def _share(self, half: int, k: int, of: int) -> int:
        word = (half + self.keys[k]) % 2**64
        word = (word ^ word >> 32) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 29) * 0x94D049BB133111EB % 2**64
        return (word >> 32) * of >> 32

    def number(self, place: int) -> int:
        while True:
            row, column = divmod(place, self.columns)
            for k in range(0, len(self.keys), 2):
                row = (row + self._share(column, k, self.rows)) % self.rows
                column = (column + self._share(row, k + 1, self.columns)) % self.columns
            place = row * self.columns + column
            if place < self.num_samples:
                return place

    def place(self, number: int) -> int:
        while True:
            row, column = divmod(number, self.columns)
            for k in range(len(self.keys) - 2, -1, -2):
                column = (column - self._share(row, k + 1, self.columns)) % self.columns
                row = (row - self._share(column, k, self.rows)) % self.rows
            number = row * self.columns + column
            if number < self.num_samples:
                return number


@pytest.mark.parametrize("num_samples", [65_537, 14_197_122, 2**31 + 11, ALMOST_2_32 - 4, ALMOST_2_32])
def test_no_two_places_of_a_large_set_have_one_sample(num_samples):
    """By a twin that finds the way back from each."""
    places = np.unique(np.random.default_rng(0).integers(0, num_samples, 400))
    places[-1] = num_samples - 1
    ids, twin = Order.of(KEY, num_samples, 9, Stream.ORDER, "keyed").at(places), Twin(keys(9), num_samples)
    assert (twin.rows, twin.columns) == grid(num_samples)
    assert num_samples <= twin.rows * twin.columns < num_samples + twin.rows
    assert ids.tolist() == [twin.number(place) for place in places.tolist()]
    assert [twin.place(number) for number in ids.tolist()] == places.tolist()


def least_pvalue(num_samples: int, rounds: int, epochs: int) -> float:
    """Of uniform places, and of pairs: how far apart they end, in rows and in columns; pairs that begin in one column.

    Two different samples are in one row, or in one column, a little less often than in two given ones: left out.
    """
    (rows, columns), begin = grid(num_samples), 3
    places = np.array([begin, begin + columns, begin + 2 * columns, begin + 1, begin + 1 + columns])
    ends = np.stack([permuted(keys(epoch, rounds), num_samples, places) for epoch in range(epochs)])
    pvalues = [stats.chisquare(np.bincount(ends[:, n] * 16 // num_samples)).pvalue for n in range(len(places))]
    for at, count in ((ends // columns, rows), (ends % columns, columns)):
        for one, other in combinations(at.T, 2):
            apart = np.bincount((one - other) % count, minlength=count)[1:]
            pvalues.append(stats.chisquare(apart).pvalue)
    return min(pvalues)


def test_places_and_pairs_are_uniform():
    """Of the smallest permutations, of which most is seen; four and six rounds show that this test can fail."""
    assert least_pvalue(64, ROUNDS, 40_000) > 1e-4
    assert least_pvalue(64, 4, 10_000) < 1e-100
    assert least_pvalue(64, 6, 40_000) < 1e-8


def test_places_and_pairs_of_the_smallest_set_that_has_it_are_uniform():
    assert least_pvalue(65_537, ROUNDS, 20_000) > 1e-4


def test_the_orders_are_frozen():
    """Numbers that were written down: another one is another meaning of a seed, see lowrank_vit/config/meaning.py."""
    assert Order.of(KEY, 101, 3, Stream.ORDER, "keyed").at(np.arange(6)).tolist() == [25, 17, 64, 54, 10, 39]
    million, large = (Order.of(KEY, count, 3, Stream.ORDER, "keyed") for count in (10**6, ALMOST_2_32))
    assert million.at(np.arange(6)).tolist() == [126354, 312844, 523737, 373849, 129304, 916518]
    assert large.at(np.arange(4)).tolist() == [3219653112, 1251259555, 3772526950, 1426641887]


def test_earlier_versions_sorted_large_sets_too():
    numbers = [philox(KEY, 0, n, 2, Stream.ORDER) for n in range(65_600)]
    earlier = np.argsort([int(w0) << 32 | int(w1) for w0, w1, _, _ in numbers], kind="stable")
    assert np.array_equal(plan_of(65_600, rules=TrainRules(order="sorted")).order(2), earlier)
    assert not np.array_equal(plan_of(65_600).order(2), earlier)
    assert set(subset(7, 65_600, 9, "sorted")) != set(subset(7, 65_600, 9))


@pytest.mark.parametrize(
    ("dataset", "number", "order"),
    [("", 9, "sorted"), ("folder", 1, "sorted"), ("", 10, "keyed"), ("digits", 9, "keyed")],
)
def test_an_older_run_keeps_the_order_that_it_began_with(dataset, number, order):
    config = parse(["--dataset", dataset])
    args = {name: value for name, value in yaml.safe_load(to_yaml(config)).items() if name != "epoch-order"}
    resumed = as_resumed(config, checkpoint_of(args, meaning=number), lambda line: None)
    assert (resumed.data.epoch_order, train_rules(resumed).order) == (order, order)


@pytest.mark.parametrize("order", ["keyed", "sorted"])
def test_a_smaller_subset_of_a_large_set_is_a_part_of_a_larger_one(order):
    chosen = subset(7, 70_000, 300, order)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(subset(7, 70_000, 20, order).tolist()) < set(chosen.tolist())
    assert not set(subset(8, 70_000, 20, order).tolist()) <= set(chosen.tolist())
    assert not set(plan_of(70_000).order(0)[:20].tolist()) <= set(chosen.tolist())  # of a stream of its own


def plan_of(num_samples: int, rules: TrainRules | None = None, **more) -> TrainPlan:
    """Of a set that takes no memory: its sides are one number, of which there are as many as one likes."""
    sides = np.broadcast_to(np.int32(40), num_samples)
    return TrainPlan(sides, sides, rules or TrainRules(), **({"seed": 7, "img_size": 32, "batch_size": 8} | more))


@pytest.mark.parametrize("num_samples", [MOST_SORTED, MOST_SORTED + 1])
def test_ranks_and_steps_share_a_large_sets_order(num_samples):
    whole = plan_of(num_samples, batch_size=24)
    ranks = [plan_of(num_samples, batch_size=4, rank=r, world_size=3, accum_steps=2) for r in range(3)]
    for update in (0, 1, whole.steps_per_epoch - 1):
        parts = [rank.step_ids(5, step).tolist() for step in (2 * update, 2 * update + 1) for rank in ranks]
        assert np.array_equal(joined(parts), whole.step_ids(5, update))
        assert np.array_equal(np.sort(whole.step_ids(5, update)), np.sort(whole.order(5)[24 * update :][:24]))
    ids = ranks[1].ids(5)
    assert all(np.array_equal(ids[step], ranks[1].step_ids(5, step)) for step in (0, 17, len(ids) - 1))


@pytest.mark.parametrize("num_samples", [100, MOST_SORTED + 1])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_next_sample_of_the_order_stands_in_for_a_bad_one(num_samples, ranks):
    plans = [plan_of(num_samples, batch_size=16 // ranks, rank=r, world_size=ranks) for r in range(ranks)]
    order = plans[0].order(3).tolist()
    bad = {order[0], order[5], order[6], order[7], order[-1]}
    expected = [order[1], *order[1:5], order[8], order[8], order[8], *order[8:16]]
    parts = [plan.step_ids(3, 0, bad).tolist() for plan in plans]
    assert sorted(joined(parts)) == sorted(expected)
    whole = plan_of(num_samples, batch_size=16)
    is_same = whole.step_ids(3, 0) == whole.step_ids(3, 0, bad)
    assert np.array_equal(joined(parts), whole.step_ids(3, 0, bad))
    assert np.array_equal(~is_same, np.isin(whole.step_ids(3, 0), list(bad)))
    everything = range(num_samples)
    assert np.array_equal(plans[0].step_ids(3, 1, everything), plans[0].step_ids(3, 1))  # nothing is left to stand in


def test_a_batch_of_four_billion_samples_is_planned_without_looking_at_them():
    count = ALMOST_2_32
    plan = plan_of(count, batch_size=256, rank=3, world_size=16)
    last = plan.steps_per_epoch - 1
    batch = plan.batch(2, last, plan.step_ids(2, last, without={5}))
    assert batch.ids.max() > 2**31
    assert (batch.windows[:, :2] + batch.windows[:, 2:] <= 40).all()
    assert len(subset(7, count, 10)) == 10
    sides = np.broadcast_to(np.int32(40), count)
    evaluation = EvalPlan(sides, sides, img_size=32, crop_pct=1.0, batch_size=100, rank=1, world_size=2)
    ids = evaluation.step_ids(0, 7, without={count // 2 + 1 + 700})
    assert ids.tolist() == [count // 2 + 1 + n for n in range(701, 800)]
    assert (evaluation.batch(0, 7, ids).windows == [0, 0, 40, 40]).all()
