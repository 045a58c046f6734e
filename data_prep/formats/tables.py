"""Safe reading of a `.beton`'s tables: header, rows and allocation table, whatever the bytes are.

For the layout see `data_prep.formats.beton`.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.formats.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    MAX_PAGE_SIZE,
    METADATA_START,
    MIN_PAGE_SIZE,
    MODE_JPEG,
    MODE_RAW,
    SAMPLE,
    TYPE_INT,
    TYPE_RGB_IMAGE,
    VERSION,
    align_to_page,
    field_names,
    stored_names,
)
from lowrank_vit.common.errors import BetonError

MAX_SAMPLES = 1 << 32
"""Most samples of a set, over all of its parts: sample ids have 32 bits."""
COLUMNS = {
    "modes": np.dtype(np.uint8),
    "heights": np.dtype(np.int32),
    "widths": np.dtype(np.int32),
    "labels": np.dtype(np.int64),
    "pointers": np.dtype(np.int64),
    "sizes": np.dtype(np.int64),
}
"""The columns of `Tables`, with a value for each sample."""
_BLOCK = 1 << 14
"""Rows that are read and checked at a time: they stay in a core's cache."""


@dataclass(frozen=True)
class Layout:
    """A `.beton`'s header, checked against the file's size."""

    path: Path
    head: bytes
    """The first `METADATA_START` bytes."""
    page_size: int
    num_samples: int
    table_start: int
    file_bytes: int

    @property
    def first_page(self) -> int:
        """The byte at which samples may begin."""
        return align_to_page(METADATA_START + self.num_samples * SAMPLE.itemsize, self.page_size)


@dataclass(frozen=True)
class Tables:
    """The tables of a `.beton` with N samples, in sample order; every pointer is known to lie inside the file."""

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


def empty_columns(num_samples: int) -> dict[str, np.ndarray]:
    """Uninitialised arrays of `COLUMNS` for `num_samples` samples."""
    return {name: np.empty(num_samples, dtype) for name, dtype in COLUMNS.items()}


def read_layout(path: str | os.PathLike[str]) -> Layout:
    """Read and check header and fields of an image + integer label `.beton`. Raises `BetonError`."""
    path = Path(path)
    with _reading(path) as file:
        return _read_layout(path, file)


def read_tables(path: str | os.PathLike[str], into: Mapping[str, np.ndarray] | None = None) -> Tables:
    """Read and check header, fields, metadata and allocation table of an image + integer label `.beton`.

    The columns are filled into the arrays of `into` (as `empty_columns` makes them, for as many samples as the file
    has), or into new ones. No sample is decoded. What a converter of ours writes, samples in the order of their
    addresses, is checked in one pass over each table, a block at a time; only another order, as FFCV's own writer
    leaves it, is sorted.
    Raises `BetonError`, which names the file and the next step, whatever the bytes are.
    """
    path = Path(path)
    with _reading(path) as file:
        layout = _read_layout(path, file)
        columns = empty_columns(layout.num_samples) if into is None else dict(into)
        if any(len(columns[name]) != layout.num_samples for name in COLUMNS):
            raise BetonError(f"{path} was changed while it was read. Try again when its conversion is finished.")
        digest = xxhash.xxh3_64(layout.head)
        is_sound = _read_rows(layout, file, columns, digest)
        is_sound &= _read_allocations(layout, file, columns, digest, is_sound=is_sound)
        if not is_sound:
            _sort_and_check(layout, file, columns)
    return Tables(layout.page_size, layout.file_bytes, **columns, index_xxh3=digest.hexdigest())


@contextmanager
def _reading(path: Path) -> Generator[FileIO]:
    """Open the file. Raises `BetonError` if it is not a regular file, and for every `OSError` inside the context."""
    try:
        if not path.is_file():
            what = "is a directory, not a .beton file" if path.is_dir() else "does not exist"
            if path.exists() and not path.is_dir():
                what = "is a device or a pipe, not a .beton file"
            raise BetonError(f"{path} {what}. Give the path of a file written by `python -m data_prep`.")
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise BetonError(f"{path} cannot be read: {error.strerror}. Check its permissions and the disk.") from error


def _read_layout(path: Path, file: FileIO) -> Layout:
    file_bytes, head = os.fstat(file.fileno()).st_size, file.read(METADATA_START)
    if len(head) < HEADER.itemsize:
        raise BetonError(
            f"{path} holds {file_bytes} bytes, too few for a .beton header. Convert it again with "
            "`python -m data_prep`."
        )
    header = np.frombuffer(head, HEADER, count=1)[0]
    _check_header(path, header, head, file_bytes)
    page_size, num_samples = int(header["page_size"]), int(header["num_samples"])
    return Layout(path, head, page_size, num_samples, int(header["alloc_table_ptr"]), file_bytes)


def _blocks(
    layout: Layout, file: FileIO, start: int, dtype: np.dtype, digest: Any
) -> Iterator[tuple[slice, np.ndarray]]:
    """Read a table of one row a sample from `start` on; yield which samples, and their rows, which do not last."""
    buffer = memoryview(bytearray(_BLOCK * dtype.itemsize))
    file.seek(start)
    for first in range(0, layout.num_samples, _BLOCK):
        last = min(first + _BLOCK, layout.num_samples)
        left = block = buffer[: (last - first) * dtype.itemsize]
        while left:
            if not (count := file.readinto(left)):
                raise BetonError(
                    f"{layout.path} became shorter while it was read. Convert it again with `python -m data_prep`."
                )
            left = left[count:]
        digest.update(block)
        yield slice(first, last), np.frombuffer(block, dtype)


def _read_rows(layout: Layout, file: FileIO, columns: dict[str, np.ndarray], digest: Any) -> bool:
    """Fill all columns but the sizes; whether no row is wrong by itself."""
    is_sound = True
    for rows, table in _blocks(layout, file, METADATA_START, SAMPLE, digest):
        modes, heights, widths, labels, pointers = (
            columns[name][rows] for name in ("modes", "heights", "widths", "labels", "pointers")
        )
        image = table["image"]
        modes[:], heights[:], widths[:], labels[:] = image["mode"], image["height"], image["width"], table["label"]
        pointers[:] = image["data_ptr"].view(np.int64)  # what is below zero then is beyond every file
        is_sound &= bool(
            modes.max() <= max(MODE_JPEG, MODE_RAW)
            and heights.min() > 0
            and widths.min() > 0
            and labels.min() >= 0
            and pointers.min() >= layout.first_page
            and pointers.max() < layout.table_start
        )
    return is_sound


def _read_allocations(
    layout: Layout, file: FileIO, columns: dict[str, np.ndarray], digest: Any, *, is_sound: bool
) -> bool:
    """Fill the sizes; whether the table is in the order of the samples, they in that of addresses, and nothing wrong.

    `is_sound`: whether the rows are, without which nothing is compared.
    """
    end_before, sample_before = 0, (0, 0)
    for rows, table in _blocks(layout, file, layout.table_start, ALLOCATION, digest):
        modes, pointers, sizes = columns["modes"][rows], columns["pointers"][rows], columns["sizes"][rows]
        sizes[:] = table["size"].view(np.int64)
        is_sound = bool(
            is_sound
            and (table["sample_id"].view(np.int64) == np.arange(rows.start, rows.stop)).all()
            and (table["ptr"].view(np.int64) == pointers).all()
            and sizes.min() > 0
            and sizes.max() <= layout.page_size
        )
        if not is_sound:
            continue
        ends = pointers + sizes
        is_free = pointers[1:] >= ends[:-1]
        if not is_free.all():  # neighbours that have all their bytes in common are no error
            is_free |= (pointers[1:] == pointers[:-1]) & (sizes[1:] == sizes[:-1])
        sample = int(pointers[0]), int(sizes[0])
        is_sound = bool(
            is_free.all()
            and (sample[0] >= end_before or sample == sample_before)
            and ends[-1] <= layout.table_start
            # Pages are powers of two, so only bits below theirs differ between the first byte and the last.
            and np.bitwise_xor(pointers, ends - 1).max() < layout.page_size
            and (modes.max() != MODE_RAW or not _raw_of_another_size(columns, rows).any())
        )
        end_before, sample_before = int(ends[-1]), (int(pointers[-1]), int(sizes[-1]))
    return is_sound


def _raw_of_another_size(columns: dict[str, np.ndarray], rows: slice) -> np.ndarray:
    raw_bytes = 3 * columns["heights"][rows].astype(np.int64) * columns["widths"][rows]
    return (columns["modes"][rows] == MODE_RAW) & (columns["sizes"][rows] != raw_bytes)


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
        not all(name.isascii() for name in stored_names(head)) or names[0] == names[1]
    ):  # FFCV tells the fields apart by them
        raise BetonError(f"{path} has fields named {names[0]!r} and {names[1]!r}: it is damaged. {again}")
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
    check_count(path, num_samples)


def _sort_and_check(layout: Layout, file: FileIO, columns: dict[str, np.ndarray]) -> None:
    """Sort the sizes by sample and check all samples at once; the error names the first one that is wrong."""
    path, num_samples, page_size = layout.path, layout.num_samples, layout.page_size

    def fail(bad: np.ndarray, what: str) -> None:
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            error = BetonError(
                f"{path}: sample {first} {what}. The file is damaged; convert it again with `python -m data_prep`."
            )
            error.sample_id = first
            raise error

    modes, heights, widths = columns["modes"], columns["heights"], columns["widths"]
    pointers = columns["pointers"].view(np.uint64)
    fail((modes != MODE_JPEG) & (modes != MODE_RAW), "has an unknown storage mode")
    fail((heights == 0) | (widths == 0), "has no pixels")
    fail(columns["labels"] < 0, "has a negative label")
    table = np.empty(num_samples, ALLOCATION)
    for rows, block in _blocks(layout, file, layout.table_start, ALLOCATION, xxhash.xxh3_64()):
        table[rows] = block
    # Allocations may stand in any order (FFCV's workers finish as they please): sort them by sample.
    table = table[np.argsort(table["sample_id"], kind="stable")]
    fail(table["sample_id"] != np.arange(num_samples, dtype=np.uint64), "is missing from the allocation table")
    fail(table["ptr"] != pointers, "lies elsewhere by the allocation table than by its metadata")
    # Compare in uint64 without adding first, so that no sum can wrap around.
    sizes, table_start = table["size"].astype(np.uint64), np.uint64(layout.table_start)
    outside = (pointers < layout.first_page) | (pointers >= table_start) | (sizes == 0)
    outside |= sizes > table_start - np.minimum(pointers, table_start)
    fail(outside, "points outside the file's pages")
    columns["sizes"][:] = sizes
    starts, sizes = columns["pointers"], columns["sizes"]
    fail(starts // page_size != (starts + sizes - 1) // page_size, "spans two pages")
    fail(_raw_of_another_size(columns, slice(None)), "is raw but its size is not height x width x 3")
    # FFCV looks a sample's size up by its address, so two samples may share their bytes but not overlap otherwise.
    by_address = np.lexsort((sizes, starts))
    starts, ends = starts[by_address], (starts + sizes)[by_address]
    overlaps = np.zeros(num_samples, bool)
    overlaps[by_address[1:]] = (starts[1:] < ends[:-1]) & ((starts[1:] != starts[:-1]) | (ends[1:] != ends[:-1]))
    fail(overlaps, "overlaps another sample")


def check_count(path: Path, num_samples: int) -> None:
    """Raise `BetonError` for a set, or a file, with more samples than there are ids."""
    if num_samples > MAX_SAMPLES:
        raise BetonError(
            f"{path} holds {num_samples:,} samples, more than the {MAX_SAMPLES:,} that a set may have. Divide the set."
        )
