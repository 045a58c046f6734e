"""Rectangles of random area and aspect ratio: crop windows, as in torchvision and timm, and boxes to erase.

In evaluation the window is the centre. Erasing: Zhong et al., "Random erasing data augmentation", AAAI 2020, in the
variant of timm's `RandomErasing`: area uniform in [0.02, 1/3] of the image (shared among the boxes), aspect ratio
log-uniform in [0.3, 1/0.3], ten attempts a box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from lowrank_vit.plan.philox import counter_of, philox, to_below, to_unit

ATTEMPTS = 10
"""Attempts for each window and box, as in timm and torchvision."""
MIN_AREA, MAX_AREA, MIN_ASPECT = 0.02, 1 / 3, 0.3


@dataclass(frozen=True)
class CenterCrops:
    """Evaluation crops of B images, as timm makes them: resize the whole image, then cut out the middle."""

    resized: np.ndarray
    """int32 (B, 2): height and width to which the whole image is resized, pixels."""
    corners: np.ndarray
    """int32 (B, 2): top and left of the square cut out of that."""


def center_crops(
    heights: np.ndarray, widths: np.ndarray, img_size: int, crop_pct: float
) -> tuple[np.ndarray, np.ndarray]:
    """int32 (N, 2) each, (height, width) and (top, left): timm's evaluation resize and centre crop.

    The short side becomes floor(img_size / crop_pct), the long one is truncated (torchvision `Resize`), and the corner
    is rounded half to even (torchvision `CenterCrop`).
    """
    sides = np.stack([heights, widths], axis=1).astype(np.int64)
    short = sides.min(1, keepdims=True)
    resized = math.floor(img_size / crop_pct) * sides // short
    return resized.astype(np.int32), np.rint((resized - img_size) / 2).astype(np.int32)


def center_windows(
    heights: np.ndarray, widths: np.ndarray, resized: np.ndarray, corners: np.ndarray, img_size: int
) -> np.ndarray:
    """int32 (N, 4): the stored pixels that `center_crops` keeps, top, left, height, width, rounded to whole ones."""
    sides = np.stack([heights, widths], axis=1).astype(np.float64)
    scale = sides / resized
    low = np.rint(corners * scale)
    size = np.maximum(1, np.minimum(np.rint(img_size * scale), sides - low))
    return np.concatenate([low, size], axis=1).astype(np.int32)


@njit(cache=True)
def crop_windows(
    key: np.uint64,
    epoch: int,
    stream: int,
    ids: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale_min: float,
    scale_max: float,
    ratio_min: float,
    ratio_max: float,
) -> np.ndarray:
    """Torchvision's RandomResizedCrop.get_params: ten attempts, one Philox block each, then a centre crop."""
    log_min, log_max = math.log(ratio_min), math.log(ratio_max)
    windows = np.empty((len(ids), 4), np.int32)
    for n in range(len(ids)):
        height, width = heights[n], widths[n]
        top, left, h, w = 0, 0, 0, 0
        id_, use = counter_of(ids[n], stream)
        for attempt in range(ATTEMPTS):
            w0, w1, w2, w3 = philox(key, attempt, id_, epoch, use)
            area = height * width * (scale_min + (scale_max - scale_min) * to_unit(w0))
            aspect = math.exp(log_min + (log_max - log_min) * to_unit(w1))
            w = int(round(math.sqrt(area * aspect)))
            h = int(round(math.sqrt(area / aspect)))
            if 0 < w <= width and 0 < h <= height:
                top, left = to_below(w2, height - h + 1), to_below(w3, width - w + 1)
                break
        else:
            h, w = height, width
            if width / height < ratio_min:
                h = min(height, int(round(width / ratio_min)))
            elif width / height > ratio_max:
                w = min(width, int(round(height * ratio_max)))
            top, left = (height - h) // 2, (width - w) // 2
        windows[n, 0], windows[n, 1], windows[n, 2], windows[n, 3] = top, left, h, w
    return windows


@dataclass(frozen=True)
class Erase:
    """Rectangles to erase in each of B images, later ones over earlier ones."""

    boxes: np.ndarray
    """int32 (B, K, 4): top, bottom, left, right in pixels of the model's input; a box of no pixels if there is none."""
    keys: np.ndarray
    """uint32 (B, 2): key of each sample's noise, see `lowrank_vit.augment.erase`."""


@njit(cache=True)
def draw_erase_boxes(
    key: np.uint64, epoch: int, ids: np.ndarray, stream: int, prob: float, max_count: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """(boxes int32 (B, max_count, 4), keys uint32 (B, 2)) for images of `height` x `width` pixels."""
    boxes = np.zeros((len(ids), max_count, 4), np.int32)
    keys = np.zeros((len(ids), 2), np.uint32)
    log_aspect = math.log(1 / MIN_ASPECT)
    for n in range(len(ids)):
        id_, use = counter_of(ids[n], stream)
        w0, w1, w2, w3 = philox(key, 0, id_, epoch, use)
        keys[n, 0], keys[n, 1] = w2, w3
        if to_unit(w0) >= prob:
            continue
        count = 1 + to_below(w1, max_count)
        for box in range(count):
            for attempt in range(ATTEMPTS):
                w0, w1, w2, w3 = philox(key, 1 + box * ATTEMPTS + attempt, id_, epoch, use)
                area = (MIN_AREA + (MAX_AREA - MIN_AREA) * to_unit(w0)) * height * width / count
                aspect = math.exp(log_aspect * (2 * to_unit(w1) - 1))
                h, w = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
                if h < height and w < width:
                    top, left = to_below(w2, height - h + 1), to_below(w3, width - w + 1)
                    boxes[n, box] = np.array([top, top + h, left, left + w])
                    break
    return boxes, keys
