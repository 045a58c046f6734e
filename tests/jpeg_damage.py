"""Photographs as JPEGs of every kind, and streams mutated so that libjpeg warns; shared by tests and measurements."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

from data_prep.formats import turbojpeg

END = b"\xff\xd9"
KINDS = (
    "baseline",
    "4:4:4",
    "restart",
    "progressive",
    "grey",
    "adobe",
    "adobe-rgb",
    "arithmetic",
    "arithmetic-restart",
)
HUFFMAN = tuple(kind for kind in KINDS if not kind.startswith("arithmetic"))


@cache
def photos(side: int = 320) -> tuple[Image.Image, ...]:
    """Six photographs that scikit-image and scikit-learn ship, `side` pixels long."""
    arrays = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket(), skimage.data.chelsea()]
    images = tuple(Image.fromarray(pixels) for pixels in [*arrays, *load_sample_images().images])
    for image in images:
        image.thumbnail((side, side))
    return images


def encode(photo: Image.Image, kind: str) -> bytes:
    """A JPEG of one of `KINDS`."""
    if kind.startswith("arithmetic"):
        # libturbojpeg reads these from the environment; PIL has no switch for them.
        switches = {"TJ_ARITHMETIC": "1", "TJ_RESTART": "2B" if kind.endswith("restart") else ""}
        os.environ.update({name: value for name, value in switches.items() if value})
        try:
            return turbojpeg.encode(np.asarray(photo), 90)
        finally:
            for name in switches:
                os.environ.pop(name, None)
    options: dict = {
        "4:4:4": {"subsampling": "4:4:4"},
        "restart": {"restart_marker_blocks": 8},
        "progressive": {"progressive": True},
        "adobe-rgb": {"keep_rgb": True},
    }.get(kind, {})
    buffer = io.BytesIO()
    (photo.convert("L") if kind == "grey" else photo).save(buffer, "JPEG", quality=90, **options)
    data = buffer.getvalue()
    if kind == "adobe":  # in place of JFIF's segment, as Photoshop writes it
        data = data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\1" + data[2 + 2 + int.from_bytes(data[4:6], "big") :]
    return data


@dataclass(frozen=True)
class Segment:
    """A marker, where its 0xFF stands and where its parameters end."""

    marker: int
    start: int
    end: int


def segments(data: bytes) -> Iterator[Segment]:
    """All of a sound JPEG with their parameters, the start marker apart."""
    offset = 2
    while (offset := data.find(b"\xff", offset)) >= 0 and data[offset + 1] != END[1]:
        marker = data[offset + 1]
        if marker in (0, 0xFF) or 0xD0 <= marker <= 0xD7:
            offset += 2
            continue
        end = offset + 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
        yield Segment(marker, offset, end)
        offset = end


def scans(data: bytes) -> list[bytes]:
    """What lies before the first scan's segment, then each scan with its tables, at last the end marker."""
    starts = [segment.end for segment in segments(data) if segment.marker == 0xDA]
    found, last = [], 0
    for end in starts[1:]:
        tables = [s.start for s in segments(data) if starts[len(found)] <= s.start < end]
        found.append(data[last : tables[0]])
        last = tables[0]
    return [*found, data[last:-2], data[-2:]]


def _with(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


def _restarts(data: bytes) -> list[int]:
    start = max(segment.end for segment in segments(data) if segment.marker == 0xDA)
    return [n for n in range(start, len(data) - 2) if data[n] == 0xFF and 0xD0 <= data[n + 1] <= 0xD7]


def run(data: bytes, rng: random.Random, what: str, length: int) -> bytes:
    """`length` bytes behind the first scan's header made zeros, ones or random, cut out, put in, or moved."""
    first = next(segment.end for segment in segments(data) if segment.marker == 0xDA)
    at = rng.randrange(first, len(data) - 3)
    length = min(length, len(data) - 2 - at)
    new = {"zeros": bytes(length), "ones": b"\xff" * length, "cut": b""}.get(what, rng.randbytes(length))
    return data[:at] + new + data[at + (0 if what == "put in" else length) :]


RUNS = ("zeros", "ones", "random", "cut", "put in")


def _restart_changed(data: bytes, rng: random.Random) -> bytes:
    at = rng.choice(_restarts(data))
    return _with(data, at + 1, bytes([0xD0 | (data[at + 1] + rng.randrange(1, 8)) & 7]))


def _restart_lost(data: bytes, rng: random.Random) -> bytes:
    at = rng.choice(_restarts(data))
    return data[:at] + data[at + 2 :]


def _scans_swapped(data: bytes, rng: random.Random) -> bytes:
    parts = scans(data)
    one, other = sorted(rng.sample(range(1, len(parts) - 1), 2))
    parts[one], parts[other] = parts[other], parts[one]
    return b"".join(parts)


def _scan_twice(data: bytes, rng: random.Random) -> bytes:
    parts = scans(data)
    n = rng.randrange(1, len(parts) - 1)
    return b"".join([*parts[: n + 1], *parts[n:]])


def _scan_lost(data: bytes, rng: random.Random) -> bytes:
    parts = scans(data)
    del parts[rng.randrange(1, len(parts) - 1)]
    return b"".join(parts)


def _cut_between_scans(data: bytes, rng: random.Random) -> bytes:
    return b"".join(scans(data)[: rng.randrange(1, len(scans(data)) - 1)])


def _too_many(count: int) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, rng: data[:-2] + bytes(count) + data[-2:]


def _counted(count: int, last: bytes = b"\0") -> Callable[[bytes, random.Random], bytes]:
    """Zeros before the end marker, the last one as given, so many that libjpeg, which misses some, counts `count`."""

    def put(data: bytes, rng: random.Random) -> bytes:
        longer = data
        width, height = Image.open(io.BytesIO(data)).size
        while True:
            longer = longer[:-2] + b"\0" + END
            try:
                turbojpeg.check(longer, width, height)
            except turbojpeg.JpegDataError:  # of 1 extraneous byte
                return longer[:-3] + bytes(count - 1) + last + END

    return put


def _before_a_segment(count: int) -> Callable[[bytes, random.Random], bytes]:
    def put(data: bytes, rng: random.Random) -> bytes:
        at = rng.choice([segment.start for segment in segments(data)])
        return data[:at] + bytes(count) + data[at:]

    return put


def _scan_parameters(data: bytes, rng: random.Random) -> bytes:
    end = next(segment.end for segment in segments(data) if segment.marker == 0xDA)
    return _with(data, end - 3, rng.choice([b"\0\0\0", b"\0\x3f\1", b"\1\x3f\0", b"\0\x40\0"]))


def _jfif(data: bytes, rng: random.Random) -> bytes:
    return _with(data, data.index(b"JFIF\0") + 5, bytes([rng.choice([0, 2, 3, 255]), rng.randrange(256)]))


def _adobe(data: bytes, rng: random.Random) -> bytes:
    return _with(data, data.index(b"Adobe") + 11, bytes([rng.randrange(3, 256)]))


PRECISE: dict[str, tuple[tuple[str, ...], Callable[[bytes, random.Random], bytes]]] = {
    "no end marker": (KINDS, lambda data, rng: data[:-2]),
    "half an end marker": (KINDS, lambda data, rng: data[:-1]),
    "end marker overwritten": (KINDS, lambda data, rng: data[:-2] + bytes(2)),
    "cut 1 byte before": (KINDS, lambda data, rng: data[:-3]),
    "cut anywhere": (KINDS, lambda data, rng: data[: rng.randrange(len(data) // 4, len(data) - 4)]),
    "cut between scans": (("progressive",), _cut_between_scans),
    "end marker too early": (KINDS, lambda data, rng: data[: rng.randrange(len(data) // 4, len(data) - 4)] + END),
    **{f"{n} zeros before the end": (KINDS, _too_many(n)) for n in (2, 8, 500)},
    **{f"libjpeg counts {n} too many": (HUFFMAN, _counted(n)) for n in (1, 2, 3)},
    "libjpeg counts 2 too many, no padding": (HUFFMAN, _counted(2, b"\x5a")),
    "2 zeros before a segment": (KINDS, _before_a_segment(2)),
    "9 zeros before a segment": (KINDS, _before_a_segment(9)),
    "restart marker changed": (("restart", "arithmetic-restart"), _restart_changed),
    "restart marker lost": (("restart", "arithmetic-restart"), _restart_lost),
    "scans swapped": (("progressive",), _scans_swapped),
    "scan twice": (("progressive",), _scan_twice),
    "scan lost": (("progressive",), _scan_lost),
    "scan parameters": (("baseline", "restart", "grey"), _scan_parameters),
    "JFIF revision": (("baseline", "progressive", "grey"), _jfif),
    "Adobe transform": (("adobe", "adobe-rgb"), _adobe),
}
"""Of each: the kinds of JPEG it can be done to, and how."""
