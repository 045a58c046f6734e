"""Normalising, mixing and label smoothing against timm."""

from __future__ import annotations

import numpy as np
import pytest
import timm.data.mixup
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from lowrank_vit.augment.mix import mix_images, mix_targets, mix_to_tensor
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.data.plan_mix import NO_MIX, Mix


class FixedMixup(timm.data.mixup.Mixup):
    """timm's Mixup with the draw replaced by a given one."""

    def __init__(self, lam: float, use_cutmix: bool) -> None:
        super().__init__(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
        self._fixed = (lam, use_cutmix)

    def _params_per_batch(self):
        return self._fixed


def timms(images, targets, lam, box):
    """Timm's mixed images and targets for a given lambda and box (None: mixup)."""
    mixup = FixedMixup(lam, use_cutmix=box is not None)
    if box is None:
        return mixup(images.clone(), targets)
    original = timm.data.mixup.cutmix_bbox_and_lam
    timm.data.mixup.cutmix_bbox_and_lam = lambda *args, **kwargs: (box, lam)
    try:
        return mixup(images.clone(), targets)
    finally:
        timm.data.mixup.cutmix_bbox_and_lam = original


@pytest.mark.parametrize(
    "mix",
    [Mix(0.3, is_cutmix=False), Mix(0.0, is_cutmix=False), Mix(1 - 6 * 9 / 256, is_cutmix=True, box=(2, 8, 0, 9))],
)
def test_mixing_is_timms(mix):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    targets = torch.randint(0, 10, (6,), generator=generator)
    expected_images, expected_targets = timms(images, targets, mix.lam, mix.box if mix.is_cutmix else None)
    vector = mix_to_tensor([mix])
    torch.testing.assert_close(mix_images(images, vector), expected_images, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mix_targets(targets, 10, 0.1, vector), expected_targets, rtol=1e-6, atol=1e-7)


def test_no_mix_leaves_every_bit():
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(mix_images(images, mix_to_tensor([NO_MIX])), images)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_targets_sum_to_one_and_give_timms_smoothed_loss(smoothing):
    logits, targets = torch.randn(7, 10), torch.randint(0, 10, (7,))
    soft = mix_targets(targets, 10, smoothing, mix_to_tensor([NO_MIX]))
    torch.testing.assert_close(soft.sum(1), torch.ones(7))
    torch.testing.assert_close(
        SoftTargetCrossEntropy()(logits, soft), LabelSmoothingCrossEntropy(smoothing)(logits, targets)
    )


def test_normalise_is_to_tensor_then_normalize():
    from torchvision.transforms.v2.functional import normalize, to_dtype

    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 5, 5), dtype=np.uint8))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = normalize(to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    torch.testing.assert_close(Augment(mean, std, 10, 0.1).normalize(images), expected, rtol=1e-5, atol=1e-5)
