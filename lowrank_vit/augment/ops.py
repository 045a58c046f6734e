"""The image operations as tensor code for any device, a group of samples at a time: the slow twin.

On a CPU `ops_cpu.py` is faster, on a GPU `ops_triton.py`. The host knows which sample gets which operation, so grouping
them costs no synchronisation. Pixels are the same as those of `ops_cpu.py`, which names the sources of the formulas,
and as PIL's.

Shape legend: B batch, G group, H, W pixels, C = 3 channels; images are NHWC.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.augment.ops_cpu import blur_weights
from lowrank_vit.common.devices import to_device
from lowrank_vit.common.filters import BICUBIC, NEAREST
from lowrank_vit.plan.operations import GEOMETRIC, ImageOps, Kind

_TABLES = (
    *(Kind.AUTOCONTRAST, Kind.EQUALIZE, Kind.INVERT, Kind.POSTERIZE, Kind.SOLARIZE, Kind.SOLARIZE_ADD),
    *(Kind.BRIGHTNESS, Kind.CONTRAST),
)
_ROUNDING = 1 / 16384
"""Added before cutting off, because weights may sum to a rounding less than 1."""


def apply_ops(images_BHWC: Tensor, ops: ImageOps, fill: Tensor) -> None:
    """Apply the plan's operations in place to uint8 (B, H, W, 3); `fill`: uint8 (3,), colour from outside the image."""
    for layer in range(ops.kinds.shape[1]):
        kinds, args, interpolations = ops.kinds[:, layer], ops.args[:, layer], ops.interpolations[:, layer]
        for family in (_TABLES, (Kind.COLOR,), (Kind.SHARPNESS,), (Kind.BLUR,), GEOMETRIC):
            rows = np.flatnonzero(np.isin(kinds, family))
            if len(rows) == 0:
                continue
            group = to_device(rows, images_BHWC)
            images = images_BHWC[group]
            if family is _TABLES:
                changed = _look_up(images, kinds[rows], args[rows])
            elif family is GEOMETRIC:
                # If no sample is bicubic the outer taps have no weight.
                wide = bool((interpolations[rows] == BICUBIC).any())
                maps = _Affine(images, kinds[rows], args[rows], interpolations[rows])
                changed = _resample(images, maps.matrices, maps.fixed, maps.is_filter, fill, wide)
            elif Kind.COLOR in family:
                changed = _blend(_grey(images)[..., None].float(), images.float(), _column(args[rows], images))
            elif Kind.SHARPNESS in family:
                changed = _blend(_smooth(images), images.float(), _column(args[rows], images))
            else:
                changed = blur(images, args[rows])
            images_BHWC.index_copy_(0, group, changed)


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    """float32 (G, 1, 1, 1)."""
    return to_device(values.astype(np.float32), like).view(-1, 1, 1, 1)


def _blend(degenerate: Tensor, original: Tensor, factor: Tensor) -> Tensor:
    """PIL's `Image.blend` in float32, cut off towards zero: uint8."""
    return (degenerate + factor * (original - degenerate)).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """int32 (G, H, W): PIL's RGB to L, ITU-R 601 in 16-bit fixed point, rounded."""
    red, green, blue = images.int().unbind(-1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _look_up(images: Tensor, kinds: np.ndarray, args: np.ndarray) -> Tensor:
    tables = _tables(images, kinds, args)  # (G, 3, 256)
    first = torch.arange(len(images) * 3, device=images.device, dtype=torch.int32).view(-1, 1, 1, 3) * 256
    return tables.view(-1)[images.int() + first]


def _tables(images: Tensor, kinds: np.ndarray, args: np.ndarray) -> Tensor:
    """uint8 (G, 3, 256): the new value of each level of each channel of each sample."""
    levels = torch.arange(256, device=images.device, dtype=torch.float32)
    kind, arg = to_device(kinds, images).view(-1, 1), to_device(args, images).view(-1, 1)
    # bits 0-8; 2 ** (8 - bits) levels fall together, all of them at 0 bits
    step = torch.exp2(8 - arg.clamp(0, 8))
    tables = torch.where(kind == Kind.POSTERIZE, (levels / step).floor() * step, levels)
    tables = torch.where(kind == Kind.INVERT, 255 - levels, tables)
    tables = torch.where((kind == Kind.SOLARIZE) & (levels >= arg), 255 - levels, tables)
    tables = torch.where((kind == Kind.SOLARIZE_ADD) & (levels < 128), (levels + arg.floor()).clamp(max=255), tables)
    is_contrast = kind == Kind.CONTRAST
    degenerate = torch.zeros_like(arg, dtype=torch.float32)
    if (kinds == Kind.CONTRAST).any():
        mean = (_grey(images).double().mean((1, 2)) + 0.5).floor().float()[:, None]
        degenerate = torch.where(is_contrast, mean, degenerate)
    blended = (degenerate + arg.float() * (levels - degenerate)).clamp(0, 255).floor()
    tables = torch.where(is_contrast | (kind == Kind.BRIGHTNESS), blended, tables)
    tables = tables[:, None].to(torch.uint8).repeat(1, 3, 1)
    rows = np.flatnonzero(np.isin(kinds, (Kind.AUTOCONTRAST, Kind.EQUALIZE)))
    if len(rows):
        some = to_device(rows, images)
        counts = _histograms(images[some])
        stretches = (kind[some] == Kind.AUTOCONTRAST)[:, None]
        tables.index_copy_(0, some, torch.where(stretches, _stretch(counts), _equalize(counts)).to(torch.uint8))
    return tables


def _histograms(images: Tensor) -> Tensor:
    """int64 (G, 3, 256)."""
    G = len(images)
    first = torch.arange(G * 3, device=images.device).view(G, 1, 1, 3) * 256
    counts = torch.zeros(G * 3 * 256, dtype=torch.int64, device=images.device)
    bins = (images.long() + first).flatten()
    return counts.scatter_add_(0, bins, torch.ones_like(bins)).view(G, 3, 256)


def _stretch(counts: Tensor) -> Tensor:
    """`ImageOps.autocontrast`: the darkest level to 0, the brightest to 255."""
    present, levels = counts > 0, torch.arange(256, device=counts.device)
    low = torch.where(present, levels, 256).amin(-1, keepdim=True)
    high = torch.where(present, levels, -1).amax(-1, keepdim=True)
    span = (high - low).clamp(min=1).double()
    scale = (
        torch.full_like(span, 255.0) / span
    )  # not `255.0 / span`: torch multiplies by the reciprocal, a rounding off
    stretched = (levels * scale + -low * scale).clamp(0, 255).floor()
    return torch.where(high <= low, levels.double(), stretched)


def _equalize(counts: Tensor) -> Tensor:
    """`ImageOps.equalize`: a flat histogram."""
    present, levels = counts > 0, torch.arange(256, device=counts.device)
    last = torch.where(present, levels, -1).amax(-1, keepdim=True).clamp(min=0)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, last)) // 255
    before = counts.cumsum(-1) - counts
    equalized = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    is_kept = (present.sum(-1, keepdim=True) <= 1) | (step == 0)
    return torch.where(is_kept, levels, equalized).double()


def _smooth(images: Tensor) -> Tensor:
    """PIL's SMOOTH filter as float32: the 3 x 3 mean with a five-fold centre; the outermost pixels stay."""
    _, H, W, _ = images.shape
    whole = images.int()
    smooth = whole.float()
    if H < 3 or W < 3:
        return smooth
    total = 4 * whole[:, 1:-1, 1:-1]
    for dy in range(3):
        for dx in range(3):
            total = total + whole[:, dy : H - 2 + dy, dx : W - 2 + dx]
    smooth[:, 1:-1, 1:-1] = ((2 * total + 13) // 26).float()
    return smooth


def blur(images: Tensor, sigmas: np.ndarray) -> Tensor:
    """PIL's GaussianBlur: three box blurs along the rows, three along the columns, each rounded to 8 bits."""
    parameters = [blur_weights(sigma) for sigma in sigmas]
    reach = max(radius for _, _, radius in parameters) + 1
    taps = np.zeros((len(sigmas), 2 * reach + 1), np.int64)
    for row, (inner, edge, radius) in zip(taps, parameters, strict=True):
        row[reach - radius : reach + radius + 1] = inner
        row[[reach - radius - 1, reach + radius + 1]] = edge
    weights = to_device(taps, images)
    blurred = images.long()
    for axis in (2, 1):
        length = blurred.shape[axis]
        positions = torch.arange(length, device=images.device)
        for _ in range(3):
            total = torch.full_like(blurred, 1 << 23)
            for tap in range(2 * reach + 1):
                index = (positions + tap - reach).clamp(0, length - 1)
                total += weights[:, tap].view(-1, 1, 1, 1) * blurred.index_select(axis, index)
            blurred = total >> 24
    return blurred.to(torch.uint8)


class _Affine:
    """The source of each output pixel of a group."""

    def __init__(self, images: Tensor, kinds: np.ndarray, args: np.ndarray, interpolations: np.ndarray) -> None:
        height, width = images.shape[1:3]
        matrices = affine(kinds, args, height, width)
        self.matrices = to_device(matrices, images)
        """float64 (6, G), see `affine`."""
        is_nearest = interpolations == NEAREST
        self.fixed = to_device(fixed_point(matrices, kinds), images) if is_nearest.any() else None
        """int64 (6, G), see `fixed_point`; None if no sample uses nearest."""
        self.is_filter = to_device(np.stack([interpolations == BICUBIC, is_nearest]), images)
        """bool (2, G): bicubic, nearest."""


def _resample(
    images: Tensor, matrices: Tensor, fixed: Tensor | None, is_filter: Tensor, fill: Tensor, wide: bool
) -> Tensor:
    """Affine resampling as in PIL's `Geometry.c`; bicubic has a = -1, edges repeat, outside is `fill`.

    `wide`: take all sixteen pixels around a point rather than the inner four.
    """
    G, H, W, C = images.shape
    a, b, c, d, e, f = matrices.view(6, G, 1, 1).unbind(0)
    x = torch.arange(W, device=images.device, dtype=torch.float64) + 0.5
    y = torch.arange(H, device=images.device, dtype=torch.float64)[:, None] + 0.5
    xin, yin = a * x + b * y + c, d * x + e * y + f
    is_inside = (xin >= 0) & (xin < W) & (yin >= 0) & (yin < H)
    x1, y1 = (xin - 0.5).floor(), (yin - 0.5).floor()
    dx, dy = (xin - 0.5 - x1).float(), (yin - 0.5 - y1).float()
    x1, y1 = x1.long(), y1.long()
    cubic, nearest = is_filter.view(2, G, 1, 1).unbind(0)
    if fixed is not None:
        x_nearest, y_nearest = _nearest(fixed, images)
        is_there = (x_nearest >= 0) & (x_nearest < W) & (y_nearest >= 0) & (y_nearest < H)
        is_inside = torch.where(nearest, is_there, is_inside)
        x1, y1 = torch.where(nearest, x_nearest, x1), torch.where(nearest, y_nearest, y1)
        dx, dy = torch.where(nearest, 0.0, dx), torch.where(nearest, 0.0, dy)
    weights_x, weights_y = _weights(dx, cubic), _weights(dy, cubic)
    flat, total = images.view(G, H * W, C), torch.zeros(G, H, W, C, device=images.device)
    taps = range(4) if wide else (1, 2)
    for ty in taps:
        row = (y1 + (ty - 1)).clamp(0, H - 1) * W
        for tx in taps:
            index = (row + (x1 + (tx - 1)).clamp(0, W - 1)).view(G, H * W, 1).expand(-1, -1, C)
            weight = (weights_y[ty] * weights_x[tx])[..., None]
            total = total + weight * flat.gather(1, index).view(G, H, W, C)
    return torch.where(is_inside[..., None], (total + _ROUNDING).clamp(0, 255).to(torch.uint8), fill)


def _nearest(fixed: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """int64 (G, H, W) twice: column and row of the nearest pixel, from `fixed_point`."""
    G, H, W, _ = images.shape
    a, b, c, d, e, f = fixed.view(6, G, 1, 1).unbind(0)
    x = torch.arange(W, device=images.device)
    y = torch.arange(H, device=images.device)[:, None]
    return (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16


def fixed_point(matrices: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """int64 (6, G): `affine` for pixel numbers, in the 16.16 fixed point of PIL's nearest resampling."""
    a, b, c, d, e, f = matrices
    starts = [c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5]
    exact = np.isin(kinds, (Kind.TRANSLATE_X, Kind.TRANSLATE_Y))  # PIL computes these in float64
    c, f = (np.where(exact, np.floor(start) + 0.5, start) for start in starts)
    return np.floor(np.stack([a, b, c, d, e, f]) * 65536.0 + 0.5).astype(np.int64)


def _weights(d: Tensor, cubic: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the four pixels around a point that is `d` (0-1) past the second."""
    return (
        torch.where(cubic, d * (d * (2 - d) - 1), 0.0),
        torch.where(cubic, 1 + d * d * (d - 2), 1 - d),
        torch.where(cubic, d * (1 + d * (1 - d)), d),
        torch.where(cubic, d * d * (d - 1), 0.0),
    )


def affine(kinds: np.ndarray, args: np.ndarray, height: int, width: int) -> np.ndarray:
    """float64 (6, G): input x = a x + b y + c, y = d x + e y + f for each output pixel's centre (x, y)."""
    matrices = np.zeros((6, len(kinds)))
    matrices[0] = matrices[4] = 1.0
    for row, kind in ((1, Kind.SHEAR_X), (3, Kind.SHEAR_Y), (2, Kind.TRANSLATE_X), (5, Kind.TRANSLATE_Y)):
        matrices[row] = np.where(kinds == kind, args, 0.0)
    rotates = kinds == Kind.ROTATE
    angle = -np.radians(args[rotates])
    cosine, sine = np.cos(angle), np.sin(angle)
    matrices[:, rotates] = (
        *(cosine, sine, width / 2 - cosine * width / 2 - sine * height / 2),
        *(-sine, cosine, height / 2 + sine * width / 2 - cosine * height / 2),
    )
    return matrices
