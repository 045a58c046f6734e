"""The FFCV `.beton` layout (version 2, little-endian): record types, safe reading of a file's tables, names of parts.

Both the writer (`write_beton`) and every reader (`lowrank_vit.data.sets.beton`) know the
format through this file alone.
Source: FFCV 1.0.2, `ffcv/types.py`, `ffcv/writer.py` and `ffcv/fields/rgb_image.py`.

    header 24 B | one 1041-B descriptor a field | one 24-B row a sample | pages of samples | allocation table to the end
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Tables:
    """What a `.beton` says of its N samples, in sample order; every pointer is known to lie inside the file."""

    page_size: int
    file_bytes: int
    modes: np.ndarray
    """uint8 (N,): MODE_JPEG or MODE_RAW."""
    heights: np.ndarray
    """int32 (N,), pixels."""
    widths: np.ndarray
    """int32 (N,), pixels."""
    labels: np.ndarray
    """int64 (N,), >= 0."""
    pointers: np.ndarray
    """int64 (N,), byte offset of the sample's data in the file."""
    sizes: np.ndarray
    """int64 (N,), bytes."""
    index_xxh3: str
    """`index_checksum` of the file."""


def index_checksum(*index: bytes | bytearray | memoryview) -> str:
    """XXH3-64 in hexadecimal of header and field descriptors, rows, allocation table, in this order.

    It runs at several GB/s: 62 MB for ImageNet's 1.3 million samples (https://xxhash.com).
    """
    digest = xxhash.xxh3_64()
    for part in index:
        digest.update(part)
    return digest.hexdigest()


def read_tables(path: str | os.PathLike[str]) -> Tables:
    """Read and check header, fields, metadata and allocation table of an image + integer label `.beton`.

    No sample is decoded. Raises `BetonError`, which names the file and the next step, whatever the bytes are.
    """
    path = Path(path)
    again = "Convert it again with `python -m data_prep`."
    try:
        file_bytes = path.stat().st_size if path.is_file() else -1
        if file_bytes < 0:
            what = "is a directory, not a .beton file" if path.is_dir() else "does not exist"
            if path.exists() and not path.is_dir():
                what = "is a device or a pipe, not a .beton file"
            raise BetonError(f"{path} {what}. Give the path of a file written by `python -m data_prep`.")
        with path.open("rb") as file:
            head = file.read(METADATA_START)
            if len(head) < HEADER.itemsize:
                raise BetonError(f"{path} holds {file_bytes} bytes, too few for a .beton header. {again}")
            header = np.frombuffer(head, HEADER, count=1)[0]
            _check_header(path, header, head, file_bytes)
            num_samples, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
            sample_bytes = file.read(num_samples * SAMPLE.itemsize)
            file.seek(table_start)
            table_bytes = file.read(num_samples * ALLOCATION.itemsize)
    except OSError as error:
        raise BetonError(f"{path} cannot be read: {error.strerror}. Check its permissions and the disk.") from error
    if len(sample_bytes) != num_samples * SAMPLE.itemsize or len(table_bytes) != num_samples * ALLOCATION.itemsize:
        raise BetonError(f"{path} became shorter while it was read. {again}")
    samples, table = np.frombuffer(sample_bytes, SAMPLE), np.frombuffer(table_bytes, ALLOCATION)
    checksum = index_checksum(head, sample_bytes, table_bytes)
    return _check_samples(path, samples, table, int(header["page_size"]), table_start, file_bytes, checksum)


def field_names(head: bytes) -> list[str]:
    """The names of the image's and of the label's field, from the first `METADATA_START` bytes of a file.

    FFCV's users choose them as they like; ours are image and label.
    """
    return [name.split(b"\0")[0].decode("latin-1") for name in _stored_names(head)]


def _stored_names(head: bytes) -> list[bytes]:
    starts = (HEADER.itemsize + n * FIELD.itemsize + 1 for n in range(2))
    return [head[start : start + 16] for start in starts]


def _check_header(path: Path, header: np.void, head: bytes, file_bytes: int) -> None:
    again = "Convert it again with `python -m data_prep`."
    version, num_fields = int(header["version"]), int(header["num_fields"])
    page_size, num_samples = int(header["page_size"]), int(header["num_samples"])
    table_start = int(header["alloc_table_ptr"])
    if version != VERSION:
        raise BetonError(
            f"{path} is not an FFCV .beton file: its version field reads {version}, expected {VERSION}. "
            "Give a file written by `python -m data_prep`."
        )
    if num_fields != 2 or len(head) < METADATA_START:
        raise BetonError(
            f"{path} holds {num_fields} fields in {file_bytes} bytes; expected an image and an integer label. {again}"
        )
    types = [int(t) for t in np.frombuffer(head, FIELD, count=2, offset=HEADER.itemsize)["type_id"]]
    if types != [TYPE_RGB_IMAGE, TYPE_INT]:
        raise BetonError(
            f"{path} holds fields of FFCV types {types}; expected an RGB image ({TYPE_RGB_IMAGE}) "
            f"and an integer label ({TYPE_INT}). {again}"
        )
    names = field_names(head)
    if (
        not all(name.isascii() for name in _stored_names(head)) or names[0] == names[1]
    ):  # FFCV tells the fields apart by them
        raise BetonError(f"{path} has fields of the names {names[0]!r} and {names[1]!r}: it is damaged. {again}")
    if table_start == 0:
        raise BetonError(f"{path} is unfinished: its writer was interrupted before the end. {again}")
    if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise BetonError(f"{path} has the impossible page size {page_size}: its header is damaged. {again}")
    if num_samples == 0:
        raise BetonError(f"{path} holds no samples. Check the source it was converted from.")
    first_page = align_to_page(METADATA_START + num_samples * SAMPLE.itemsize, page_size)
    expected = table_start + num_samples * ALLOCATION.itemsize
    if not first_page < table_start or expected != file_bytes:
        raise BetonError(
            f"{path} is cut short or damaged: its header promises {num_samples} samples and a table that ends at "
            f"byte {expected}, but the file has {file_bytes} bytes. {again}"
        )


def _check_samples(
    path: Path,
    samples: np.ndarray,
    table: np.ndarray,
    page_size: int,
    table_start: int,
    file_bytes: int,
    checksum: str,
) -> Tables:
    again = "The file is damaged; convert it again with `python -m data_prep`."
    num_samples = len(samples)
    modes, labels = samples["image"]["mode"].copy(), samples["label"].astype(np.int64)
    heights, widths = samples["image"]["height"].astype(np.int32), samples["image"]["width"].astype(np.int32)
    pointers_u64 = samples["image"]["data_ptr"].astype(np.uint64)

    def fail(bad: np.ndarray, what: str) -> None:
        if bad.any():
            error = BetonError(f"{path}: sample {int(np.flatnonzero(bad)[0])} {what}. {again}")
            error.sample_id = int(np.flatnonzero(bad)[0])
            raise error

    fail((modes != MODE_JPEG) & (modes != MODE_RAW), "has an unknown storage mode")
    fail((heights == 0) | (widths == 0), "has no pixels")
    fail(labels < 0, "has a negative label")
    # Allocations may stand in any order (FFCV's workers finish as they please): sort them by sample.
    order = np.argsort(table["sample_id"], kind="stable")
    table = table[order]
    fail(table["sample_id"] != np.arange(num_samples, dtype=np.uint64), "is missing from the allocation table")
    fail(table["ptr"] != pointers_u64, "lies elsewhere by the allocation table than by its metadata")
    first_page = align_to_page(METADATA_START + num_samples * SAMPLE.itemsize, page_size)
    sizes_u64 = table["size"].astype(np.uint64)
    # Compare in uint64 without adding first, so that no sum can wrap around.
    outside = (pointers_u64 < first_page) | (pointers_u64 >= table_start) | (sizes_u64 == 0)
    outside |= sizes_u64 > np.uint64(table_start) - np.minimum(pointers_u64, np.uint64(table_start))
    fail(outside, "points outside the file's pages")
    pointers, sizes = pointers_u64.astype(np.int64), sizes_u64.astype(np.int64)
    fail(pointers // page_size != (pointers + sizes - 1) // page_size, "spans two pages")
    raw_bytes = heights.astype(np.int64) * widths * 3
    fail((modes == MODE_RAW) & (sizes != raw_bytes), "is raw but its size is not height x width x 3")
    # FFCV looks a sample's size up by its address, so two samples may share their bytes but not overlap otherwise.
    by_address = np.lexsort((sizes, pointers))
    starts, ends = pointers[by_address], (pointers + sizes)[by_address]
    overlaps = np.zeros(num_samples, bool)
    overlaps[by_address[1:]] = (starts[1:] < ends[:-1]) & ((starts[1:] != starts[:-1]) | (ends[1:] != ends[:-1]))
    fail(overlaps, "overlaps another sample")
    return Tables(page_size, file_bytes, modes, heights, widths, labels, pointers, sizes, checksum)


def part_path(out: Path, index: int, count: int) -> Path:
    """Where part `index` (from 1) of `count` of `out` lies."""
    return out.with_name(f"{out.stem}-{index:0{len(str(count))}d}-of-{count}{out.suffix}")


def find_parts(out: Path) -> list[Path]:
    """The parts of `out` that lie beside it, in order; an empty list if there is none.

    Raises `BetonError` if some are missing, or if parts of two divisions lie there.
    """
    pattern = re.compile(re.escape(out.stem) + r"-([0-9]+)-of-([0-9]+)" + re.escape(out.suffix))
    names = [path.name for path in out.parent.iterdir()] if out.parent.is_dir() else []
    present = {(int(m[2]), int(m[1])) for name in names if (m := pattern.fullmatch(name))}
    if not present:
        return []
    counts = sorted({count for count, _ in present})
    if len(counts) > 1:
        raise BetonError(
            f"{out.parent} holds parts of {out.name} from divisions into {' and '.join(map(str, counts))}. "
            "Remove those of all divisions but one."
        )
    count = counts[0]
    # A name may promise any number of parts, so what is counted is what is there.
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
    """`beton` itself, or its parts where it is not there and they are. Raises `BetonError`, see `find_parts`."""
    return [beton] if beton.exists() else find_parts(beton) or [beton]


def parse_shard(text: str) -> tuple[int, int]:
    """Read the command line's "2/16" as (2, 16). Raises `UserError`."""
    match = re.fullmatch(r"([0-9]{1,18})/([0-9]{1,18})", text)
    if not match:
        raise UserError(f"--shard is {text}, expected i/n, for example 2/16 for the second of 16 parts.")
    return int(match[1]), int(match[2])
