"""What happens to a decoded batch before the model sees it, in timm's order; pure tensor code that compiles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_vit.augment.mix import mix_images, mix_targets


class Augment(nn.Module):
    """uint8 images and labels to normalised float images and soft targets."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int, smoothing: float) -> None:
        """`mean`, `std`: of RGB in 0-1, the model's own; `smoothing`: label smoothing in [0, 1)."""
        super().__init__()
        self.num_classes, self.smoothing = num_classes, smoothing
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) in 0-255 to float32 with the model's mean and standard deviation."""
        return (images.float() - self.mean) / self.std

    def forward(self, images: Tensor, targets: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
        """Training: normalise, then mix. `mix` as by `mix_to_tensor`, on the images' device."""
        mixed = mix_images(self.normalize(images), mix)
        return mixed, mix_targets(targets, self.num_classes, self.smoothing, mix)
