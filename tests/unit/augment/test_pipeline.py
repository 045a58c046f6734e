"""The whole of augmentation against timm: order, normalising, mixing and label smoothing."""

from __future__ import annotations

import numpy as np
import pytest
import timm.data.mixup
import torch
from PIL import Image, ImageOps
from skimage import data as skimage_data
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torchvision.transforms.functional import normalize, to_tensor

from lowrank_vit.augment import ops
from lowrank_vit.augment.erase import NORMAL, erase
from lowrank_vit.augment.mixing import mix_images, mix_targets, mix_to_tensor
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common.errors import UserError
from lowrank_vit.plan.mixing import NO_MIX, Mix, MixRules
from lowrank_vit.plan.operations import Kind, parse_policy
from lowrank_vit.plan.plans import TrainPlan, TrainRules
from tests.unit.augment.test_ops import in_pil


class FixedMixup(timm.data.mixup.Mixup):
    """timm's Mixup with the draws replaced by given ones."""

    def __init__(self, mixes: list[Mix], mode: str) -> None:
        super().__init__(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10, mode=mode)
        self._mixes = mixes

    def _params_per_batch(self):
        return self._mixes[0].lam, self._mixes[0].is_cutmix

    def _params_per_elem(self, batch_size):
        assert batch_size == len(self._mixes)
        return np.array([m.lam for m in self._mixes], np.float32), np.array([m.is_cutmix for m in self._mixes])


def timms(images, targets, mixes, mode, monkeypatch):
    """Timm's mixed images and targets for given lambdas and boxes."""
    boxes = iter([(mix.box, mix.lam) for mix in mixes if mix.is_cutmix])
    monkeypatch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", lambda *args, **kwargs: next(boxes))
    return FixedMixup(mixes, mode)(images.clone(), targets)


MIXES = [
    Mix(0.3, is_cutmix=False),
    Mix(1 - 6 * 9 / 256, is_cutmix=True, box=(2, 8, 0, 9)),
    Mix(0.0, is_cutmix=False),
    Mix(1 - 16 * 3 / 256, is_cutmix=True, box=(0, 16, 13, 16)),
    NO_MIX,
    Mix(0.99, is_cutmix=False),
]


@pytest.mark.parametrize(
    ("mode", "drawn", "mixes"),
    [
        *(("batch", [mix], [mix]) for mix in MIXES),
        ("elem", MIXES, MIXES),
        ("pair", MIXES[:3], MIXES[:3] + MIXES[2::-1]),
        ("pair", MIXES[3:], MIXES[3:] + MIXES[:2:-1]),
    ],
)
def test_mixing_is_timms(mode, drawn, mixes, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    targets = torch.randint(0, 10, (6,), generator=generator)
    expected_images, expected_targets = timms(images, targets, drawn, mode, monkeypatch)
    vector = mix_to_tensor(mixes)
    torch.testing.assert_close(mix_images(images, vector), expected_images, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mix_targets(targets, 10, 0.1, vector), expected_targets, rtol=1e-6, atol=1e-7)


def test_no_mix_leaves_every_bit():
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(mix_images(images, mix_to_tensor([NO_MIX])), images)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_sum_to_one(mode, smoothing):
    sides = np.full(50, 32)
    rules = TrainRules(mixing=MixRules(mixup=0.8, cutmix=1.0, mode=mode))
    mixes = TrainPlan(sides, sides, rules, seed=1, img_size=32, batch_size=9).mix(0, 0, np.arange(9))
    soft = mix_targets(torch.randint(0, 10, (9,)), 10, smoothing, mix_to_tensor(mixes))
    torch.testing.assert_close(soft.sum(1), torch.ones(9))
    assert (soft >= 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_targets_sum_to_one_and_give_timms_smoothed_loss(smoothing):
    logits, targets = torch.randn(7, 10), torch.randint(0, 10, (7,))
    soft = mix_targets(targets, 10, smoothing, mix_to_tensor([NO_MIX]))
    torch.testing.assert_close(soft.sum(1), torch.ones(7))
    torch.testing.assert_close(
        SoftTargetCrossEntropy()(logits, soft), LabelSmoothingCrossEntropy(smoothing)(logits, targets)
    )


def test_normalise_is_to_tensor_then_normalize():
    from torchvision.transforms.v2.functional import to_dtype

    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 5, 5), dtype=np.uint8))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = normalize(to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    torch.testing.assert_close(Augment(mean, std, 10, 0.1).normalize(images), expected, rtol=1e-5, atol=1e-5)


def photographs(count, size):
    """uint8 (count, size, size, 3) crops of the photographs that scikit-image ships."""
    sources = [skimage_data.astronaut(), skimage_data.chelsea(), skimage_data.coffee(), skimage_data.rocket()]
    corners = np.random.default_rng(0).integers(0, 300 - size, (count, 2))
    return np.stack([sources[n % 4][y : y + size, x : x + size] for n, (y, x) in enumerate(corners)])


def plan_of(rules, count, size):
    sides = np.full(max(count, 1), size)
    plan = TrainPlan(sides, sides, rules, seed=11, img_size=size, batch_size=count)
    return plan.batch(3, 0, np.arange(count))


def drawn_as_tensors(plan):
    """What `Augment.begin` sends to a GPU: mix, boxes, keys."""
    boxes, keys = torch.from_numpy(plan.erase.boxes), torch.from_numpy(plan.erase.keys.astype(np.int64))
    return mix_to_tensor(plan.mix), boxes, keys


def finished(augment, images, plan, labels=None):
    """The model's input and the soft targets, as the step makes them."""
    images, *drawn = augment.begin(images, plan)
    return augment(images, torch.zeros(len(images), dtype=torch.long) if labels is None else labels, *drawn)


FULL = TrainRules(
    vflip=0.5, policy=parse_policy("rand-m9-mstd0.5-inc1"), color_jitter=(0.4, 0.4, 0.4), reprob=0.5, recount=2
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(("count", "size"), [(1, 32), (7, 48), (24, 224)])
def test_the_whole_chain_is_pils_and_timms_one_image_at_a_time(count, size):
    """Vertical flip, policy, jitter, normalising, erasing: in timm's order, with the plan's parameters."""
    photos = photographs(count, size)
    plan = plan_of(FULL, count, size)
    assert plan.vflips is not None
    assert plan.ops is not None
    assert plan.erase is not None
    images = torch.from_numpy(photos.copy()).permute(0, 3, 1, 2)
    augment = Augment(MEAN, STD, 10, 0.1, "const")
    prepared = augment.prepare(images, plan)
    assert prepared.dtype == torch.uint8
    found, _ = finished(augment, prepared, plan)
    for n in range(count):
        pixels = photos[n]
        if plan.vflips[n]:
            pixels = np.asarray(ImageOps.flip(Image.fromarray(pixels)))
        for kind, arg, interpolation in zip(
            plan.ops.kinds[n], plan.ops.args[n], plan.ops.interpolations[n], strict=True
        ):
            if kind:
                pixels = in_pil(pixels, Kind(kind), arg, interpolation)
        expected = normalize(to_tensor(pixels.copy()), list(MEAN), list(STD))
        for top, bottom, left, right in plan.erase.boxes[n]:
            expected[:, top:bottom, left:right] = 0
        # One level of a geometric operation may be multiplied by the next operation, on few pixels.
        error = (found[n] - expected).abs() * 255 * max(STD)
        assert error.mean() < 0.05
        assert error.quantile(0.99) < 3


@pytest.mark.parametrize("erase_first", [False, True])
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_mixed_images_are_erased_as_timm_does_it_with_its_prefetcher(mode, erase_first, monkeypatch):
    """Its `FastCollateMixup` comes before erasing; without the prefetcher `Mixup` comes behind it."""
    mixing = MixRules(mixup=0.8, cutmix=1.0, mode=mode)
    photos, labels = photographs(8, 32), torch.arange(8)
    images = torch.from_numpy(photos).permute(0, 3, 1, 2)
    augment = Augment(MEAN, STD, 10, 0.1, "const", erase_first=erase_first)
    is_cutmix = set[bool]()
    for epoch in range(12):
        sides = np.full(8, 32)
        plan = TrainPlan(sides, sides, TrainRules(reprob=0.5, mixing=mixing), seed=1, img_size=32, batch_size=8)
        batch = plan.batch(epoch, 0, np.arange(8))
        assert batch.erase is not None
        is_inside = torch.zeros(8, 1, 32, 32, dtype=torch.bool)
        for n, (top, bottom, left, right) in enumerate(batch.erase.boxes[:, 0]):
            is_inside[n, :, top:bottom, left:right] = True
        expected = augment.normalize(images).masked_fill(is_inside, 0) if erase_first else augment.normalize(images)
        expected, soft = timms(expected, labels, list(batch.mix), mode, monkeypatch)
        expected = expected if erase_first else expected.masked_fill(is_inside, 0)
        found = finished(augment, images, batch, labels)
        torch.testing.assert_close(found, (expected, soft), rtol=1e-5, atol=1e-5)
        by_torch = augment(images, labels, *drawn_as_tensors(batch))
        assert all(map(torch.equal, by_torch, found))
        is_cutmix |= {mix.is_cutmix for mix in batch.mix}
    assert is_cutmix == {False, True}


@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
def test_the_tensor_code_for_gpus_gives_what_the_cpu_code_gives(remode):
    photos, plan = photographs(16, 64), plan_of(FULL, 16, 64)
    augment = Augment(MEAN, STD, 10, 0.1, remode)
    by_numba, _ = finished(augment, augment.prepare(torch.from_numpy(photos.copy()).permute(0, 3, 1, 2), plan), plan)
    assert plan.vflips is not None
    assert plan.ops is not None
    assert plan.erase is not None
    images_BHWC = torch.from_numpy(np.where(plan.vflips[:, None, None, None], photos[:, ::-1], photos))
    ops.apply_ops(images_BHWC, plan.ops, augment.fill)
    normalized = augment.normalize(images_BHWC.permute(0, 3, 1, 2))
    keys = torch.from_numpy(plan.erase.keys.astype(np.int64))
    by_torch = erase(normalized, torch.from_numpy(plan.erase.boxes), keys, remode, NORMAL)
    error = (by_numba - by_torch).abs()
    # A level, where float32 sums of the two fall on either side of a whole number.
    assert error.max() < 3 / 255 / min(STD)
    assert (error > 1e-4).float().mean() < 1e-3


@pytest.mark.parametrize("erase_first", [False, True])
@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
def test_what_is_erased_on_a_gpu_is_what_a_cpu_erases(remode, erase_first, on_cuda_path):
    """There the step erases, by tensor code, what here a pass of numba does before it."""
    rules = TrainRules(reprob=0.6, recount=2, mixing=MixRules(mixup=0.8, cutmix=1.0))
    plan, images = plan_of(rules, 9, 48), torch.from_numpy(photographs(9, 48)).permute(0, 3, 1, 2)
    augment = Augment(MEAN, STD, 10, 0.1, remode, erase_first=erase_first)
    expected = augment.inputs(images, torch.arange(9), plan)
    with on_cuda_path():
        assert augment.begin(images, plan)[0] is images
        found = augment.inputs(images, torch.arange(9), plan)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_nothing_planned_is_nothing_done():
    images = torch.from_numpy(photographs(3, 32).copy()).permute(0, 3, 1, 2)
    assert Augment(MEAN, STD, 10, 0.1).prepare(images, plan_of(TrainRules(), 3, 32)) is images


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x.float(), "takes uint8 images .* got torch.float32"),
        (lambda x: x.contiguous(), "takes channels_last images"),
        (lambda x: x[:, :1], r"\(B, 3, H, W\), got .*\(4, 1, 32, 32\)"),
        (lambda x: x[0], r"got .*\(3, 32, 32\)"),
    ],
)
def test_another_dtype_or_layout_is_an_error(wrong, message):
    images = torch.from_numpy(photographs(4, 32).copy()).permute(0, 3, 1, 2)
    with pytest.raises(UserError, match=message):
        Augment(MEAN, STD, 10, 0.1).prepare(wrong(images), plan_of(FULL, 4, 32))


def test_images_that_are_normalised_already_are_refused_by_the_steps_half():
    images = torch.zeros(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with pytest.raises(UserError, match=r"torch\.float32, expected torch\.uint8"):
        Augment(MEAN, STD, 10, 0.1).inputs(images, torch.zeros(4, dtype=torch.int64), plan_of(FULL, 4, 32))
