"""What the plan draws for random erasing: boxes, and a key for the noise inside them.

Zhong et al., "Random erasing data augmentation", AAAI 2020, in the variant of timm's `RandomErasing`: area uniform in
[0.02, 1/3] of the image (shared among the boxes), aspect ratio log-uniform in [0.3, 1/0.3], ten attempts a box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from lowrank_vit.plan.philox import philox, to_below, to_unit

MIN_AREA, MAX_AREA, MIN_ASPECT = 0.02, 1 / 3, 0.3
ATTEMPTS = 10


@dataclass(frozen=True)
class Erase:
    """Rectangles to erase in each of B images, later ones over earlier ones."""

    boxes: np.ndarray
    """int32 (B, K, 4): top, bottom, left, right in pixels of the model's input; empty where there is none."""
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
        w0, w1, w2, w3 = philox(key, 0, ids[n], epoch, stream)
        keys[n, 0], keys[n, 1] = w2, w3
        if to_unit(w0) >= prob:
            continue
        count = 1 + to_below(w1, max_count)
        for box in range(count):
            for attempt in range(ATTEMPTS):
                w0, w1, w2, w3 = philox(key, 1 + box * ATTEMPTS + attempt, ids[n], epoch, stream)
                area = (MIN_AREA + (MAX_AREA - MIN_AREA) * to_unit(w0)) * height * width / count
                aspect = math.exp(log_aspect * (2 * to_unit(w1) - 1))
                h, w = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
                if h < height and w < width:
                    top, left = to_below(w2, height - h + 1), to_below(w3, width - w + 1)
                    boxes[n, box] = np.array([top, top + h, left, left + w])
                    break
    return boxes, keys
