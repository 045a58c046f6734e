"""Data inside a page: JSON and one block of float32 numbers, both compressed, as text for HTML."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lowrank_vit.report.language import texts

_HERE, _LIBRARY = "lowrank_vit.report.interactive", "plotly-cartesian.min.js.gz"
_SCRIPTS = ("data", "charts", "matrices", "table", "downloads", "start")
"""Files of `js/`, in their order in the page."""
_KEPT = np.uint32(0xFFFFFC00)
"""Bits of a float32 that are kept: sign, exponent and 13 of the mantissa."""
_HALF = np.uint32(0x200)


class Packer:
    """Arrays of numbers in one block, to which a page's JSON refers by position.

    A number keeps four significant digits (a relative error of at most 6e-5); NaN and infinities are kept.
    """

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._size = 0
        self._places: dict[bytes, int] = {}

    def __call__(self, values: ArrayLike, *, exact: bool = False) -> dict[str, list[int]]:
        """The reference to `values`, flattened, in the JSON: `{"$": [position, length]}`; equal arrays share one.

        `exact`: keep all digits of a float32.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            bits = np.asarray(values, np.float64).ravel().astype("<f4").view("<u4")
        if not exact:
            is_finite = (bits & np.uint32(0x7F800000)) < np.uint32(0x7F000000)  # also after rounding
            bits = np.where(is_finite, (bits + _HALF) & _KEPT, bits)
        at = self._places.setdefault(bits.tobytes(), self._size)
        if at == self._size:
            self._parts.append(bits)
            self._size += bits.size
        return {"$": [at, bits.size]}

    def embedded(self) -> str:
        """All arrays: the first bytes of all numbers, then the second ones and so on; gzip, base64."""
        block = np.concatenate([np.empty(0, "<u4"), *self._parts]).astype("<u4")
        return _text(block.view(np.uint8).reshape(-1, 4).T.tobytes())


def embedded_json(data: Mapping[str, Any]) -> str:
    """`data` as JSON, gzip, base64. Numbers that are not finite become null."""
    return _text(json.dumps(_plain(data), allow_nan=False, separators=(",", ":")).encode("ascii"))


def embedded_library() -> str:
    """Plotly's bundle for Cartesian charts, gzip, base64."""
    return base64.b64encode(resources.files(_HERE).joinpath(_LIBRARY).read_bytes()).decode("ascii")


def script() -> str:
    """The page's own script, to be put between script tags as it is, with the texts of the language."""
    folder = resources.files(_HERE).joinpath("js")
    parts = [folder.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    own = json.dumps(texts(), ensure_ascii=False).replace("<", "\\u003c")
    return "".join(['(() => {\n"use strict";\n', f"const texts = {own};\n", *parts, "})();"])


def _text(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode("ascii")


def _plain(value: Any) -> Any:
    """The value in Python's own types, with None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
