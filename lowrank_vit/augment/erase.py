"""Random erasing of normalised images: the plan's boxes, filled with zeros or with normal noise from the sample's key.

The noise of pixel i is one of 65,536 equally likely normal numbers, chosen by 16 bits of a hash of (key, i): the same
bits on every device, at the price of a largest number of 4.3. The hash is "lowbias32" (C. Wellons, Prospecting for hash
functions, 2018), twice, once for each word of the key.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numba import njit
from torch import Tensor

from lowrank_vit.augment.grid import Grid

Mode = Literal["const", "rand", "pixel"]
MODES: tuple[Mode, ...] = ("const", "rand", "pixel")
_RAND, _PIXEL = 1, 2
_LOW = 0xFFFFFFFF
_M0, _M1 = 0x7FEB352D, 0x846CA68B
NORMAL = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)).float()
"""float32 (65536,): quantiles of the standard normal distribution."""


def erase(images: Tensor, boxes: Tensor, keys: Tensor, mode: Mode, normal: Tensor, grid: Grid | None = None) -> Tensor:
    """Erase rectangles of float images; `boxes` int32 (B, K, 4), `keys` int64 (B, 2), `normal`: `NORMAL`.

    All are on the images' device. The images' axes are (B, C, H, W), or as `grid` says.
    """
    grid = grid or Grid.of(images)
    key0, key1 = (grid.spread(words) for words in keys.unbind(1))
    for k in range(boxes.shape[1]):
        is_inside = grid.is_inside(*(grid.spread(edge) for edge in boxes[:, k].unbind(1)))
        if mode == "const":
            noise = torch.zeros((), device=images.device, dtype=images.dtype)
        else:
            index = grid.index if mode == "pixel" else grid.channels + 3 * k
            noise = normal[_word(index, key0, key1)].to(images.dtype)
        images = torch.where(is_inside, noise, images)
    return images


def _word(index: Tensor, key0: Tensor, key1: Tensor) -> Tensor:
    """int64 in [0, 65536), of the shape that index and keys broadcast to."""
    return _hash(_hash(index ^ key0) ^ key1) >> 16


def _hash(x: Tensor) -> Tensor:
    # In int64, where only the low 32 bits of each product are kept: they do not depend on the overflow.
    x = ((x ^ (x >> 16)) * _M0) & _LOW
    x = ((x ^ (x >> 15)) * _M1) & _LOW
    return x ^ (x >> 16)


@njit(cache=True)
def erase_cpu(image_HWC: np.ndarray, boxes: np.ndarray, key: np.ndarray, mode: int, normal: np.ndarray) -> None:
    """Erase rectangles of one float32 image in place, as `erase`; `mode`: the mode's index in `MODES`."""
    H, W, C = image_HWC.shape
    key0, key1 = np.uint32(key[0]), np.uint32(key[1])
    for k in range(boxes.shape[0]):
        top, bottom, left, right = boxes[k]
        for y in range(top, bottom):
            for x in range(left, right):
                for c in range(C):
                    value = np.float32(0)
                    if mode == _PIXEL:
                        value = normal[_word_cpu(np.uint32((c * H + y) * W + x), key0, key1)]
                    elif mode == _RAND:
                        value = normal[_word_cpu(np.uint32(c + 3 * k), key0, key1)]
                    image_HWC[y, x, c] = value


@njit(cache=True, inline="always")
def _word_cpu(index: np.uint32, key0: np.uint32, key1: np.uint32) -> np.uint32:
    return np.uint32(_hash_cpu(_hash_cpu(index ^ key0) ^ key1)) >> np.uint32(16)


@njit(cache=True)
def _hash_cpu(x: np.uint32) -> np.uint32:
    x = np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(_M0)
    x = np.uint32(x) ^ (np.uint32(x) >> np.uint32(15))
    x = np.uint32(x) * np.uint32(_M1)
    return np.uint32(x) ^ (np.uint32(x) >> np.uint32(16))
