"""Crop, antialiased resize and flip on a GPU, directly from images of any sizes that lie one after the other.

Two kernels, first down the columns, then along the rows, with bytes between them as in `resize_cpu.py`, their twin.
Each output pixel sums up only the pixels that its filter reaches, so nothing is gathered, padded or multiplied by
zeros, and nothing but bytes is written.

Shape legend: B batch, S side of the output, W columns of the widest region.
"""

# Kernels are Triton's language, which type checkers take for Python:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportMissingParameterType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_vit.common.filters import BICUBIC, NEAREST

_NEAREST, _BICUBIC = tl.constexpr(NEAREST), tl.constexpr(BICUBIC)
_BYTES, _PIXELS = 512, 256
"""Bytes of one program of the first kernel, pixels of one of the second."""
_COLUMNS = tl.constexpr(13)


def resize(flat: Tensor, table_BN: Tensor, width: int, size: int) -> Tensor:
    """Resample and mirror: uint8 (B, size, size, 3).

    Args:
        flat: uint8 (bytes,), images of three channels one after the other.
        table_BN: float64 (B, 13), on the same device: flip, filter, first byte, pixels a row, the span along rows and
            the span along columns (see `backend.spans`), and a last number that is not read here.
        width: columns of the widest region.
        size: side of the output, pixels.
    """
    B, columns = table_BN.shape
    assert columns == _COLUMNS.value
    rows_BSWC = torch.empty(B, size, width, 3, dtype=torch.uint8, device=flat.device)
    images_BSSC = torch.empty(B, size, size, 3, dtype=torch.uint8, device=flat.device)
    blocks = triton.cdiv(3 * width, _BYTES)
    _resize_columns[(B, size, blocks)](flat, table_BN, rows_BSWC, width, size, BLOCK=_BYTES, enable_fp_fusion=False)
    blocks = triton.cdiv(size * size, _PIXELS)
    _resize_rows[(B, blocks)](rows_BSWC, table_BN, images_BSSC, width, size, BLOCK=_PIXELS, enable_fp_fusion=False)
    return images_BSSC


@triton.jit
def _resize_columns(flat, table, out, width, size, BLOCK: tl.constexpr):
    """One output row of one image, over the columns of its region as they are stored."""
    n, row = tl.program_id(0), tl.program_id(1)
    table += n * _COLUMNS
    interpolation = tl.load(table + 1).to(tl.int32)
    begin, row_bytes = tl.load(table + 2).to(tl.int64), tl.load(table + 3).to(tl.int64) * 3
    origin, scale, low, length = tl.load(table + 4), tl.load(table + 5), tl.load(table + 6), tl.load(table + 7)
    left, region_bytes = tl.load(table + 10).to(tl.int64) * 3, tl.load(table + 11).to(tl.int32) * 3
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < region_bytes
    center = (row + 0.5) * scale + (origin - low)
    first, last = _reach(center, scale, length, interpolation)
    source = flat + begin + low.to(tl.int64) * row_bytes + left + at
    shrink = 1.0 / tl.maximum(scale, 1.0)
    total, weights = tl.zeros([BLOCK], tl.float32), center * 0
    for tap in range(first, last):
        weights += _weight((tap + 0.5 - center) * shrink, interpolation)
    whole = 1.0 / weights  # float64 divisions are subroutines: one for each pixel and no more
    for tap in range(first, last):
        weight = (_weight((tap + 0.5 - center) * shrink, interpolation) * whole).to(tl.float32)
        total += weight * tl.load(source + tap * row_bytes, inside, 0).to(tl.float32)
    tl.store(out + (n.to(tl.int64) * size + row) * width * 3 + at, _byte(total), inside)


@triton.jit
def _resize_rows(rows, table, out, width, size, BLOCK: tl.constexpr):
    """A block of one image's output pixels."""
    n = tl.program_id(0)
    table += n * _COLUMNS
    flip, interpolation = tl.load(table) != 0, tl.load(table + 1).to(tl.int32)
    origin, scale, low, length = tl.load(table + 8), tl.load(table + 9), tl.load(table + 10), tl.load(table + 11)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size * size
    y, x = at // size, at % size
    x = tl.where(flip, size - 1 - x, x)
    center = (x + 0.5) * scale + (origin - low)
    first, last = _reach(center, scale, length, interpolation)
    source = rows + n.to(tl.int64) * size * width * 3 + y * width * 3
    taps = tl.max(tl.where(inside, last - first, 0), 0)
    shrink, weights = 1.0 / tl.maximum(scale, 1.0), center * 0
    for k in range(taps):
        weights += tl.where(first + k < last, _weight((first + k + 0.5 - center) * shrink, interpolation), 0.0)
    whole = 1.0 / weights
    red, green, blue = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k in range(taps):
        reached = inside & (first + k < last)
        weight = (_weight((first + k + 0.5 - center) * shrink, interpolation) * whole).to(tl.float32)
        weight, pixel = tl.where(reached, weight, 0.0), source + (first + k) * 3
        red += weight * tl.load(pixel, reached, 0).to(tl.float32)
        green += weight * tl.load(pixel + 1, reached, 0).to(tl.float32)
        blue += weight * tl.load(pixel + 2, reached, 0).to(tl.float32)
    out += n.to(tl.int64) * size * size * 3 + at * 3
    tl.store(out, _byte(red), inside)
    tl.store(out + 1, _byte(green), inside)
    tl.store(out + 2, _byte(blue), inside)


@triton.jit
def _reach(center, scale, length, interpolation):
    """First pixel that the filter around `center` sums up, and the one after the last, within the region."""
    stretch = tl.maximum(scale, 1.0)
    support = tl.where(interpolation == _BICUBIC, 2.0, 1.0) * stretch
    first = tl.maximum(tl.floor(center - support + 0.5), 0.0)
    last = tl.minimum(tl.floor(center + support + 0.5), length)
    nearest = tl.floor(center)
    first, last = (
        tl.where(interpolation == _NEAREST, nearest, first),
        tl.where(interpolation == _NEAREST, nearest + 1, last),
    )
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _weight(x, interpolation):
    """Weight of a pixel, not yet normalised: PIL's triangle and bicubic (Keys 1981, a = -0.5) filters, in float64.

    `x`: its distance from the output pixel's centre, in pixels of the coarser of the two images.
    """
    x = tl.abs(x)
    linear = tl.maximum(1.0 - x, 0.0)
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    cubic = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.where(interpolation == _NEAREST, 1.0, tl.where(interpolation == _BICUBIC, cubic, linear))


@triton.jit
def _byte(total):
    return tl.minimum(tl.maximum(tl.floor(total + 0.5), 0.0), 255.0).to(tl.uint8)
