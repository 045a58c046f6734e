"""The sidecar `FILE.beton.samples`: for each sample its checksum, why it was stored so, and its source file.

A NumPy `.npz` without pickles. `checksums` uint64 (N,): XXH3-64 of the sample's 24-byte metadata row followed by its
data; `reasons` uint8 (N,): index into `reason_names`; `names` uint8: the source names in sample order, as the file
system spells them, each followed by a NUL.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import xxhash

from data_prep.formats.beton import ALLOCATION, SAMPLE
from data_prep.formats.jpeg import REASONS
from data_prep.formats.manifest import ADVICE
from lowrank_vit.common.errors import BetonError
from lowrank_vit.common.files import write_whole, writing


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
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            checksums=self.checksums,
            reasons=self.reasons,
            reason_names=np.array(self.reason_names),
            names=np.frombuffer(self.names_blob, np.uint8),
        )
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


def read_sample_table(beton: Path) -> SampleTable:
    """Read and check the sidecar of `beton`. Raises `BetonError` if it is missing or damaged."""
    path = sample_table_path(beton)
    again = "Copy it from where the .beton came from, or convert the source again with `python -m data_prep`."
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            _check_size(arrays.zip, beton)
            columns = {name: arrays[name] for name in ("checksums", "reasons", "reason_names", "names")}
    except FileNotFoundError as error:
        raise BetonError(f"{path} is missing, so no sample can be checked or named. {again}") from error
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
        MemoryError,
    ) as error:
        raise BetonError(f"{path} cannot be read: {error}. {again}") from error
    reason_names = tuple(str(name) for name in columns["reason_names"].ravel())
    table = SampleTable(columns["checksums"], columns["reasons"], reason_names, columns["names"].tobytes())
    n = len(table.names)
    kinds = table.checksums.dtype == np.uint64 and table.reasons.dtype == np.uint8
    if not kinds or table.checksums.shape != (n,) or table.reasons.shape != (n,) or not reason_names:
        raise BetonError(f"{path} is damaged: its columns do not belong together. {again}")
    if n and table.reasons.max() >= len(reason_names):
        raise BetonError(f"{path} is damaged: it gives a reason that it does not name. {again}")
    return table
