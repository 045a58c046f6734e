"""libturbojpeg for compiled code: JPEGs decoded to the pixels of Pillow, or to those of FFCV."""

from __future__ import annotations

import ctypes
from typing import Any

import numba
import numpy as np
from llvmlite import binding
from numba import types

from data_prep.formats import turbojpeg
from lowrank_vit.common.errors import UserError

_VOID, _INT = types.uintp, types.int32


def _function(name: str, result: types.Type, *arguments: types.Type) -> Any:
    """A function of the library, found by name rather than by address, so that numba can cache code that calls it.

    If the library is missing, a placeholder is used, which is never called: `open_loader` then opens no JPEGs.
    """
    symbol = f"lowrank_vit_{name}"
    try:
        binding.add_symbol(symbol, turbojpeg.address(name))
    except UserError:
        binding.add_symbol(symbol, ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value)
    return types.ExternalFunction(symbol, result(*arguments))


_init = _function("tjInitDecompress", _VOID)
_header = _function("tjDecompressHeader3", _INT, _VOID, _VOID, types.ulong, *[_VOID] * 4)
_decompress = _function("tjDecompress2", _INT, _VOID, _VOID, types.ulong, _VOID, *[_INT] * 5)
_destroy = _function("tjDestroy", _INT, _VOID)

EXACT = 0
"""Flags of libturbojpeg for the slow, exact integer DCT, Pillow's default."""
FAST = 2048
"""Flags for the fast integer DCT, as in FFCV's own C function: the same pixels as FFCV's.

It is biased: means of red and blue are about one grey level too low on photographs, which does not matter in training
but does for published accuracies.
"""
MAX_SCANS = 500
"""Most scans of a progressive JPEG, libturbojpeg's own limit; each scan takes a pass over the picture: minutes."""


@numba.njit(nogil=True, cache=True)
def has_too_many_scans(data: np.ndarray) -> bool:
    """Whether the bytes are a progressive JPEG with more than `MAX_SCANS` scans; of others only the head is read."""
    at, end = 2, len(data)
    while at + 4 <= end and data[at] == 0xFF and data[at + 1] not in (0xC0, 0xC1, 0xC2, 0xDA):
        at += 1 if data[at + 1] == 0xFF else 2 + max(2, 256 * int(data[at + 2]) + int(data[at + 3]))
    if at + 4 > end or data[at] != 0xFF or data[at + 1] != 0xC2:
        return False
    scans = 0
    for n in range(at, end - 1):
        scans += data[n] == 0xFF and data[n + 1] == 0xDA
    return scans > MAX_SCANS


@numba.njit(nogil=True, cache=True)
def is_of_size(data: np.ndarray, height: int, width: int) -> bool:
    """Whether the header of a JPEG gives this size in pixels, as libturbojpeg reads it.

    Call this before decoding, since libturbojpeg writes a smaller image into a buffer meant for a larger one and
    reports success: the rest of the buffer then keeps its old content.
    """
    decoder = _init()
    found = np.zeros(4, np.int32)  # width, height, subsampling, colour space; zeros stay where no header was read
    at = found.ctypes.data
    _header(decoder, data.ctypes.data, data.size, at, at + 4, at + 8, at + 12)
    _destroy(decoder)
    return found[0] == width and found[1] == height


@numba.njit(nogil=True, cache=True)
def decode_jpeg(data: np.ndarray, pixels: np.ndarray, height: int, width: int, flags: int) -> bool:
    """Decode the bytes of a JPEG into `pixels`, flat uint8; return whether libjpeg had neither error nor warning.

    `flags`: `EXACT` or `FAST`. A decoder is made for each image, which takes microseconds and keeps no state between
    threads and loaders, nor the tables of one JPEG for another that lacks its own.
    """
    decoder = _init()
    code = _decompress(decoder, data.ctypes.data, data.size, pixels.ctypes.data, width, 0, height, 0, flags)
    _destroy(decoder)
    return code == 0
