"""The image operations on a CPU: one image per thread, each pixel touched once per operation; compiled by numba.

Twins: PIL's own operations, and the batched tensor version in `ops.py`. Sources: `src/libImaging/{Blend,Filter,
BoxBlur}.c` and `src/PIL/{ImageOps,ImageEnhance}.py` of Pillow 13.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import njit, prange

from lowrank_vit.augment.resample_cpu import along_columns, along_rows, rotate
from lowrank_vit.plan.operations import Kind

# The ffcv loader's thread runs numba's parallel code too, beside the main thread; numba's own "workqueue" would abort
# the process.
if numba.config.THREADING_LAYER == "default":  # type: ignore[attr-defined]
    numba.config.THREADING_LAYER = "threadsafe"  # type: ignore[attr-defined]

_EQUALIZE, _AUTOCONTRAST, _INVERT = int(Kind.EQUALIZE), int(Kind.AUTOCONTRAST), int(Kind.INVERT)
_POSTERIZE, _SOLARIZE, _SOLARIZE_ADD = int(Kind.POSTERIZE), int(Kind.SOLARIZE), int(Kind.SOLARIZE_ADD)
_CONTRAST, _COLOR = int(Kind.CONTRAST), int(Kind.COLOR)
_SHARPNESS, _BLUR, _ROTATE = int(Kind.SHARPNESS), int(Kind.BLUR), int(Kind.ROTATE)
_SHEAR_X, _SHEAR_Y = int(Kind.SHEAR_X), int(Kind.SHEAR_Y)
_TRANSLATE_X, _TRANSLATE_Y = int(Kind.TRANSLATE_X), int(Kind.TRANSLATE_Y)


@njit(parallel=True, nogil=True, cache=True)
def apply_ops(
    images_NHWC: np.ndarray, kinds: np.ndarray, args: np.ndarray, interpolations: np.ndarray, fill: np.ndarray
) -> None:
    """Apply int8 `kinds` (N, L) with float64 `args` and `interpolations`, in order, to uint8 (N, H, W, 3) in place.

    `fill` is uint8 (3,), the colour outside the image.
    """
    N, L = kinds.shape
    for n in prange(N):
        image = images_NHWC[n]
        other = np.empty_like(image) if kinds[n].any() else image
        for layer in range(L):
            kind, arg, interpolation = kinds[n, layer], args[n, layer], interpolations[n, layer]
            if kind == 0:
                continue
            if kind < _COLOR:
                _look_up(image, _table(image, kind, arg))
            elif kind == _COLOR:
                _color(image, np.float32(arg))
            else:
                if kind == _SHARPNESS:
                    _sharpness(image, other, np.float32(arg))
                elif kind == _BLUR:
                    _blur(image, other, arg)
                elif kind == _ROTATE:
                    rotate(image, other, arg, interpolation, fill)
                elif kind in (_SHEAR_X, _TRANSLATE_X):
                    along_rows(image, other, arg, kind == _SHEAR_X, interpolation, fill)
                else:
                    along_columns(image, other, arg, kind == _SHEAR_Y, interpolation, fill)
                _copy(other, image)


@njit(cache=True)
def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """`target[:] = source` without numba's check of the shapes, whose compilation takes seconds."""
    H, W, _ = source.shape
    rows, target_rows = source.reshape(H, W * 3), target.reshape(H, W * 3)
    for y in range(H):
        for i in range(W * 3):
            target_rows[y, i] = rows[y, i]


@njit(cache=True)
def _look_up(image: np.ndarray, table: np.ndarray) -> None:
    H, W, _ = image.shape
    for y in range(H):
        for x in range(W):
            image[y, x, 0] = table[0, image[y, x, 0]]
            image[y, x, 1] = table[1, image[y, x, 1]]
            image[y, x, 2] = table[2, image[y, x, 2]]


@njit(cache=True)
def _table(image: np.ndarray, kind: int, arg: float) -> np.ndarray:
    """uint8 (3, 256): the new value of each level of each channel."""
    table = np.empty((3, 256), np.uint8)
    if kind in (_AUTOCONTRAST, _EQUALIZE):
        counts = _histogram(image)
        for c in range(3):
            if kind == _AUTOCONTRAST:
                _stretch(counts[c], table[c])
            else:
                _equalize(counts[c], table[c])
        return table
    degenerate = np.float32(_mean_grey(image)) if kind == _CONTRAST else np.float32(0)
    factor = np.float32(arg)
    mask = 0 if arg <= 0 else 256 - (1 << (8 - int(min(arg, 8.0))))
    for i in range(256):
        value = i
        if kind == _INVERT:
            value = 255 - i
        elif kind == _POSTERIZE:
            value = i & mask
        elif kind == _SOLARIZE:
            value = i if i < arg else 255 - i
        elif kind == _SOLARIZE_ADD:
            value = min(255, i + int(arg)) if i < 128 else i
        else:
            value = _blend(degenerate, np.float32(i), factor)
        for c in range(3):
            table[c, i] = value
    return table


@njit(cache=True, inline="always")
def _blend(degenerate: np.float32, original: np.float32, factor: np.float32) -> np.uint8:
    """PIL's `Image.blend`, cut off towards zero; float32 in all three."""
    value = degenerate + factor * (original - degenerate)
    return np.uint8(0) if value <= 0 else np.uint8(255) if value >= 255 else np.uint8(value)


@njit(cache=True)
def _histogram(image: np.ndarray) -> np.ndarray:
    counts = np.zeros((3, 256), np.int64)
    H, W, _ = image.shape
    for y in range(H):
        for x in range(W):
            counts[0, image[y, x, 0]] += 1
            counts[1, image[y, x, 1]] += 1
            counts[2, image[y, x, 2]] += 1
    return counts


@njit(cache=True)
def _stretch(counts: np.ndarray, table: np.ndarray) -> None:
    """`ImageOps.autocontrast`: the darkest level to 0, the brightest to 255."""
    low, high = 0, 255
    while low < 255 and counts[low] == 0:
        low += 1
    while high > 0 and counts[high] == 0:
        high -= 1
    for i in range(256):
        if high <= low:
            table[i] = i
        else:
            scale = 255.0 / (high - low)
            table[i] = np.uint8(max(0, min(255, int(i * scale + -low * scale))))


@njit(cache=True)
def _equalize(counts: np.ndarray, table: np.ndarray) -> None:
    """`ImageOps.equalize`: a flat histogram."""
    last, levels, total = 0, 0, 0
    for i in range(256):
        total += counts[i]
        if counts[i]:
            last, levels = counts[i], levels + 1
    step = (total - last) // 255
    n = step // 2
    for i in range(256):
        table[i] = i if levels <= 1 or step == 0 else np.uint8(min(255, n // max(step, 1)))
        n += counts[i]


@njit(cache=True, inline="always")
def _grey(red: np.uint8, green: np.uint8, blue: np.uint8) -> np.int64:
    """PIL's RGB to L: ITU-R 601 in 16-bit fixed point, rounded."""
    return (np.int64(red) * 19595 + np.int64(green) * 38470 + np.int64(blue) * 7471 + 0x8000) >> 16


@njit(cache=True)
def _mean_grey(image: np.ndarray) -> int:
    H, W, _ = image.shape
    total = 0
    for y in range(H):
        for x in range(W):
            total += _grey(image[y, x, 0], image[y, x, 1], image[y, x, 2])
    return int(total / (H * W) + 0.5)


@njit(cache=True)
def _color(image: np.ndarray, factor: np.float32) -> None:
    H, W, _ = image.shape
    for y in range(H):
        for x in range(W):
            grey = np.float32(_grey(image[y, x, 0], image[y, x, 1], image[y, x, 2]))
            for c in range(3):
                image[y, x, c] = _blend(grey, np.float32(image[y, x, c]), factor)


@njit(cache=True)
def _sharpness(image: np.ndarray, out: np.ndarray, factor: np.float32) -> None:
    """Blend with PIL's SMOOTH filter: the 3 x 3 mean with a five-fold centre; the outermost pixels stay."""
    H, W, _ = image.shape
    rows, out_rows = image.reshape(H, W * 3), out.reshape(H, W * 3)
    sums = np.empty(W * 3, np.float32)
    half, share = np.float32(6.5), np.float32(1 / 13)
    for y in range(H):
        for i in range(W * 3):
            out_rows[y, i] = rows[y, i]
        if not 0 < y < H - 1:
            continue
        for i in range(W * 3):
            sums[i] = np.float32(rows[y - 1, i]) + np.float32(rows[y, i]) + np.float32(rows[y + 1, i])
        for i in range(3, W * 3 - 3):
            centre = np.float32(rows[y, i])
            total = np.float32(4) * centre + sums[i - 3] + sums[i] + sums[i + 3]
            # The rounded thirteenth: `total + 6.5` lies well between two multiples of 13.
            out_rows[y, i] = _blend(np.floor((total + half) * share), centre, factor)


@njit(cache=True)
def blur_weights(sigma: float | np.float32) -> tuple[np.int64, np.int64, int]:
    """(inner, edge): 24-bit fixed-point weights of PIL's extended box blur of three passes, and its whole radius.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", 2011.
    """
    # Rounded to float32 where PIL's C code does: ties depend on it.
    sigma = np.float32(sigma)
    variance = np.float32(sigma * sigma / np.float32(3))
    radius = math.floor((np.float32(math.sqrt(12.0 * variance + 1.0)) - 1.0) / 2.0)
    fraction = np.float32((2 * radius + 1) * (radius * (radius + 1) - 3.0 * variance))
    fraction = np.float32(fraction / (6.0 * (variance - (radius + 1) * (radius + 1))))
    exact = np.float32(np.float32(radius) + fraction)
    inner = np.int64(np.float32(1 << 24) / (exact * np.float32(2) + np.float32(1)))
    edge = ((1 << 24) - (int(exact) * 2 + 1) * inner) // 2
    return inner, edge, int(exact)


@njit(cache=True)
def _blur(image: np.ndarray, out: np.ndarray, sigma: float) -> None:
    """PIL's GaussianBlur: three box blurs along the rows, three along the columns, each rounded to 8 bits."""
    H, W, _ = image.shape
    inner, edge, radius = blur_weights(sigma)
    line = np.empty(max(H, W), np.int64)
    _copy(image, out)
    for vertical in range(2):
        lines, length = (W, H) if vertical else (H, W)
        for i in range(lines):
            for c in range(3):
                for _ in range(3):
                    for k in range(length):
                        line[k] = out[k, i, c] if vertical else out[i, k, c]
                    for k in range(length):
                        total = edge * (line[max(k - radius - 1, 0)] + line[min(k + radius + 1, length - 1)])
                        for d in range(-radius, radius + 1):
                            total += inner * line[min(max(k + d, 0), length - 1)]
                        value = np.uint8((total + (1 << 23)) >> 24)
                        if vertical:
                            out[k, i, c] = value
                        else:
                            out[i, k, c] = value
