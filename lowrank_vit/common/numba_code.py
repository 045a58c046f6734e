"""Functions compiled by numba: whether this machine has compiled them before, and the threads that they use."""

from __future__ import annotations

import inspect
import threading
from ctypes import CFUNCTYPE
from importlib import import_module
from pathlib import Path
from typing import Any

import numba

NOTE = "compiling image operations for this machine, once: seconds to a minute"
"""What to say before the first call of a function that must be compiled."""
_starting = threading.Lock()


def must_compile(*functions: Any) -> bool:
    """Whether any of these functions, made by `numba.njit(cache=True)`, has no valid file in numba's cache.

    numba keeps compiled code beside the source, or in the user's cache directory; looking for the file there costs
    nothing, and it is invalid if the source has changed since. (Only a function's own file counts, for numba too: after
    a change of a compiled function that others call from other files, remove their `__pycache__`.)
    """
    return any(not _is_kept(function) for function in functions)


def _is_kept(function: Any) -> bool:
    source = Path(inspect.getfile(function.py_func))
    folder = Path(function.stats.cache_path)
    newest = max((index.stat().st_mtime for index in folder.glob(f"{_name(function, source)}-*.nbi")), default=0.0)
    return newest >= source.stat().st_mtime


def _name(function: Any, source: Path) -> str:
    return f"{source.stem}.{function.py_func.__qualname__}"


def use_threads(count: int) -> int:
    """Let parallel functions that this thread calls run on at most `count` of numba's threads, which start if needed.

    Returns how many that are: numba has no more than NUMBA_NUM_THREADS, which is the number of cores by default. Call
    it before each function made by `numba.njit(parallel=True)`. Where TBB starts the threads, its first task belongs to
    the thread that asks for them, and the process waits for that task when it ends. On a single core nobody else does
    it, so it is done here: that of a thread that has ended would be waited for for ever.
    """
    with _starting:
        try:
            numba.threading_layer()
        except ValueError:  # not started yet
            numba.get_num_threads()
            if numba.threading_layer() == "tbb":
                CFUNCTYPE(None)(import_module("numba.np.ufunc.tbbpool").synchronize)()
    count = min(count, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(count)
    return count
