"""The image operations on a GPU: for each layer one kernel that makes tables and one that applies any operation.

A program takes one image (or a block of its pixels) and branches by the image's operation, so that a batch takes two
launches per layer however its operations are mixed. The arithmetic is that of `ops.py`, its twin, which runs anywhere.

Shape legend: B batch, L layers, H, W pixels; images are uint8 (B, H, W, 3).
"""

# Kernels are Triton's language, which type checkers take for Python:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportMissingParameterType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_vit.augment.ops import affine, blur, fixed_point
from lowrank_vit.common.devices import to_device
from lowrank_vit.common.filters import BICUBIC, NEAREST
from lowrank_vit.plan.operations import GEOMETRIC, ImageOps, Kind

_PIXELS = 256
"""Pixels of one program."""
_COLUMNS = tl.constexpr(9)
"""Numbers per image and layer: kind, argument, interpolation and the six of its affine map, float64."""
_AUTOCONTRAST, _EQUALIZE = tl.constexpr(int(Kind.AUTOCONTRAST)), tl.constexpr(int(Kind.EQUALIZE))
_INVERT, _POSTERIZE = tl.constexpr(int(Kind.INVERT)), tl.constexpr(int(Kind.POSTERIZE))
_SOLARIZE, _SOLARIZE_ADD = tl.constexpr(int(Kind.SOLARIZE)), tl.constexpr(int(Kind.SOLARIZE_ADD))
_CONTRAST, _COLOR, _SHARPNESS = (
    tl.constexpr(int(Kind.CONTRAST)),
    tl.constexpr(int(Kind.COLOR)),
    tl.constexpr(int(Kind.SHARPNESS)),
)
_LAST_GEOMETRIC = tl.constexpr(int(max(GEOMETRIC)))
_NEAREST, _BICUBIC = tl.constexpr(NEAREST), tl.constexpr(BICUBIC)


def apply_ops(images_BHWC: Tensor, ops: ImageOps, fill: Tensor) -> Tensor:
    """Apply the plan's operations to uint8 (B, H, W, 3); returns the images, in memory of the call or in `images_BHWC`.

    `fill`: uint8 (3,), colour from outside the image. The host does not wait: one transfer, two launches a layer.
    """
    B, H, W, _ = images_BHWC.shape
    layers = ops.kinds.shape[1]
    numbers_LBN = to_device(_numbers(ops, H, W), images_BHWC)
    tables = torch.empty(B, 3, 256, dtype=torch.uint8, device=images_BHWC.device)
    source, target = images_BHWC, torch.empty_like(images_BHWC)
    for layer in range(layers):
        numbers = numbers_LBN[layer]
        _make_tables[(B, 3)](source, numbers, tables, H * W, BLOCK=2048, enable_fp_fusion=False)
        blocks = triton.cdiv(H * W, _PIXELS)
        _apply[(B, blocks)](source, target, numbers, tables, fill, H, W, BLOCK=_PIXELS, enable_fp_fusion=False)
        rows = np.flatnonzero(ops.kinds[:, layer] == Kind.BLUR)
        if len(rows):
            group = to_device(rows, target)
            target.index_copy_(0, group, blur(target[group], ops.args[rows, layer]))
        source, target = target, source
    return source


def _numbers(ops: ImageOps, height: int, width: int) -> np.ndarray:
    """float64 (L, B, 9): the kernels' input for each layer and image, see `_COLUMNS`."""
    B, L = ops.kinds.shape
    numbers = np.zeros((L, B, _COLUMNS.value))
    for layer in range(L):
        kinds, args, interpolations = (
            ops.kinds[:, layer],
            ops.args[:, layer].astype(np.float64),
            ops.interpolations[:, layer],
        )
        columns = numbers[layer]
        columns[:, 0], columns[:, 2] = kinds, interpolations
        # How many levels fall together, 256 at 0 bits.
        columns[:, 1] = np.where(kinds == Kind.POSTERIZE, np.exp2(8 - np.clip(np.floor(args), 0, 8)), args)
        rows = np.flatnonzero(np.isin(kinds, GEOMETRIC))
        if len(rows):
            matrices = affine(kinds[rows], args[rows], height, width)
            nearest = interpolations[rows] == NEAREST
            matrices[:, nearest] = fixed_point(matrices[:, nearest], kinds[rows][nearest])
            columns[rows, 3:] = matrices.T
    return numbers


@triton.jit
def _make_tables(images, numbers, tables, num_pixels, BLOCK: tl.constexpr):
    """For one image and channel: the new value of each level, if the operation is a table."""
    n, c = tl.program_id(0), tl.program_id(1)
    kind = tl.load(numbers + n * _COLUMNS).to(tl.int32)
    if kind == 0 or kind >= _COLOR:
        return
    arg = tl.load(numbers + n * _COLUMNS + 1)
    levels = tl.arange(0, 256)
    image = images + n.to(tl.int64) * num_pixels * 3
    value = levels
    if kind == _INVERT:
        value = 255 - levels
    elif kind == _POSTERIZE:
        step = arg.to(tl.int32)
        value = levels // step * step
    elif kind == _SOLARIZE:
        value = tl.where(levels < arg, levels, 255 - levels)
    elif kind == _SOLARIZE_ADD:
        value = tl.where(levels < 128, tl.minimum(levels + arg.to(tl.int32), 255), levels)
    elif (kind == _AUTOCONTRAST) | (kind == _EQUALIZE):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, num_pixels, BLOCK):
            at = start + tl.arange(0, BLOCK)
            pixels = tl.load(image + at * 3 + c, at < num_pixels, 0).to(tl.int32)
            counts += tl.histogram(pixels, 256)
        # Beyond the image zeros were counted.
        beyond = tl.cdiv(num_pixels, BLOCK) * BLOCK - num_pixels
        counts -= tl.where(levels == 0, beyond, 0)
        high = tl.max(tl.where(counts > 0, levels, -1), 0)
        if kind == _AUTOCONTRAST:
            low = tl.min(tl.where(counts > 0, levels, 256), 0)
            scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
            stretched = levels.to(tl.float64) * scale + (-low).to(tl.float64) * scale
            stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
            value = tl.where(high <= low, levels, stretched)
        else:
            step = (num_pixels - tl.sum(tl.where(levels == high, counts, 0), 0)) // 255
            present = tl.sum((counts > 0).to(tl.int32), 0)
            before = tl.cumsum(counts, 0) - counts
            equalized = tl.minimum((step // 2 + before) // tl.maximum(step, 1), 255)
            value = tl.where((present <= 1) | (step == 0), levels, equalized)
    else:
        degenerate = 0.0
        if kind == _CONTRAST:
            total = tl.zeros([BLOCK], tl.int64)
            for start in range(0, num_pixels, BLOCK):
                at = start + tl.arange(0, BLOCK)
                inside = at < num_pixels
                grey = _grey(
                    tl.load(image + at * 3, inside, 0).to(tl.int32),
                    tl.load(image + at * 3 + 1, inside, 0).to(tl.int32),
                    tl.load(image + at * 3 + 2, inside, 0).to(tl.int32),
                )
                total += grey
            mean = tl.sum(total, 0).to(tl.float64) / num_pixels
            degenerate = tl.floor(mean + 0.5).to(tl.float32)
        value = _blend(degenerate, levels.to(tl.float32), arg.to(tl.float32)).to(tl.int32)
    tl.store(tables + (n * 3 + c) * 256 + levels, value.to(tl.uint8))


@triton.jit
def _grey(red, green, blue):
    """PIL's RGB to L: ITU-R 601 in 16-bit fixed point, rounded."""
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def _blend(degenerate, original, factor):
    """PIL's `Image.blend` in float32, not yet cut off towards zero."""
    return tl.minimum(tl.maximum(degenerate + factor * (original - degenerate), 0.0), 255.0)


@triton.jit
def _apply(source, target, numbers, tables, fill, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    """For a block of one image's pixels: apply the operation, whichever it is; no operation and blur copy."""
    n = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < H * W
    begin = n.to(tl.int64) * H * W * 3
    image, out = source + begin, target + begin
    numbers += n * _COLUMNS
    kind, factor = tl.load(numbers).to(tl.int32), tl.load(numbers + 1).to(tl.float32)
    if kind == 0 or kind > _LAST_GEOMETRIC:
        for c in tl.static_range(3):
            tl.store(out + at * 3 + c, tl.load(image + at * 3 + c, inside, 0), inside)
    elif kind < _COLOR:
        for c in tl.static_range(3):
            level = tl.load(image + at * 3 + c, inside, 0).to(tl.int32)
            tl.store(out + at * 3 + c, tl.load(tables + (n * 3 + c) * 256 + level, inside, 0), inside)
    elif kind == _COLOR:
        grey = _grey(
            tl.load(image + at * 3, inside, 0).to(tl.int32),
            tl.load(image + at * 3 + 1, inside, 0).to(tl.int32),
            tl.load(image + at * 3 + 2, inside, 0).to(tl.int32),
        ).to(tl.float32)
        for c in tl.static_range(3):
            original = tl.load(image + at * 3 + c, inside, 0).to(tl.float32)
            tl.store(out + at * 3 + c, _blend(grey, original, factor).to(tl.uint8), inside)
    elif kind == _SHARPNESS:
        y, x = at // W, at % W
        is_inner = inside & (y > 0) & (y < H - 1) & (x > 0) & (x < W - 1)
        for c in tl.static_range(3):
            original = tl.load(image + at * 3 + c, inside, 0).to(tl.int32)
            total = 4 * original
            for dy in tl.static_range(3):
                for dx in tl.static_range(3):
                    near = at + (dy - 1) * W + (dx - 1)
                    total += tl.load(image + near * 3 + c, is_inner, 0).to(tl.int32)
            smooth = ((2 * total + 13) // 26).to(tl.float32)
            sharp = _blend(smooth, original.to(tl.float32), factor).to(tl.int32)
            tl.store(out + at * 3 + c, tl.where(is_inner, sharp, original).to(tl.uint8), inside)
    else:
        interpolation = tl.load(numbers + 2).to(tl.int32)
        if interpolation == _NEAREST:
            _nearest(image, out, numbers, fill, at, inside, H, W)
        elif interpolation == _BICUBIC:
            _smooth(image, out, numbers, fill, at, inside, H, W, True)
        else:
            _smooth(image, out, numbers, fill, at, inside, H, W, False)


@triton.jit
def _nearest(image, out, numbers, fill, at, inside, H, W):
    """Affine resampling by the nearest pixel, in PIL's 16.16 fixed point."""
    a, b, c = tl.load(numbers + 3).to(tl.int64), tl.load(numbers + 4).to(tl.int64), tl.load(numbers + 5).to(tl.int64)
    d, e, f = tl.load(numbers + 6).to(tl.int64), tl.load(numbers + 7).to(tl.int64), tl.load(numbers + 8).to(tl.int64)
    x, y = (at % W).to(tl.int64), (at // W).to(tl.int64)
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    there = inside & (column >= 0) & (column < W) & (row >= 0) & (row < H)
    for channel in tl.static_range(3):
        pixel = tl.load(image + (row * W + column) * 3 + channel, there, 0)
        tl.store(out + at * 3 + channel, tl.where(there, pixel, tl.load(fill + channel)), inside)


@triton.jit
def _smooth(image, out, numbers, fill, at, inside, H, W, BICUBIC: tl.constexpr):
    """Affine resampling as in PIL's `Geometry.c`; bicubic has a = -1, edges repeat, outside is `fill`."""
    x, y = (at % W).to(tl.float64) + 0.5, (at // W).to(tl.float64) + 0.5
    xin = tl.load(numbers + 3) * x + tl.load(numbers + 4) * y + tl.load(numbers + 5)
    yin = tl.load(numbers + 6) * x + tl.load(numbers + 7) * y + tl.load(numbers + 8)
    there = inside & (xin >= 0) & (xin < W) & (yin >= 0) & (yin < H)
    left, upper = tl.floor(xin - 0.5), tl.floor(yin - 0.5)
    dx, dy = (xin - 0.5 - left).to(tl.float32), (yin - 0.5 - upper).to(tl.float32)
    column, row = left.to(tl.int32), upper.to(tl.int32)
    red, green, blue = tl.zeros_like(dx), tl.zeros_like(dx), tl.zeros_like(dx)
    first: tl.constexpr = 0 if BICUBIC else 1
    last: tl.constexpr = 4 if BICUBIC else 3
    for ty in tl.static_range(first, last):
        line = tl.minimum(tl.maximum(row + (ty - 1), 0), H - 1) * W
        for tx in tl.static_range(first, last):
            near = (line + tl.minimum(tl.maximum(column + (tx - 1), 0), W - 1)) * 3
            weight = _weight(dy, ty, BICUBIC) * _weight(dx, tx, BICUBIC)
            red += weight * tl.load(image + near, there, 0).to(tl.float32)
            green += weight * tl.load(image + near + 1, there, 0).to(tl.float32)
            blue += weight * tl.load(image + near + 2, there, 0).to(tl.float32)
    _put(out, at * 3, red, there, inside, tl.load(fill))
    _put(out, at * 3 + 1, green, there, inside, tl.load(fill + 1))
    _put(out, at * 3 + 2, blue, there, inside, tl.load(fill + 2))


@triton.jit
def _weight(d, tap: tl.constexpr, BICUBIC: tl.constexpr):
    """Weight of one of the four pixels around a point that is `d` (0-1) past the second."""
    if not BICUBIC:
        return 1 - d if tap == 1 else d
    if tap == 0:
        return d * (d * (2 - d) - 1)
    if tap == 1:
        return 1 + d * d * (d - 2)
    if tap == 2:
        return d * (1 + d * (1 - d))
    return d * d * (d - 1)


@triton.jit
def _put(out, at, total, there, inside, fill):
    # Weights may sum to a rounding less than 1, which must not cost a whole level.
    level = tl.minimum(tl.maximum(total + 1 / 16384, 0.0), 255.0).to(tl.uint8)
    tl.store(out + at, tl.where(there, level, fill), inside)
