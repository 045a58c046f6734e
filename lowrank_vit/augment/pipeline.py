"""What happens to a decoded batch before the model sees it, in timm's order.

Vertical flip, image operations (uint8), normalisation, mixup or cutmix, erasing. Where nothing is erased, images stay
uint8 until they are normalised and mixed inside the compiled step.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor, nn

from lowrank_vit.augment import ops, ops_cpu
from lowrank_vit.augment.erase import NORMAL, Mode, erase, normalize_and_erase_cpu
from lowrank_vit.augment.mixing import mix_images, mix_targets, mix_to_tensor
from lowrank_vit.common.errors import UserError
from lowrank_vit.plan.plans import BatchPlan


class Augment(nn.Module):
    """uint8 images and labels to normalised float images and soft targets."""

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_classes: int,
        smoothing: float,
        remode: Mode = "const",
        *,
        erase_first: bool = False,
        compile: bool = False,
    ) -> None:
        """`mean`, `std`: of RGB in 0-1, the model's own; `smoothing`: label smoothing in [0, 1).

        `erase_first`: erase before mixing. `compile`: fuse normalising, mixing and erasing on CUDA with torch.compile.
        """
        super().__init__()
        self.num_classes, self.smoothing = num_classes, smoothing
        self.remode: Mode = remode
        self._erase_first = erase_first
        self._erase_on_cuda = torch.compile(self._normalize_and_erase) if compile else self._normalize_and_erase
        self.mean: Tensor
        self.std: Tensor
        self.fill: Tensor
        self.quantiles: Tensor
        self.register_buffer("quantiles", NORMAL.clone(), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        # Kept from batch to batch: touching new memory for every batch takes longer than the arithmetic.
        self._normalized = np.empty((0, 0, 0, 3), np.float32)
        # timm's colour of what an operation brings in from outside the image
        fill = [min(255, round(255 * value)) for value in mean]
        self.register_buffer("fill", torch.tensor(fill, dtype=torch.uint8), persistent=False)

    @torch.no_grad()
    def prepare(self, images: Tensor, plan: BatchPlan) -> Tensor:
        """Apply the plan to uint8 (B, 3, S, S) channels_last images: all that `forward` leaves.

        Changes `images`. Returns them, still uint8, or float32 (normalised and mixed) if images are erased, on a CPU in
        memory that the next call uses again; a plan with nothing of the kind costs nothing. The host does not wait for
        the device. Raises `UserError` for another dtype or layout.
        """
        if plan.vflips is None and plan.ops is None and plan.erase is None:
            return images
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"augmentation takes uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
        if not images.is_contiguous(memory_format=torch.channels_last):
            raise UserError("augmentation takes channels_last images: .contiguous(memory_format=torch.channels_last).")
        images_BHWC = images.permute(0, 2, 3, 1)
        if not images.is_cuda:
            numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        if plan.vflips is not None:
            rows = ops.to_device(np.flatnonzero(plan.vflips), images)
            images_BHWC[rows] = images_BHWC[rows].flip(1)
        if plan.ops is not None:
            if images.is_cuda:
                from lowrank_vit.augment import ops_triton  # comes with torch's builds for GPUs

                images_BHWC = ops_triton.apply_ops(images_BHWC, plan.ops, self.fill)
                images = images_BHWC.permute(0, 3, 1, 2)
            else:
                planned = plan.ops.kinds, plan.ops.args, plan.ops.kernels
                ops_cpu.apply_ops(images_BHWC.numpy(), *planned, self.fill.numpy())
        return self._erase(images, plan)

    def _erase(self, images: Tensor, plan: BatchPlan) -> Tensor:
        if plan.erase is None:
            return images
        boxes, keys, mix = plan.erase.boxes, plan.erase.keys, mix_to_tensor(plan.mix).numpy()
        if images.is_cuda:
            on_device = (ops.to_device(values, images) for values in (boxes, keys.astype(np.int64), mix))
            return self._erase_on_cuda(images, *on_device)
        scale = self.mean.flatten().numpy(), self.std.flatten().numpy()
        images_BHWC = images.permute(0, 2, 3, 1).numpy()
        if self._normalized.shape != images_BHWC.shape:
            self._normalized = np.empty(images_BHWC.shape, np.float32)
        mix = None if self._erase_first else mix
        normalize_and_erase_cpu(images_BHWC, *scale, boxes, keys, self.remode, self._normalized, mix)
        return torch.from_numpy(self._normalized).permute(0, 3, 1, 2)

    def _normalize_and_erase(self, images: Tensor, boxes: Tensor, keys: Tensor, mix: Tensor) -> Tensor:
        images = self.normalize(images)
        images = images if self._erase_first else mix_images(images, mix)
        return erase(images, boxes, keys, self.remode, self.quantiles)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) in 0-255 to float32 with the model's mean and standard deviation; floats stay."""
        return (images.float() - self.mean) / self.std if images.dtype == torch.uint8 else images

    def forward(self, images: Tensor, targets: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
        """Training: normalise and mix what `prepare` left. `mix` as by `mix_to_tensor`, on the images' device."""
        is_mixed = images.dtype != torch.uint8 and not self._erase_first
        mixed = images if is_mixed else mix_images(self.normalize(images), mix)
        return mixed, mix_targets(targets, self.num_classes, self.smoothing, mix)
