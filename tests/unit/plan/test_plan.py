"""The plan is reproducible, elastic over ranks, and draws what torchvision and timm draw."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data.mixup import rand_bbox, rand_bbox_minmax
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize

from lowrank_vit.common.errors import UserError
from lowrank_vit.plan.mixing import NO_MIX, Mix, MixRules, cut_box
from lowrank_vit.plan.operations import parse_policy
from lowrank_vit.plan.order import subset
from lowrank_vit.plan.philox import Stream, beta, philox, to_unit
from lowrank_vit.plan.plans import BatchPlan, EvalPlan, TrainPlan, TrainRules
from lowrank_vit.plan.rectangles import center_crops, center_windows
from tests.distributions import assert_same_distribution
from tests.slots import joined

NO_IDS = np.zeros(0, np.int64)


def make_plan(num_samples=101, rules=None, **kwargs):
    options = {"seed": 7, "img_size": 32, "batch_size": 8} | kwargs
    heights = np.full(num_samples, 375)
    widths = np.full(num_samples, 500)
    return TrainPlan(heights, widths, rules or TrainRules(), **options)


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_order_is_a_permutation(num_samples, seed, epoch):
    order = make_plan(num_samples, seed=seed, batch_size=1).order(epoch)
    assert np.array_equal(np.sort(order), np.arange(num_samples))


def test_order_changes_with_seed_and_epoch_only():
    plan = make_plan()
    assert np.array_equal(plan.order(3), make_plan(batch_size=16).order(3))
    assert not np.array_equal(plan.order(3), plan.order(4))
    assert not np.array_equal(plan.order(3), make_plan(seed=8).order(3))


def test_positions_in_the_order_are_uniform():
    plan = make_plan(10, batch_size=1)
    first = np.bincount([plan.order(epoch)[0] for epoch in range(5000)], minlength=10)
    assert stats.chisquare(first).pvalue > 1e-4


def test_a_subset_is_of_the_seed_alone_and_a_smaller_one_a_part_of_it():
    chosen = subset(7, 101, 20)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert np.array_equal(chosen, subset(7, 101, 20))
    assert set(subset(7, 101, 5).tolist()) < set(chosen.tolist())
    assert not np.array_equal(chosen, subset(8, 101, 20))
    assert not np.array_equal(chosen, np.sort(make_plan().order(0)[:20]))  # of a stream of its own
    counts = np.bincount(np.concatenate([subset(seed, 10, 3) for seed in range(2000)]), minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-4


EVERYTHING = TrainRules(
    vflip=0.3,
    policy=parse_policy("rand-m9-mstd0.5-inc1"),
    color_jitter=(0.4, 0.4, 0.4),
    reprob=0.5,
    recount=2,
    mixing=MixRules(mixup=0.8, cutmix=1.0),
)


def arrays_of(batch: BatchPlan) -> list:
    """All that a batch's plan says of its samples, one row each."""
    assert batch.ops is not None
    assert batch.erase is not None
    return [
        *(batch.ids, batch.windows, batch.flips, batch.interpolations, batch.vflips, batch.ops.kinds, batch.ops.args),
        *(batch.ops.interpolations, batch.erase.boxes, batch.erase.keys),
    ]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(("world_size", "accum_steps"), [(2, 1), (4, 1), (8, 1), (1, 2), (1, 8), (2, 4), (4, 2)])
def test_ranks_and_accumulation_share_one_stream(world_size, accum_steps, mode):
    rules = replace(EVERYTHING, mixing=replace(EVERYTHING.mixing, mode=mode))
    one = make_plan(rules=rules, batch_size=32)
    batch_size = 32 // world_size // accum_steps
    shares = {"batch_size": batch_size, "world_size": world_size, "accum_steps": accum_steps}
    ranks = [make_plan(rules=rules, rank=r, **shares) for r in range(world_size)]
    for update in range(one.steps_per_epoch):
        whole = one.batch(2, update, one.ids(2)[update])
        steps = range(update * accum_steps, (update + 1) * accum_steps)
        parts = [rank.batch(2, step, rank.ids(2)[step]) for step in steps for rank in ranks]
        for whole_array, *part_arrays in zip(arrays_of(whole), *(arrays_of(p) for p in parts), strict=True):
            assert np.array_equal(whole_array, joined(part_arrays))
        if mode == "batch":
            assert all(p.mix == whole.mix for p in parts)
        else:
            assert tuple(joined([p.mix for p in parts])) == whole.mix
        # The partner in a part's own reverse is the partner in the reverse of the whole.
        partner = dict(zip(whole.ids, whole.ids[::-1], strict=True))
        assert all(partner[a] == b for p in parts for a, b in zip(p.ids, p.ids[::-1], strict=True))


def test_odd_batches_of_several_ranks_cover_the_same_samples():
    one = make_plan(batch_size=15)
    ranks = [make_plan(batch_size=5, rank=r, world_size=3) for r in range(3)]
    for whole, *parts in zip(one.ids(1), *(rank.ids(1) for rank in ranks), strict=True):
        assert np.array_equal(whole, joined(parts))


def test_an_epoch_has_whole_updates_only():
    plan = make_plan(100, batch_size=8, world_size=2, accum_steps=3)
    assert (plan.updates_per_epoch, plan.steps_per_epoch) == (2, 6)
    assert plan.ids(0).shape == (6, 8)


def test_augmentation_of_a_sample_changes_with_the_epoch_and_the_seed_alone():
    plan, ids = make_plan(rules=EVERYTHING), np.arange(64)
    here = arrays_of(plan.batch(1, 0, ids))
    for same in (plan.batch(1, 5, ids), make_plan(rules=EVERYTHING, batch_size=3).batch(1, 0, ids)):
        assert all(np.array_equal(a, b) for a, b in zip(here, arrays_of(same), strict=True))
    for other in (plan.batch(2, 0, ids), make_plan(rules=EVERYTHING, seed=8).batch(1, 0, ids)):
        assert not any(np.array_equal(a, b) for a, b in list(zip(here, arrays_of(other), strict=True))[1:])


def test_what_is_drawn_for_one_use_is_independent_of_the_others():
    """Correlations between the uses of a sample's draws, over 20,000 samples."""
    ids = np.arange(20_000)
    batch = make_plan(20_000, rules=replace(EVERYTHING, mixing=MixRules(mixup=1.0, mode="elem"))).batch(0, 0, ids)
    assert batch.ops is not None
    assert batch.erase is not None
    uses = [
        *(
            batch.windows[:, 1],
            batch.flips,
            batch.interpolations,
            batch.vflips,
            batch.ops.kinds[:, 0],
            batch.ops.args[:, 2],
        ),
        *(batch.erase.boxes[:, 0, 0], batch.erase.keys[:, 0], [mix.lam for mix in batch.mix]),
    ]
    correlations = np.corrcoef(np.array(uses, np.float64)) - np.eye(len(uses))
    assert np.abs(correlations).max() < 0.035


def test_training_drops_the_tail():
    plan = make_plan(101, batch_size=8)
    assert plan.steps_per_epoch == 12
    assert plan.ids(0).shape == (12, 8)


def test_batch_larger_than_data_is_an_error():
    with pytest.raises(UserError, match=r"global batch of 32 .* 20 samples.*batch_size=20"):
        make_plan(20, batch_size=32)


def test_windows_lie_inside_and_do_not_depend_on_the_batch():
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 900, 500), rng.integers(1, 900, 500)
    plan = TrainPlan(heights, widths, TrainRules(), seed=3, img_size=32, batch_size=4)
    ids = np.arange(500)
    windows = plan.windows(5, ids)
    top, left, height, width = windows.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height > 0).all()
    assert (width > 0).all()
    assert (top + height <= heights).all()
    assert (left + width <= widths).all()
    shuffled = rng.permutation(500)
    assert np.array_equal(plan.windows(5, ids[shuffled]), windows[shuffled])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (40, 400)])
def test_windows_have_torchvisions_distribution(height, width):
    """Area share, aspect ratio and position against RandomResizedCrop's own draws (two-sample Kolmogorov-Smirnov)."""
    count = 6000
    plan = TrainPlan(np.full(count, height), np.full(count, width), TrainRules(), seed=1, img_size=32, batch_size=4)
    ours = plan.windows(0, np.arange(count)).astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], dtype=float
    )
    for measure in (
        lambda w: w[:, 2] * w[:, 3],
        lambda w: w[:, 3] / w[:, 2],
        lambda w: w[:, 0],
        lambda w: w[:, 1],
    ):
        assert float(stats.ks_2samp(measure(ours), measure(theirs))[1]) > 1e-4  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333)])
def test_areas_and_aspect_ratios_are_torchvisions_by_chi_square(height, width):
    """Counts in a common grid of areas and of aspect ratios, and of both together."""
    count, bins = 20_000, 12
    plan = TrainPlan(np.full(count, height), np.full(count, width), TrainRules(), seed=4, img_size=32, batch_size=4)
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    draws = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    ours, theirs = plan.windows(0, np.arange(count)).astype(float), np.array(draws, dtype=float)
    (area, aspect), (their_area, their_aspect) = ((w[:, 2] * w[:, 3], w[:, 3] / w[:, 2]) for w in (ours, theirs))
    edges = [np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]) for values in (their_area, their_aspect)]
    cells = [np.searchsorted(edges[0], area), np.searchsorted(edges[1], aspect)]
    their_cells = [np.searchsorted(edges[0], their_area), np.searchsorted(edges[1], their_aspect)]
    for one, other, size in (
        (cells[0], their_cells[0], bins),
        (cells[1], their_cells[1], bins),
        (cells[0] * bins + cells[1], their_cells[0] * bins + their_cells[1], bins * bins),
    ):
        table = np.stack([np.bincount(one, minlength=size), np.bincount(other, minlength=size)])
        table = table[:, table.sum(0) >= 10]
        assert stats.chi2_contingency(table)[1] > 1e-4  # type: ignore[operator]


def test_extreme_images_fall_back_to_a_centre_crop():
    plan = TrainPlan(np.array([10, 1000]), np.array([1000, 10]), TrainRules(), seed=1, img_size=32, batch_size=1)
    wide, tall = plan.windows(0, np.array([0, 1]))
    # A 100:1 image can hold no window of 8 % of its area with an aspect ratio below 4:3.
    assert wide.tolist() == [0, (1000 - 13) // 2, 10, 13]
    assert tall.tolist() == [(1000 - 13) // 2, 0, 13, 10]


def test_flip_probability():
    for probability in (0.0, 0.3, 1.0):
        flips = make_plan(20_000, TrainRules(hflip=probability)).flips(1, np.arange(20_000))
        assert flips.mean() == pytest.approx(probability, abs=0.015)


def test_flips_and_windows_are_independent_of_one_another():
    plan = make_plan(20_000)
    ids = np.arange(20_000)
    correlation = np.corrcoef(plan.flips(0, ids), plan.windows(0, ids)[:, 1])[0, 1]
    assert abs(correlation) < 0.03


def test_mix_follows_its_probabilities():
    rules = TrainRules(mixing=MixRules(mixup=0.8, cutmix=1.0, prob=0.6, switch_prob=0.25))
    plan = make_plan(rules=rules)
    mixes = [plan.mix(epoch, step, NO_IDS)[0] for epoch in range(20) for step in range(200)]
    mixed = [m for m in mixes if m.lam < 1.0]
    assert len(mixed) / len(mixes) == pytest.approx(0.6, abs=0.03)
    assert np.mean([m.is_cutmix for m in mixed]) == pytest.approx(0.25, abs=0.03)
    lams = [m.lam for m in mixed if not m.is_cutmix]
    assert stats.kstest(lams, stats.beta(0.8, 0.8).cdf).pvalue > 1e-4


def test_mix_can_be_off():
    assert make_plan().mix(0, 0, NO_IDS)[0].lam == 1.0
    late = make_plan(rules=TrainRules(mixing=MixRules(mixup=0.8), mixup_off_epoch=3))
    assert late.mix(2, 0, NO_IDS)[0].lam < 1.0
    assert late.mix(3, 0, NO_IDS)[0].lam == 1.0
    assert all(
        not make_plan(rules=TrainRules(mixing=MixRules(mixup=0.8))).mix(0, step, NO_IDS)[0].is_cutmix
        for step in range(50)
    )
    assert all(
        make_plan(rules=TrainRules(mixing=MixRules(cutmix=1.0))).mix(0, step, NO_IDS)[0].is_cutmix for step in range(50)
    )


def test_cut_box_is_timms():
    """Timm draws the box's centre with numpy; give both the same centre."""
    for seed in range(200):
        lam = random.Random(seed).random()
        np.random.seed(seed)
        expected = rand_bbox((1, 3, 224, 224), lam)
        np.random.seed(seed)
        row, column = np.random.randint(0, 224), np.random.randint(0, 224)
        assert cut_box(224, lam, row / 224 + 1e-9, column / 224 + 1e-9) == tuple(int(v) for v in expected)


def test_cutmix_lam_is_the_area_kept():
    plan = make_plan(rules=TrainRules(mixing=MixRules(cutmix=1.0)))
    for step in range(100):
        mix = plan.mix(0, step, NO_IDS)[0]
        top, bottom, left, right = mix.box
        assert mix.lam == 1 - (bottom - top) * (right - left) / 32**2
        assert 0 <= top <= bottom <= 32
        assert 0 <= left <= right <= 32


def test_boxes_between_two_sides_have_timms_distribution():
    plan = make_plan(rules=TrainRules(mixing=MixRules(minmax=(0.2, 0.8))))
    ours = np.array([plan.mix(epoch, step, NO_IDS)[0].box for epoch in range(40) for step in range(100)])
    np.random.seed(0)
    theirs = np.array([[int(v) for v in rand_bbox_minmax((3, 32, 32), (0.2, 0.8))] for _ in range(4000)])
    for measure in (lambda b: b[:, 1] - b[:, 0], lambda b: b[:, 3] - b[:, 2], lambda b: b[:, 0], lambda b: b[:, 2]):
        assert_same_distribution(measure(ours).tolist(), measure(theirs).tolist())


def mixed_in_python(rules: MixRules, side: int, sample_id: int) -> Mix:
    """The draw for one sample in Python's own arithmetic."""
    counter = sample_id, 4, Stream.MIX_SAMPLE
    u_mixed, u_cutmix, u_row, u_column = map(to_unit, philox(np.uint64(7), 0, *counter))
    if u_mixed >= rules.prob:
        return NO_MIX
    alpha = rules.cutmix if rules.minmax is None else 1.0
    is_cutmix = alpha > 0 and (rules.mixup == 0 or u_cutmix < rules.switch_prob)
    lam = float(beta(np.uint64(7), alpha if is_cutmix else rules.mixup, *counter))
    if not is_cutmix:
        return Mix(lam, is_cutmix=False)
    height = width = int(side * math.sqrt(1 - lam))
    row, column = int(u_row * side), int(u_column * side)
    ends = (row - height // 2, row + (height + 1) // 2, column - width // 2, column + (width + 1) // 2)
    if rules.minmax is not None:
        low, high = (int(side * share) for share in rules.minmax)
        u_height, u_width, *_ = map(to_unit, philox(np.uint64(7), 1 << 20, *counter))
        height, width = low + int(u_height * (high - low)), low + int(u_width * (high - low))
        top, left = int(u_row * (side - height + 1)), int(u_column * (side - width + 1))
        ends = (top, top + height, left, left + width)
    top, bottom, left, right = (min(max(end, 0), side) for end in ends)
    return Mix(1 - (bottom - top) * (right - left) / side**2, is_cutmix=True, box=(top, bottom, left, right))


@pytest.mark.parametrize("mode", ["elem", "pair"])
@pytest.mark.parametrize(
    "rules", [MixRules(0.8, 1.0, prob=0.7), MixRules(0.2), MixRules(0.0, 0.3), MixRules(3.0, minmax=(0.2, 0.8))]
)
def test_each_samples_draw_is_that_of_plain_python_to_the_bit(rules, mode):
    plan, ids = make_plan(rules=TrainRules(mixing=replace(rules, mode=mode))), np.arange(10**9, 10**9 + 301)
    expected = [mixed_in_python(rules, 32, i) for i in ids.tolist()]
    if mode == "pair":
        expected = [*expected[:150], NO_MIX, *expected[149::-1]]
    assert list(plan.mix(4, 0, ids)) == expected


def test_both_of_a_pair_are_mixed_alike_and_the_middle_one_stays():
    plan = make_plan(rules=TrainRules(mixing=MixRules(mixup=0.8, cutmix=1.0, mode="pair")))
    for count in (1, 6, 7):
        mixes = plan.mix(0, 0, np.arange(count))
        assert len(mixes) == count
        assert mixes == mixes[::-1]
        assert len({mix.lam for mix in mixes}) == (count + 1) // 2
        assert count % 2 == 0 or mixes[count // 2].lam == 1.0


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_covers_every_sample_once(world_size):
    sizes = np.full(53, 40)
    plans = [
        EvalPlan(sizes, sizes, img_size=32, crop_pct=0.9, batch_size=4, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    seen = np.concatenate([ids for plan in plans for ids in plan.ids(0)])
    assert np.array_equal(np.sort(seen), np.arange(53))


def test_evaluation_crops_are_torchvisions_resize_and_center_crop():
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 700, 200), rng.integers(1, 700, 200)
    for img_size, crop_pct in ((224, 0.9), (33, 0.875), (32, 1.0)):
        resized, corners = center_crops(heights, widths, img_size, crop_pct)
        for n in range(200):
            image = torch.arange(widths[n]).expand(1, heights[n], -1).float()
            expected = Resize(math.floor(img_size / crop_pct), InterpolationMode.NEAREST)(image)
            assert resized[n].tolist() == list(expected.shape[1:])
            columns = torch.arange(resized[n, 1]).expand(1, resized[n, 0], -1)
            assert CenterCrop(img_size)(columns)[0, 0, 0] == corners[n, 1]


def test_evaluation_windows_are_the_crops_in_stored_pixels():
    resized, corners = center_crops(np.array([375, 8]), np.array([500, 8]), 224, 0.9)
    windows = center_windows(np.array([375, 8]), np.array([500, 8]), resized, corners, 224)
    side, top, left = 375 * 224 / 248, 12 * 375 / 248, 53 * 500 / 330
    assert windows[0].tolist() == [round(top), round(left), round(side), round(500 * 224 / 330)]
    assert windows[1].tolist() == [0, 0, 7, 7]


def test_an_evaluation_of_some_samples_cuts_each_as_that_of_all():
    heights, widths = np.array([9, 20, 33, 8, 15, 64]), np.array([30, 8, 33, 9, 12, 8])
    some = np.array([1, 2, 5])
    rules: dict[str, Any] = {"img_size": 8, "crop_pct": 0.9, "batch_size": 2}
    of_all, of_some = EvalPlan(heights, widths, **rules), EvalPlan(heights, widths, samples=some, **rules)
    assert [ids.tolist() for ids in of_some.ids(0)] == [[1, 2], [5]]
    assert of_some.steps_per_epoch == 2
    assert (of_some.batch(0, 0, some[:2]).windows == of_all.batch(0, 0, some[:2]).windows).all()
