"""Read and check the files and manifests of a set once, and summarise all samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.formats.beton import MODE_RAW, part_path
from data_prep.formats.jpeg import MAX_PIXELS
from data_prep.formats.sidecars import Manifest, check_index, manifest_path, read_manifest
from data_prep.formats.tables import Layout, check_count, empty_columns, read_layout, read_tables, scan_tables
from lowrank_vit.common.errors import BetonError
from lowrank_vit.common.filesystem import MappedFiles, starts_of
from lowrank_vit.common.threads import beat

LARGE = 99
"""Percent of a set's JPEGs that do not exceed `Summary.jpeg_height` and `jpeg_width`: a few may be huge."""
_BLOCK = 1 << 14
"""Samples at a time, so that no array of the set's size is made beside its columns."""


@dataclass(frozen=True)
class Summary:
    """Facts about all samples and manifests, so that no process has to walk through them."""

    num_raw: int
    label_max: int
    stored_bytes: int
    decoded_bytes: int
    """Bytes as uint8 RGB; 0 for a JPEG of more pixels than are ever decoded."""
    is_uniform: bool
    """Whether all images have one size."""
    is_ascending: bool
    """Whether samples are in the files in the order of their ids."""
    jpeg_height: int
    jpeg_width: int
    """Pixels that `LARGE` percent of the JPEGs do not exceed; 0 without any."""
    labels_xxh3: str
    images_xxh3: str
    """XXH3-64 of modes, and of sizes in pixels and in bytes."""
    manifest_part: int
    """The first part that has a manifest; -1 if none has."""
    num_manifests: int
    num_checked: int
    """Parts whose manifest has the checksum of their index."""
    files_sha256_xxh3: str
    """XXH3-64 of the SHA-256 of all files that have manifests."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Sums of the manifests' `reasons`."""


@dataclass(frozen=True)
class Index:
    """The checked index of a set of P files and N samples; its arrays cannot be written to."""

    columns: Mapping[str, np.ndarray]
    """`COLUMNS`, (N,) each, or the file's own, see `columns_in_place`; pointers are those into the files behind one
    another, see `filesystem.map_files`."""
    first_ids: np.ndarray
    """int64 (P + 1,): the first sample of each file, and N."""
    file_sizes: np.ndarray
    """int64 (P,), bytes."""
    summary: Summary
    is_mapped: bool = False
    """Whether the columns are maps of files, not memory of this process."""
    file: MappedFiles | None = None
    """The one file whose own tables are the columns; None: they are copies."""
    why_private: str = ""
    """Why each process keeps an index of its own, though the set is large; in words."""

    @cached_property
    def num_samples(self) -> int:
        """N."""
        return int(self.first_ids[-1])


def read_layouts(path: Path, parts: Sequence[Path]) -> list[Layout]:
    """The headers of all files. Raises `BetonError`, also for a set of too many samples."""
    layouts = [read_layout(part) for part in parts]
    check_count(path, sum(layout.num_samples for layout in layouts))
    return layouts


def places_of(layouts: Sequence[Layout]) -> tuple[np.ndarray, np.ndarray]:
    """`first_ids` and `file_sizes` of an `Index`."""
    counts = [0, *(layout.num_samples for layout in layouts)]
    return np.cumsum(counts, dtype=np.int64), np.array([layout.file_bytes for layout in layouts], np.int64)


def read_index(path: Path, layouts: Sequence[Layout], columns: Mapping[str, np.ndarray] | None = None) -> Index:
    """Read and check tables and manifests of all files of the set `path`, into `columns` or memory of this process.

    Raises `BetonError`: a file, or a manifest, is damaged, or they do not belong together.
    """
    first_ids, file_sizes = places_of(layouts)
    columns = empty_columns(int(first_ids[-1])) if columns is None else columns
    checksums = []
    for layout, first, start in zip(layouts, first_ids.tolist(), starts_of(file_sizes.tolist()), strict=False):
        rows = slice(first, first + layout.num_samples)
        tables = read_tables(layout.path, {name: column[rows] for name, column in columns.items()})
        if tables.file_bytes != layout.file_bytes:
            raise BetonError(f"{layout.path} was changed while it was read. Try again when its conversion is finished.")
        checksums.append(tables.index_xxh3)
        if start:
            columns["pointers"][rows] += start
        beat()
    for column in columns.values():
        column.flags.writeable = False
    of_manifests = _of_manifests(path, layouts, checksums)
    found = _Found()
    for block in blocks(columns):
        found.add(block)
    return Index(columns, first_ids, file_sizes, Summary(**found.of_samples(), **of_manifests))


def summary_in_place(path: Path, layout: Layout) -> Summary | None:
    """The summary of a set of one file whose own tables can be its index; None where they cannot, see `scan_tables`.

    Raises `BetonError`: the file, or its manifest, is damaged, or they do not belong together.
    """
    found = _Found()
    checksum = scan_tables(layout, found.add)
    if checksum is None:
        return None
    return Summary(**found.of_samples(), **_of_manifests(path, [layout], [checksum]))


def _of_manifests(path: Path, layouts: Sequence[Layout], checksums: Sequence[str]) -> dict[str, Any]:
    """The manifests' part of a `Summary`; only the first manifest and the current one are in memory."""
    first: Manifest | None = None
    manifest_part, num_manifests, num_checked = -1, 0, 0
    reasons, digest = Counter[str](), xxhash.xxh3_64()
    for part, (layout, checksum) in enumerate(zip(layouts, checksums, strict=True)):
        manifest = _read_manifest(layout, checksum)
        if manifest is None:
            continue
        if first is None:
            first, manifest_part = manifest, part
        _check_agree(path, first, manifest)
        is_named = layout.path == part_path(path, part + 1, len(layouts))  # a list may have any order
        if is_named and manifest.shard != (part + 1, len(layouts)):
            i, count = manifest.shard or (1, 1)
            raise BetonError(f"{layout.path} says that it is part {i} of {count}. It must have been renamed.")
        num_manifests += 1
        num_checked += bool(manifest.index_xxh3)
        reasons.update(manifest.reasons)
        digest.update(manifest.sha256.encode())
        beat()
    return {
        "manifest_part": manifest_part,
        "num_manifests": num_manifests,
        "num_checked": num_checked,
        "files_sha256_xxh3": digest.hexdigest(),
        "reasons": dict(reasons),
    }


def _read_manifest(layout: Layout, index_xxh3: str) -> Manifest | None:
    path = layout.path
    if not manifest_path(path).exists():
        return None
    manifest = read_manifest(path)
    if manifest.num_samples != layout.num_samples or manifest.file_bytes != layout.file_bytes:
        raise BetonError(
            f"{path} does not belong to its manifest {manifest_path(path).name}: the manifest speaks of "
            f"{manifest.num_samples} samples in {manifest.file_bytes} bytes, the file has {layout.num_samples} "
            f"samples in {layout.file_bytes} bytes. Convert it again with `python -m data_prep`."
        )
    check_index(path, index_xxh3, manifest)
    return manifest


def _check_agree(path: Path, one: Manifest, other: Manifest) -> None:
    differing = {
        "classes": one.classes != other.classes,
        "options": one.options != other.options or one.converter_version != other.converter_version,
        "lists of files": one.whole_list_sha256 != other.whole_list_sha256,
    }
    if any(differing.values()):
        what = next(name for name, differs in differing.items() if differs)
        raise BetonError(f"{path}: its parts have different {what}. Convert all parts from one source.")


def blocks(columns: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Views of all columns, `_BLOCK` samples at a time."""
    for first in range(0, len(columns["modes"]), _BLOCK):
        yield {name: column[first : first + _BLOCK] for name, column in columns.items()}


def decoded_bytes(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """int64 (N,): bytes of each image as uint8 RGB; 0 for a JPEG of more pixels than are ever decoded."""
    pixels = columns["heights"].astype(np.int64) * columns["widths"]
    pixels[(pixels > MAX_PIXELS) & (columns["modes"] != MODE_RAW)] = 0
    return 3 * pixels


class _Found:
    """What all samples say together, a block at a time."""

    def __init__(self) -> None:
        self._num_raw, self._label_max, self._stored, self._decoded, self._before = 0, 0, 0, 0, 0
        self._size: tuple[int, int] | None = None  # of the first image
        self._is_uniform = self._is_ascending = True
        self._counts = {"heights": np.zeros(1 << 16, np.int64), "widths": np.zeros(1 << 16, np.int64)}
        self._digests = {name: xxhash.xxh3_64() for name in ("labels", "heights", "widths", "modes", "sizes")}

    def add(self, block: Mapping[str, np.ndarray]) -> None:
        """The next samples, in the dtypes of `COLUMNS`."""
        heights, widths, pointers = block["heights"], block["widths"], block["pointers"]
        for name, digest in self._digests.items():
            digest.update(block[name].data)
        is_raw = block["modes"] == MODE_RAW
        raw = int(np.count_nonzero(is_raw))
        self._num_raw, self._label_max = self._num_raw + raw, max(self._label_max, int(block["labels"].max()))
        self._stored += int(block["sizes"].sum())
        self._decoded += int(decoded_bytes(block).sum())
        self._size = self._size or (int(heights[0]), int(widths[0]))
        if self._is_uniform:
            self._is_uniform = bool((heights == self._size[0]).all() and (widths == self._size[1]).all())
        if self._is_ascending:
            self._is_ascending = bool(pointers[0] >= self._before and (pointers[1:] >= pointers[:-1]).all())
        self._before = int(pointers[-1])
        if raw == len(is_raw):
            return
        for name, count in self._counts.items():
            found = np.bincount(block[name][~is_raw] if raw else block[name])
            count[: len(found)] += found

    def of_samples(self) -> dict[str, Any]:
        """Those parts of a `Summary` that no manifest tells."""
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        return {
            "num_raw": self._num_raw,
            "label_max": self._label_max,
            "stored_bytes": self._stored,
            "decoded_bytes": self._decoded,
            "is_uniform": self._is_uniform,
            "is_ascending": self._is_ascending,
            "jpeg_height": _percentile(self._counts["heights"]),
            "jpeg_width": _percentile(self._counts["widths"]),
            "labels_xxh3": digests.pop("labels"),
            "images_xxh3": " ".join(digests.values()),
        }


def _percentile(counts: np.ndarray) -> int:
    """What `np.percentile(values, LARGE, method="higher")` is of values that occur so often; 0 of none."""
    total = int(counts.sum())
    place = -(-(total - 1) * LARGE // 100)
    return int(np.searchsorted(np.cumsum(counts), place, side="right")) if total else 0
