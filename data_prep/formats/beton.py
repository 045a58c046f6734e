"""The FFCV `.beton` layout (version 2, little-endian): record types, checksum of the index, names of parts.

The writer (`write_beton`) and the reader of the tables (`read_tables`) know the format through this file alone.
Source: FFCV 1.0.2, `ffcv/types.py`, `ffcv/writer.py` and `ffcv/fields/rgb_image.py`.

    header 24 B | 1041-B descriptor per field | 24-B row per sample | pages of samples | allocation table to the end
"""

from __future__ import annotations

import re
import struct
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from lowrank_vit.common.errors import BetonError, UserError

VERSION = 2
PAGE_SIZE = 8 << 20
"""Default page size in bytes, FFCV's own; a sample may not span two pages."""
MIN_PAGE_SIZE = 2 << 20
MAX_PAGE_SIZE = 1 << 31
MODE_JPEG, MODE_RAW = 0, 1
TYPE_INT, TYPE_RGB_IMAGE = 1, 2

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype({"names": ["image", "label"], "formats": [IMAGE, "<i8"], "offsets": [0, 16], "itemsize": 24})
PACK_SAMPLE = struct.Struct("<BHHQ3xq")
"""One row of `SAMPLE`: mode, width, height, pointer, label. Ten times as fast as assigning to a NumPy row."""
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
METADATA_START = HEADER.itemsize + 2 * FIELD.itemsize


def align_to_page(offset: int, page_size: int) -> int:
    """The first multiple of `page_size` that is at least `offset` (bytes)."""
    return -(-offset // page_size) * page_size


def head_bytes(num_samples: int, page_size: int, table_start: int) -> bytes:
    """The first `METADATA_START` bytes of a file of ours; `table_start` is where its allocation table begins."""
    fields = np.zeros(2, FIELD)
    fields["type_id"] = TYPE_RGB_IMAGE, TYPE_INT
    fields["name"] = b"image", b"label"
    return np.array((VERSION, 2, page_size, num_samples, table_start), HEADER).tobytes() + fields.tobytes()


def allocations(pointers: np.ndarray, sizes: np.ndarray, first_id: int = 0) -> np.ndarray:
    """Rows of the allocation table, `ALLOCATION` (N,), for samples from `first_id` on."""
    table = np.zeros(len(pointers), ALLOCATION)
    table["sample_id"] = np.arange(first_id, first_id + len(pointers))
    table["ptr"], table["size"] = pointers, sizes
    return table


def index_checksum(*index: bytes | bytearray | memoryview) -> str:
    """XXH3-64 in hexadecimal of header and field descriptors, rows, allocation table, in this order.

    It runs at several GB/s: 62 MB for ImageNet's 1.3 million samples (https://xxhash.com).
    """
    digest = xxhash.xxh3_64()
    for part in index:
        digest.update(part)
    return digest.hexdigest()


def field_names(head: bytes) -> list[str]:
    """The names of the image's and of the label's field, from the first `METADATA_START` bytes of a file.

    FFCV's users choose them as they like; ours are image and label.
    """
    return [name.split(b"\0")[0].decode("latin-1") for name in stored_names(head)]


def stored_names(head: bytes) -> list[bytes]:
    """The same two names as they are stored: 16 bytes each, padded with NULs."""
    starts = (HEADER.itemsize + n * FIELD.itemsize + 1 for n in range(2))
    return [head[start : start + 16] for start in starts]


def part_path(out: Path, index: int, count: int) -> Path:
    """Where part `index` (from 1) of `count` of `out` lies."""
    return out.with_name(f"{out.stem}-{index:0{len(str(count))}d}-of-{count}{out.suffix}")


def find_parts(out: Path) -> list[Path]:
    """The parts of `out` that lie beside it, in order; an empty list if there is none.

    Raises `BetonError` if some are missing, or if the parts are from conversions into different numbers of parts.
    """
    pattern = re.compile(re.escape(out.stem) + r"-([0-9]+)-of-([0-9]+)" + re.escape(out.suffix))
    names = [path.name for path in out.parent.iterdir()] if out.parent.is_dir() else []
    present = {(int(m[2]), int(m[1])) for name in names if (m := pattern.fullmatch(name))}
    if not present:
        return []
    counts = sorted({count for count, _ in present})
    if len(counts) > 1:
        raise BetonError(
            f"{out.parent} holds parts of {out.name} from divisions into {' and '.join(map(str, counts))} parts. "
            "Keep those of one division and remove the others."
        )
    count = counts[0]
    # A name may claim any number of parts, so the files are counted.
    num_missing = count - sum(1 <= i <= count for _, i in present)
    if num_missing or len(present) > count:
        lacking = (part_path(out, i, count).name for i in range(1, count + 1) if (count, i) not in present)
        shown = ", ".join(islice(lacking, 5)) + (", ..." if num_missing > 5 else "")
        if not num_missing:
            raise BetonError(f"{out.parent} holds parts of {out.name} that are numbered beyond {count}. Remove them.")
        raise BetonError(
            f"{out.parent} lacks {num_missing:,} of the {count:,} parts of {out.name}: {shown}. "
            f"Write each with `python -m data_prep imagefolder ... --out {out} --shard i/{count}`."
        )
    return [part_path(out, i, count) for i in range(1, count + 1)]


def file_or_parts(beton: Path) -> list[Path]:
    """The parts of `beton` if only they exist, else `beton` itself. Raises `BetonError`, see `find_parts`."""
    return [beton] if beton.exists() else find_parts(beton) or [beton]


def parse_shard(text: str) -> tuple[int, int]:
    """Read the command line's "2/16" as (2, 16). Raises `UserError`."""
    match = re.fullmatch(r"([0-9]{1,18})/([0-9]{1,18})", text)
    if not match:
        raise UserError(f"--shard is {text}, expected i/n, for example 2/16 for the second of 16 parts.")
    return int(match[1]), int(match[2])
