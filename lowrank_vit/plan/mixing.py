"""Draw the mixing of samples: mixup or cutmix, how much, and where.

Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019; in the variant of timm's `Mixup`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numba import njit

from lowrank_vit.common.arguments import (
    NOT_NEGATIVE,
    SHARE,
    check_ascending,
    check_choice,
    check_number,
    check_whole,
)
from lowrank_vit.plan.philox import Word, beta, counter_of, philox, to_unit


@dataclass(frozen=True)
class Mix:
    """How samples are mixed with their partners, which mirror them in the batch: `x * w + x.flip(0) * (1 - w)`.

    `lam` is the share of the first label, corrected to the cut area. `box` is `(top, bottom, left, right)` in pixels of
    the model's input, empty unless cut-mixed; `lam` 1 and an empty box leave samples as they are.
    """

    lam: float
    is_cutmix: bool
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


NO_MIX = Mix(lam=1.0, is_cutmix=False)


@dataclass(frozen=True)
class MixRules:
    """Ranges of the random choices; meanings are those of timm's flags."""

    mixup: float = 0.0
    """Alpha of the Beta distribution that lam comes from; 0: no mixup."""
    cutmix: float = 0.0
    """The same for cutmix."""
    minmax: tuple[float, float] | None = None
    """Least and greatest side of cutmix's box as a share of the image; replaces `cutmix`."""
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"
    block: int = 128
    """Samples of the global batch that share a draw in `batch` mode and have their partners among themselves; 0: all.

    With the batch size of a process of timm's, an update is mixed as timm mixes it.
    """

    def __post_init__(self) -> None:
        """Raise `UserError` for a value outside its range."""
        check_number(NOT_NEGATIVE, mixup=self.mixup, cutmix=self.cutmix)
        check_number(SHARE, prob=self.prob, switch_prob=self.switch_prob)
        check_choice(("batch", "pair", "elem"), mode=self.mode)
        check_whole(NOT_NEGATIVE, block=self.block)
        if self.minmax is not None:
            check_ascending(SHARE, minmax=self.minmax)

    @property
    def is_on(self) -> bool:
        """Whether anything is ever mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.minmax is not None


def draw_mixes(
    rules: MixRules, img_size: int, key: np.uint64, epoch: int, indices: np.ndarray, stream: int
) -> tuple[Mix, ...]:
    """One draw for each of `indices`, int64: steps, or sample ids."""
    low, high = rules.minmax or (-1.0, -1.0)
    of_rules = (
        float(rules.mixup),
        float(rules.cutmix),
        float(low),
        float(high),
        float(rules.prob),
        float(rules.switch_prob),
    )
    lams, is_cutmix, boxes = _draw_mixes(key, epoch, indices, stream, img_size, *of_rules)
    rows = zip(lams.tolist(), is_cutmix.tolist(), map(tuple, boxes.tolist()), strict=True)
    return tuple(Mix(lam, cut, box) if cut or lam < 1.0 else NO_MIX for lam, cut, box in rows)


@njit(cache=True)
def _draw_mixes(
    key: np.uint64,
    epoch: int,
    indices: np.ndarray,
    stream: int,
    img_size: int,
    mixup: float,
    cutmix: float,
    low: float,
    high: float,
    prob: float,
    switch_prob: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float64 (M,) lam, bool (M,) is_cutmix and int64 (M, 4) box; `low` is negative if cutmix has no least side."""
    lams, is_cutmix, boxes = (
        np.ones(len(indices)),
        np.zeros(len(indices), np.bool_),
        np.zeros((len(indices), 4), np.int64),
    )
    alpha = cutmix if low < 0 else 1.0
    for n in range(len(indices)):
        index, use = counter_of(indices[n], stream)
        u_mixed, u_cutmix, u_row, u_column = _uniforms(key, 0, index, epoch, use)
        if u_mixed >= prob:
            continue
        is_cutmix[n] = alpha > 0 and (mixup == 0 or u_cutmix < switch_prob)
        lams[n] = beta(key, alpha if is_cutmix[n] else mixup, index, epoch, use)
        if not is_cutmix[n]:
            continue
        if low < 0:
            box = cut_box(img_size, lams[n], u_row, u_column)
        else:
            # The draw counter far from those that `beta` may have used.
            u_height, u_width, _, _ = _uniforms(key, 1 << 20, index, epoch, use)
            box = minmax_box(img_size, low, high, u_height, u_width, u_row, u_column)
        boxes[n, 0], boxes[n, 1], boxes[n, 2], boxes[n, 3] = box
        area = (box[1] - box[0]) * (box[3] - box[2])
        lams[n] = 1.0 - area / img_size**2
    return lams, is_cutmix, boxes


@njit(cache=True)
def cut_box(img_size: int, lam: float, u_row: float, u_column: float) -> tuple[int, int, int, int]:
    """CutMix's box, (top, bottom, left, right) clipped to the image, as timm's `rand_bbox` (Yun et al., ICCV 2019)."""
    cut = int(img_size * math.sqrt(1.0 - lam))
    row, column = int(u_row * img_size), int(u_column * img_size)
    top, bottom = max(row - cut // 2, 0), min(row + (cut + 1) // 2, img_size)
    left, right = max(column - cut // 2, 0), min(column + (cut + 1) // 2, img_size)
    return top, bottom, left, right


@njit(cache=True)
def minmax_box(
    img_size: int, least: float, most: float, u_height: float, u_width: float, u_row: float, u_column: float
) -> tuple[int, int, int, int]:
    """CutMix's box with sides between two shares of the image, as timm's `rand_bbox_minmax`."""
    low, high = int(img_size * least), int(img_size * most)
    height, width = low + int(u_height * (high - low)), low + int(u_width * (high - low))
    top, left = int(u_row * (img_size - height + 1)), int(u_column * (img_size - width + 1))
    return top, top + height, left, left + width


@njit(cache=True)
def _uniforms(key: np.uint64, draw: int, index: Word, epoch: int, stream: Word) -> tuple[float, float, float, float]:
    w0, w1, w2, w3 = philox(key, draw, index, epoch, stream)
    return to_unit(w0), to_unit(w1), to_unit(w2), to_unit(w3)
