"""The training loss on soft targets: cross entropy, or binary cross entropy of each class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_vit.config.options import Config


@dataclass(frozen=True)
class Loss:
    """timm's SoftTargetCrossEntropy, or its BinaryCrossEntropy where `is_binary`; targets are smoothed and mixed."""

    is_binary: bool = False
    sums_classes: bool = False
    """Binary: the sum over the classes instead of their mean."""
    threshold: float | None = None
    """Binary: targets above it count as 1, others as 0."""

    @classmethod
    def of(cls, config: Config) -> Loss:
        """The loss that the flags ask for."""
        augment = config.augment
        return cls(augment.bce_loss, augment.bce_sum, augment.bce_target_thresh)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch; float32 (B, C) logits and soft targets in 0-1."""
        if not self.is_binary:
            return torch.sum(-targets * torch.log_softmax(logits, dim=1), dim=1).mean()
        if self.threshold is not None:
            targets = targets.gt(self.threshold).to(targets.dtype)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return loss.sum(1).mean() if self.sums_classes else loss.mean()
