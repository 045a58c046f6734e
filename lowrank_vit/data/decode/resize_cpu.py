"""Crop, antialiased resize and flip on CPU threads, image by image, as PIL resizes.

Filter, support and normalisation are those of `Pillow/src/libImaging/Resample.c` (`precompute_coeffs`), including its
rounding to uint8 between the two passes. Rows are always resized before columns; Pillow takes the other order, or (13)
the cheaper one. With the same order they differ by at most one level (float32 sums against fixed point), else by a few
levels on few pixels. `resize_triton.py` does the same on a GPU.

DALI's resize takes 1.0 ms of a core for a 224-pixel crop and OpenCV's area filter 0.4; this takes less, and its filters
are PIL's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from lowrank_vit.common.filters import BICUBIC, NEAREST
from lowrank_vit.data.decode.backend import LENGTH, LOW, ORIGIN, SCALE


@numba.njit(nogil=True, cache=True, inline="always")
def _cubic(x: float) -> float:
    x = abs(x)  # Keys 1981 with a = -0.5, as PIL
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@numba.njit(nogil=True, cache=True)
def _taps(span: np.ndarray, interpolation: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each output pixel: the first input pixel, the number of them, and their weights (which add up to 1)."""
    scale, low, length = span[SCALE], span[LOW], span[LENGTH]
    stretch = max(scale, 1.0)
    support = (2.0 if interpolation == BICUBIC else 1.0) * stretch
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.empty((size, int(2 * support) + 2), np.float32)
    exact = np.empty(weights.shape[1], np.float64)
    for i in range(size):
        center = (i + 0.5) * scale + (span[ORIGIN] - low)
        if interpolation == NEAREST:
            first[i], count[i], weights[i, 0] = int(low + math.floor(center)), 1, 1.0
            continue
        begin = max(math.floor(center - support + 0.5), 0.0)
        end = min(math.floor(center + support + 0.5), length)
        total = 0.0
        for k in range(int(end - begin)):
            x = (begin + k + 0.5 - center) / stretch
            exact[k] = _cubic(x) if interpolation == BICUBIC else max(0.0, 1.0 - abs(x))
            total += exact[k]
        for k in range(int(end - begin)):
            weights[i, k] = exact[k] / total
        first[i], count[i] = int(low + begin), int(end - begin)
    return first, count, weights


@numba.njit(nogil=True, cache=True, inline="always")
def _byte(value: np.float32) -> np.uint8:
    return np.uint8(np.int32(min(np.float32(255), max(np.float32(0), value))))


@numba.njit(nogil=True, cache=True)
def _are_inside(first: np.ndarray, count: np.ndarray, extent: int | np.int64) -> bool:
    """Whether all taps lie within an axis of `extent` pixels."""
    for i in range(len(first)):  # noqa: SIM110  numba knows no all()
        if first[i] < 0 or count[i] < 0 or first[i] + count[i] > extent:
            return False
    return True


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def resize_into(
    pixels: np.ndarray, row_bytes: int | np.int64, spans: np.ndarray, interpolation: int, flip: bool, out: np.ndarray
) -> bool:
    """Resample one image into `out`, uint8 (S, S, 3); False, and nothing is written, if a span leaves the image.

    `pixels`: uint8 (bytes,), RGB rows of `row_bytes`; `spans`: float64 (2, 4), see `backend.spans`; `flip`: mirror.
    """
    size, columns, rows = out.shape[0], row_bytes // 3, len(pixels) // max(row_bytes, 1)
    if not (0.0 < spans[1, SCALE] <= columns and 0.0 < spans[0, SCALE] <= rows):  # their taps would take any memory
        return False
    first_x, count_x, weights_x = _taps(spans[1], interpolation, size)
    first_y, count_y, weights_y = _taps(spans[0], interpolation, size)
    if not (_are_inside(first_x, count_x, columns) and _are_inside(first_y, count_y, rows)):
        return False
    left = first_x[0]
    width = 3 * (first_x[size - 1] + count_x[size - 1] - left)
    row = np.empty(width, np.float32)
    half, three = np.float32(0.5), np.uintp(3)  # unsigned indices spare numba's test for negative ones
    for y in range(size):
        row[:] = half
        for k in range(count_y[y]):
            weight = weights_y[y, k]
            source = pixels[(first_y[y] + k) * row_bytes + 3 * left :][:width]
            for n in range(width):
                row[n] += weight * np.float32(source[n])
        for n in range(width):
            row[n] = _byte(row[n])  # PIL, too, rounds between the passes
        line = out[y].reshape(-1)
        for x in range(size):
            red, green, blue = half, half, half
            place = three * np.uintp(first_x[x] - left)
            for k in range(count_x[x]):
                weight = weights_x[x, k]
                red += weight * row[place]
                green += weight * row[place + np.uintp(1)]
                blue += weight * row[place + np.uintp(2)]
                place += three
            to = three * np.uintp(size - 1 - x if flip else x)
            line[to], line[to + np.uintp(1)], line[to + np.uintp(2)] = _byte(red), _byte(green), _byte(blue)
    return True


@intrinsic
def _as_pointer(typing_context: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    """An integer address as a pointer to bytes, which numba itself does not offer."""
    signature = types.CPointer(types.uint8)(types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@numba.njit(parallel=True, nogil=True, cache=True)
def resize_batch(
    addresses: np.ndarray,
    num_bytes: np.ndarray,
    row_bytes: np.ndarray,
    spans: np.ndarray,
    interpolations: np.ndarray,
    flips: np.ndarray,
    out: np.ndarray,
) -> np.ndarray:
    """`resize_into` for B images that lie at `addresses`, on numba's threads: bool (B,), what it returned.

    `addresses`, `num_bytes`, `row_bytes`: int64 (B,), those of the actual memory, not the index's; `spans`: float64
    (B, 2, 4); `out`: uint8 (B, S, S, 3).
    """
    is_written = np.zeros(len(out), np.bool_)
    for n in numba.prange(len(out)):
        pointer = _as_pointer(addresses[n])  # type: ignore[call-arg]  # numba passes the first argument
        pixels = numba.carray(pointer, (num_bytes[n],), np.uint8)
        is_written[n] = resize_into(pixels, row_bytes[n], spans[n], interpolations[n], flips[n], out[n])
    return is_written
