"""The table of a `.beton`'s samples, `FILE.beton.samples` beside it: each one's source file and checksum.

It holds for each sample its checksum, why it was stored so, and its source file: a NumPy `.npz` without pickles.
`checksums` uint64 (N,): XXH3-64 of the sample's 24-byte metadata row followed by its data; `reasons` uint8 (N,): index
into `reason_names`; `names` uint8: the source names in sample order, as the file system spells them, each followed by a
NUL; `name_starts` uint64: the byte in `names` at which every 256th name begins. With it one name is found without the
others, since `names` is stored uncompressed. (Earlier versions compressed `names`, and had no `name_starts`.)
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
import xxhash

from data_prep.formats.beton import ALLOCATION, SAMPLE
from data_prep.formats.jpeg import REASONS
from data_prep.formats.sidecars import ADVICE
from lowrank_vit.common.errors import BetonError
from lowrank_vit.common.files import write_whole, writing

_NAMES_STEP, _CHUNK_BYTES = 256, 1 << 15
"""Names for each entry of `name_starts`, and bytes that are read at a time: about as many names."""


def sample_table_path(beton: Path) -> Path:
    """FILE.beton -> FILE.beton.samples."""
    return beton.with_name(beton.name + ".samples")


def checksum(row: bytes, data: bytes | memoryview) -> int:
    """XXH3-64 of a sample's metadata row and data (https://xxhash.com)."""
    digest = xxhash.xxh3_64(row)
    digest.update(data)
    return digest.intdigest()


@dataclass(frozen=True)
class SampleTable:
    """One entry a sample, in sample order."""

    checksums: np.ndarray
    """uint64 (N,)."""
    reasons: np.ndarray
    """uint8 (N,), index into `reason_names`."""
    reason_names: tuple[str, ...]
    names_blob: bytes

    @classmethod
    def of(cls, checksums: np.ndarray, reasons: np.ndarray, names: Iterable[str]) -> SampleTable:
        """A table of N samples; `reasons` index `data_prep.formats.jpeg.REASONS`."""
        blob = bytearray()
        for name in names:
            blob += os.fsencode(name) + b"\0"
        return cls(checksums, reasons, REASONS, bytes(blob))

    @cached_property
    def names(self) -> list[str]:
        """The source file of each sample, relative to the source."""
        return [os.fsdecode(name) for name in self.names_blob.split(b"\0")[:-1]]

    def to_bytes(self) -> bytes:
        """The sidecar's content; equal tables give equal bytes."""
        names = np.frombuffer(self.names_blob, np.uint8)
        ends = np.flatnonzero(names == 0)
        columns = {
            "checksums": self.checksums,
            "reasons": self.reasons,
            "reason_names": np.array(self.reason_names),
            "name_starts": np.concatenate([[0], ends[_NAMES_STEP - 1 :: _NAMES_STEP] + 1]).astype(np.uint64),
            "names": names,
        }
        buffer = io.BytesIO()
        with ZipFile(buffer, "w") as archive:
            for name, column in columns.items():
                member = ZipInfo(f"{name}.npy")
                member.compress_type = ZIP_STORED if name == "names" else ZIP_DEFLATED
                with archive.open(member, "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, column, allow_pickle=False)
        return buffer.getvalue()


def write_sample_table(path: Path, content: bytes) -> None:
    """Write the sidecar to `path` atomically. Raises `UserError` if it cannot be written."""
    with writing(path, ADVICE):
        write_whole(path, content)


def _check_size(archive: ZipFile, beton: Path) -> None:
    """Raise `ValueError` if the table unpacks to more than a `.beton` of this size can have samples for."""
    entry_bytes, path_bytes = 9, 4096
    samples = beton.stat().st_size // (SAMPLE.itemsize + ALLOCATION.itemsize)
    if sum(member.file_size for member in archive.infolist()) > (1 << 20) + samples * (entry_bytes + path_bytes):
        raise ValueError("it unpacks to more than its .beton can have names for")


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """Turn any error of a missing or damaged table into a `BetonError`."""
    again = "Copy it from where the .beton came from, or convert the source again with `python -m data_prep`."
    try:
        yield
    except FileNotFoundError as error:
        raise BetonError(f"{path} is missing, so no sample can be checked or named. {again}") from error
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        OverflowError,
        EOFError,
        BadZipFile,
        zlib.error,
        struct.error,
        NotImplementedError,
        RuntimeError,
        MemoryError,
    ) as error:
        raise BetonError(f"{path} cannot be read: {error}. {again}") from error


def read_sample_table(beton: Path) -> SampleTable:
    """Read and check the sidecar of `beton`. Raises `BetonError` if it is missing or damaged."""
    path = sample_table_path(beton)
    again = "Copy it from where the .beton came from, or convert the source again with `python -m data_prep`."
    with _reading(path), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        _check_size(arrays.zip, beton)
        columns = {name: arrays[name] for name in ("checksums", "reasons", "reason_names", "names")}
    reason_names = tuple(str(name) for name in columns["reason_names"].ravel())
    table = SampleTable(columns["checksums"], columns["reasons"], reason_names, columns["names"].tobytes())
    n = table.names_blob.count(b"\0")
    kinds = table.checksums.dtype == np.uint64 and table.reasons.dtype == np.uint8
    if not kinds or table.checksums.shape != (n,) or table.reasons.shape != (n,) or not reason_names:
        raise BetonError(f"{path} is damaged: its columns do not belong together. {again}")
    if n and table.reasons.max() >= len(reason_names):
        raise BetonError(f"{path} is damaged: it gives a reason that it does not name. {again}")
    return table


def read_sample_name(beton: Path, sample_id: int) -> str:
    """The source file of one sample, by its number in the file, without reading the others' into memory.

    A table of an earlier version, with compressed names, is unpacked up to that name: a second for ten million names.
    Raises `BetonError` if the table is missing or damaged, or has no such sample.
    """
    path = sample_table_path(beton)
    with _reading(path), path.open("rb") as file, ZipFile(file) as archive:
        _check_size(archive, beton)
        member, skipped, start = archive.getinfo("names.npy"), sample_id, 0
        if member.compress_type == ZIP_STORED and "name_starts.npy" in archive.namelist():
            with archive.open("name_starts.npy") as column:
                starts = np.lib.format.read_array(column, allow_pickle=False)
            start, skipped = int(starts.ravel()[sample_id // _NAMES_STEP]), sample_id % _NAMES_STEP
            file.seek(member.header_offset + 26)  # after a local header of 30 bytes, a name and an extra field
            file.seek(member.header_offset + 30 + sum(struct.unpack("<2H", file.read(4))))
            return _name_from(file, start, skipped)
        with archive.open(member) as names:
            return _name_from(names, start, skipped)


def _name_from(column: IO[bytes], start: int, skipped: int) -> str:
    """The name after `skipped` others, counted from byte `start` of a stored array of names."""
    if np.lib.format.read_magic(column) != (1, 0):
        raise ValueError("its names have another form")
    (length,), _, dtype = np.lib.format.read_array_header_1_0(column)
    if dtype != np.uint8 or not 0 <= start <= length:
        raise ValueError("its names have another form")
    if start:
        column.seek(start, os.SEEK_CUR)
    left, rest = length - start, b""
    while left:
        chunk = column.read(min(left, _CHUNK_BYTES))
        if not chunk:
            break
        left -= len(chunk)
        if (count := chunk.count(b"\0")) <= skipped:
            skipped -= count
            rest = (rest if count == 0 else b"") + chunk[chunk.rfind(b"\0") + 1 :]
            continue
        return os.fsdecode((rest + chunk).split(b"\0", skipped + 1)[skipped])
    raise ValueError("it has no name for that sample")
