"""Samples that come several times in an epoch: as often as timm's, drawn anew each time, whatever the ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from timm.data.distributed_sampler import RepeatAugSampler

from lowrank_vit.augment.recipe import train_rules
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.plan.dealing import dealt_repeats
from lowrank_vit.plan.mixing import MixRules
from lowrank_vit.plan.plans import TrainPlan
from lowrank_vit.plan.rules import TrainRules
from tests.slots import joined
from tests.unit.plan.test_plan import EVERYTHING, arrays_of


def plan_of(num_samples: int, repeats: int, rules: TrainRules | None = None, **more) -> TrainPlan:
    sides = np.full(num_samples, 40)
    rules = replace(rules or TrainRules(), repeats=repeats)
    return TrainPlan(sides, sides, rules, **({"seed": 7, "img_size": 32, "batch_size": 8} | more))


def timms(num_samples: int, repeats: int, batch_size: int, world_size: int) -> list[np.ndarray]:
    """The ids of each update, of all processes, as timm's loader makes them: whole batches alone."""
    samplers = [RepeatAugSampler(range(num_samples), world_size, r, num_repeats=repeats) for r in range(world_size)]
    steps = len(samplers[0]) // batch_size
    of_ranks = np.array([list(sampler)[: steps * batch_size] for sampler in samplers])
    return list(of_ranks.reshape(world_size, steps, batch_size).transpose(1, 0, 2).reshape(steps, -1))


def how_often(ids: np.ndarray) -> list[int]:
    return np.sort(np.unique(ids, return_counts=True)[1]).tolist()


@pytest.mark.parametrize("num_samples", [256, 300, 1000, 2048])
@pytest.mark.parametrize(
    ("repeats", "batch_size", "world_size"), [(2, 8, 2), (3, 16, 4), (3, 5, 3), (4, 12, 8), (5, 2, 7)]
)
def test_samples_come_as_often_as_in_timm(num_samples, repeats, batch_size, world_size):
    expected = timms(num_samples, repeats, batch_size, world_size)
    plans = [
        plan_of(num_samples, repeats, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    updates = np.stack([plan.ids(0) for plan in plans], axis=1).reshape(plans[0].steps_per_epoch, -1)
    assert len(updates) == len(expected)
    assert how_often(updates) == how_often(np.concatenate(expected))
    assert [how_often(update) for update in updates] == [how_often(update) for update in expected]


@pytest.mark.parametrize(("global_batch", "repeats"), [(24, 3), (25, 3), (2, 5), (7, 1), (64, 7)])
def test_an_epoch_has_each_repetition_of_its_samples_once(global_batch, repeats):
    """By a list of all, dealt out in turn."""
    for update in range(5):
        of_all = [divmod(n, repeats) for n in range(update * global_batch, (update + 1) * global_batch)]
        places, repetitions = dealt_repeats(update, global_batch, np.arange(global_batch), repeats)
        assert list(zip(places.tolist(), repetitions.tolist(), strict=True)) == sorted(of_all, key=lambda one: one[1])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(("world_size", "accum_steps"), [(4, 1), (1, 8), (2, 4)])
def test_ranks_and_accumulation_share_one_stream(world_size, accum_steps, mode):
    rules = replace(EVERYTHING, mixing=replace(EVERYTHING.mixing, mode=mode))
    one = plan_of(300, 3, rules, batch_size=32)
    shares = {"batch_size": 32 // world_size // accum_steps, "world_size": world_size, "accum_steps": accum_steps}
    ranks = [plan_of(300, 3, rules, rank=r, **shares) for r in range(world_size)]
    for update in (0, 1, 7):
        whole = one.batch(2, update, one.step_ids(2, update))
        steps = range(update * accum_steps, (update + 1) * accum_steps)
        parts = [rank.batch(2, step, rank.step_ids(2, step)) for step in steps for rank in ranks]
        for whole_array, *part_arrays in zip(arrays_of(whole), *(arrays_of(p) for p in parts), strict=True):
            assert np.array_equal(whole_array, joined(part_arrays))
        if mode != "batch":
            assert tuple(joined([p.mix for p in parts])) == whole.mix


def test_each_repetition_is_drawn_anew_and_the_first_is_that_of_no_repetition():
    rules = replace(EVERYTHING, mixing=MixRules(mixup=0.8, mode="elem"))
    plan, once = plan_of(600, 3, rules, batch_size=96), plan_of(600, 1, rules, batch_size=96)
    batch = plan.batch(1, 0, plan.step_ids(1, 0))
    plain = once.batch(1, 0, batch.ids)
    place_of = {
        (id_, n): row for row, (id_, n) in enumerate(zip(batch.ids.tolist(), plan._dealt(0)[1].tolist(), strict=True))
    }
    firsts, seconds, thirds = ([place_of[id_, n] for id_ in sorted(set(batch.ids.tolist()))] for n in range(3))
    drawn = [*arrays_of(batch)[1:], np.array([mix.lam for mix in batch.mix])]
    for ours, those in zip(drawn, [*arrays_of(plain)[1:], np.array([mix.lam for mix in plain.mix])], strict=True):
        assert np.array_equal(ours[firsts], those[firsts])
        assert not np.array_equal(ours[firsts], ours[seconds])
        assert not np.array_equal(ours[thirds], ours[seconds])
    keys = arrays_of(batch)[-1]
    assert len({tuple(key) for key in keys.tolist()}) == len(keys)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.uint32, np.uint64])
@pytest.mark.parametrize("repeats", [1, 3])
def test_ids_may_be_whole_numbers_of_any_width(dtype, repeats):
    plan = plan_of(300, repeats, EVERYTHING)
    ids = plan.step_ids(0, 1)
    for expected, found in zip(
        arrays_of(plan.batch(0, 1, ids)), arrays_of(plan.batch(0, 1, ids.astype(dtype))), strict=True
    ):
        assert np.array_equal(expected, found)
    assert np.array_equal(plan.windows(0, ids), plan.windows(0, ids.astype(dtype)))


def test_repetitions_lie_in_different_batches_and_are_hardly_mixed_with_one_another():
    rules = TrainRules(mixing=MixRules(mixup=0.8))
    plans = [plan_of(3000, 3, rules, batch_size=128, rank=r, world_size=8) for r in range(8)]
    for update in range(plans[0].steps_per_epoch):
        for plan in plans:
            ids = plan.step_ids(0, update)
            assert len(set(ids.tolist())) == len(ids)


def test_the_next_sample_stands_in_for_each_repetition_of_a_bad_one():
    plan = plan_of(300, 3, batch_size=32)
    order = plan.order(4).tolist()
    bad = {order[2], order[3]}
    before, after = plan.step_ids(4, 0), plan.step_ids(4, 0, bad)
    assert after.tolist() == [order[4] if id_ in bad else id_ for id_ in before.tolist()]
    assert (before != after).sum() == 6


def test_what_cannot_be_repeated_is_an_error():
    with pytest.raises(UserError, match=r"^repeats takes a whole number from 1 to 65536, not 0"):
        plan_of(300, 0)
    with pytest.raises(UserError, match=r"global batch of 290 is larger than the training set of 256"):
        plan_of(300, 3, batch_size=290)
    with pytest.raises(UserError, match=r"^ids takes the 8 of a batch"):
        plan_of(300, 3).batch(0, 0, np.arange(5))
    with pytest.raises(UserError, match=r"--aug-repeats 2.5: each image is repeated equally often"):
        parse(["--aug-repeats", "2.5"])
    typed = {flag: train_rules(parse(["--aug-repeats", flag])).repeats for flag in ("0", "1", "3", "3.0")}
    assert typed == {"0": 1, "1": 1, "3": 3, "3.0": 3}
