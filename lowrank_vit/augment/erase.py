"""Random erasing of normalised images: the plan's boxes, filled with zeros or with normal noise from the sample's key.

The noise of pixel i is a hash of (key, i) turned normal by Box and Muller's method, so it is the same on every device
up to rounding. The hash is "lowbias32" (C. Wellons, Prospecting for hash functions, 2018), twice, once for each word.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

Mode = Literal["const", "rand", "pixel"]
_MODES: tuple[Mode, ...] = ("const", "rand", "pixel")
_RAND, _PIXEL = 1, 2
_LOW = 0xFFFFFFFF
_M0, _M1 = 0x7FEB352D, 0x846CA68B


def erase(images_BCHW: Tensor, boxes: Tensor, keys: Tensor, mode: Mode) -> Tensor:
    """Erase rectangles of float images; `boxes` int32 (B, K, 4), `keys` int64 (B, 2), on the images' device."""
    B, C, H, W = images_BCHW.shape
    rows = torch.arange(H, device=images_BCHW.device)[:, None]
    columns = torch.arange(W, device=images_BCHW.device)
    channels = torch.arange(C, device=images_BCHW.device)[:, None, None]
    for k in range(boxes.shape[1]):
        top, bottom, left, right = (boxes[:, k, i].view(B, 1, 1, 1) for i in range(4))
        is_inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        if mode == "const":
            noise = torch.zeros((), device=images_BCHW.device, dtype=images_BCHW.dtype)
        else:
            index = (channels * H + rows) * W + columns if mode == "pixel" else channels + 3 * k
            noise = _normal(index, keys.view(B, 2, 1, 1, 1)).to(images_BCHW.dtype)
        images_BCHW = torch.where(is_inside, noise, images_BCHW)
    return images_BCHW


def _normal(index: Tensor, keys: Tensor) -> Tensor:
    """float32 standard normal numbers of the shape that `index` and `keys[:, 0]` broadcast to."""
    first = _hash(_hash(index ^ keys[:, 0]) ^ keys[:, 1])
    second = _hash(first ^ 0x9E3779B9)
    u, v = ((word.float() + 0.5) * 2.0**-32 for word in (first, second))
    return torch.sqrt(-2.0 * torch.log(u)) * torch.cos(2.0 * math.pi * v)


def _hash(x: Tensor) -> Tensor:
    # In int64, where only the low 32 bits of each product are kept: they do not depend on the overflow.
    x = ((x ^ (x >> 16)) * _M0) & _LOW
    x = ((x ^ (x >> 15)) * _M1) & _LOW
    return x ^ (x >> 16)


def normalize_and_erase_cpu(
    images_BHWC: np.ndarray, mean: np.ndarray, std: np.ndarray, boxes: np.ndarray, keys: np.ndarray, mode: Mode
) -> np.ndarray:
    """uint8 (B, H, W, 3) to float32: `(x - mean) / std`, then as `erase`; `mean` and `std` float32 (3,) in 0-255."""
    out = np.empty(images_BHWC.shape, np.float32)
    _normalize_and_erase(images_BHWC, mean, std, boxes, keys, _MODES.index(mode), out)
    return out


@njit(parallel=True, nogil=True, cache=True)
def _normalize_and_erase(images, mean, std, boxes, keys, mode, out):
    B, H, W, C = images.shape
    for n in prange(B):
        table = np.empty((C, 256), np.float32)
        for c in range(C):
            for level in range(256):
                table[c, level] = (np.float32(level) - mean[c]) / std[c]
        for y in range(H):
            for x in range(W):
                for c in range(C):
                    out[n, y, x, c] = table[c, images[n, y, x, c]]
        key0, key1 = np.uint32(keys[n, 0]), np.uint32(keys[n, 1])
        for k in range(boxes.shape[1]):
            top, bottom, left, right = boxes[n, k]
            for y in range(top, bottom):
                for x in range(left, right):
                    for c in range(C):
                        value = np.float32(0)
                        if mode == _PIXEL:
                            value = _normal_cpu(np.uint32((c * H + y) * W + x), key0, key1)
                        elif mode == _RAND:
                            value = _normal_cpu(np.uint32(c + 3 * k), key0, key1)
                        out[n, y, x, c] = value


@njit(cache=True)
def _normal_cpu(index, key0, key1):
    first = _hash_cpu(_hash_cpu(index ^ key0) ^ key1)
    second = _hash_cpu(first ^ np.uint32(0x9E3779B9))
    scale, half = np.float32(2.0**-32), np.float32(0.5)
    u, v = (np.float32(first) + half) * scale, (np.float32(second) + half) * scale
    return np.sqrt(np.float32(-2) * np.log(u)) * np.cos(np.float32(2 * math.pi) * v)


@njit(cache=True)
def _hash_cpu(x):
    x = np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(_M0)
    x = np.uint32(x) ^ (np.uint32(x) >> np.uint32(15))
    x = np.uint32(x) * np.uint32(_M1)
    return np.uint32(x) ^ (np.uint32(x) >> np.uint32(16))
