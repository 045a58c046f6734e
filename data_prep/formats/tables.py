"""Safe reading of a `.beton`'s tables: header, rows and allocation table, whatever the bytes are.

For the layout see `data_prep.formats.beton`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping
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
    addresses, is checked a block at a time; only another order, as FFCV's own writer leaves it, is sorted.
    Raises `BetonError`, which names the file and the next step, whatever the bytes are.
    """
    path = Path(path)
    with _reading(path) as file:
        layout = _read_layout(path, file)
        columns = empty_columns(layout.num_samples) if into is None else dict(into)
        if any(len(columns[name]) != layout.num_samples for name in COLUMNS):
            raise BetonError(f"{path} was changed while it was read. Try again when its conversion is finished.")
        digest = xxhash.xxh3_64(layout.head)
        *_, is_sound = (is_sound for _, is_sound in _read_blocks(layout, file, columns, digest))
        if not is_sound:
            _sort_and_check(layout, file, columns)
    return Tables(layout.page_size, layout.file_bytes, **columns, index_xxh3=digest.hexdigest())


def scan_tables(layout: Layout, take: Callable[[Mapping[str, np.ndarray]], None]) -> str | None:
    """Read and check as `read_tables`, but keep nothing: `take` is given `COLUMNS`, a block of samples at a time.

    Returns `index_checksum` of the file; None if something is wrong, which `read_tables` names, or if tables and
    samples are not both in the order of the addresses, which `columns_in_place` needs. Raises `BetonError` for a file
    that cannot be read, or that is not the one of `layout`.
    """
    with _reading(layout.path) as file:
        if _read_layout(layout.path, file) != layout:
            raise BetonError(f"{layout.path} was changed while it was read. Try again when its conversion is finished.")
        digest, columns = xxhash.xxh3_64(layout.head), empty_columns(min(_BLOCK, layout.num_samples))
        for block, is_sound in _read_blocks(layout, file, columns, digest):
            if not is_sound:
                return None
            take(block)
    return digest.hexdigest()


def columns_in_place(file_bytes: np.ndarray, num_samples: int, table_start: int) -> dict[str, np.ndarray]:
    """`COLUMNS` of a file as views of its `file_bytes`, uint8, such as a map: nothing is copied.

    Heights and widths are uint16, and no column is contiguous or aligned. `scan_tables` must have returned a checksum
    for the file.
    """

    def table(start: int, dtype: np.dtype) -> np.ndarray:
        return file_bytes[start : start + num_samples * dtype.itemsize].view(dtype)

    samples = table(METADATA_START, SAMPLE)
    image, sizes = samples["image"], table(table_start, ALLOCATION)["size"]
    return {
        "modes": image["mode"],
        "heights": image["height"],
        "widths": image["width"],
        "labels": samples["label"],
        "pointers": image["data_ptr"].view(np.int64),
        "sizes": sizes.view(np.int64),
    }


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
    layout: Layout, file: FileIO, start: int, dtype: np.dtype, digest: Any = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Read a table with a row per sample from byte `start` on; yield which samples, and their rows, until the next."""
    buffer = memoryview(bytearray(_BLOCK * dtype.itemsize))
    for first in range(0, layout.num_samples, _BLOCK):
        last = min(first + _BLOCK, layout.num_samples)
        left = block = buffer[: (last - first) * dtype.itemsize]
        at = start + first * dtype.itemsize
        while left:
            if not (count := os.preadv(file.fileno(), [left], at)):
                raise BetonError(
                    f"{layout.path} became shorter while it was read. Convert it again with `python -m data_prep`."
                )
            left, at = left[count:], at + count
        if digest is not None:
            digest.update(block)
        yield slice(first, last), np.frombuffer(block, dtype)


def _read_blocks(
    layout: Layout, file: FileIO, columns: Mapping[str, np.ndarray], digest: Any
) -> Iterator[tuple[dict[str, np.ndarray], bool]]:
    """Fill all columns, a block at a time; yield each block, and whether all is valid and in order so far.

    `columns`: of all samples, or of one block, to be filled with each in turn. Sizes are those of the samples only
    where nothing was wrong. `digest` is given rows and allocation table.
    """
    # The checksum takes all rows before the table; reading them again costs less than keeping what is compared.
    for _ in _blocks(layout, file, METADATA_START, SAMPLE, digest):
        pass
    rows_read = _blocks(layout, file, METADATA_START, SAMPLE)
    table_read = _blocks(layout, file, layout.table_start, ALLOCATION, digest)
    of_all, is_sound, before = len(columns["modes"]) == layout.num_samples, True, (0, 0)
    for (rows, samples), (_, table) in zip(rows_read, table_read, strict=True):
        place = rows if of_all else slice(0, rows.stop - rows.start)
        block = {name: column[place] for name, column in columns.items()}
        image = samples["image"]
        block["modes"][:], block["labels"][:] = image["mode"], samples["label"]
        block["heights"][:], block["widths"][:] = image["height"], image["width"]
        block["pointers"][:] = image["data_ptr"].view(np.int64)  # a negative one is beyond every file
        block["sizes"][:] = table["size"].view(np.int64)
        is_sound = is_sound and _is_sound(layout, rows.start, block, table, before)
        before = int(block["pointers"][-1]), int(block["sizes"][-1])
        yield block, is_sound


def _is_sound(
    layout: Layout, first: int, block: Mapping[str, np.ndarray], table: np.ndarray, before: tuple[int, int]
) -> bool:
    """Whether samples from `first` on are valid, and in the order of their addresses.

    `table`: their rows of the allocation table; `before`: pointer and size of the sample before them.
    """
    pointers, sizes = block["pointers"], block["sizes"]
    if not (
        block["modes"].max() <= max(MODE_JPEG, MODE_RAW)
        and block["heights"].min() > 0
        and block["widths"].min() > 0
        and block["labels"].min() >= 0
        and pointers.min() >= layout.first_page
        and pointers.max() < layout.table_start
        and (table["sample_id"].view(np.int64) == np.arange(first, first + len(table))).all()
        and (table["ptr"].view(np.int64) == pointers).all()
        and sizes.min() > 0
        and sizes.max() <= layout.page_size
    ):
        return False
    ends = pointers + sizes
    is_free = pointers[1:] >= ends[:-1]
    if not is_free.all():  # neighbours may share all their bytes
        is_free |= (pointers[1:] == pointers[:-1]) & (sizes[1:] == sizes[:-1])
    sample = int(pointers[0]), int(sizes[0])
    return bool(
        is_free.all()
        and (sample[0] >= sum(before) or sample == before)
        and ends[-1] <= layout.table_start
        # Pages are powers of two, so only bits below theirs differ between the first byte and the last.
        and np.bitwise_xor(pointers, ends - 1).max() < layout.page_size
        and (block["modes"].max() != MODE_RAW or not _raw_of_another_size(block).any())
    )


def _raw_of_another_size(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    raw_bytes = 3 * columns["heights"].astype(np.int64) * columns["widths"]
    return (columns["modes"] == MODE_RAW) & (columns["sizes"] != raw_bytes)


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
    for rows, block in _blocks(layout, file, layout.table_start, ALLOCATION):
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
    fail(_raw_of_another_size(columns), "is raw but its size is not height x width x 3")
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
