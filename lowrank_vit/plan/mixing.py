"""What the plan draws for mixing: mixup or cutmix, how much, and where.

Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019; in the variant of timm's `Mixup`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numba import njit

from lowrank_vit.plan.philox import beta, philox, to_unit


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
    """The same of cutmix."""
    minmax: tuple[float, float] | None = None
    """Least and greatest side of cutmix's box as a share of the image; replaces `cutmix`."""
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"
    block: int = 128
    """Samples of the global batch that share a draw in `batch` mode and have their partners among themselves; 0: all.

    With as many as a process of timm's has in its batches, an update is mixed as timm mixes it.
    """

    @property
    def is_on(self) -> bool:
        """Whether anything is ever mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.minmax is not None


@dataclass(frozen=True)
class Dealing:
    """Which samples of a global batch of G make up which batch, S batches of B; the same for every update."""

    positions: np.ndarray
    """int64 (S, B), each of 0 to G - 1 once: places in the epoch's order, counted from the update's first."""
    blocks: np.ndarray
    """int64 (S, B): the mixing block that each sample belongs to."""
    num_blocks: int
    is_alone: np.ndarray
    """bool (S, B): samples that mirror another one in their batch, but have no partner."""


def deal(global_batch: int, batch_size: int, block: int) -> Dealing:
    """Deal G samples out to batches so that partners share a batch and mirror each other in it.

    Each `block` of consecutive samples (0: all) is mirrored in itself: of one with M samples, i and M - 1 - i are
    partners. The last block may be shorter; the middle sample of an odd one is alone. Who is whose partner does not
    depend on `batch_size` as long as that is even or every batch gets the middle of a block into its own; else batches
    are consecutive samples, each mirrored in itself.
    """
    block = min(block or global_batch, global_batch)
    slots, half = global_batch // batch_size, batch_size // 2
    starts = range(0, global_batch, block)
    sides = [(start, min(start + block, global_batch)) for start in starts]
    first = np.concatenate([np.arange(low, low + (high - low) // 2) for low, high in sides])
    partner = np.concatenate([np.arange(high - 1, high - 1 - (high - low) // 2, -1) for low, high in sides])
    middles = np.array([(low + high) // 2 for low, high in sides if (high - low) % 2], np.int64)
    if batch_size % 2 and len(middles) < slots:
        positions, alone = np.arange(global_batch).reshape(slots, batch_size), middles[:0]
    else:
        own, alone = np.split(middles, [slots * (batch_size % 2)])
        first, partner = np.concatenate([first, alone[::2]]), np.concatenate([partner, alone[1::2]])
        mirrored = partner.reshape(slots, half)[:, ::-1]
        positions = np.concatenate([first.reshape(slots, half), own.reshape(slots, batch_size % 2), mirrored], axis=1)
    return Dealing(positions, positions // block, len(sides), np.isin(positions, alone))


def draw_mix(rules: MixRules, img_size: int, key: np.uint64, epoch: int, index: int, stream: int) -> Mix:
    """One draw for `index`: a step, or a sample id."""
    u_mixed, u_cutmix, u_row, u_column = _uniforms(key, 0, index, epoch, stream)
    if u_mixed >= rules.prob:
        return NO_MIX
    alpha = rules.cutmix if rules.minmax is None else 1.0
    is_cutmix = alpha > 0 and (rules.mixup == 0 or u_cutmix < rules.switch_prob)
    lam = float(beta(key, alpha if is_cutmix else rules.mixup, index, epoch, stream))
    if not is_cutmix:
        return Mix(lam, is_cutmix=False)
    if rules.minmax is None:
        box = cut_box(img_size, lam, u_row, u_column)
    else:
        # The draw counter far from those that `beta` may have used.
        u_height, u_width, _, _ = _uniforms(key, 1 << 20, index, epoch, stream)
        box = minmax_box(img_size, rules.minmax, u_height, u_width, u_row, u_column)
    area = (box[1] - box[0]) * (box[3] - box[2])
    return Mix(1.0 - area / img_size**2, is_cutmix=True, box=box)


def cut_box(img_size: int, lam: float, u_row: float, u_column: float) -> tuple[int, int, int, int]:
    """CutMix's box, (top, bottom, left, right) clipped to the image, as timm's `rand_bbox` (Yun et al., ICCV 2019)."""
    cut = int(img_size * math.sqrt(1.0 - lam))
    row, column = int(u_row * img_size), int(u_column * img_size)
    top, bottom = max(row - cut // 2, 0), min(row + (cut + 1) // 2, img_size)
    left, right = max(column - cut // 2, 0), min(column + (cut + 1) // 2, img_size)
    return top, bottom, left, right


def minmax_box(
    img_size: int, minmax: tuple[float, float], u_height: float, u_width: float, u_row: float, u_column: float
) -> tuple[int, int, int, int]:
    """CutMix's box with sides between two shares of the image, as timm's `rand_bbox_minmax`."""
    low, high = int(img_size * minmax[0]), int(img_size * minmax[1])
    height, width = low + int(u_height * (high - low)), low + int(u_width * (high - low))
    top, left = int(u_row * (img_size - height + 1)), int(u_column * (img_size - width + 1))
    return top, top + height, left, left + width


@njit(cache=True)
def _uniforms(key: np.uint64, draw: int, index: int, epoch: int, stream: int) -> tuple[float, float, float, float]:
    w0, w1, w2, w3 = philox(key, draw, index, epoch, stream)
    return to_unit(w0), to_unit(w1), to_unit(w2), to_unit(w3)
