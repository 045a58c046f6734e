"""Blocks of mixing: timm's Mixup on each block of the global batch, whatever the ranks and the accumulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lowrank_vit.augment.mixing import mix_images, mix_targets, mix_to_tensor
from lowrank_vit.config.flags import parse, to_yaml
from lowrank_vit.plan.dealing import deal
from lowrank_vit.plan.mixing import NO_MIX, MixRules, draw_mixes
from lowrank_vit.plan.philox import Stream
from lowrank_vit.plan.plans import TrainPlan, TrainRules
from lowrank_vit.training.resume import as_resumed
from tests.runs import checkpoint_of
from tests.unit.augment.test_pipeline import timms

BOTH: dict[str, Any] = {"mixup": 0.8, "cutmix": 1.0}
SIDE, CLASSES, SAMPLES = 16, 10, 200


def plans_of(batch, world_size, accum_steps, **mixing):
    """One for each rank."""
    rules, sides = TrainRules(mixing=MixRules(**(BOTH | mixing))), np.full(SAMPLES, SIDE)
    options = {"seed": 5, "img_size": SIDE, "batch_size": batch, "world_size": world_size, "accum_steps": accum_steps}
    return [TrainPlan(sides, sides, rules, rank=rank, **options) for rank in range(world_size)]


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


def mixed(samples, plans, update, epoch=1):
    """What the batches of an update become: sample id -> (image, soft target)."""
    images, labels = samples
    accum_steps, found = plans[0].accum_steps, {}
    for plan in plans:
        for step in range(update * accum_steps, (update + 1) * accum_steps):
            batch = plan.batch(epoch, step, plan.ids(epoch)[step])
            mix = mix_to_tensor(batch.mix)
            made = mix_images(images[batch.ids], mix), mix_targets(labels[batch.ids], CLASSES, 0.1, mix)
            found |= {int(i): (image, soft) for i, image, soft in zip(batch.ids, *made, strict=True)}
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for i, pair in expected.items():
        for one, other in zip(found[i], pair, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [4, 8, 10, 12, 24, 128])
@pytest.mark.parametrize(("batch", "world_size", "accum_steps"), [(24, 1, 1), (4, 2, 3), (12, 1, 2), (2, 12, 1)])
def test_an_update_is_timms_mixup_of_each_block(samples, batch, world_size, accum_steps, block, monkeypatch):
    """Timm's with as many samples a GPU as a block has; G = 24, which blocks of 10 do not divide."""
    (one,) = plans_of(24, 1, 1, block=block)
    images, labels = samples
    for update in range(3):
        ids = one.order(1)[24 * update : 24 * (update + 1)]
        blocks, expected = [ids[low : low + block] for low in range(0, 24, block)], {}
        for number, own in enumerate(blocks):
            (draw,) = draw_mixes(
                one.rules.mixing, SIDE, np.uint64(5), 1, np.array([update * len(blocks) + number]), Stream.MIX
            )
            made = timms(images[own], labels[own], [draw], "batch", monkeypatch)
            expected |= {int(i): (image, soft) for i, image, soft in zip(own, *made, strict=True)}
        assert_same(mixed(samples, plans_of(batch, world_size, accum_steps, block=block), update), expected)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    ("batch", "world_size", "accum_steps", "block"),
    [(6, 2, 2, 3), (6, 2, 2, 7), (2, 3, 4, 5), (8, 3, 1, 10), (3, 8, 1, 3), (5, 2, 2, 5), (9, 3, 1, 5)],
)
def test_ranks_and_accumulation_share_the_blocks_of_any_size_and_mode(
    samples, batch, world_size, accum_steps, block, mode
):
    """Odd blocks too, whose middle sample stays as it is, and odd batches where each gets such a sample."""
    global_batch = batch * world_size * accum_steps
    whole = mixed(samples, plans_of(global_batch, 1, 1, block=block, mode=mode), 1)
    assert_same(mixed(samples, plans_of(batch, world_size, accum_steps, block=block, mode=mode), 1), whole)
    unmixed = [i for i, (image, _) in whole.items() if torch.allclose(image, samples[0][i], atol=1e-6)]
    (one,) = plans_of(global_batch, 1, 1, block=block, mode=mode)
    ids = one.order(1)[global_batch : 2 * global_batch]
    assert {
        int(ids[(low + min(low + block, global_batch)) // 2])
        for low in range(0, global_batch, block)
        if min(block, global_batch - low) % 2
    } <= set(unmixed)


@pytest.mark.parametrize(("batch", "slots"), [(8, 1), (8, 4), (2, 6), (7, 1), (7, 3), (1, 5)])
@pytest.mark.parametrize("block", [0, 56, 1000])
def test_a_block_as_large_as_the_batch_is_the_draw_and_the_order_of_older_runs(batch, slots, block):
    """Earlier versions drew once for a global batch; the formulas are theirs."""
    order = np.arange(batch * slots)
    if batch % 2:
        earlier = order.reshape(slots, batch)
    else:
        first, mirrored = order[: len(order) // 2], order[: len(order) // 2 - 1 : -1]
        mirrored = mirrored.reshape(slots, batch // 2)[:, ::-1]
        earlier = np.concatenate([first.reshape(slots, batch // 2), mirrored], axis=1)
    assert np.array_equal(deal(len(order), batch, block).positions, earlier)
    for plan in plans_of(batch, slots, 1, block=block):
        for update in range(plan.updates_per_epoch):
            (draw,) = draw_mixes(plan.rules.mixing, SIDE, np.uint64(5), 3, np.array([update]), Stream.MIX)
            assert plan.batch(3, update, plan.ids(3)[update]).mix == (draw,)


def test_blocks_are_drawn_for_themselves():
    (plan,) = plans_of(100, 1, 1, block=10)
    draws = [mix for epoch in range(100) for step in range(2) for mix in set(plan.mix(epoch, step, np.arange(100)))]
    assert len({mix.lam for mix in draws if not mix.is_cutmix}) == sum(not mix.is_cutmix for mix in draws) > 800


@pytest.mark.parametrize(("batch", "block", "rows"), [(8, 8, 1), (8, 16, 1), (8, 4, 8), (16, 8, 16), (8, 12, 8)])
def test_there_are_as_many_rows_in_every_step(batch, block, rows):
    """So that nothing recompiles: one where a batch lies in one block, else one a sample; also where mixing is off."""
    plans = plans_of(batch, 1, 3, block=block)
    sides, rules = np.full(SAMPLES, SIDE), TrainRules(mixing=MixRules(**BOTH, block=block), mixup_off_epoch=1)
    late = TrainPlan(sides, sides, rules, seed=5, img_size=SIDE, batch_size=batch, accum_steps=3)
    for plan in (*plans, late):
        for epoch in range(2):
            for step in range(plan.steps_per_epoch):
                assert len(plan.mix(epoch, step, plan.ids(epoch)[step])) == rows
    assert set(late.mix(1, 0, late.ids(1)[0])) == {NO_MIX}


def test_without_mixing_blocks_change_nothing():
    sides = np.full(SAMPLES, SIDE)
    options = {"seed": 1, "img_size": SIDE, "batch_size": 8, "world_size": 2, "rank": 1}
    plans = [TrainPlan(sides, sides, TrainRules(mixing=MixRules(block=block)), **options) for block in (0, 4)]
    assert np.array_equal(plans[0].ids(0), plans[1].ids(0))
    assert plans[1].mix(0, 0, plans[1].ids(0)[0]) == (NO_MIX,)


@pytest.mark.parametrize(
    ("flags", "goes_on_with"),
    [("--mixup 0.8 --reprob 0.25", (0, True)), ("--cutmix 1", (0, False)), ("--reprob 0.25", (128, False))],
)
def test_older_runs_go_on_with_one_draw_and_erase_first(flags, goes_on_with):
    """Theirs was one draw a global batch, and mixing after erasing; what a run has not used it need not keep."""
    config, lines = parse(flags.split()), []
    args = yaml.safe_load(to_yaml(config))
    args = {name: value for name, value in args.items() if name not in ("mix-block", "erase-first")}
    config = as_resumed(config, checkpoint_of(args), lines.append)
    assert (config.augment.mix_block, config.augment.erase_first) == goes_on_with
    assert sum("drawn for each --mix-block" in line for line in lines) == (goes_on_with[0] == 0)
