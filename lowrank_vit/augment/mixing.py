"""Mixup and cutmix of a batch with its own reverse, from the plan's parameters, without host values in the graph.

Twin: timm's `Mixup` in `batch`, `pair` and `elem` mode (Zhang et al., ICLR 2018; Yun et al., ICCV 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from lowrank_vit.augment.grid import Grid
from lowrank_vit.plan.mixing import Mix


def mix_to_tensor(mixes: Sequence[Mix]) -> Tensor:
    """float32 (M, 6) on the host: lam, is_cutmix (0 or 1), top, bottom, left, right; M is 1 or the batch size.

    A tensor, so that nothing recompiles. A draw that many samples share as one object is converted once.
    """
    draws = {id(mix): mix for mix in mixes}
    rows = {key: [mix.lam, float(mix.is_cutmix), *mix.box] for key, mix in draws.items()}
    return torch.tensor([rows[id(mix)] for mix in mixes], dtype=torch.float32)


def mix_images(images: Tensor, mix: Tensor, grid: Grid | None = None) -> Tensor:
    """Mix float images with the reversed batch: everywhere by lam (mixup), or only inside the box (cutmix).

    The images' axes are (B, C, H, W), or as `grid` says.
    """
    grid = grid or Grid.of(images)
    lam, is_cutmix, *box = (grid.spread(values) for values in mix.to(images.dtype).unbind(1))
    keep = torch.where(is_cutmix > 0, (~grid.is_inside(*box)).to(images.dtype), lam)
    return images * keep + images.flip(0) * (1 - keep)


def mix_targets(targets: Tensor, num_classes: int, smoothing: float, mix: Tensor) -> Tensor:
    """float32 (B, num_classes): smoothed one-hot labels, mixed by lam with those of the reversed batch; rows sum to 1.

    Smoothing as in Szegedy et al., CVPR 2016: `smoothing / num_classes` everywhere, the rest on the label.
    """
    one_hot = torch.nn.functional.one_hot(targets, num_classes).float()
    soft = one_hot * (1.0 - smoothing) + smoothing / num_classes
    lam = mix[:, :1]
    return soft * lam + soft.flip(0) * (1 - lam)


@njit(cache=True)
def mix_cpu(
    images_BHWC: np.ndarray, n: int | np.int64, table: np.ndarray, mix: np.ndarray, out_HWC: np.ndarray
) -> None:
    """Normalise image `n` of a uint8 batch and mix it with its partner, as `mix_images`.

    `table` float32 (3, 256): each level of each channel, normalised; `mix` float32 (M, 6) as by `mix_to_tensor`.
    """
    B, H, W, C = images_BHWC.shape
    partner = B - 1 - n
    row = n if len(mix) > 1 else 0
    lam = mix[row, 0]
    is_cutmix = mix[row, 1] > 0
    if is_cutmix or lam == 1:
        for y in range(H):
            for x in range(W):
                for c in range(C):
                    out_HWC[y, x, c] = table[c, images_BHWC[n, y, x, c]]
        if is_cutmix:
            for y in range(int(mix[row, 2]), int(mix[row, 3])):
                for x in range(int(mix[row, 4]), int(mix[row, 5])):
                    for c in range(C):
                        out_HWC[y, x, c] = table[c, images_BHWC[partner, y, x, c]]
    else:
        rest = np.float32(1) - lam
        for y in range(H):
            for x in range(W):
                for c in range(C):
                    own, other = table[c, images_BHWC[n, y, x, c]], table[c, images_BHWC[partner, y, x, c]]
                    out_HWC[y, x, c] = own * lam + other * rest
