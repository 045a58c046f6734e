"""Augment a decoded batch, in timm's order and in two halves.

The loader's half, `apply_operations`, turns uint8 pixels into uint8 pixels: vertical flip, image operations. The step's
half, `Augment`, turns them into the model's input, compiled with the model: normalisation, mixup or cutmix, erasing.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor, nn

from lowrank_vit.augment import ops_cpu
from lowrank_vit.augment.erase import MODES, NORMAL, Mode, erase, erase_cpu
from lowrank_vit.augment.grid import Grid
from lowrank_vit.augment.mixing import mix_cpu, mix_images, mix_targets, mix_to_tensor
from lowrank_vit.common.arguments import (
    SHARE,
    SHARE_BELOW_1,
    Range,
    check_choice,
    check_number,
    check_numbers,
    check_whole,
)
from lowrank_vit.common.devices import cuda_path, to_device
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.numba_code import use_threads
from lowrank_vit.plan.mixing import NO_MIX
from lowrank_vit.plan.plans import BatchPlan


@torch.no_grad()
def apply_operations(images: Tensor, plan: BatchPlan, fill: Tensor) -> Tensor:
    """Apply the plan's vertical flips and operations to uint8 (B, 3, S, S) channels_last images; changes them.

    `fill`: uint8 (3,) on their device, the colour outside the image. Returns uint8 images, the same or new ones; a plan
    without flips and operations costs nothing. The host does not wait for the device.
    Raises `UserError` for another dtype or layout.
    """
    _check_images(images)
    if plan.vflips is None and plan.ops is None:
        return images
    images_BHWC = images.permute(0, 2, 3, 1)
    if plan.vflips is not None:
        rows = to_device(np.flatnonzero(plan.vflips), images)
        images_BHWC[rows] = images_BHWC[rows].flip(1)
    if plan.ops is None:
        return images
    if cuda_path(images):
        from lowrank_vit.augment import ops_triton  # comes with torch's builds for GPUs

        return ops_triton.apply_ops(images_BHWC, plan.ops, fill).permute(0, 3, 1, 2)
    use_threads(torch.get_num_threads())
    ops_cpu.apply_ops(images_BHWC.numpy(), plan.ops.kinds, plan.ops.args, plan.ops.interpolations, fill.numpy())
    return images


def _check_images(images: Tensor) -> None:
    """Raise `UserError` for images that are not as a loader makes them."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"augmentation takes uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
    if not images.is_contiguous(memory_format=torch.channels_last):
        raise UserError("augmentation takes channels_last images: .contiguous(memory_format=torch.channels_last).")


def _check_pixels(images: Tensor) -> None:
    """Raise `UserError` for images that have been normalised already."""
    if images.dtype != torch.uint8:
        raise UserError(
            f"images to augment are {images.dtype}, expected torch.uint8 from 0 to 255, as a loader gives them. "
            "`Augment` normalises them itself."
        )


class Augment(nn.Module):
    """uint8 images and labels to normalised float images and soft targets; `prepare` is the loader's half.

    A step calls `begin`, which must not be compiled, and passes its results on: `augment(images, targets, *drawn)`.
    `inputs` does both for a loop that compiles nothing.

    Example:
        >>> beton = Beton("train.beton")
        >>> plan = TrainPlan.of(beton, img_size=32, batch_size=8, mixup=0.8)
        >>> augment = Augment(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), num_classes=2)
        >>> loader, line = open_loader(beton, plan, "cpu", workers=1, prepare=augment.prepare)
        >>> batch = next(loader.batches(epoch=0))
        >>> images, targets = augment.inputs(batch.images, batch.targets, batch.plan)
        >>> images.dtype, tuple(images.shape), tuple(targets.shape)
        (torch.float32, (8, 3, 32, 32), (8, 2))
        >>> loader.close()
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_classes: int,
        smoothing: float = 0.1,
        remode: Mode = "const",
        *,
        erase_first: bool = False,
    ) -> None:
        """`mean`, `std`: of RGB in 0-1, the model's own; `smoothing`: label smoothing in [0, 1).

        `remode`: the content of erased boxes, const (zeros), rand (one random colour) or pixel (noise). `erase_first`:
        erase before mixing. Raises `UserError` for a value outside its range.
        """
        check_numbers(SHARE, 3, mean=mean)
        check_numbers(Range(0, 1, open_low=True), 3, std=std)
        check_whole(num_classes=num_classes)
        check_number(SHARE_BELOW_1, smoothing=smoothing)
        check_choice(MODES, remode=remode)
        check_choice((True, False), erase_first=erase_first)
        super().__init__()
        self.num_classes, self.smoothing = num_classes, smoothing
        self.remode: Mode = remode
        self._erase_first = erase_first
        self.mean: Tensor
        self.std: Tensor
        self.fill: Tensor
        self.quantiles: Tensor
        self.register_buffer("quantiles", NORMAL.clone(), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        # timm's colour outside the image
        fill = [min(255, round(255 * value)) for value in mean]
        self.register_buffer("fill", torch.tensor(fill, dtype=torch.uint8), persistent=False)

    def prepare(self, images: Tensor, plan: BatchPlan) -> Tensor:
        """`apply_operations` with timm's colour: uint8 to uint8, for `open_loader`."""
        return apply_operations(images, plan, self.fill)

    @torch.no_grad()
    def begin(
        self, images: Tensor, plan: BatchPlan, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The arguments of `forward` except the targets: images, and the plan's mix, boxes and keys as tensors.

        On a CPU, images to be erased are normalised, mixed (unless erasing comes first) and erased here, in one pass of
        compiled numba code, into float32 `out` if that has their shape; boxes and keys are then None. Else images are
        returned unchanged, and boxes and keys are None if nothing is erased. The host does not wait for the device.
        """
        _check_pixels(images)
        mix = mix_to_tensor(plan.mix)
        if plan.erase is None:
            return images, to_device(mix.numpy(), images), None, None
        boxes, keys = plan.erase.boxes, plan.erase.keys
        if cuda_path(images):
            sent = [to_device(values, images) for values in (mix.numpy(), boxes, keys.astype(np.int64))]
            return images, sent[0], sent[1], sent[2]
        if out is None or out.shape != images.shape:
            out = torch.empty(images.shape, memory_format=torch.channels_last)
        mixed_now = mix_to_tensor([NO_MIX]) if self._erase_first else mix
        use_threads(torch.get_num_threads())
        _inputs_cpu(
            images.permute(0, 2, 3, 1).numpy(),
            self.mean.flatten().numpy(),
            self.std.flatten().numpy(),
            mixed_now.numpy(),
            boxes,
            keys,
            MODES.index(self.remode),
            self.quantiles.numpy(),
            out.permute(0, 2, 3, 1).numpy(),
        )
        return out, mix, None, None

    def inputs(self, images: Tensor, targets: Tensor, plan: BatchPlan) -> tuple[Tensor, Tensor]:
        """Float32 (B, 3, S, S) input of the model and soft targets (B, num_classes), from images that `prepare` made.

        Raises `UserError` for images and labels that do not belong to a batch of the plan.
        """
        _check_pixels(images)
        _check_images(images)
        self._check_targets(images, targets, plan)
        images, *drawn = self.begin(images, plan)
        try:
            return self(images, targets, *drawn)
        except RuntimeError as error:
            if "Class values must be" not in str(error):  # torch's words on a CPU, where it checks labels
                raise
            raise UserError(
                f"targets are labels from {int(targets.min())} to {int(targets.max())}, but num_classes is "
                f"{self.num_classes}: labels are 0 to {self.num_classes - 1}."
            ) from None

    def _check_targets(self, images: Tensor, targets: Tensor, plan: BatchPlan) -> None:
        if targets.dtype != torch.int64 or targets.ndim != 1:
            raise UserError(
                f"targets are int64 labels (B,), got {targets.dtype} {tuple(targets.shape)}. `Augment` smooths and "
                "mixes them itself."
            )
        if not len(images) == len(targets) == len(plan.ids):
            raise UserError(
                f"images, targets and plan have {len(images)}, {len(targets)} and {len(plan.ids)} samples. All must "
                "be of one batch of the loader."
            )
        if not images.device == targets.device == self.mean.device:
            raise UserError(
                f"images, targets and this module are on {images.device}, {targets.device} and {self.mean.device}. "
                "Move them to one device with .to(device)."
            )

    def normalize(self, images: Tensor, grid: Grid | None = None) -> Tensor:
        """uint8 (B, 3, S, S) in 0-255, or as `grid` says, to float32 with the model's mean and standard deviation.

        Raises `UserError` for another dtype.
        """
        if images.dtype != torch.uint8:
            raise UserError(f"images to normalize are {images.dtype}, expected torch.uint8 of 0 to 255.")
        mean, std = (grid.along_channels(values) if grid else values for values in (self.mean, self.std))
        return (images.float() - mean) / std

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        mix: Tensor,
        boxes: Tensor | None = None,
        keys: Tensor | None = None,
        *,
        patch: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Float32 (B, 3, S, S) input of the model and soft targets (B, num_classes), from the results of `begin`.

        `patch`: compute it in patches of so many rows and columns, for a compiled model that embeds such patches.
        """
        soft = mix_targets(targets, self.num_classes, self.smoothing, mix)
        if images.dtype != torch.uint8:  # erased by `begin`
            return mix_images(images, mix) if self._erase_first else images, soft
        grid = Grid.of(images, patch)
        pixels = self.normalize(grid.of_images(images), grid)
        if boxes is None or keys is None:
            pixels = mix_images(pixels, mix, grid)
        elif self._erase_first:
            pixels = mix_images(self._erase(pixels, boxes, keys, grid), mix, grid)
        else:
            pixels = self._erase(mix_images(pixels, mix, grid), boxes, keys, grid)
        return grid.to_images(pixels), soft

    def _erase(self, pixels: Tensor, boxes: Tensor, keys: Tensor, grid: Grid) -> Tensor:
        return erase(pixels, boxes, keys, self.remode, self.quantiles, grid)


@njit(parallel=True, nogil=True, cache=True)
def _inputs_cpu(
    images_BHWC: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    mix: np.ndarray,
    boxes: np.ndarray,
    keys: np.ndarray,
    mode: int,
    normal: np.ndarray,
    out_BHWC: np.ndarray,
) -> None:
    """Normalise, mix and erase uint8 images into float32 `out_BHWC`, an image a thread."""
    B, _, _, C = images_BHWC.shape
    for i in prange(B):
        n = np.int64(i)  # prange counts in uint64, which minus int64 is a float
        table = np.empty((C, 256), np.float32)
        for c in range(C):
            for level in range(256):
                table[c, level] = (np.float32(level) - mean[c]) / std[c]
        mix_cpu(images_BHWC, n, table, mix, out_BHWC[n])
        erase_cpu(out_BHWC[n], boxes[n], keys[n], mode, normal)
