"""Turn an image file into the bytes to store: a suitable JPEG is stored as it is, anything else is converted once.

Reasons, which the manifest counts; the first that applies is given:

    raw           pixels were asked for
    coding        a JPEG that is not 8-bit Huffman-coded (arithmetic, lossless, 12 bits)
    gray          a JPEG of one component
    cmyk, ycck    a JPEG of four components, without and with Adobe's colour transform
    orientation   a JPEG whose Exif or XMP orientation is not 1; decoders disagree on whether to obey it
    resized       its longer side is above the limit
    bytes         an RGB JPEG with more metadata than one page of a `.beton` can hold
    baseline      a progressive JPEG, rewritten without loss because baseline was asked for
    repaired      a JPEG at which libjpeg warns though its picture is whole: stored with the cause mended, without loss
    passthrough   none of these: stored byte for byte
    16-bit, palette, alpha, png, bmp, gif, tiff, webp, ppm, avif, jpeg2000, other
                  other formats: by a property that has to be converted, else by the name of the format
"""

from __future__ import annotations

import io
import math
import os
import threading
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from data_prep.formats import jpeg_segments, turbojpeg
from data_prep.formats.beton import MODE_JPEG, MODE_RAW, PAGE_SIZE
from data_prep.formats.image_formats import format_by_suffix
from data_prep.formats.jpeg_segments import JpegHeader
from data_prep.sources.samples import Sample
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.packages import needs

# Named one by one because a file's suffix proves nothing, and PIL would hand an EPS file to Ghostscript. Formats that
# their first bytes do not identify are tried only where the suffix names them.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000")
REASONS = tuple(
    """passthrough raw baseline coding gray cmyk ycck orientation resized repaired bytes
    16-bit palette alpha png bmp gif tiff webp ppm avif jpeg2000 other""".split()
)
ORIENTATION_TAG = 0x0112
_TURNS = {  # Exif orientation -> what turns the stored pixels upright, as `ImageOps.exif_transpose` does
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
JPEG_MAX_SIDE = 65500
"""libjpeg's limit in pixels; just below the 65535 that a `.beton` can hold."""
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Larger images are refused unread as possible decompression bombs: 179 million pixels, where PIL refuses too."""
MAX_FILE_BYTES = 1 << 30
_LOWER_QUALITIES = (95, 90, 75)
"""Qualities that are tried for a JPEG that would not fit a page otherwise."""
_SCRATCH_BYTES = 1 << 26


class BadImageError(UserError):
    """A file that does not decode to an image we can store."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class UnreadableImageError(BadImageError):
    """A file that cannot even be read: the fault lies with the disk or the permissions, not with the image."""


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What decides the stored bytes of an image file."""

    max_side: int = 500
    """Pixels; longer sides are made smaller."""
    quality: int = 90
    """JPEG quality of converted images, 1..100."""
    verify: Literal["decode", "header"] = "decode"
    """Decode every image completely, or only parse JPEGs that can be stored as they are."""
    baseline: bool = False
    """Rewrite progressive JPEGs as baseline ones, without loss."""
    raw: int | None = None
    """Store squares with this many pixels a side, uncompressed, instead of JPEGs."""
    lossless: bool = False
    """Store other formats as raw pixels where they fit a page, and encode JPEGs without subsampling; see `LOSSLESS`."""


LOSSLESS = ImageOptions(max_side=JPEG_MAX_SIDE, quality=100, lossless=True)
"""Options that keep the source's pixels as far as a `.beton` allows, for sets whose scores are to be published.

Usual JPEGs of any size go in byte for byte, other formats as raw pixels; JPEGs that have to be decoded (grey, CMYK,
turned) and images too large for a page are encoded at quality 100, which moves a pixel by about half a grey level.
"""
JPEG_REASONS = frozenset("coding gray cmyk ycck orientation resized extraneous bytes".split())
"""Reasons of JPEGs that are encoded again; only earlier converters gave "extraneous", for surplus bytes."""


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
    """One of `REASONS`."""
    source_stat: tuple[int, int] = (0, 0)
    """Size in bytes and modification time in ns of the file it was made from; zeros where there is none."""
    repairs: tuple[str, ...] = ()
    """Which of `jpeg_segments.REPAIRS` were made to the file's bytes before anything else."""


def encode_file(sample: Sample, root: Path, options: ImageOptions) -> EncodedImage:
    """`encode_image` of the file that `sample` names below `root`."""
    return encode_image(f"{root}/{sample.name}", options)  # joining a `Path` takes as long as opening the file


def encode_pixels(sample: Sample) -> EncodedImage:
    """Store the pixels of `sample`, uint8 (height, width, 3), uncompressed."""
    assert sample.pixels is not None, sample.name
    height, width, _ = sample.pixels.shape
    return EncodedImage(MODE_RAW, width, height, sample.pixels.tobytes(), "raw")


def encode_image(path: Path | str, options: ImageOptions) -> EncodedImage:
    """The bytes to store for the image file `path`: its own if they meet `options`, else those of a conversion.

    A conversion turns the image upright, lays transparency over white, scales 16-bit grey down to 8 bits, resizes
    without aliasing and drops metadata (colour profiles are not applied, as in every training loader). PIL may warn of
    odd metadata; only an image that does not decode is bad.
    Raises `BadImageError` if it does not decode completely, `UnreadableImageError` if it cannot be read at all.
    """
    bad = partial(BadImageError, str(path))
    try:
        # Without O_NONBLOCK, opening a pipe would wait forever for a writer.
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            stat = os.fstat(file.fileno())
            if not S_ISREG(stat.st_mode):
                raise bad("not a regular file")
            if stat.st_size > MAX_FILE_BYTES:
                raise bad(f"the file has {stat.st_size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
            data = file.readall()
    except OSError as error:
        raise UnreadableImageError(str(path), f"cannot be read: {error.strerror}") from error
    if not data:
        raise bad("the file is empty")
    return encode_bytes(data, str(path), options, (stat.st_size, stat.st_mtime_ns))


def encode_bytes(data: bytes, name: str, options: ImageOptions, source_stat: tuple[int, int] = (0, 0)) -> EncodedImage:
    """`encode_image` of an image file's content. `name` is for messages; its suffix may tell the format.

    Raises `BadImageError`.
    """
    bad = partial(BadImageError, name)
    try:
        by_suffix = format_by_suffix(name)
        try:
            (mode, width, height, stored, reason), repairs = _encode(data, options, by_suffix), ()
        except turbojpeg.JpegDataError as error:
            data, repairs = jpeg_segments.mended(data, error)
            mode, width, height, stored, reason = _encode(data, options, by_suffix)
            reason = "repaired" if reason == "passthrough" else reason
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise bad("not an image in a known format") from error
    except _TooLargeError as error:
        raise bad(f"{error}; make the image smaller") from error
    except Exception as error:  # PIL's decoders raise nearly every built-in exception on damaged files
        raise bad(f"does not decode: {error or type(error).__name__}") from error
    return EncodedImage(mode, width, height, stored, reason, source_stat, repairs)


class _TooLargeError(ValueError):
    pass


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _TooLargeError(
            f"{width} x {height} pixels are more than the limit of {MAX_PIXELS:,} (a decompression bomb?)"
        )


def _encode(data: bytes, options: ImageOptions, by_suffix: str) -> tuple[int, int, int, bytes, str]:
    """Mode, width, height, bytes and reason; `by_suffix` is the format of the file's suffix, or empty.

    Raises `JpegDataError` at the first warning of libjpeg.
    """
    header = jpeg_segments.read_header(data) if data.startswith(jpeg_segments.START) else None
    if header is None:
        pixels, reason = _decode_with_pil(data, by_suffix)
        return store_pixels(pixels, "raw" if options.raw else reason, options)
    _check_pixels(header.width, header.height)
    orientation = _orientation(data) if header.may_be_turned else 1
    reason = _why_convert(data, header, orientation, options)
    if reason != "passthrough":
        return store_pixels(_decode_jpeg(data, header, orientation, reason, options), reason, options)
    # A truncated file lacks its end marker. Looking for it costs nothing, so it is done even for headers alone.
    if options.verify == "decode" or data.rfind(jpeg_segments.END, -4096) < 0:
        turbojpeg.check(data, header.width, header.height)
    if options.baseline and header.frame == jpeg_segments.PROGRESSIVE:
        data, reason = turbojpeg.to_baseline(data), "baseline"
    return MODE_JPEG, header.width, header.height, data, reason


def _why_convert(data: bytes, header: JpegHeader, orientation: int, options: ImageOptions) -> str:
    if options.raw:
        return "raw"
    if not _is_common(header):
        return "coding"
    if header.components != 3:
        return "gray" if header.components == 1 else "ycck" if header.adobe_transform == 2 else "cmyk"
    if orientation != 1:
        return "orientation"
    if max(header.width, header.height) > options.max_side:
        return "resized"
    return "bytes" if len(data) > PAGE_SIZE else "passthrough"


def _is_common(header: JpegHeader) -> bool:
    huffman = header.frame in (jpeg_segments.BASELINE, jpeg_segments.EXTENDED, jpeg_segments.PROGRESSIVE)
    return huffman and header.precision == 8 and header.components in (1, 3, 4)


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged Exif data do no harm to the pixels
        return 1
    return orientation if orientation in _TURNS else 1


def _decode_jpeg(data: bytes, header: JpegHeader, orientation: int, reason: str, options: ImageOptions) -> np.ndarray:
    """uint8 (height, width, 3), upright, at least twice as large as it will be stored or at its own size."""
    if not _is_common(header):
        return _decode_with_pil(data)[0]
    width, height = header.width, header.height
    if header.components == 4:
        turbojpeg.check(data, width, height, "cmyk")  # PIL would not see damage
        return _decode_with_pil(data)[0]
    pixels = turbojpeg.decode(data, width, height, shrink=_shrink(width, height, options), empty=_decoded.empty)
    if orientation != 1:
        pixels = np.asarray(Image.fromarray(pixels).transpose(_TURNS[orientation]))
    return pixels


def _shrink(width: int, height: int, options: ImageOptions) -> Literal[1, 2, 4, 8]:
    """The factor by which libjpeg shrinks while decoding, which is much faster; it leaves enough for a good resize."""
    scale = min(width, height) / options.raw if options.raw else max(width, height) / options.max_side
    return 8 if scale >= 16 else 4 if scale >= 8 else 2 if scale >= 4 else 1


def _decode_with_pil(data: bytes, by_suffix: str = "") -> tuple[np.ndarray, str]:
    """uint8 (height, width, 3), upright, and the reason for the conversion."""
    # Another library in this process may have switched this on; a truncated file must never pass.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with Image.open(io.BytesIO(data), formats=(*FORMATS, by_suffix) if by_suffix else FORMATS) as image:
        _check_pixels(*image.size)
        if image.format == "PNG":  # decoding does not check the checksums of PNG's chunks
            with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
                again.verify()
        reason = _pil_reason(image)
        if reason == "coding":
            _check_odd_jpeg(data, *image.size)
        return np.asarray(upright_rgb(image)), reason


def _check_odd_jpeg(data: bytes, width: int, height: int) -> None:
    """Raise `JpegDataError` if libjpeg warns, which PIL would not report. Codings unknown to libturbojpeg pass."""
    try:
        turbojpeg.check(data, width, height)
    except turbojpeg.JpegDataError as error:
        if error.is_warning:
            raise


def _pil_reason(image: ImageFile.ImageFile) -> str:
    if image.format in ("JPEG", "MPO"):
        return "coding"
    # PIL reduces 16-bit colours to 8 bits while reading, but its tiles tell what the file holds.
    if image.mode.startswith("I") or ";16" in str(image.tile):
        return "16-bit"
    if image.mode in ("P", "PA"):
        return "palette"
    if image.has_transparency_data:
        return "alpha"
    name = str(image.format).lower()
    return name if name in REASONS else "other"


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as it is converted: turned as its Exif data say, 8 bits, on white where it is transparent.

    Changes `image`. Raises `ValueError` for pixel values without a defined white.
    """
    ImageOps.exif_transpose(image, in_place=True)
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


def store_pixels(pixels: np.ndarray, reason: str, options: ImageOptions) -> tuple[int, int, int, bytes, str]:
    """Encode pixels, uint8 (height, width, 3), as `options` say: mode, width, height, bytes and `reason`."""
    height, width, _ = pixels.shape
    if options.raw:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = _resize(pixels[top : top + side, left : left + side], options.raw, options.raw)
        return MODE_RAW, options.raw, options.raw, square.tobytes(), reason
    fits = pixels.nbytes <= PAGE_SIZE and max(height, width) <= options.max_side
    if options.lossless and fits and reason not in JPEG_REASONS:
        return MODE_RAW, width, height, pixels.tobytes(), reason
    scale = min(1.0, options.max_side / max(height, width))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    pixels, subsampling = _resize(pixels, width, height), "4:4:4" if options.lossless else "4:2:0"
    for quality in (options.quality, *(lower for lower in _LOWER_QUALITIES if lower < options.quality)):
        data = turbojpeg.encode(pixels, quality, subsampling)
        if len(data) <= PAGE_SIZE:
            return MODE_JPEG, width, height, data, reason
        subsampling = "4:2:0"
    raise _TooLargeError(f"takes more than the {PAGE_SIZE:,} bytes of a page even at quality {_LOWER_QUALITIES[-1]}")


def _resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize uint8 (height, width, 3): shrink by averaging areas, which does not alias; enlarge with bicubic."""
    if pixels.shape[:2] == (height, width):
        return pixels
    opencv = _opencv()
    grows = height > pixels.shape[0] or width > pixels.shape[1]
    interpolation = opencv.INTER_CUBIC if grows else opencv.INTER_AREA
    return opencv.resize(pixels, (width, height), _resized.empty((height, width, 3)), interpolation=interpolation)


class _Scratch(threading.local):
    """One thread's memory for an image that is needed only until the thread's next one.

    A new buffer of this size comes from the system each time, and touching its pages takes a tenth of the whole time.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, int, int]) -> np.ndarray:
        """A uint8 array of `shape`, in the memory of the one returned before."""
        size = math.prod(shape)
        if size > _SCRATCH_BYTES:
            return np.empty(shape, np.uint8)
        if size > self._bytes.size:
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].reshape(shape)


_decoded, _resized = _Scratch(), _Scratch()


@cache
def _opencv() -> Any:
    opencv = needs("cv2", extra="train", to="Resizing images")  # a tenth of a second, and not every set needs it
    opencv.setNumThreads(1)  # the workers already use every core
    return opencv
