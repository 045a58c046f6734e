"""What a JPEG says of itself in front of its pixels, read without decoding (ITU T.81, annex B)."""

from __future__ import annotations

from dataclasses import dataclass

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
