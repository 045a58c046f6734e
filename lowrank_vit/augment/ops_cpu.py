"""The image operations on a CPU: one image a thread, each pixel touched once an operation; compiled by numba.

Twins: PIL's own operations, and the batched tensor version in `ops.py`. Sources: `src/libImaging/{Blend,Filter,
Geometry,BoxBlur}.c` and `src/PIL/{ImageOps,ImageEnhance}.py` of Pillow 13.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import njit, prange

from lowrank_vit.data.plan_ops import BICUBIC, NEAREST, Kind

# FFCV's thread runs numba's parallel code too, beside the main thread; numba's own "workqueue" would abort the process.
if numba.config.THREADING_LAYER == "default":  # type: ignore[attr-defined]
    numba.config.THREADING_LAYER = "threadsafe"  # type: ignore[attr-defined]

_EQUALIZE, _AUTOCONTRAST, _INVERT = int(Kind.EQUALIZE), int(Kind.AUTOCONTRAST), int(Kind.INVERT)
_POSTERIZE, _SOLARIZE, _SOLARIZE_ADD = int(Kind.POSTERIZE), int(Kind.SOLARIZE), int(Kind.SOLARIZE_ADD)
_BRIGHTNESS, _CONTRAST, _COLOR = int(Kind.BRIGHTNESS), int(Kind.CONTRAST), int(Kind.COLOR)
_SHARPNESS, _BLUR, _ROTATE = int(Kind.SHARPNESS), int(Kind.BLUR), int(Kind.ROTATE)
_SHEAR_X, _SHEAR_Y = int(Kind.SHEAR_X), int(Kind.SHEAR_Y)
_TRANSLATE_X, _TRANSLATE_Y = int(Kind.TRANSLATE_X), int(Kind.TRANSLATE_Y)


@njit(parallel=True, nogil=True, cache=True)
def apply_ops(images_NHWC, kinds, args, kernels, fill):
    """Apply int8 `kinds` (N, L) with float64 `args` and int8 `kernels`, in order, to uint8 (N, H, W, 3) in place.

    `fill` is uint8 (3,), the colour of what comes from outside the image.
    """
    N, L = kinds.shape
    for n in prange(N):
        image = images_NHWC[n]
        other = np.empty_like(image) if kinds[n].any() else image
        for layer in range(L):
            kind, arg, kernel = kinds[n, layer], args[n, layer], kernels[n, layer]
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
                    _rotate(image, other, arg, kernel, fill)
                elif kind in (_SHEAR_X, _TRANSLATE_X):
                    _along_rows(image, other, arg, kind == _SHEAR_X, kernel, fill)
                else:
                    _along_columns(image, other, arg, kind == _SHEAR_Y, kernel, fill)
                image[:] = other


@njit(cache=True)
def _look_up(image, table):
    H, W, _ = image.shape
    for y in range(H):
        for x in range(W):
            image[y, x, 0] = table[0, image[y, x, 0]]
            image[y, x, 1] = table[1, image[y, x, 1]]
            image[y, x, 2] = table[2, image[y, x, 2]]


@njit(cache=True)
def _table(image, kind, arg):
    """uint8 (3, 256): what each level of each channel becomes."""
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
def _blend(degenerate, original, factor):
    """PIL's `Image.blend`, cut off towards zero; float32 in all three."""
    value = degenerate + factor * (original - degenerate)
    return np.uint8(0) if value <= 0 else np.uint8(255) if value >= 255 else np.uint8(value)


@njit(cache=True)
def _histogram(image):
    counts = np.zeros((3, 256), np.int64)
    H, W, _ = image.shape
    for y in range(H):
        for x in range(W):
            counts[0, image[y, x, 0]] += 1
            counts[1, image[y, x, 1]] += 1
            counts[2, image[y, x, 2]] += 1
    return counts


@njit(cache=True)
def _stretch(counts, table):
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
def _equalize(counts, table):
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
def _grey(red, green, blue):
    """PIL's RGB to L: ITU-R 601 in 16-bit fixed point, rounded."""
    return (np.int64(red) * 19595 + np.int64(green) * 38470 + np.int64(blue) * 7471 + 0x8000) >> 16


@njit(cache=True)
def _mean_grey(image):
    H, W, _ = image.shape
    total = 0
    for y in range(H):
        for x in range(W):
            total += _grey(image[y, x, 0], image[y, x, 1], image[y, x, 2])
    return int(total / (H * W) + 0.5)


@njit(cache=True)
def _color(image, factor):
    H, W, _ = image.shape
    for y in range(H):
        for x in range(W):
            grey = np.float32(_grey(image[y, x, 0], image[y, x, 1], image[y, x, 2]))
            for c in range(3):
                image[y, x, c] = _blend(grey, np.float32(image[y, x, c]), factor)


@njit(cache=True)
def _sharpness(image, out, factor):
    """Blend with PIL's SMOOTH filter: the 3 x 3 mean with a five-fold centre; the outermost pixels stay."""
    H, W, _ = image.shape
    for y in range(H):
        for x in range(W):
            for c in range(3):
                centre = np.int64(image[y, x, c])
                smooth = centre
                if 0 < y < H - 1 and 0 < x < W - 1:
                    total = 4 * centre
                    for dy in range(-1, 2):
                        for dx in range(-1, 2):
                            total += image[y + dy, x + dx, c]
                    smooth = (2 * total + 13) // 26
                out[y, x, c] = _blend(np.float32(smooth), np.float32(centre), factor)


@njit(cache=True)
def blur_weights(sigma):
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
def _blur(image, out, sigma):
    """PIL's GaussianBlur: three box blurs along the rows, three along the columns, each rounded to 8 bits."""
    H, W, _ = image.shape
    inner, edge, radius = blur_weights(sigma)
    line = np.empty(max(H, W), np.int64)
    out[:] = image
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


@njit(cache=True, inline="always")
def _weights(d, kernel):
    """Weights of the four pixels around a point that lies `d` (0-1) behind the second: PIL's BICUBIC (Keys, a = -1)."""
    one, two = np.float32(1), np.float32(2)
    if kernel == BICUBIC:
        return d * (d * (two - d) - one), one + d * d * (d - two), d * (one + d * (one - d)), d * d * (d - one)
    return np.float32(0), one - d, d, np.float32(0)


@njit(cache=True, inline="always")
def _to_byte(value):
    """Cut off towards zero, as PIL; the weights' sum may lie a rounding below 1, which must not cost a whole level."""
    value += np.float32(1 / 16384)
    return np.uint8(0) if value <= 0 else np.uint8(255) if value >= 255 else np.uint8(value)


@njit(cache=True, inline="always")
def _fixed(value):
    """PIL's 16.16 fixed point, in which it reckons where the nearest pixel lies."""
    return np.int64(math.floor(value * 65536.0 + 0.5))


@njit(cache=True)
def _nearest(arg, line, is_shear):
    """How many whole pixels a shear or translation shifts a line by."""
    if is_shear:
        return (_fixed(0.5 + 0.5 * arg) + line * _fixed(arg)) >> 16
    return np.int64(math.floor(0.5 + arg))


@njit(cache=True)
def _along_rows(image, out, arg, is_shear, kernel, fill):
    """Shear or translate along x: within a row every pixel moves by the same distance."""
    H, W, _ = image.shape
    for y in range(H):
        shift = arg * (y + 0.5) if is_shear else arg
        whole = int(math.floor(shift))
        if kernel == NEAREST:
            whole = _nearest(arg, y, is_shear)
            for x in range(W):
                for c in range(3):
                    out[y, x, c] = image[y, x + whole, c] if 0 <= x + whole < W else fill[c]
            continue
        w0, w1, w2, w3 = _weights(np.float32(shift - whole), kernel)
        for x in range(W):
            if not 0.0 <= x + 0.5 + shift < W:
                for c in range(3):
                    out[y, x, c] = fill[c]
                continue
            x1 = x + whole
            x0, x2, x3 = max(x1 - 1, 0), min(x1 + 1, W - 1), min(x1 + 2, W - 1)
            x1 = max(x1, 0)
            for c in range(3):
                value = w1 * np.float32(image[y, x1, c]) + w2 * np.float32(image[y, x2, c])
                if kernel == BICUBIC:
                    value += w0 * np.float32(image[y, x0, c]) + w3 * np.float32(image[y, x3, c])
                out[y, x, c] = _to_byte(value)


@njit(cache=True)
def _along_columns(image, out, arg, is_shear, kernel, fill):
    """Shear or translate along y."""
    H, W, _ = image.shape
    for y in range(H):
        for x in range(W):
            shift = arg * (x + 0.5) if is_shear else arg
            if kernel == NEAREST:
                y1 = y + _nearest(arg, x, is_shear)
                for c in range(3):
                    out[y, x, c] = image[y1, x, c] if 0 <= y1 < H else fill[c]
                continue
            if not 0.0 <= y + 0.5 + shift < H:
                for c in range(3):
                    out[y, x, c] = fill[c]
                continue
            whole = int(math.floor(shift))
            w0, w1, w2, w3 = _weights(np.float32(shift - whole), kernel)
            y1 = y + whole
            y0, y2, y3 = max(y1 - 1, 0), min(y1 + 1, H - 1), min(y1 + 2, H - 1)
            y1 = max(y1, 0)
            for c in range(3):
                value = w1 * np.float32(image[y1, x, c]) + w2 * np.float32(image[y2, x, c])
                if kernel == BICUBIC:
                    value += w0 * np.float32(image[y0, x, c]) + w3 * np.float32(image[y3, x, c])
                out[y, x, c] = _to_byte(value)


@njit(cache=True)
def _rotate(image, out, degrees, kernel, fill):
    """`Image.rotate` about the middle."""
    H, W, _ = image.shape
    cosine, sine = math.cos(math.radians(-degrees)), math.sin(math.radians(-degrees))
    u, v = 0.5 - W / 2, 0.5 - H / 2
    x_fixed, y_fixed = _fixed(cosine * u + sine * v + W / 2), _fixed(cosine * v - sine * u + H / 2)
    for y in range(H):
        for x in range(W):
            if kernel == NEAREST:
                x1 = (x_fixed + x * _fixed(cosine) + y * _fixed(sine)) >> 16
                y1 = (y_fixed - x * _fixed(sine) + y * _fixed(cosine)) >> 16
                for c in range(3):
                    out[y, x, c] = image[y1, x1, c] if 0 <= x1 < W and 0 <= y1 < H else fill[c]
                continue
            u, v = x + 0.5 - W / 2, y + 0.5 - H / 2
            xin, yin = cosine * u + sine * v + W / 2, cosine * v - sine * u + H / 2
            if not (0.0 <= xin < W and 0.0 <= yin < H):
                for c in range(3):
                    out[y, x, c] = fill[c]
                continue
            x1, y1 = int(math.floor(xin - 0.5)), int(math.floor(yin - 0.5))
            a0, a1, a2, a3 = _weights(np.float32(xin - 0.5 - x1), kernel)
            b0, b1, b2, b3 = _weights(np.float32(yin - 0.5 - y1), kernel)
            x0, x2, x3 = max(x1 - 1, 0), min(x1 + 1, W - 1), min(x1 + 2, W - 1)
            y0, y2, y3 = max(y1 - 1, 0), min(y1 + 1, H - 1), min(y1 + 2, H - 1)
            x1, y1 = max(x1, 0), max(y1, 0)
            for c in range(3):
                if kernel == BICUBIC:
                    value = (
                        b0 * _row(image, y0, x0, x1, x2, x3, c, a0, a1, a2, a3)
                        + b1 * _row(image, y1, x0, x1, x2, x3, c, a0, a1, a2, a3)
                        + b2 * _row(image, y2, x0, x1, x2, x3, c, a0, a1, a2, a3)
                        + b3 * _row(image, y3, x0, x1, x2, x3, c, a0, a1, a2, a3)
                    )
                else:
                    upper = a1 * np.float32(image[y1, x1, c]) + a2 * np.float32(image[y1, x2, c])
                    lower = a1 * np.float32(image[y2, x1, c]) + a2 * np.float32(image[y2, x2, c])
                    value = b1 * upper + b2 * lower
                out[y, x, c] = _to_byte(value)


@njit(cache=True, inline="always")
def _row(image, y, x0, x1, x2, x3, c, a0, a1, a2, a3):
    return (
        a0 * np.float32(image[y, x0, c])
        + a1 * np.float32(image[y, x1, c])
        + a2 * np.float32(image[y, x2, c])
        + a3 * np.float32(image[y, x3, c])
    )
