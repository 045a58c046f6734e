"""Weights of a small model at 32 pixels, for files of them."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor

NAME = "vit_tiny_patch16_224"
_SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
KWARGS = tuple(f"{name}={size}" for name, size in _SIZES.items())


def state(seed: int, num_classes: int = 7) -> dict[str, Tensor]:
    """Of a small model at 32 pixels."""
    torch.manual_seed(seed)
    return timm.create_model(NAME, num_classes=num_classes, img_size=32, **_SIZES).state_dict()


OWN, EMA = state(1), state(2)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
