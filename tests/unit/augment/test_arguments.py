"""What `Augment` does not take is told: its own arguments, and images and labels that are no batch of the plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common.errors import UserError
from lowrank_vit.plan.plans import TrainPlan, TrainRules

B = 4


def make(**arguments: Any) -> Augment:
    return Augment(**{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "num_classes": 3, **arguments})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mean", ((0.5,), 0.5, None, (123.7, 116.3, 103.5), (-0.1, 0, 0), "abc")),
        ("std", ((0, 0, 0), (0.5, 0.5), (58.4, 57.1, 57.4), (0.5, 0.5, float("nan")), None)),
        ("num_classes", (0, -1, "3", 2.5, None)),
        ("smoothing", (2, 1, -1, "0.1", None)),
        ("remode", ("zz", "", None, 1)),
        ("erase_first", (3, None, "yes")),
    ],
)
def test_an_argument_outside_its_range_is_named(name, values):
    for value in values:
        with pytest.raises(UserError, match=rf"^{name} takes .*, not "):
            make(**{name: value})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x, y: (x.float(), y), "torch.float32,? .*uint8|uint8 .*torch.float32"),
        (lambda x, y: (x[0], y), "takes uint8 images"),
        (lambda x, y: (x[:, :1], y), "takes uint8 images"),
        (lambda x, y: (x.contiguous(), y), "takes channels_last images"),
        (lambda x, y: (x[:3], y), "have 3, 4 and 4 samples"),
        (lambda x, y: (x, y[:3]), "have 4, 3 and 4 samples"),
        (lambda x, y: (x[:3], y[:3]), "have 3, 3 and 4 samples"),
        (
            lambda x, y: (x, torch.nn.functional.one_hot(y, 3)),
            r"int64 labels \(B,\), got torch.int64 \(4, 3\)",
        ),
        (lambda x, y: (x, y.float()), "got torch.float32"),
        (lambda x, y: (x, y.to("meta")), "are on cpu, meta and cpu"),
        (lambda x, y: (x, y + 1), "labels from 1 to 3, but num_classes is 3: labels are 0 to 2"),
        (lambda x, y: (x, y - 1), "labels from -1 to 1, but"),
    ],
)
@pytest.mark.parametrize("reprob", [0.0, 0.5])
def test_what_is_no_batch_of_the_plan_is_refused(change, told, reprob):
    sides = np.full(B, 8)
    plan = TrainPlan(sides, sides, TrainRules(reprob=reprob), seed=1, img_size=8, batch_size=B)
    batch = plan.batch(0, 0, plan.ids(0)[0])
    images = torch.zeros(B, 8, 8, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.tensor([0, 1, 2, 0])
    assert make().inputs(images, labels, batch)[0].shape == images.shape
    changed: Any = change(images, labels)
    with pytest.raises(UserError, match=told):
        make().inputs(changed[0], changed[1], batch)
    if changed[1] is labels and len(changed[0]) == B:
        with pytest.raises(UserError, match=told):
            make().prepare(changed[0], batch)


def test_normalize_takes_pixels_alone():
    with pytest.raises(UserError, match=r"images to normalize are torch.float32, expected torch.uint8"):
        make().normalize(torch.zeros(1, 3, 8, 8))
