"""Decode one sample with Pillow: it decides which samples are damaged, and is the slow twin of every backend."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFile

from data_prep.formats import jpeg_segments, turbojpeg
from data_prep.formats.beton import MODE_RAW
from lowrank_vit.common.filters import PIL_NAMES
from lowrank_vit.data.decode.jpeg import MAX_SCANS, has_too_many_scans
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import BatchPlan


def decode(beton: Beton, sample_id: int) -> np.ndarray:
    """A whole stored sample, uint8 (H, W, 3) RGB, of the index's size.

    Raises `ValueError` with Pillow's words if it is damaged, of another size, or no JPEG where it should be one.
    """
    stored, (height, width) = beton.sample(sample_id), map(int, beton.sides_of(sample_id))
    if beton.modes[sample_id] == MODE_RAW:
        return stored.reshape(height, width, 3)
    if has_too_many_scans(stored):
        raise ValueError(f"a progressive JPEG of more than {MAX_SCANS} scans, which would decode for minutes")
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # another library in this process may have switched it on
    try:
        # Named, because the bytes may be anything: Pillow would hand an EPS file to Ghostscript.
        with Image.open(io.BytesIO(stored.tobytes()), formats=("JPEG",)) as image:
            if image.size != (width, height):  # before anything is decoded: its own size may be enormous
                found = f"{image.width} x {image.height}"
                raise ValueError(f"the JPEG is {found} pixels, the index says {width} x {height}")
            return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every built-in exception on damaged files
        raise ValueError(pillow_says(error)) from error


def decode_sound(beton: Beton, sample_id: int) -> np.ndarray:
    """`decode`, but libjpeg's warnings, which Pillow does not report, count as damage as they do when converting.

    Raises `ValueError` with the words of Pillow or libjpeg.
    """
    pixels = decode(beton, sample_id)
    if beton.modes[sample_id] != MODE_RAW:
        stored = beton.sample(sample_id).tobytes()
        try:
            turbojpeg.check(stored, pixels.shape[1], pixels.shape[0])
        except turbojpeg.JpegDataError as error:
            if error.is_warning:
                jpeg_segments.mended(stored, error)  # raises it unless the picture is whole
    return pixels


def pillow_says(error: Exception) -> str:
    """Pillow's complaint in words, without the addresses of our own objects."""
    return str(error).replace("<_io.BytesIO object at ", "<").split(" <")[0] or type(error).__name__


def find_damage(beton: Beton, ids: np.ndarray) -> dict[int, str]:
    """Ids of the samples that are damaged, with the reasons."""
    damaged = {}
    for sample_id in ids:
        try:
            decode_sound(beton, int(sample_id))
        except ValueError as error:
            damaged[int(sample_id)] = str(error)
    return damaged


def crop_and_resize(pixels: np.ndarray, plan: BatchPlan, n: int, size: int) -> np.ndarray:
    """Crop, resize and flip the whole image of sample `n` as planned: uint8 (size, size, 3)."""
    image, interpolation = Image.fromarray(pixels), Image.Resampling[PIL_NAMES[plan.interpolations[n]]]
    if plan.center is not None:
        (height, width), (top, left) = plan.center.resized[n].tolist(), plan.center.corners[n].tolist()
        image = image.resize((width, height), interpolation).crop((left, top, left + size, top + size))
    else:
        top, left, height, width = plan.windows[n].tolist()
        image = image.crop((left, top, left + width, top + height)).resize((size, size), interpolation)
    result = np.asarray(image)
    return result[:, ::-1] if plan.flips[n] else result
