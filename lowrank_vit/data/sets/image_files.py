"""Image files of any kind that Pillow decodes by itself: found in folders, and opened."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.formats.image_formats import formats, image_suffixes, is_of_the_system
from data_prep.formats.jpeg import upright_rgb


def images_below(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images in a folder and its sub-folders, sorted, and how many other files there are by suffix.

    What is hidden or a file server's own is neither.
    """
    below = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = [path for path in below if not any(map(is_of_the_system, path.relative_to(folder).parts))]
    images = [path for path in files if path.suffix.lower() in image_suffixes()]
    return images, Counter(path.suffix.lower() for path in files if path.suffix.lower() not in image_suffixes())


def read_image(file: Path) -> np.ndarray | str:
    """uint8 (H, W, 3) as the converter makes it: upright, 8 bits, on white; the reason where that cannot be had.

    Of an animation the first picture. A suffix proves nothing, so only `formats` are tried, whatever it is.
    """
    try:
        with Image.open(file, formats=formats()) as image:
            return np.asarray(upright_rgb(image))
    except Exception as error:  # Pillow's decoders raise nearly every built-in exception on damaged files
        return "cannot identify image file" if "cannot identify" in str(error) else str(error) or type(error).__name__
