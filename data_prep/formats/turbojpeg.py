"""libturbojpeg, the JPEG library that FFCV decodes with, through its C interface: what passes here decodes there.

PIL is not used for JPEG because it takes twice as long (it unpacks every row a second time), holds Python's lock while
it encodes, and ignores libjpeg's warnings, so that damaged data pass. All calls here let other threads run.
Source: https://libjpeg-turbo.org/Documentation/Documentation, TurboJPEG C API 2.x (3.x keeps these functions).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lowrank_vit.common.errors import UserError

_PIXEL_FORMATS = {"rgb": (0, 3), "grey": (6, 1), "cmyk": (11, 4)}
_SUBSAMPLING = {"4:4:4": 0, "4:2:0": 2}
_FAST_DCT, _STOP_ON_WARNING, _LIMIT_SCANS = 2048, 8192, 32768
_WARNING_CODE = 0


class JpegDataError(ValueError):
    """libjpeg's error or warning about a JPEG's data."""

    def __init__(self, message: str, is_warning: bool) -> None:
        super().__init__(message)
        self.is_warning = is_warning
        """libjpeg could continue, with grey or shifted blocks, which a decoder that ignores warnings shows."""


def _empty(shape: tuple[int, int, int]) -> np.ndarray:
    return np.empty(shape, np.uint8)


def decode(
    data: bytes,
    width: int,
    height: int,
    *,
    shrink: Literal[1, 2, 4, 8] = 1,
    stop_on_warning: bool = True,
    empty: Callable[[tuple[int, int, int]], np.ndarray] = _empty,
) -> np.ndarray:
    """Decode a JPEG of `width` x `height` pixels to uint8 (ceil(height / shrink), ceil(width / shrink), 3).

    `empty` makes the result's array. Raises `JpegDataError`; with `stop_on_warning` at libjpeg's first warning too. A
    progressive JPEG of more than 500 scans is refused (it would decode for minutes).
    """
    pixels = empty((-(-height // shrink), -(-width // shrink), 3))
    try:
        _decompress(data, pixels, "rgb", _LIMIT_SCANS | (_STOP_ON_WARNING if stop_on_warning else 0))
    except JpegDataError as error:
        if stop_on_warning or not error.is_warning:
            raise
    return pixels


def _decompress(data: bytes, pixels: np.ndarray, colours: str, flags: int) -> None:
    height, width = pixels.shape[:2]
    with _fresh("tjInitDecompress") as handle:
        code = _library().tjDecompress2(
            handle, data, len(data), pixels.ctypes.data, width, 0, height, _PIXEL_FORMATS[colours][0], flags
        )
        if code != 0:
            raise _last_error(handle)


def check(data: bytes, width: int, height: int, colours: Literal["grey", "cmyk"] = "grey") -> None:
    """Read all compressed data of a JPEG without making a picture. Raises `JpegDataError` at the first warning.

    Grey at an eighth of the size spares libjpeg nearly everything but the entropy decoding, where all damage shows. A
    JPEG of four components can be read as "cmyk" only.
    """
    pixels = np.empty((-(-height // 8), -(-width // 8), _PIXEL_FORMATS[colours][1]), np.uint8)
    _decompress(data, pixels, colours, _LIMIT_SCANS | _STOP_ON_WARNING | _FAST_DCT)


def size_at(address: int, num_bytes: int) -> tuple[int, int]:
    """Height and width in pixels of the JPEG in memory at `address`, as libturbojpeg reads them; zeros if it cannot.

    Only the segments in front of the first scan are read, in about 5 us.
    """
    found = (ctypes.c_int * 4)()  # width, height, subsampling, colour space
    at = ctypes.addressof(found)
    _library().tjDecompressHeader3(_handle("tjInitDecompress"), address, num_bytes, at, at + 4, at + 8, at + 12)
    return found[1], found[0]


def encode(pixels: np.ndarray, quality: int, subsampling: Literal["4:2:0", "4:4:4"] = "4:2:0") -> bytes:
    """Encode uint8 (height, width, 3) as a baseline JPEG of `quality` 1..100 without metadata."""
    pixels = np.ascontiguousarray(pixels)
    height, width, _ = pixels.shape
    handle, library = _handle("tjInitCompress"), _library()
    jpeg, size = ctypes.c_void_p(), ctypes.c_ulong()
    code = library.tjCompress2(
        *(handle, pixels.ctypes.data, width, 0, height, 0),
        *(ctypes.byref(jpeg), ctypes.byref(size), _SUBSAMPLING[subsampling], quality, 0),
    )
    return _take(code, handle, jpeg, size)


def to_baseline(data: bytes) -> bytes:
    """Write the same quantised DCT coefficients as a baseline (sequential) JPEG: no pixel changes, metadata are kept.

    Raises `JpegDataError`.
    """
    jpeg, size, transform = ctypes.c_void_p(), ctypes.c_ulong(), _Transform()
    with _fresh("tjInitTransform") as handle:
        code = _library().tjTransform(
            *(handle, data, len(data), 1, ctypes.byref(jpeg), ctypes.byref(size)),
            *(ctypes.byref(transform), _STOP_ON_WARNING | _LIMIT_SCANS),
        )
        return _take(code, handle, jpeg, size)


class _Transform(ctypes.Structure):
    """`tjtransform`; all zeros asks for no geometric change and for every marker to be copied."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("x", "y", "w", "h", "op", "options")),
        ("data", ctypes.c_void_p),
        ("custom_filter", ctypes.c_void_p),
    )


def _take(code: int, handle: ctypes.c_void_p, jpeg: ctypes.c_void_p, size: ctypes.c_ulong) -> bytes:
    """Copy the buffer that the library allocated, and free it."""
    try:
        if code != 0:
            raise _last_error(handle)
        return ctypes.string_at(jpeg, size.value)
    finally:
        _library().tjFree(jpeg)


def _last_error(handle: ctypes.c_void_p) -> JpegDataError:
    library = _library()
    message = library.tjGetErrorStr2(handle).decode("ascii", "replace")
    # Errors of the library itself are worded "tjDecompress2(): ...".
    return JpegDataError(message.rpartition("(): ")[2], library.tjGetErrorCode(handle) == _WARNING_CODE)


@contextmanager
def _fresh(kind: str) -> Generator[ctypes.c_void_p]:
    """A handle for one JPEG. A used one would decode a JPEG that lacks tables with those of the JPEG before."""
    handle = ctypes.c_void_p(getattr(_library(), kind)())
    try:
        yield handle
    finally:
        _library().tjDestroy(handle)


class _Handles(threading.local):
    """This thread's handles for calls that leave no state behind; a handle serves one call at a time."""

    def __init__(self) -> None:
        self.by_kind: dict[str, ctypes.c_void_p] = {}

    def __del__(self) -> None:  # the thread has ended
        for handle in self.by_kind.values():
            _library().tjDestroy(handle)


_handles = _Handles()


def _handle(kind: str) -> ctypes.c_void_p:
    if kind not in _handles.by_kind:
        _handles.by_kind[kind] = ctypes.c_void_p(getattr(_library(), kind)())
    return _handles.by_kind[kind]


@cache
def identity() -> str:
    """The library's file name and the beginning of its SHA-256; it has no function that tells its version.

    Raises `UserError` if the library is missing, as do all functions here that call it.
    """

    class SymbolInfo(ctypes.Structure):  # Dl_info of dladdr(3)
        _fields_ = (
            *(("file", ctypes.c_char_p), ("base", ctypes.c_void_p)),
            *(("symbol", ctypes.c_char_p), ("address", ctypes.c_void_p)),
        )

    found = SymbolInfo()
    address = ctypes.cast(_library().tjDecompress2, ctypes.c_void_p)
    if not ctypes.CDLL(None).dladdr(address, ctypes.byref(found)) or not found.file:
        return "unknown"
    path = Path(os.fsdecode(found.file)).resolve()
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def address(name: str) -> int:
    """The address of a function of the library, for compiled code that calls it without Python."""
    return ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value or 0


def load() -> None:
    """Load the library. Raises `UserError` if it is missing."""
    _library()


@cache
def _library() -> Any:
    library = _load()
    void, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong
    for name in ("tjInitDecompress", "tjInitCompress", "tjInitTransform"):
        getattr(library, name).restype = void
    library.tjDecompress2.argtypes = [void, ctypes.c_char_p, size, void, *[integer] * 5]
    library.tjDecompressHeader3.argtypes = [void, void, size, *[void] * 4]
    library.tjCompress2.argtypes = [void, void, *[integer] * 4, void, void, *[integer] * 3]
    library.tjTransform.argtypes = [void, ctypes.c_char_p, size, integer, void, void, void, integer]
    library.tjGetErrorStr2.argtypes, library.tjGetErrorStr2.restype = [void], ctypes.c_char_p
    for name in ("tjGetErrorCode", "tjDestroy"):
        getattr(library, name).argtypes = [void]
    library.tjFree.argtypes, library.tjFree.restype = [void], None
    return library


def _load() -> ctypes.CDLL:
    for name in ("libturbojpeg.so.0", "libturbojpeg.dylib"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    # A wheel of ffcv may carry its own copy, whose functions are found through ffcv's extension module.
    ffcv = find_spec("ffcv")
    for folder in (ffcv.submodule_search_locations or []) if ffcv else []:
        for extension in Path(folder).glob("_libffcv*.so"):
            return ctypes.CDLL(str(extension))
    raise UserError(
        "libturbojpeg, which reads and writes JPEGs, is missing. Install it (Debian, Ubuntu: `apt-get install "
        "libturbojpeg0-dev`; conda: `conda install -c conda-forge libjpeg-turbo`), or run `make setup`."
    )
