"""Several models in one pass over the data score as each alone, and differences are paired by sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.batch import Batch
from lowrank_vit.lowrank.curve import SampleScores, copy_of
from lowrank_vit.lowrank.images import score_models
from lowrank_vit.plan.plans import EvalPlan
from lowrank_vit.score.evaluate import Evaluator

SIDE, CLASSES = 4, 5


class Batches:
    """Random images with labels, in batches of which the last is short."""

    def __init__(self, count: int, batch_size: int = 4) -> None:
        made = torch.Generator().manual_seed(3)
        self.images = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=made, dtype=torch.uint8)
        self.targets = torch.randint(0, CLASSES, (count,), generator=made)
        sizes = np.full(count, SIDE)
        self._plan = EvalPlan(sizes, sizes, img_size=SIDE, crop_pct=1.0, batch_size=batch_size)

    def batches(self, epoch: int):
        for step, ids in enumerate(self._plan.ids(0)):
            yield Batch(self.images[ids], self.targets[ids], self._plan.batch(0, step, ids))


def models(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES), nn.Dropout(0.5)) for _ in range(count)]


def test_several_models_score_as_each_alone():
    augment, loader = Augment((0.5,) * 3, (0.5,) * 3, CLASSES), Batches(10)
    several = models(3)
    for model, found in zip(several, score_models(several, loader.batches(0), augment.normalize), strict=True):
        alone = Evaluator(model, augment, amp=False, compile=False)(loader, 4)
        assert (found.loss, found.top1) == (pytest.approx(alone.loss, rel=1e-6), pytest.approx(alone.top1))
        assert len(found.losses_N) == len(found.hits_N) == 10


def test_no_sample_is_an_error():
    with pytest.raises(UserError, match="no sample to score"):
        score_models(models(2), iter(()), lambda images: images)


def test_differences_are_paired_by_sample():
    losses = torch.tensor([[1.0, 2.0, 6.0], [1.5, 2.5, 6.2]], dtype=torch.float64)
    before = SampleScores(losses[0], torch.tensor([True, True, False]))
    after = SampleScores(losses[1], torch.tensor([True, False, False]))
    than = after.than(before)
    assert than.loss == pytest.approx(0.4)
    assert than.loss_error == pytest.approx(np.std([0.5, 0.5, 0.2], ddof=1) / math.sqrt(3))  # 10 times less than of 6-1
    assert than.top1 == pytest.approx(-100 / 3)
    assert than.top1_error == pytest.approx(np.std([0, -100, 0], ddof=1) / math.sqrt(3))
    itself = before.than(before)
    assert (itself.loss, itself.loss_error, itself.top1, itself.top1_error) == (0, 0, 0, 0)
    one = SampleScores(losses[0, :1], torch.tensor([True]))
    assert math.isnan(one.than(one).loss_error)


def test_a_copy_shares_its_parameters_and_not_its_modules():
    (model,) = models(1)
    copied = copy_of(model)
    assert [a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True)] == [True, True]
    copied.set_submodule("1", nn.Identity())
    assert isinstance(model.get_submodule("1"), nn.Linear)
