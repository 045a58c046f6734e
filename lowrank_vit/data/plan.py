"""The plan: every random choice about the data, as a pure function of (seed, epoch, sample id or step).

Order, crop windows, flips and mixing come from Philox4x32-10 with the seed as key and the counter
`(draw, sample id or step, epoch, stream)`. The plan knows each image's size from the index, so that nothing has to be
decoded first; decoders, ranks, worker counts and restarts cannot change what it says. Nothing else in the project
draws a random number about the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numba import njit

from data_prep.errors import UserError
from lowrank_vit.data.philox import beta, philox, to_below, to_unit

CROP_ATTEMPTS = 10
"""As torchvision's and timm's RandomResizedCrop."""


class Stream(IntEnum):
    """The last counter word, so that no two uses share a draw. Values are part of the reproducible stream."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    MIX = 3


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed with its own reverse: `x * weight + x.flip(0) * (1 - weight)`.

    `lam` is the share of the first label, corrected to the cut area. `box` is `(top, bottom, left, right)` in pixels of
    the model's input, empty unless the batch is cut-mixed; `lam` 1 and an empty box leave the batch as it is.
    """

    lam: float
    is_cutmix: bool
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


NO_MIX = Mix(lam=1.0, is_cutmix=False)


@dataclass(frozen=True)
class BatchPlan:
    """What one rank's batch of B samples consists of."""

    epoch: int
    step: int
    ids: np.ndarray
    """int64 (B,), sample numbers in the `.beton`."""
    windows: np.ndarray
    """int32 (B, 4): top, left, height, width of the crop, in pixels of the stored image."""
    flips: np.ndarray
    """bool (B,): mirror left and right after resizing."""
    mix: Mix


@dataclass(frozen=True)
class TrainRules:
    """Ranges of the random choices; names and meanings are timm's flags."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int = 0


class TrainPlan:
    """The shuffled, cropped, flipped and mixed training stream; whole global batches only (the tail is dropped)."""

    def __init__(
        self,
        heights: np.ndarray,
        widths: np.ndarray,
        rules: TrainRules,
        *,
        seed: int,
        img_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`heights`, `widths`: int (N,), pixels; `batch_size`: samples a step of this rank; raises `UserError`."""
        self.heights, self.widths = heights.astype(np.int64), widths.astype(np.int64)
        self.num_samples = len(heights)
        self.rules, self.img_size = rules, img_size
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._key = np.uint64(seed)
        global_batch = batch_size * world_size
        if global_batch > self.num_samples:
            raise UserError(
                f"The global batch of {global_batch} is larger than the training set of {self.num_samples} samples, "
                f"which leaves no whole batch. Use --batch-size {max(1, self.num_samples // world_size)} or less."
            )
        if self.num_samples >= 2**32:
            raise UserError(f"{self.num_samples} samples are more than the plan can number (2**32 - 1).")
        self.steps_per_epoch = self.num_samples // global_batch

    def order(self, epoch: int) -> np.ndarray:
        """int64 (N,): the permutation of all sample ids for this epoch, the same on every rank.

        Samples are sorted by a random 64-bit number each: uniform up to ties, less likely than N**2 / 2**65.
        """
        return np.argsort(_order_keys(self._key, self.num_samples, epoch), kind="stable")

    def ids(self, epoch: int) -> np.ndarray:
        """int64 (steps, batch_size): this rank's share of the epoch's order."""
        order = self.order(epoch)[: self.steps_per_epoch * self.batch_size * self.world_size]
        return np.ascontiguousarray(order.reshape(self.steps_per_epoch, self.world_size, self.batch_size)[:, self.rank])

    def windows(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """int32 (B, 4), top, left, height, width: RandomResizedCrop of torchvision and timm for each id."""
        (scale_min, scale_max), (ratio_min, ratio_max) = self.rules.scale, self.rules.ratio
        return _crop_windows(
            self._key, epoch, ids, self.heights[ids], self.widths[ids], scale_min, scale_max, ratio_min, ratio_max
        )

    def flips(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """Bool (B,): whether each sample is mirrored in this epoch."""
        return _flips(self._key, epoch, ids, self.rules.hflip)

    def mix(self, epoch: int, step: int) -> Mix:
        """Mixup or cutmix of the global batch `step` in timm's `batch` mode; the same on every rank."""
        rules = self.rules
        is_off = rules.mixup_off_epoch and epoch >= rules.mixup_off_epoch
        if is_off or (rules.mixup == 0 and rules.cutmix == 0):
            return NO_MIX
        u_mixed, u_cutmix, u_row, u_column = _uniforms(self._key, 0, step, epoch, Stream.MIX)
        if u_mixed >= rules.mixup_prob:
            return NO_MIX
        is_cutmix = rules.cutmix > 0 and (rules.mixup == 0 or u_cutmix < rules.mixup_switch_prob)
        lam = float(beta(self._key, rules.cutmix if is_cutmix else rules.mixup, step, epoch, Stream.MIX))
        if not is_cutmix:
            return Mix(lam, is_cutmix=False)
        box = cut_box(self.img_size, lam, u_row, u_column)
        area = (box[1] - box[0]) * (box[3] - box[2])
        return Mix(1.0 - area / self.img_size**2, is_cutmix=True, box=box)

    def batch(self, epoch: int, step: int, ids: np.ndarray) -> BatchPlan:
        """The batch whose ids are row `step` of `ids(epoch)`."""
        return BatchPlan(epoch, step, ids, self.windows(epoch, ids), self.flips(epoch, ids), self.mix(epoch, step))


class EvalPlan:
    """Every sample exactly once, in file order, centre-cropped; the last batch may be short."""

    def __init__(
        self,
        heights: np.ndarray,
        widths: np.ndarray,
        *,
        img_size: int,
        crop_pct: float,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._windows = center_windows(heights, widths, img_size, crop_pct)
        self.batch_size, self.img_size = batch_size, img_size
        own = np.array_split(np.arange(len(heights)), world_size)[rank]
        self._batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
        self.steps_per_epoch = len(self._batches)

    def ids(self, epoch: int) -> list[np.ndarray]:
        """This rank's batches of ids, int64 (B,) each; the same in every epoch."""
        return self._batches

    def batch(self, epoch: int, step: int, ids: np.ndarray) -> BatchPlan:
        """The centre crops of `ids`, unmirrored and unmixed."""
        return BatchPlan(epoch, step, ids, self._windows[ids], np.zeros(len(ids), dtype=bool), NO_MIX)


Plan = TrainPlan | EvalPlan


def center_windows(heights: np.ndarray, widths: np.ndarray, img_size: int, crop_pct: float) -> np.ndarray:
    """int32 (N, 4): the windows that resizing the short side to floor(img_size / crop_pct) and a centre crop keep.

    timm's evaluation crop, expressed in the stored image's pixels and rounded to whole ones.
    """
    short = np.minimum(heights, widths).astype(np.float64)
    resized = math.floor(img_size / crop_pct)
    side = np.maximum(1, np.rint(short * img_size / resized)).astype(np.int64)
    top, left = (heights - side) // 2, (widths - side) // 2
    return np.stack([top, left, side, side], axis=1).astype(np.int32)


def cut_box(img_size: int, lam: float, u_row: float, u_column: float) -> tuple[int, int, int, int]:
    """CutMix's box, (top, bottom, left, right) clipped to the image, as timm's `rand_bbox` (Yun et al., ICCV 2019)."""
    cut = int(img_size * math.sqrt(1.0 - lam))
    row, column = int(u_row * img_size), int(u_column * img_size)
    top, bottom = max(row - cut // 2, 0), min(row + (cut + 1) // 2, img_size)
    left, right = max(column - cut // 2, 0), min(column + (cut + 1) // 2, img_size)
    return top, bottom, left, right


@njit(cache=True)
def _uniforms(key, draw, index, epoch, stream):
    w0, w1, w2, w3 = philox(key, draw, index, epoch, stream)
    return to_unit(w0), to_unit(w1), to_unit(w2), to_unit(w3)


@njit(cache=True)
def _order_keys(key, num_samples, epoch):
    keys = np.empty(num_samples, np.uint64)
    for i in range(num_samples):
        w0, w1, _, _ = philox(key, 0, i, epoch, 0)  # Stream.ORDER
        keys[i] = (w0 << np.uint64(32)) | w1
    return keys


@njit(cache=True)
def _flips(key, epoch, ids, probability):
    flips = np.empty(len(ids), np.bool_)
    for n in range(len(ids)):
        flips[n] = to_unit(philox(key, 0, ids[n], epoch, 2)[0]) < probability  # Stream.FLIP
    return flips


@njit(cache=True)
def _crop_windows(key, epoch, ids, heights, widths, scale_min, scale_max, ratio_min, ratio_max):
    """Torchvision's RandomResizedCrop.get_params: ten attempts, one Philox block each, then a centre crop."""
    log_min, log_max = math.log(ratio_min), math.log(ratio_max)
    windows = np.empty((len(ids), 4), np.int32)
    for n in range(len(ids)):
        height, width = heights[n], widths[n]
        top, left, h, w = 0, 0, 0, 0
        for attempt in range(CROP_ATTEMPTS):
            w0, w1, w2, w3 = philox(key, attempt, ids[n], epoch, 1)  # Stream.CROP
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
