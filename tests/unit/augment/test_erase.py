"""Random erasing: boxes with timm's distribution, noise that is normal and the same from numba and torch."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import random_erasing

from lowrank_vit.augment.erase import NORMAL, erase
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.plan.plans import TrainPlan, TrainRules
from lowrank_vit.plan.rectangles import Erase
from tests.distributions import UNLIKELY, assert_same_counts, assert_same_distribution
from tests.unit.augment.test_pipeline import plan_of

SAMPLES = 20_000


def planned(size=48, **rules) -> Erase:
    sides = np.full(SAMPLES, 64)
    plan = TrainPlan(sides, sides, TrainRules(**rules), seed=5, img_size=size, batch_size=1)
    drawn = plan.erase(0, np.arange(SAMPLES))
    assert drawn is not None
    return drawn


def timms_boxes(size: int, monkeypatch: pytest.MonkeyPatch, **options) -> list[list[tuple[int, int, int, int]]]:
    """top, bottom, left, right of the boxes that timm's RandomErasing draws, image by image."""
    boxes: list[tuple[int, int, int, int]] = []

    class Canvas:
        def __setitem__(self, where, value):
            _, rows, columns = where
            boxes.append((rows.start, rows.stop, columns.start, columns.stop))

    monkeypatch.setattr(random_erasing, "_get_pixels", lambda *args, **kwargs: None)
    erasing = random_erasing.RandomErasing(device="cpu", **options)
    random.seed(2)
    found = []
    for _ in range(SAMPLES):
        boxes.clear()
        erasing._erase(Canvas(), 3, size, size, torch.float32)
        found.append(list(boxes))
    return found


@pytest.mark.parametrize("size", [32, 48, 224])
def test_boxes_have_timms_distribution(size, monkeypatch):
    ours = planned(size, reprob=0.7).boxes[:, 0]
    theirs = timms_boxes(size, monkeypatch, probability=0.7)
    is_erased = ours[:, 1] > ours[:, 0]
    count = sum(map(len, theirs))
    assert_same_counts([is_erased.sum(), (~is_erased).sum()], [count, SAMPLES - count])
    ours, others = ours[is_erased], np.array([boxes[0] for boxes in theirs if boxes])
    assert (ours >= 0).all()
    assert (ours <= size).all()
    for measure in (lambda b: b[:, 1] - b[:, 0], lambda b: b[:, 3] - b[:, 2], lambda b: b[:, 0], lambda b: b[:, 3]):
        assert_same_distribution(measure(ours).tolist(), measure(others).tolist())


def test_number_of_boxes_is_timms(monkeypatch):
    boxes = planned(48, reprob=1.0, recount=3).boxes
    theirs = timms_boxes(48, monkeypatch, probability=1.0, max_count=3)
    assert_same_distribution((boxes[:, :, 1] > boxes[:, :, 0]).sum(1).tolist(), [len(boxes) for boxes in theirs])


def augment_of(mode) -> Augment:
    return Augment((120 / 255,) * 3, (60 / 255,) * 3, 10, 0.0, mode)


def by_numba(images_BHWC: np.ndarray, boxes: np.ndarray, keys: np.ndarray, mode) -> np.ndarray:
    """float32 (B, H, W, 3): normalised and erased as a step on a CPU does it."""
    plan = replace(plan_of(TrainRules(), len(boxes), 8), erase=Erase(boxes, keys))
    inputs, *_ = augment_of(mode).begin(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2), plan)
    return inputs.permute(0, 2, 3, 1).numpy()


def both(boxes: np.ndarray, keys: np.ndarray, mode, size: int) -> list[np.ndarray]:
    """float32 (B, size, size, 3) by numba and by torch."""
    images = np.random.default_rng(0).integers(0, 256, (len(boxes), size, size, 3), dtype=np.uint8)
    normalized = augment_of(mode).normalize(torch.from_numpy(images).permute(0, 3, 1, 2))
    by_torch = erase(normalized, torch.from_numpy(boxes), torch.from_numpy(keys.astype(np.int64)), mode, NORMAL)
    return [by_numba(images, boxes, keys, mode), by_torch.permute(0, 2, 3, 1).numpy()]


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_numba_and_torch_erase_alike(mode):
    drawn = planned(40, reprob=0.8, recount=3)
    compiled, tensors = both(drawn.boxes[:50], drawn.keys[:50], mode, 40)
    assert np.array_equal(compiled, tensors)


def test_modes():
    boxes = np.array([[[2, 6, 1, 9], [4, 10, 5, 7]]] * 2, np.int32)
    keys = np.array([[1, 2], [1, 3]], np.uint32)
    plain, _ = both(np.zeros_like(boxes), keys, "const", 12)
    is_inside = np.zeros((12, 12), bool)
    for top, bottom, left, right in boxes[0]:
        is_inside[top:bottom, left:right] = True
    for mode in ("const", "rand", "pixel"):
        erased, _ = both(boxes, keys, mode, 12)
        assert np.array_equal(erased[:, ~is_inside], plain[:, ~is_inside])
        inside = erased[:, is_inside]
        if mode == "const":
            assert not inside.any()
        elif mode == "rand":  # one colour a box, the second box over the first; another colour for another key
            assert len(np.unique(erased[0, 2:6, 1:5].reshape(-1, 3), axis=0)) == 1
            assert len(np.unique(erased[0, 4:10, 5:7].reshape(-1, 3), axis=0)) == 1
            assert len(np.unique(inside.reshape(-1, 3), axis=0)) == 4
        else:
            assert len(np.unique(inside)) == inside.size


def test_noise_is_standard_normal_and_independent():
    size = 64
    boxes = np.tile(np.array([0, size, 0, size], np.int32), (64, 1, 1))
    keys = planned(reprob=1.0).keys[:64]
    noise = by_numba(np.zeros((64, size, size, 3), np.uint8), boxes, keys, "pixel")
    assert float(stats.kstest(noise.ravel(), "norm")[1]) > UNLIKELY  # type: ignore[arg-type]
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert 4 < np.abs(noise).max() < 4.4
    bound = 5 / (noise.size / 3) ** 0.5
    red = noise[..., 0]
    for other in (np.roll(red, 1, 0), np.roll(red, 1, 1), np.roll(red, 1, 2), noise[..., 1], noise[..., 2]):
        assert abs(np.corrcoef(red.ravel(), other.ravel())[0, 1]) < bound


def test_noise_belongs_to_the_sample_not_to_its_place():
    drawn = planned(32, reprob=1.0)
    images = np.zeros((10, 32, 32, 3), np.uint8)
    forward = by_numba(images, drawn.boxes[:10], drawn.keys[:10], "pixel")
    backward = by_numba(images, drawn.boxes[9::-1], drawn.keys[9::-1], "pixel")
    assert np.array_equal(forward, backward[::-1])
