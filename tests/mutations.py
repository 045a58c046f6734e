"""Mutated `.beton` files, each made from a seed and a number: what bad disks, bad copies and bad people do to bytes."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from data_prep.formats.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    METADATA_START,
    MODE_JPEG,
    MODE_RAW,
    SAMPLE,
    index_checksum,
)

KINDS = ("header", "fields", "rows", "pointers", "sizes", "modes", "labels", "data", "growth", "truncation")
_TURNS = (*KINDS, "data", "sizes", "modes", "data", "pointers")
_LAST = ("growth", "truncation", "header")  # after these nothing lies where it was
VALID_SHARE = 0.7
"""Of the mutations, that come with a manifest whose checksum is right, so that nothing but the decoders can notice."""


@dataclass
class Mutated:
    """A mutated file and what was done to it."""

    content: bytearray
    manifest: bytes | None
    """None: no sidecar lies beside it."""
    kinds: list[str] = field(default_factory=list)
    has_valid_checksum: bool = False


def mutate(intact: bytes, manifest: bytes, seed: int, number: int) -> Mutated:
    """The mutation of that number; all kinds take turns, and some come together."""
    rng = np.random.default_rng([seed, number])
    kinds = [_TURNS[number % len(_TURNS)]]
    while rng.random() < 0.15 and len(kinds) < 3:
        kinds.append(str(rng.choice(KINDS)))
    kinds.sort(key=lambda kind: (kind in _LAST, _LAST.index(kind) if kind in _LAST else 0))
    result = Mutated(bytearray(intact), manifest, kinds)
    for kind in kinds:
        with suppress(ValueError, OverflowError):  # what came before has left no index to be found
            _HOW[kind](result, rng)
    draw = rng.random()
    if draw < VALID_SHARE:
        result.has_valid_checksum = _vouch_for(result, json.loads(manifest))
    elif draw < (1 + VALID_SHARE) / 2:
        result.manifest = None
    return result


def _vouch_for(file: Mutated, told: dict) -> bool:
    """Write a manifest that agrees with the mutated index, as far as a reader could find it."""
    content = file.content
    if len(content) < METADATA_START:
        return False
    header = np.frombuffer(content, HEADER, count=1)[0]
    n, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    parts = content[METADATA_START : METADATA_START + n * SAMPLE.itemsize], content[table : table + 24 * n]
    told |= {"num_samples": n, "file_bytes": len(content)}
    told["index_xxh3"] = index_checksum(bytes(content[:METADATA_START]), *map(bytes, parts))
    others = {key: value for key, value in told.items() if key != "manifest_sha256"}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    told["manifest_sha256"] = hashlib.sha256(text.encode("ascii")).hexdigest()
    file.manifest = json.dumps(told).encode("ascii")
    return all(len(part) == n * 24 for part in parts)


def header_of(content: bytes | bytearray) -> np.ndarray:
    """The header, writable where `content` is."""
    return np.frombuffer(content, HEADER, count=1)


def rows_of(content: bytes | bytearray) -> np.ndarray:
    """The rows of an intact index."""
    return np.frombuffer(content, SAMPLE, count=int(header_of(content)["num_samples"][0]), offset=METADATA_START)


def table_of(content: bytes | bytearray) -> np.ndarray:
    """The allocation table of an intact index, whose rows are in the order of the samples."""
    header = header_of(content)[0]
    return np.frombuffer(content, ALLOCATION, count=int(header["num_samples"]), offset=int(header["alloc_table_ptr"]))


def _some(rng: np.random.Generator, values: np.ndarray) -> int:
    return int(rng.integers(len(values)))


def _odd(rng: np.random.Generator, value: int, bits: int) -> int:
    """Another value of so many bits: a flipped bit, a neighbour, an end of the range, anything."""
    top = (1 << bits) - 1
    step = int(rng.integers(1, 4))
    anything = int.from_bytes(rng.bytes(8), "little")
    flipped = value ^ (1 << int(rng.integers(bits)))
    draws = [flipped, flipped, value + step, value - step, 2 * value, value // 2, 0, 1, top, anything]
    return draws[int(rng.integers(len(draws)))] & top


def _header(file: Mutated, rng: np.random.Generator) -> None:
    header = header_of(file.content)
    name = str(rng.choice(HEADER.names or ()))
    header[name] = _odd(rng, int(header[name][0]), 8 * HEADER[name].itemsize)


def _fields(file: Mutated, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 9))):
        within = [0, int(rng.integers(1, 17)), int(rng.integers(FIELD.itemsize))][int(rng.integers(3))]  # type, name
        at = HEADER.itemsize + FIELD.itemsize * int(rng.integers(2)) + within
        file.content[at] = int(rng.integers(256))


def _rows(file: Mutated, rng: np.random.Generator) -> None:
    rows = rows_of(file.content)
    if rng.random() < 0.3:
        rows[_some(rng, rows)] = rows[_some(rng, rows)]
        return
    raw = rows.view(np.uint8)
    for _ in range(int(rng.integers(1, 5))):
        raw[_some(rng, raw)] ^= 1 << int(rng.integers(8))


def _pointers(file: Mutated, rng: np.random.Generator) -> None:
    rows, table = rows_of(file.content), table_of(file.content)
    i, j, how = _some(rng, rows), _some(rng, rows), int(rng.integers(6))
    if how == 0:  # two samples in each other's place
        for values in (rows["image"]["data_ptr"], table["ptr"], table["size"]):
            values[[i, j]] = values[[j, i]]
    elif how == 1:  # one sample's bytes for two
        rows["image"]["data_ptr"][i], table["ptr"][i] = rows["image"]["data_ptr"][j], table["ptr"][j]
        table["size"][i] = table["size"][j]
    elif how == 2:  # the sample begins later or ends earlier
        step = min(int(rng.integers(1, 200)), int(table["size"][i]) - 1)
        table["size"][i] -= step
        if rng.random() < 0.7:
            rows["image"]["data_ptr"][i] += step
            table["ptr"][i] += step
    elif how == 3:
        table["ptr"][i] = rows["image"]["data_ptr"][i] = _odd(rng, int(table["ptr"][i]), 64)
    elif how == 4:
        rows["image"]["data_ptr"][i] = _odd(rng, int(table["ptr"][i]), 64)
    else:
        table["sample_id"][i] = _odd(rng, i, 64)


def _sizes(file: Mutated, rng: np.random.Generator) -> None:
    rows, table = rows_of(file.content)["image"], table_of(file.content)
    i, how = _some(rng, table), int(rng.integers(5))
    if how == 0:
        table["size"][i] = _odd(rng, int(table["size"][i]), 64 if rng.random() < 0.3 else 16)
    elif how == 1:  # the same number of pixels, so that a raw sample's bytes fit
        factor = int(rng.integers(2, 9))
        rows["height"][i], rows["width"][i] = max(1, rows["height"][i] // factor), rows["width"][i] * factor
    elif how == 2:
        rows["height"][i], rows["width"][i] = rows["width"][i], rows["height"][i]
    else:
        for name in ("height", "width")[: int(rng.integers(1, 3))] if how == 3 else ("width",):
            rows[name][i] = _odd(rng, int(rows[name][i]), 16)


def _modes(file: Mutated, rng: np.random.Generator) -> None:
    rows, table = rows_of(file.content)["image"], table_of(file.content)
    i = _some(rng, table)
    if rows["mode"][i] == MODE_JPEG and rng.random() < 0.7:  # a JPEG's bytes as pixels, of a size that fits them
        rows["mode"][i] = MODE_RAW
        pixels = max(1, int(table["size"][i]) // 3)
        rows["height"][i] = height = int(rng.integers(1, 1 + min(64, pixels)))
        rows["width"][i] = min(65535, pixels // height)
        table["size"][i] = 3 * int(rows["height"][i]) * int(rows["width"][i])
    else:
        rows["mode"][i] = 1 - rows["mode"][i] if rng.random() < 0.8 else int(rng.integers(256))


def _labels(file: Mutated, rng: np.random.Generator) -> None:
    labels = rows_of(file.content)["label"]
    for _ in range(int(rng.integers(1, 4))):
        i = _some(rng, labels)
        value = int(rng.integers(3)) if rng.random() < 0.3 else _odd(rng, int(labels[i]), 64)
        labels[i] = value - (1 << 64) if value >> 63 else value


def _data(file: Mutated, rng: np.random.Generator) -> None:
    rows, table = rows_of(file.content)["image"], table_of(file.content)
    i = _some(rng, table)
    start, size = int(table["ptr"][i]), int(table["size"][i])
    old = bytes(file.content[start : start + size])
    new = bytearray(old)
    how = int(rng.integers(9))
    if how == 0:  # flipped bits
        for at in rng.integers(size, size=int(rng.integers(1, 9))).tolist():
            new[at] ^= 1 << int(rng.integers(8))
    elif how == 1:  # an overwritten run
        at, length = int(rng.integers(size)), int(rng.choice([1, 16, 64, 512, 4096]))
        run = [bytes(length), b"\xff" * length, rng.bytes(length)][int(rng.integers(3))]
        new[at : at + length] = run[: max(0, size - at)]
    elif how in (2, 3):  # the head: sizes, components, tables
        for at in rng.integers(min(size, 620), size=int(rng.integers(1, 4))).tolist():
            new[at] = int(rng.integers(256))
    elif how in (4, 5):  # the size that the JPEG itself gives, with or without the index
        at = max(old.find(b"\xff\xc0"), old.find(b"\xff\xc2"))
        if at >= 0:
            height, width = (_odd(rng, int.from_bytes(old[at + k : at + k + 2], "big"), 16) for k in (5, 7))
            if rng.random() < 0.5:
                width = int.from_bytes(old[at + 7 : at + 9], "big")
            new[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
            if how == 4:
                rows["height"][i], rows["width"][i] = height, width
    elif how == 6:  # components: grey, CMYK, other samplings, another kind of frame
        at = max(old.find(b"\xff\xc0"), old.find(b"\xff\xc2"))
        if at >= 0:
            where, what = [
                (1, (0xC1, 0xC2, 0xC3, 0xC9)),
                (9, (1, 2, 4)),
                (11, (0x11, 0x22, 0x41, 0x14, 0x44)),
                (4, (12,)),
            ][int(rng.integers(4))]
            new[at + where] = int(rng.choice(what))
    elif how == 7:  # cut short, with or without an end marker
        kept = int(rng.integers(size))
        new[kept:] = bytes(size - kept)
        if rng.random() < 0.5:
            new[-2:] = b"\xff\xd9"
    else:
        foreign = _foreign(rng, int(rows["width"][i]), int(rows["height"][i]))[:size]
        new[: len(foreign)] = foreign
    file.content[start : start + size] = new[:size]


def _foreign(rng: np.random.Generator, width: int, height: int) -> bytes:
    """What is no JPEG of this picture, though some decoder may like it."""
    kind = int(rng.integers(6))
    if kind == 0:
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n%%EOF\n"
    if kind == 1:
        return rng.bytes(256)
    if rng.random() < 0.5:  # else of the right size
        width, height = int(rng.integers(1, 65)), int(rng.integers(1, 65))
    image, file = Image.new("RGB", (min(width, 512), min(height, 512)), "red"), io.BytesIO()
    image.save(file, ("PNG", "GIF", "BMP", "JPEG")[kind - 2])
    return file.getvalue()


def _growth(file: Mutated, rng: np.random.Generator) -> None:
    content, how = file.content, int(rng.integers(4))
    header = header_of(content)[0]
    n, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if how == 0:
        file.content = content + rng.bytes(int(rng.integers(1, 5000)))
    elif how == 1:  # bytes too many in the middle
        at, more = int(rng.integers(len(content))), int(rng.integers(1, 5000))
        file.content = content[:at] + bytes(more) + content[at:]
    elif how == 2:  # a page more, which the header knows of
        page = int(header["page_size"])
        file.content = content[:table] + rng.bytes(page) + content[table:]
        header_of(file.content)["alloc_table_ptr"] = table + page
    else:  # samples more, with the bytes of the last one
        more = int(rng.integers(1, 9))
        last_row = rows_of(content)[-1:].tobytes()
        entries = np.repeat(table_of(content)[-1:], more)
        entries["sample_id"] += np.arange(1, more + 1, dtype=np.uint64)
        at = METADATA_START + n * SAMPLE.itemsize
        file.content = content[:at] + last_row * more + content[at + more * SAMPLE.itemsize :] + entries.tobytes()
        header_of(file.content)["num_samples"] = n + more


def _truncation(file: Mutated, rng: np.random.Generator) -> None:
    content, how = file.content, int(rng.integers(3))
    header = header_of(content)[0]
    n, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if how == 0:
        file.content = content[: int(rng.integers(len(content)))]
    elif how == 1:  # samples fewer, which header and table know of
        kept = int(rng.integers(1, n))
        file.content = content[: table + kept * ALLOCATION.itemsize]
        header_of(file.content)["num_samples"] = kept
    else:  # bytes lost among the samples
        first = int(table_of(content)["ptr"].min())
        at, lost = int(rng.integers(first, table)), int(rng.integers(1, 5000))
        file.content = content[:at] + content[at + lost : table] + content[table:]
        header_of(file.content)["alloc_table_ptr"] = table - min(lost, table - at)


_HOW: dict[str, Callable[[Mutated, np.random.Generator], None]] = {
    "header": _header,
    "fields": _fields,
    "rows": _rows,
    "pointers": _pointers,
    "sizes": _sizes,
    "modes": _modes,
    "labels": _labels,
    "data": _data,
    "growth": _growth,
    "truncation": _truncation,
}
