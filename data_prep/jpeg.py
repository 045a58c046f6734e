"""One image file in, the bytes to store out: a JPEG that will do goes in as it is, anything else is converted once.

Reasons, the first that holds (they are counted in the manifest):

    format       not a baseline or progressive JPEG (PNG, GIF's first frame, lossless or arithmetic-coded JPEG, ...)
    mode         a JPEG that is not 8-bit RGB (grey, CMYK)
    orientation  its EXIF or XMP orientation is not 1; decoders disagree on whether to obey it, so the pixels are turned
    resized      its longer side is above the limit
    bytes        an RGB JPEG with more metadata than one page of a `.beton` can hold
    passthrough  none of these: stored byte for byte
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from data_prep.beton_format import MODE_JPEG, MODE_RAW, PAGE_SIZE
from data_prep.errors import UserError
from data_prep.sources import Sample

# Named one by one because a file's suffix proves nothing, and PIL would hand an EPS file to Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "TIFF", "WEBP")
ORIENTATION_TAG = 0x0112
HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
"""Start-of-frame markers (ITU T.81, table B.1) of the baseline, extended and progressive JPEG every decoder reads."""
JPEG_MAX_SIDE = 65500
"""libjpeg's limit in pixels; just below the 65535 that a `.beton` can hold."""


class BadImageError(UserError):
    """A file that is there but does not decode to an image we can store."""

    def __init__(self, path: str, reason: str) -> None:
        # Both go to `args`, from which the exception is rebuilt when it comes back from a worker process.
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One sample as it is stored."""

    mode: int
    """MODE_JPEG or MODE_RAW."""
    width: int
    height: int
    data: bytes
    """A JPEG file, or uint8 pixels (height, width, 3) in C order."""
    reason: str
    """Why it was converted, or "passthrough", or "raw"."""


def encode_file(sample: Sample, root: Path, max_side: int, quality: int) -> EncodedImage:
    """`encode_image` of the file that `sample` names below `root`."""
    return encode_image(root / sample.name, max_side, quality)


def encode_pixels(sample: Sample) -> EncodedImage:
    """Store the pixels of `sample`, uint8 (height, width, 3), uncompressed."""
    assert sample.pixels is not None, sample.name
    height, width, _ = sample.pixels.shape
    return EncodedImage(MODE_RAW, width, height, sample.pixels.tobytes(), "raw")


def encode_image(path: Path, max_side: int, quality: int) -> EncodedImage:
    """Decode all of `path`; return its own bytes if they will do, else a JPEG of `quality` within `max_side` pixels.

    A conversion turns the image upright, lays transparency over white, scales 16-bit grey down to 8 bits, resizes with
    an antialiasing Lanczos filter and drops metadata (colour profiles are not applied, as in every training loader).
    Raises `BadImageError` if it does not decode completely, `UserError` if it cannot be read at all.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Check for a broken link, its permissions and the disk."
        ) from error
    bad = partial(BadImageError, str(path))
    if not data:
        raise bad("the file is empty")
    # A library in this process may have switched on tolerance; a cut file must never pass.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata; all that decides is whether it decodes
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _encode(image, data, max_side, quality)
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise bad("not an image in a known format") from error
    except Image.DecompressionBombError as error:
        raise bad(f"too many pixels, possibly a decompression bomb: {error}") from error
    except Exception as error:  # PIL's decoders raise nearly every built-in exception on damaged files
        raise bad(f"does not decode: {type(error).__name__}: {error}") from error


def _encode(image: ImageFile.ImageFile, data: bytes, max_side: int, quality: int) -> EncodedImage:
    reason = _why_convert(image, data, max_side)
    if reason == "passthrough":
        image.load()
        return EncodedImage(MODE_JPEG, image.width, image.height, data, reason)
    # Let libjpeg shrink large JPEGs while decoding, to twice the final size at least: 3 times as fast, same look.
    width, height = _fit(image.size, max_side)
    image.draft(None, (2 * width, 2 * height))
    ImageOps.exif_transpose(image, in_place=True)
    rgb = _to_rgb(image)
    if max(rgb.size) > max_side:
        rgb = rgb.resize(_fit(rgb.size, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=quality, subsampling="4:2:0", comment=b"")
    return EncodedImage(MODE_JPEG, rgb.width, rgb.height, buffer.getvalue(), reason)


def _why_convert(image: ImageFile.ImageFile, data: bytes, max_side: int) -> str:
    if image.format != "JPEG" or _first_frame_marker(data) not in HUFFMAN_FRAMES:
        return "format"
    if image.mode != "RGB":
        return "mode"
    if image.getexif().get(ORIENTATION_TAG, 1) != 1:
        return "orientation"
    if max(image.size) > max_side:
        return "resized"
    return "bytes" if len(data) > PAGE_SIZE else "passthrough"


def _first_frame_marker(data: bytes) -> int:
    """Second byte of the first start-of-frame marker of a JPEG; -1 if its segments do not follow one another."""
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker
        # 0xFF may be repeated as filling; every other marker in front of the frame is followed by its length.
        offset += 1 if marker == 0xFF else 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return -1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16..." and, from some formats, 16 bits in a 32-bit "I"
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("32-bit grey levels outside 0..65535; save it with 8 or 16 bits")
        return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _fit(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(width, height) scaled down, aspect kept, so that the longer side is at most `max_side`; never below 1."""
    scale = min(1.0, max_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
