"""What augmentation makes of images, for looking at: each operation by level, and a batch as the model sees it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.augment import ops_cpu
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.plan.levels import argument_of
from lowrank_vit.plan.operations import BICUBIC, NAMES, Policy
from lowrank_vit.plan.plans import BatchPlan

LEVELS = (0, 2, 4, 6, 8, 10)
"""Of the grid's columns, on timm's scale."""


def by_level(image_HWC: np.ndarray, policy: Policy, fill: np.ndarray) -> dict[str, np.ndarray]:
    """For each operation of the policy: its name -> the image at every level of `LEVELS`, uint8 (6, H, W, 3).

    Directions are positive, geometric operations bicubic, and what is drawn besides the level is in its middle. `fill`:
    uint8 (3,).
    """
    names = dict.fromkeys(op.name for row in policy.rows for op in row)
    shape = (len(LEVELS), 1)
    grid = {}
    for name in names:
        _, formula, factor = NAMES[name]
        translate = policy.translate * image_HWC.shape[1]
        args = np.array([argument_of(formula, factor, float(level), 1.0, 0.5, translate) for level in LEVELS])
        images = np.repeat(image_HWC[None], len(LEVELS), axis=0)
        kinds, kernels = np.full(shape, NAMES[name][0], np.int8), np.full(shape, BICUBIC, np.int8)
        ops_cpu.apply_ops(images, kinds, args.reshape(shape), kernels, fill)
        grid[name] = images
    return grid


def as_the_model_sees_them(
    crops_BHWC: np.ndarray, labels: np.ndarray, plan: BatchPlan, augment: Augment
) -> tuple[np.ndarray, np.ndarray]:
    """Augment decoded uint8 crops (B, S, S, 3) and int labels (B,) by the plan.

    Returns uint8 (B, S, S, 3), the model's float images turned back into pixels and clipped, and float32 (B, classes),
    the soft targets.
    """
    images = augment.prepare(torch.from_numpy(crops_BHWC.copy()).permute(0, 3, 1, 2), plan)
    images, *drawn = augment.begin(images, plan)
    images, soft = augment(images, torch.from_numpy(labels), *drawn)
    pixels: Tensor = (images * augment.std + augment.mean).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy(), soft.numpy()


def caption(soft_target: np.ndarray, smoothing: float, classes: list[str]) -> str:
    """The labels that were mixed and their shares, without the smoothing: `cat 0.63 + dog 0.37`."""
    shares = (soft_target - smoothing / len(soft_target)) / (1 - smoothing)
    order = [n for n in np.argsort(-shares, kind="stable") if shares[n] > 0.005]
    return " + ".join(
        f"{classes[n]} {shares[n]:.2f}" if not math.isclose(shares[n], 1, abs_tol=0.005) else classes[n] for n in order
    )
