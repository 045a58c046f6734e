"""The segments of a JPEG: reading the header in front of its pixels, and mending bytes without changing a pixel.

A header is read without decoding (ITU T.81, annex B). Bytes are mended where libjpeg warns and the picture is whole.

libjpeg goes on after a warning, so a decoder that ignores warnings shows grey or shifted blocks. What each warning
means for the picture was measured (`tests/measure_jpeg_warnings.py`; the table is in docs/data_format.md). Four causes
leave it whole; everything else is damage. libturbojpeg reports only its first warning, and damage may follow a harmless
one. So one cause is mended at a time, until the whole JPEG is read without a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.formats import turbojpeg
from data_prep.formats.turbojpeg import JpegDataError

START = b"\xff\xd8"
END = b"\xff\xd9"
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
"""Start-of-frame markers (table B.1) of the Huffman-coded frames that every decoder reads."""
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_SCAN, _APP1, _APP14 = 0xDA, 0xE1, 0xEE


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """The frame header, and what the application segments in front of it say."""

    frame: int
    """Second byte of the start-of-frame marker."""
    precision: int
    """Bits a sample."""
    width: int
    height: int
    components: int
    adobe_transform: int | None
    """Adobe's colour transform: 0 none, 1 YCbCr, 2 YCCK; None without the segment."""
    may_be_turned: bool
    """An Exif or XMP segment, before the frame header or behind it, may state an orientation."""


def read_header(data: bytes) -> JpegHeader | None:
    """Parse the segments up to the first scan; None if no frame header comes.

    Bytes between segments are passed over, as libjpeg does with a warning.
    """
    offset, frame = 2, None
    adobe_transform, may_be_turned = None, False
    while 0 <= (offset := data.find(b"\xff", offset)) <= len(data) - 4:
        marker = data[offset + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD7:  # filling, and markers without a segment
            offset += 1
            continue
        length = int.from_bytes(data[offset + 2 : offset + 4], "big")
        body, end = offset + 4, offset + 2 + length
        if marker in (BASELINE, EXTENDED, PROGRESSIVE) or marker in _OTHER_FRAMES:
            if length < 8 or end > len(data):
                return None
            height, width = (
                int.from_bytes(data[body + 1 : body + 3], "big"),
                int.from_bytes(data[body + 3 : body + 5], "big"),
            )
            frame = frame or (marker, data[body], width, height, data[body + 5])
        elif marker == _SCAN:
            break
        elif marker == _APP1:
            may_be_turned |= data.startswith(b"Exif", body) or data.find(b"Orientation", body, end) >= 0
        elif marker == _APP14 and length >= 14 and data.startswith(b"Adobe", body):
            adobe_transform = data[body + 11]
        offset = end if length >= 2 else len(data)
    return None if frame is None else JpegHeader(*frame, adobe_transform, may_be_turned)


REPAIRS = (
    "its end marker was missing",
    "one or two bytes too many were removed",
    "its JFIF revision was not 1",
    "its scan parameters were not those of a sequential JPEG",
)
"""What can be mended, in words for the manifest. Their order is part of the journal of unfinished conversions."""
NO_END, EXTRANEOUS, REVISION, SCAN_PARAMETERS = REPAIRS
MAX_EXTRANEOUS = 2
"""Bytes. More than these in front of a marker are remains of a scan that was overwritten further up."""
_PADDING = b"\0\n\r \x1a\xff"
"""Values that programs append; overwritten data leave any values."""
_FIRST_ARITHMETIC = 0xC9
_SEQUENTIAL_SCAN = bytes((0, 63, 0))
"""Ss, Se, and Ah with Al (ITU T.81, B.2.3)."""


def to_bits(repairs: tuple[str, ...]) -> int:
    """Some of `REPAIRS` as a number of 8 bits, for the journal."""
    return sum(1 << REPAIRS.index(repair) for repair in repairs)


def from_bits(bits: int) -> tuple[str, ...]:
    """The inverse of `to_bits`."""
    return tuple(repair for n, repair in enumerate(REPAIRS) if bits >> n & 1)


def mended(data: bytes, error: JpegDataError) -> tuple[bytes, tuple[str, ...]]:
    """Remove the causes of a JPEG's warnings, of which `error` is the first: the new bytes, and the `REPAIRS` made.

    Raises `JpegDataError`, in libjpeg's words, if the picture is damaged.
    """
    repairs: list[str] = []
    following: JpegDataError | None = error
    while following:
        if NO_END not in repairs:  # "premature end" says more than the warnings that follow from it
            error = following
        header = read_header(data)
        found = _mend(data, header, following) if header and following.is_warning else None
        if header is None or found is None or found[1] in repairs:
            raise error
        data, repair = found
        repairs.append(repair)
        following = _first_warning(data, header)
    return data, from_bits(to_bits(tuple(repairs)))


def _mend(data: bytes, header: JpegHeader, error: JpegDataError) -> tuple[bytes, str] | None:
    """Remove one cause: the new bytes, and which of `REPAIRS` that was; None if the picture is damaged."""
    message = str(error)
    if message == "Premature end of JPEG file":
        whole = data + END[data.endswith(b"\xff") :]
        # Arithmetic decoders continue with zeros after the end of the data, without a warning.
        return (whole, NO_END) if header.frame < _FIRST_ARITHMETIC and _has_all_scans(whole, header) else None
    if found := re.search(r"(\d+) extraneous bytes before marker", message):
        shorter = _without_extraneous(data, header, error, int(found[1]))
        return None if shorter is None else (shorter, EXTRANEOUS)
    if "unknown JFIF revision" in message:
        revisions = {n + 9: b"\1" for n, _ in _segments(data, 0xE0) if data.startswith(b"JFIF\0", n + 4)}
        return _with_bytes(data, revisions, REVISION)
    if message == "Invalid SOS parameters for sequential JPEG":
        return _with_bytes(data, {end - 3: _SEQUENTIAL_SCAN for _, end in _segments(data, 0xDA)}, SCAN_PARAMETERS)
    return None


def _with_bytes(data: bytes, written: dict[int, bytes], repair: str) -> tuple[bytes, str]:
    changed = bytearray(data)
    for offset, values in written.items():
        changed[offset : offset + len(values)] = values
    return bytes(changed), repair


def _first_warning(data: bytes, header: JpegHeader) -> JpegDataError | None:
    try:
        turbojpeg.check(data, header.width, header.height, colours="cmyk" if header.components == 4 else "grey")
    except JpegDataError as error:
        return error
    return None


def _without_extraneous(data: bytes, header: JpegHeader, error: JpegDataError, count: int) -> bytes | None:
    """Remove the `count` bytes in front of a marker that `error` reports; None if they are a sign of damage."""
    if count > MAX_EXTRANEOUS or header.frame >= _FIRST_ARITHMETIC:
        return None
    # libjpeg does not say where. It warns when it reads the marker: the shortest prefix of the file whose first warning
    # is this one ends at that marker, since a shorter prefix ends too early and gets another warning.
    low, high = 0, len(data)
    while low < high:
        middle = (low + high) // 2
        warning = _first_warning(data[:middle], header)
        low, high = (low, middle) if warning and str(warning) == str(error) else (middle + 1, high)
    marker = low - 2
    first_scan = next((end for _, end in _segments(data, 0xDA)), 0)
    if first_scan < low and data[marker:low] != END:  # between scans or restarts they come from damage
        return None
    if any(value not in _PADDING for value in data[marker - count : marker]):
        return None
    return data[: marker - count] + data[marker:]


def _segments(data: bytes, wanted: int) -> Iterator[tuple[int, int]]:
    """Start (at its 0xFF) and end of each segment with the marker `wanted`, also between and after scans."""
    offset = 2
    while 0 <= (offset := data.find(b"\xff", offset)) < len(data) - 3:
        marker = data[offset + 1]
        if marker == END[1]:
            return
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # data of a scan, filling, markers that stand alone
            offset += 1 if marker == 0xFF else 2
            continue
        end = offset + 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
        if marker == wanted and end <= len(data):
            yield offset, end
        offset = end


def _has_all_scans(data: bytes, header: JpegHeader) -> bool:
    """Whether the scans hold every bit of every coefficient; a progressive JPEG cut between two scans decodes, too."""
    missing: dict[int, set[int]] = {}
    for start, end in _segments(data, 0xDA):
        count = data[start + 4]
        if end - start != 8 + 2 * count:
            return False
        first, last, bits = data[end - 3 : end]
        if header.frame & 3 != 2:  # not one of the four progressive kinds (T.81, table B.1)
            first, last, bits = 0, 63, 0
        for component in data[start + 5 : start + 5 + 2 * count : 2]:
            left = missing.setdefault(component, set(range(64)))
            if bits & 15 == 0:
                left.difference_update(range(first, last + 1))
    return len(missing) == header.components and not any(missing.values())
