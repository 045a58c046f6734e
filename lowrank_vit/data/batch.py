"""The one type that the stages of the data path exchange."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowrank_vit.plan.plans import BatchPlan


@dataclass(frozen=True)
class Batch:
    """B decoded, cropped, resized and flipped images with their labels, on the trainer's device."""

    images: Tensor
    """uint8 (B, 3, S, S), RGB 0-255, channels_last (a permuted view of the decoder's NHWC); no other batch's memory."""
    targets: Tensor
    """int64 (B,), labels."""
    plan: BatchPlan
    """The samples that the images come from, and the augmentation still to be done (arrays on the host)."""

    def __len__(self) -> int:
        return len(self.plan.ids)
