"""Image files of any kind that Pillow decodes by itself: found in folders, and opened."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.jpeg import upright_rgb

_NOT_READ = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}
"""EPS is run by Ghostscript, another program; the others Pillow only recognises, or decodes on Windows alone."""


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _NOT_READ))


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of those formats, in lower case with their dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats())


def images_below(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images in a folder and its sub-folders, sorted, and how many other files there are by suffix."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    images = [path for path in files if path.suffix.lower() in suffixes()]
    return images, Counter(path.suffix.lower() for path in files if path.suffix.lower() not in suffixes())


def read_image(file: Path) -> np.ndarray | str:
    """uint8 (H, W, 3) as the converter makes it: upright, 8 bits, on white; the reason where that cannot be had.

    Of an animation the first picture. A suffix proves nothing, so only `formats` are tried, whatever it is.
    """
    try:
        with Image.open(file, formats=formats()) as image:
            return np.asarray(upright_rgb(image))
    except Exception as error:  # Pillow's decoders raise nearly every built-in exception on damaged files
        return "cannot identify image file" if "cannot identify" in str(error) else str(error) or type(error).__name__
