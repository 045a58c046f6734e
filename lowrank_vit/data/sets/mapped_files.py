"""Several files as one read-only array, without copying: their pages are mapped one behind the other."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

from lowrank_vit.common.errors import BetonError


def map_files(paths: list[Path], sizes: list[int]) -> tuple[np.ndarray, list[int]]:
    """Map files of `sizes` bytes; return uint8 (bytes,) and where in it each file begins.

    Each begins at a multiple of the machine's page size; the gaps read as zeros. Raises `BetonError` where the system
    refuses.
    """
    if len(paths) == 1:
        return np.memmap(paths[0], np.uint8, mode="r"), [0]
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    # Reserve the addresses with an empty private map, then lay each file over its stretch (mmap(2), MAP_FIXED). The
    # whole is unmapped with the reservation, when the last view of the array is gone.
    whole = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    array = np.frombuffer(whole, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    for path, size, start in zip(paths, sizes, starts, strict=True):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            address = array.ctypes.data + start
            fixed = mmap.MAP_SHARED | 0x10  # MAP_FIXED, which Python does not name
            if libc.mmap(address, size, mmap.PROT_READ, fixed, descriptor, 0) != address:
                raise BetonError(f"{path} cannot be mapped: {os.strerror(ctypes.get_errno())}.")
        finally:
            os.close(descriptor)
    return array, starts
