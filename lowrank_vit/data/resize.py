"""Crop, antialiased resize and flip of a whole batch as two batched matrix products, as PIL resizes.

Resampling a window to S pixels is linear in the pixels, so each image's rows and columns are multiplied by a small
weight matrix of its own. Filter, support and normalisation are those of `Pillow/src/libImaging/Resample.c`
(`precompute_coeffs`), including its rounding to uint8 between the two passes. Columns are always resized before rows;
Pillow 13 takes the cheaper pass first. Where both take the same order they differ by at most one level (float32 sums
against fixed point), elsewhere by a few levels on few pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_vit.data.plan_ops import BICUBIC, NEAREST


def crop_resize_flip(images_NHWC: Tensor, windows: Tensor, flips: Tensor, kernels: Tensor, size: int) -> Tensor:
    """Cut `windows` out of uint8 (B, H, W, 3) images, resize to `size` and mirror: uint8 (B, size, size, 3).

    `windows`: int (B, 4) top, left, height, width, inside the image; `flips`: bool (B,); `kernels`: int (B,),
    NEAREST, BILINEAR or BICUBIC. All on one device.
    """
    B, H, W, C = images_NHWC.shape
    top, left, height, width = windows.double().unbind(1)
    to_columns = _resample_matrix(left, width, W, size, kernels)
    to_columns = torch.where(flips[:, None, None], to_columns.flip(1), to_columns)
    to_rows = _resample_matrix(top, height, H, size, kernels)
    # Columns first, as PIL does: the larger second product then writes NHWC directly.
    columns_first = images_NHWC.permute(0, 2, 1, 3).reshape(B, W, H * C).float()
    resized = _round_to_byte(to_columns @ columns_first).view(B, size, H, C)
    rows_first = resized.permute(0, 2, 1, 3).reshape(B, H, size * C)
    return _round_to_byte(to_rows @ rows_first).view(B, size, size, C).to(torch.uint8)


def _round_to_byte(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def _resample_matrix(start: Tensor, length: Tensor, extent: int, size: int, kernels: Tensor) -> Tensor:
    """float32 (B, size, extent): row i holds the weights by which output pixel i sums up the input pixels.

    Reckoned in float64, so that ties fall as in PIL.

    The window `[start, start + length)` of an axis of `extent` pixels is stretched to `size`; pixels outside the window
    get no weight, as if the image had been cropped first.
    """
    scale = (length / size)[:, None, None]
    stretch = scale.clamp(min=1.0)
    kernels = kernels[:, None, None]
    support = torch.where(kernels == BICUBIC, 2.0, 1.0) * stretch
    pixel = torch.arange(extent, device=start.device, dtype=torch.float64)[None, None, :] - start[:, None, None]
    center = (torch.arange(size, device=start.device, dtype=torch.float64)[None, :, None] + 0.5) * scale
    # PIL takes the pixels from int(center - support + 0.5) to int(center + support + 0.5), within the window.
    first = (center - support + 0.5).floor().clamp(min=0.0)
    last = torch.minimum((center + support + 0.5).floor(), length[:, None, None])
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
