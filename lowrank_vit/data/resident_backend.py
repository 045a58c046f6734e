"""The resident backend: a small raw set held in device memory, cropped and resized there batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import UserError
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.plan import BatchPlan, EvalPlan, TrainPlan
from lowrank_vit.data.resize import crop_resize_flip


class ResidentBackend:
    """Batches of a raw `.beton` with images of one size; the host sends only ids, windows and flips."""

    name = "resident"

    def __init__(self, beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device) -> None:
        """Copy the whole set to `device`. Raises `UserError` where samples are JPEG or of several sizes."""
        reason = why_not_resident(beton)
        if reason:
            raise UserError(f"--loader resident cannot hold {beton.path}: {reason}. Use --loader ffcv.")
        self._plan, self._device = plan, device
        height, width = int(beton.heights[0]), int(beton.widths[0])
        pixels = np.empty((beton.num_samples, height, width, 3), np.uint8)
        for i in range(beton.num_samples):
            pixels[i] = beton.sample(i).reshape(height, width, 3)
        self._images_NHWC = torch.from_numpy(pixels).to(device)
        self._labels = torch.from_numpy(beton.labels).to(device)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the epoch's batches from `first_step` on."""
        rows = self._plan.ids(epoch)
        for step in range(first_step, self._plan.steps_per_epoch):
            yield self._decode(self._plan.batch(epoch, step, rows[step]))

    def _decode(self, plan: BatchPlan) -> Batch:
        host = np.column_stack([plan.ids, plan.windows, plan.flips, plan.kernels])  # one int64 (B, 7) transfer
        parameters = self._to_device(torch.from_numpy(host))
        ids, windows, flips, kernels = parameters[:, 0], parameters[:, 1:5], parameters[:, 5].bool(), parameters[:, 6]
        images_NHWC = crop_resize_flip(self._images_NHWC[ids], windows, flips, kernels, self._plan.img_size)
        return Batch(images_NHWC.permute(0, 3, 1, 2), self._labels[ids], plan)

    def _to_device(self, host: Tensor) -> Tensor:
        # From pinned memory the copy does not make the host wait; the caching allocator keeps it until it is done.
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host

    def close(self) -> None:
        """Give the device memory back."""
        del self._images_NHWC, self._labels


def why_not_resident(beton: Beton) -> str:
    """The reason why a set cannot be resident, or an empty string."""
    if not beton.is_raw:
        return "it holds JPEG samples"
    if not beton.is_uniform:
        return "its images have several sizes"
    return ""
