"""Shears, translations and rotations on a CPU, as PIL resamples: nearest, bilinear, or bicubic with a = -1.

Taps past an edge repeat it, pixels from outside the image are filled. Source: `src/libImaging/Geometry.c` of Pillow 13.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from lowrank_vit.common.filters import BICUBIC, NEAREST


@njit(cache=True)
def along_rows(
    image: np.ndarray, out: np.ndarray, arg: float, is_shear: bool, interpolation: int, fill: np.ndarray
) -> None:
    """Shear or translate along x: within a row every pixel moves by the same distance."""
    H, W, _ = image.shape
    rows, out_rows = image.reshape(H, W * 3), out.reshape(H, W * 3)
    for y in range(H):
        shift = arg * (y + 0.5) if is_shear else arg
        whole = int(math.floor(shift))
        w0, w1, w2, w3 = _weights(np.float32(shift - whole), interpolation)
        # Columns with a source inside the image: 0 <= x + 0.5 + shift < W.
        first, last = max(0, math.ceil(-0.5 - shift)), min(W, math.ceil(W - 0.5 - shift))
        if interpolation == NEAREST:
            whole = _nearest(arg, y, is_shear)
            first, last = max(0, -whole), min(W, W - whole)
        last = max(first, last)
        for x in range(W):
            if x == first:
                break
            _put(out, y, x, fill)
        for x in range(last, W):
            _put(out, y, x, fill)
        if interpolation == NEAREST:
            for i in range(3 * first, 3 * last):
                out_rows[y, i] = rows[y, i + 3 * whole]
            continue
        # Where all four neighbours are inside no index is clamped, and the loop can be vectorised.
        low, high = min(last, max(first, 1 - whole)), max(first, min(last, W - 2 - whole))
        for x in range(first, last):
            if low <= x < high:
                continue
            x0, x1 = min(max(x + whole - 1, 0), W - 1), min(max(x + whole, 0), W - 1)
            x2, x3 = min(x + whole + 1, W - 1), min(x + whole + 2, W - 1)
            for c in range(3):
                out[y, x, c] = _sum4(image[y, x0, c], image[y, x1, c], image[y, x2, c], image[y, x3, c], w0, w1, w2, w3)
        if low < high and interpolation == BICUBIC:
            source = rows[y, 3 * (low + whole - 1) : 3 * (high + whole + 2)]
            for i in range(3 * (high - low)):
                out_rows[y, 3 * low + i] = _sum4(source[i], source[i + 3], source[i + 6], source[i + 9], w0, w1, w2, w3)
        elif low < high:
            source = rows[y, 3 * (low + whole) : 3 * (high + whole + 1)]
            for i in range(3 * (high - low)):
                out_rows[y, 3 * low + i] = _sum2(source[i], source[i + 3], w1, w2)


@njit(cache=True)
def along_columns(
    image: np.ndarray, out: np.ndarray, arg: float, is_shear: bool, interpolation: int, fill: np.ndarray
) -> None:
    """Shear or translate along y: within a column every pixel moves by the same distance."""
    H, W, _ = image.shape
    rows, out_rows = image.reshape(H, W * 3), out.reshape(H, W * 3)
    wholes, weights = np.empty(W, np.int64), np.empty((4, W), np.float32)
    firsts, lasts = np.empty(W, np.int64), np.empty(W, np.int64)
    for x in range(W):
        shift = arg * (x + 0.5) if is_shear else arg
        whole = int(math.floor(shift))
        weights[0, x], weights[1, x], weights[2, x], weights[3, x] = _weights(np.float32(shift - whole), interpolation)
        firsts[x], lasts[x] = max(0, math.ceil(-0.5 - shift)), min(H, math.ceil(H - 0.5 - shift))
        if interpolation == NEAREST:
            whole = _nearest(arg, x, is_shear)
            firsts[x], lasts[x] = max(0, -whole), min(H, H - whole)
        wholes[x] = whole
    for y in range(H):
        if is_shear or interpolation == NEAREST:
            for x in range(W):
                if not firsts[x] <= y < lasts[x]:
                    _put(out, y, x, fill)
                    continue
                y0, y1 = max(y + wholes[x] - 1, 0), max(y + wholes[x], 0)
                y2, y3 = min(y + wholes[x] + 1, H - 1), min(y + wholes[x] + 2, H - 1)
                w0, w1, w2, w3 = weights[0, x], weights[1, x], weights[2, x], weights[3, x]
                for c in range(3):
                    if interpolation == BICUBIC:
                        value = _sum4(
                            image[y0, x, c], image[y1, x, c], image[y2, x, c], image[y3, x, c], w0, w1, w2, w3
                        )
                    elif interpolation == NEAREST:
                        value = image[y1, x, c]
                    else:
                        value = _sum2(image[y1, x, c], image[y2, x, c], w1, w2)
                    out[y, x, c] = value
            continue
        if not firsts[0] <= y < lasts[0]:
            for x in range(W):
                _put(out, y, x, fill)
            continue
        y1 = y + wholes[0]
        row0, row1 = rows[max(y1 - 1, 0)], rows[max(y1, 0)]
        row2, row3 = rows[min(y1 + 1, H - 1)], rows[min(y1 + 2, H - 1)]
        w0, w1, w2, w3 = weights[0, 0], weights[1, 0], weights[2, 0], weights[3, 0]
        if interpolation == BICUBIC:
            for i in range(W * 3):
                out_rows[y, i] = _sum4(row0[i], row1[i], row2[i], row3[i], w0, w1, w2, w3)
        else:
            for i in range(W * 3):
                out_rows[y, i] = _sum2(row1[i], row2[i], w1, w2)


@njit(cache=True)
def rotate(image: np.ndarray, out: np.ndarray, degrees: float, interpolation: int, fill: np.ndarray) -> None:
    """`Image.rotate` about the middle."""
    H, W, _ = image.shape
    cosine, sine = math.cos(math.radians(-degrees)), math.sin(math.radians(-degrees))
    u, v = 0.5 - W / 2, 0.5 - H / 2
    x_fixed, y_fixed = _fixed(cosine * u + sine * v + W / 2), _fixed(cosine * v - sine * u + H / 2)
    for y in range(H):
        for x in range(W):
            if interpolation == NEAREST:
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
            a0, a1, a2, a3 = _weights(np.float32(xin - 0.5 - x1), interpolation)
            b0, b1, b2, b3 = _weights(np.float32(yin - 0.5 - y1), interpolation)
            x0, x2, x3 = max(x1 - 1, 0), min(x1 + 1, W - 1), min(x1 + 2, W - 1)
            y0, y2, y3 = max(y1 - 1, 0), min(y1 + 1, H - 1), min(y1 + 2, H - 1)
            x1, y1 = max(x1, 0), max(y1, 0)
            for c in range(3):
                if interpolation == BICUBIC:
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
def _row(
    image: np.ndarray,
    y: int,
    x0: int,
    x1: int,
    x2: int,
    x3: int,
    c: int,
    a0: np.float32,
    a1: np.float32,
    a2: np.float32,
    a3: np.float32,
) -> np.float32:
    return (
        a0 * np.float32(image[y, x0, c])
        + a1 * np.float32(image[y, x1, c])
        + a2 * np.float32(image[y, x2, c])
        + a3 * np.float32(image[y, x3, c])
    )


@njit(cache=True, inline="always")
def _weights(d: np.float32, interpolation: int) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """Weights of the four pixels around a point that is `d` (0-1) past the second: PIL's BICUBIC (Keys, a = -1)."""
    one, two = np.float32(1), np.float32(2)
    if interpolation == BICUBIC:
        return d * (d * (two - d) - one), one + d * d * (d - two), d * (one + d * (one - d)), d * d * (d - one)
    return np.float32(0), one - d, d, np.float32(0)


@njit(cache=True, inline="always")
def _to_byte(value: np.float32) -> np.uint8:
    """Cut off towards zero, as PIL; the weights' sum may lie a rounding below 1, which must not cost a whole level."""
    value += np.float32(1 / 16384)
    return np.uint8(0) if value <= 0 else np.uint8(255) if value >= 255 else np.uint8(value)


@njit(cache=True, inline="always")
def _sum2(p1: np.uint8, p2: np.uint8, w1: np.float32, w2: np.float32) -> np.uint8:
    return _to_byte(w1 * np.float32(p1) + w2 * np.float32(p2))


@njit(cache=True, inline="always")
def _sum4(
    p0: np.uint8,
    p1: np.uint8,
    p2: np.uint8,
    p3: np.uint8,
    w0: np.float32,
    w1: np.float32,
    w2: np.float32,
    w3: np.float32,
) -> np.uint8:
    return _to_byte(w0 * np.float32(p0) + w1 * np.float32(p1) + w2 * np.float32(p2) + w3 * np.float32(p3))


@njit(cache=True, inline="always")
def _put(out: np.ndarray, y: int, x: int, color: np.ndarray) -> None:
    out[y, x, 0], out[y, x, 1], out[y, x, 2] = color[0], color[1], color[2]


@njit(cache=True, inline="always")
def _fixed(value: float) -> np.int64:
    """PIL's 16.16 fixed point, in which it computes the place of the nearest pixel."""
    return np.int64(math.floor(value * 65536.0 + 0.5))


@njit(cache=True)
def _nearest(arg: float, line: int, is_shear: bool) -> np.int64:
    """How many whole pixels a shear or translation shifts a line by."""
    if is_shear:
        return (_fixed(0.5 + 0.5 * arg) + line * _fixed(arg)) >> 16
    return np.int64(math.floor(0.5 + arg))
