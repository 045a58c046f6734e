"""Whether numba has compiled a function on this machine before: the first time takes up to a minute, in silence.

numba keeps compiled code beside the source, or in the user's cache directory; looking for the file there costs nothing,
and it is invalid if the source has changed since. (Only a function's own file counts, for numba too: after a change of
a compiled function that others call from other files, remove their `__pycache__`.)
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

NOTE = "compiling image operations for this machine, once: seconds to a minute"
"""What to say before the first call of such a function."""


def must_compile(*functions: Any) -> bool:
    """Whether any of these functions, made by `numba.njit(cache=True)`, has no valid file in numba's cache."""
    return any(not _is_kept(function) for function in functions)


def _is_kept(function: Any) -> bool:
    source = Path(inspect.getfile(function.py_func))
    folder = Path(function.stats.cache_path)
    newest = max((index.stat().st_mtime for index in folder.glob(f"{_name(function, source)}-*.nbi")), default=0.0)
    return newest >= source.stat().st_mtime


def _name(function: Any, source: Path) -> str:
    return f"{source.stem}.{function.py_func.__qualname__}"
