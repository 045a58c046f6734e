"""Crop, antialiased resize and flip of a whole batch as two batched matrix products, as PIL resizes.

Resampling along an axis is linear in the pixels, so each image's rows and columns are multiplied by a small weight
matrix of its own. Filter, support and normalisation are those of `Pillow/src/libImaging/Resample.c`
(`precompute_coeffs`), including its rounding to uint8 between the two passes. Rows are always resized before columns;
Pillow takes the other order, or (13) the cheaper one. Where both take the same order they differ by at most one level
(float32 sums against fixed point), elsewhere by a few levels on few pixels. `resize_cpu.py` is the
same for CPU threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_vit.data.geometry import LENGTH, LOW, ORIGIN, SCALE
from lowrank_vit.data.plan_ops import BICUBIC, NEAREST


def resize(images_NHWC: Tensor, spans: Tensor, flips: Tensor, kernels: Tensor, size: int) -> Tensor:
    """Resample and mirror uint8 (B, H, W, 3) images: uint8 (B, size, size, 3).

    `spans`: float64 (B, 2, 4), see `geometry`; `flips`: bool (B,); `kernels`: int (B,), NEAREST, BILINEAR or BICUBIC.
    All on one device.
    """
    B, H, W, C = images_NHWC.shape
    to_rows = _resample_matrix(spans[:, 0], H, size, kernels)
    to_columns = _resample_matrix(spans[:, 1], W, size, kernels)
    to_columns = torch.where(flips[:, None, None], to_columns.flip(1), to_columns)
    rows_BYWC = _round_to_byte(to_rows @ images_NHWC.reshape(B, H, W * C).float()).view(B, size, W, C)
    columns_first = rows_BYWC.permute(0, 2, 1, 3).reshape(B, W, size * C)
    resized_BXYC = _round_to_byte(to_columns @ columns_first).view(B, size, size, C)
    return resized_BXYC.permute(0, 2, 1, 3).to(torch.uint8, memory_format=torch.contiguous_format)


def gather_regions(flat: Tensor, starts: Tensor, row_pixels: Tensor, spans: Tensor, height: int, width: int) -> Tensor:
    """Bring regions of images of several sizes to one size: uint8 (B, height, width, 3), each in the upper left.

    `flat`: uint8 (bytes,), the images one behind the other; `starts`, `row_pixels`: int (B,), where an image begins and
    how wide it is; `spans`: float64 (B, 2, 4), whose LOW and LENGTH are the region. Beyond a region its last row and
    column are repeated.
    """
    y = torch.arange(height, device=flat.device)[None, :, None]
    x = torch.arange(width, device=flat.device)[None, None, :]
    (top, left), (h, w) = (spans[:, :, side].long()[:, :, None, None].unbind(1) for side in (LOW, LENGTH))
    pixel = (top + torch.minimum(y, h - 1)) * row_pixels[:, None, None] + left + torch.minimum(x, w - 1)
    first_byte = starts[:, None, None] + 3 * pixel
    return flat[first_byte[..., None] + torch.arange(3, device=flat.device)]


def _round_to_byte(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def _resample_matrix(spans: Tensor, extent: int, size: int, kernels: Tensor) -> Tensor:
    """float32 (B, size, extent): row i holds the weights by which output pixel i sums up the input pixels.

    `spans`: float64 (B, 4), along an axis of `extent` pixels. Reckoned in float64, so that ties fall as in PIL.
    """
    origin, scale, low, length = (spans[:, n, None, None] for n in (ORIGIN, SCALE, LOW, LENGTH))
    stretch = scale.clamp(min=1.0)
    kernels = kernels[:, None, None]
    support = torch.where(kernels == BICUBIC, 2.0, 1.0) * stretch
    pixel = torch.arange(extent, device=spans.device, dtype=torch.float64)[None, None, :] - low
    place = torch.arange(size, device=spans.device, dtype=torch.float64)[None, :, None] + 0.5
    center = place * scale + (origin - low)
    # PIL takes the pixels from int(center - support + 0.5) to int(center + support + 0.5), within the window.
    first = (center - support + 0.5).floor().clamp(min=0.0)
    last = torch.minimum((center + support + 0.5).floor(), length)
    weights = _kernel((pixel + 0.5 - center) / stretch, kernels == BICUBIC)
    weights = torch.where((pixel >= first) & (pixel < last), weights, 0.0)
    weights = torch.where(kernels == NEAREST, (pixel == center.floor()).double(), weights)
    return (weights / weights.sum(2, keepdim=True)).float()


def _kernel(x: Tensor, cubic: Tensor) -> Tensor:
    x = x.abs()
    linear = (1.0 - x).clamp(min=0.0)
    a = -0.5  # PIL's bicubic (Keys 1981)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return torch.where(cubic, torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0)), linear)
