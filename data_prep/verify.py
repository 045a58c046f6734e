"""Check a `.beton` against its sidecars, down to the byte, and name the damaged samples and their source files."""

from __future__ import annotations

import hashlib
import mmap
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.formats import jpeg_segments, turbojpeg
from data_prep.formats.beton import METADATA_START, MODE_JPEG, SAMPLE
from data_prep.formats.sample_table import SampleTable, checksum, read_sample_table, sample_table_path
from data_prep.formats.sidecars import (
    Manifest,
    add_index_checksum,
    check_index,
    doubt_line,
    manifest_path,
    read_manifest,
)
from data_prep.formats.tables import Tables, read_tables
from data_prep.writing.workers import ConversionProgress, map_ordered
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.common.filesystem import map_file
from lowrank_vit.common.terminal import one_line

DAMAGED_SHOWN = 100


@dataclass(frozen=True)
class Verified:
    """A file in which nothing wrong was found."""

    beton: Path
    num_samples: int
    file_bytes: int
    decoded: bool
    """Whether every sample was decoded too."""
    note: str = ""
    """Sentences on a manifest of an earlier version: whether it was completed, and which doubts remain."""


def verify(beton: Path, *, full: bool = False, workers: int = 1, progress: bool = False) -> Verified:
    """Check tables, sidecars and the SHA-256 of `beton`; with `full` decode every sample in `workers` threads too.

    Any changed byte is found. A manifest of an earlier version gets the checksum of the index. Raises `BetonError`,
    which lists every damaged sample with its source file; if no sample is, it says where else the damage lies.
    """
    try:
        tables = read_tables(beton)
    except BetonError as error:
        raise BetonError(f"{error}{_source_of(beton, error.sample_id)}") from error
    manifest = read_manifest(beton)
    names = _read_names(beton, manifest, len(tables.labels))
    if manifest.num_samples != len(tables.labels) or manifest.file_bytes != tables.file_bytes:
        raise BetonError(
            f"{beton} does not belong to {manifest_path(beton).name}, which describes {manifest.num_samples:,} samples "
            f"in {manifest.file_bytes:,} bytes; the file has {len(tables.labels):,} in {tables.file_bytes:,}. "
            "Copy both again, or convert the source again."
        )
    try:
        with closing(map_file(beton)) as data:
            if hashlib.sha256(data).hexdigest() != manifest.sha256:
                raise BetonError(_describe_damage(beton, tables, names, manifest, data))
            if full:
                _decode_all(beton, tables, names, manifest, data, workers, progress)
    except OSError as error:
        raise BetonError(f"{beton} cannot be read: {error.strerror}. Check its permissions and the disk.") from error
    check_index(beton, tables.index_xxh3, manifest)
    note = "" if manifest.index_xxh3 else _add_index_checksum(beton, tables.index_xxh3)
    notes = filter(None, (note, doubt_line(manifest.reasons)))
    return Verified(beton, manifest.num_samples, tables.file_bytes, full, " ".join(notes))


def _add_index_checksum(beton: Path, index_xxh3: str) -> str:
    try:
        add_index_checksum(beton, index_xxh3)
    except UserError as error:
        return f"The checksum of its index could not be added to the manifest: {error}"
    return "A checksum of its index was added to its manifest, so that opening verifies it."


def _source_of(beton: Path, sample_id: int | None) -> str:
    """A sentence that names the source file of a sample; empty if it is unknown."""
    if sample_id is None:
        return ""
    with suppress(BetonError, IndexError):
        source = Path(read_manifest(beton).source) / read_sample_table(beton).names[sample_id]
        return f" The sample was made from {source}."
    return ""


def _read_names(beton: Path, manifest: Manifest, num_samples: int) -> SampleTable:
    names = read_sample_table(beton)
    path = sample_table_path(beton)
    if manifest.sample_table_sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != manifest.sample_table_sha256:
        raise BetonError(f"{path} was changed after the conversion: its SHA-256 is not the manifest's. Copy it again.")
    if len(names.names) != num_samples:
        raise BetonError(f"{path} lists {len(names.names):,} samples, but {beton.name} holds {num_samples:,}.")
    return names


def _describe_damage(beton: Path, tables: Tables, names: SampleTable, manifest: Manifest, data: mmap.mmap) -> str:
    row_bytes = SAMPLE.itemsize
    damaged = []
    with memoryview(data) as view:
        for i, (pointer, size) in enumerate(zip(tables.pointers.tolist(), tables.sizes.tolist(), strict=True)):
            row = bytes(view[METADATA_START + i * row_bytes :][:row_bytes])
            with view[pointer : pointer + size] as stored:
                if checksum(row, stored) != names.checksums[i]:
                    damaged.append((i, "its bytes are not those that were written"))
    if damaged:
        return damaged_message(beton, damaged, names, manifest)
    return (
        f"{beton} was changed after the conversion, but its samples are whole: the damage lies in its header, in its "
        "field descriptors or in the padding between pages. Copy it again, or convert the source again."
    )


def damaged_message(beton: Path, damaged: list[tuple[int, str]], names: SampleTable, manifest: Manifest) -> str:
    """A paragraph that lists `(sample id, what is wrong)` with the source files."""
    lines = [
        f"  sample {i} (from {one_line(Path(manifest.source) / names.names[i])}): {what}"
        for i, what in damaged[:DAMAGED_SHOWN]
    ]
    if len(damaged) > DAMAGED_SHOWN:
        lines.append(f"  ... and {len(damaged) - DAMAGED_SHOWN:,} more")
    what = f"{beton}: {len(damaged):,} of {len(names.names):,} samples are damaged:"
    return "\n".join([what, *lines, "Copy the file again, or convert the source again."])


def _decode_all(
    beton: Path,
    tables: Tables,
    names: SampleTable,
    manifest: Manifest,
    data: mmap.mmap,
    workers: int,
    progress: bool,
) -> None:
    ids = np.flatnonzero(tables.modes == MODE_JPEG).tolist()  # raw samples: `read_tables` has checked their sizes
    damaged = []
    with ConversionProgress(len(ids), progress) as bar:
        bar.describe("decode")
        with closing(map_ordered(partial(_why_bad, tables, data), ids, workers)) as results:
            for i, why in zip(ids, results, strict=True):
                if why:
                    damaged.append((i, why))
                bar.advance(int(tables.sizes[i]), {}, len(damaged))
    if damaged:
        raise BetonError(damaged_message(beton, damaged, names, manifest))


def _why_bad(tables: Tables, data: mmap.mmap, sample_id: int) -> str:
    """A description of what is wrong with a stored JPEG; empty if nothing is."""
    pointer, size = int(tables.pointers[sample_id]), int(tables.sizes[sample_id])
    stored = data[pointer : pointer + size]
    header = jpeg_segments.read_header(stored)
    height, width = int(tables.heights[sample_id]), int(tables.widths[sample_id])
    if header is None or header.components != 3:
        return "it is not an RGB JPEG"
    if (header.height, header.width) != (height, width):
        return f"it has {header.width} x {header.height} pixels, not {width} x {height}"
    try:
        turbojpeg.check(stored, width, height)
    except turbojpeg.JpegDataError as error:
        return f"it does not decode: {error}"
    return ""
