"""What a plan does not take is told by the argument's name, when the plan is made and when it is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.plan.mixing import MixRules
from lowrank_vit.plan.plans import EvalPlan, TrainPlan, TrainRules

IMAGES = SimpleNamespace(heights=np.full(20, 40), widths=np.full(20, 48))
BOTH = (TrainPlan, EvalPlan)
NOT_WHOLE = (0, -1, "8", 2.5, None)


def make(plan: Any, images: Any = IMAGES, **arguments: Any) -> Any:
    return plan.of(images, **{"img_size": 32, "batch_size": 8, **arguments})


@pytest.mark.parametrize(
    ("plan", "name", "values"),
    [
        *((plan, name, NOT_WHOLE) for plan in BOTH for name in ("batch_size", "world_size")),
        *((plan, "img_size", (*NOT_WHOLE, (32, 32))) for plan in BOTH),
        *((plan, "rank", (-1, 1, 2, "0", 0.0, None)) for plan in BOTH),
        (EvalPlan, "crop_pct", (0, -1, "1", float("nan"), None)),
        (TrainPlan, "accum_steps", NOT_WHOLE),
        (TrainPlan, "seed", (-1, 2**64, 1.5, "1", None)),
        (TrainPlan, "scale", ((1, 0.5), (0, 1), (0.5, 1.5), 0.5, (0.5,), None, "ab")),
        (TrainPlan, "ratio", ((0, 1), (2, 1), 1, (1, float("inf")), None)),
        *((TrainPlan, name, (2, -1, -0.1, "0.5", float("nan"), None)) for name in ("hflip", "reprob")),
        *((TrainPlan, name, (-1, "1", float("inf"), None)) for name in ("mixup", "cutmix")),
        (TrainPlan, "aa", (None, 9, ["rand-m9"])),
    ],
)
def test_an_argument_outside_its_range_is_named(plan, name, values):
    for value in values:
        with pytest.raises(UserError, match=rf"^{name} takes .*, not ") as raised:
            make(plan, **{name: value})
        assert "--" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"aa": "nope"}, "aa=nope: `nope` is not known.*For none, aa=none"),
        ({"aa": "rand-n15-t3aw"}, "aa=rand-n15-t3aw: n is 15"),
        ({"batch_size": 21}, "Use batch_size=20 or less"),
        ({"batch_size": 1, "accum_steps": 30}, "Use fewer accum_steps than 30"),
        ({"batch_size": 1, "mixup": 0.5}, "batch_size=1 has none"),
    ],
)
def test_a_library_is_not_told_of_flags(arguments, told):
    with pytest.raises(UserError, match=told) as raised:
        make(TrainPlan, **arguments)
    assert "--" not in str(raised.value)


@pytest.mark.parametrize("plan", BOTH)
def test_images_without_sizes_are_refused(plan):
    for images in ("train.beton", None, IMAGES.heights):
        with pytest.raises(UserError, match=r"^images takes a Beton"):
            make(plan, images)
    for heights in (np.zeros(20, int), np.ones(20), np.ones((20, 1), int), np.ones(19, int)):
        with pytest.raises(UserError, match=r"^images\.(heights|widths) takes whole numbers of pixels"):
            make(plan, SimpleNamespace(heights=heights, widths=IMAGES.widths))


@pytest.mark.parametrize("plan", BOTH)
def test_batches_that_there_are_not_are_refused(plan):
    made = make(plan)
    ids = made.ids(0)[0]
    for epoch in (-1, 2**32, "a", 0.0, None):
        with pytest.raises(UserError, match=r"^epoch takes a whole number from 0 to 4294967295"):
            made.ids(epoch)
        with pytest.raises(UserError, match=r"^epoch takes"):
            made.batch(epoch, 0, ids)
    for step in (-1, made.steps_per_epoch, 10**6, "0", None):
        with pytest.raises(UserError, match=f"^step takes a whole number below steps_per_epoch={made.steps_per_epoch}"):
            made.batch(0, step, ids)
    for wrong in (ids - 100, ids + 100, ids.tolist(), ids.astype(float), ids[None], 3, None):
        with pytest.raises(UserError, match=r"^ids takes a row of ids\(epoch\): whole numbers below 20"):
            made.batch(0, 0, wrong)


@pytest.mark.parametrize(
    "make_rules",
    [
        lambda: TrainRules(vflip=2),
        lambda: TrainRules(recount=0),
        lambda: TrainRules(mixup_off_epoch=-1),
        lambda: MixRules(prob=2),
        lambda: MixRules(switch_prob=-1),
        lambda: MixRules(minmax=(0.5, 0.1)),
        lambda: MixRules(block=-1),
        lambda: MixRules(mode="all"),  # type: ignore[arg-type]
    ],
)
def test_rules_outside_their_ranges_are_refused(make_rules):
    with pytest.raises(UserError, match="takes"):
        make_rules()
