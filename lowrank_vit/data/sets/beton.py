"""Open a `.beton`, or its parts: its samples' sizes, labels and addresses, without decoding any."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.filesize import decimal as size_in_words

from data_prep.formats import turbojpeg
from data_prep.formats.beton import MODE_RAW, find_parts
from data_prep.formats.jpeg import MAX_PIXELS
from data_prep.formats.sample_table import read_sample_name
from data_prep.formats.sidecars import read_manifest
from lowrank_vit.common.arguments import Range, check_type, check_whole
from lowrank_vit.common.errors import BetonError
from lowrank_vit.common.filesystem import MappedFiles, can_be_read, map_files, read_through
from lowrank_vit.common.terminal import one_line
from lowrank_vit.data.decode.jpeg import has_too_many_scans
from lowrank_vit.data.sets.index import blocks
from lowrank_vit.data.sets.published import open_index

_MUCH_BYTES = 1 << 26
"""If each process keeps at least so much of an index, a line says so."""
LABELS_UNNAMED = 1 << 16
"""Without a manifest labels must be below this, or below the number of samples if that is more."""


class Beton:
    """A safely opened `.beton` of N images with integer labels, in one file or in parts.

    If `path` FILE.beton does not exist, its parts FILE-1-of-n.beton and so on are opened; a list of files is taken as
    parts in that order. Sample ids run through the parts, so that they are those of the undivided file.

    Opening checks the header, the metadata and the allocation table, and the manifest if one lies beside the file, with
    the checksum of the index and the labels; anything wrong is a `BetonError` that names the file and the next step.
    Of a large set one process of a node does that and publishes what it found, which the others take (`published.py`).
    Arrays are read-only. Samples are memory-mapped, not read.

    Example:
        >>> beton = Beton("train.beton")
        >>> beton.num_samples, beton.classes, beton.labels.dtype, beton.heights[:3].tolist()
        (20, ['cat', 'dog'], dtype('int64'), [40, 41, 42])
    """

    def __init__(self, path: str | os.PathLike[str] | list[Path]) -> None:
        check_type((str, os.PathLike, list), "a path, or a list of the paths of parts", path=path)
        self._by_name = not isinstance(path, list)
        if isinstance(path, list):
            check_type(Path, "a path, or a list of the paths of parts", path=path[0] if path else None)
            self.path, self.parts = path[0], path
        else:
            self.path = Path(path)
            self.parts = find_parts(self.path) or [self.path]
            if self.parts != [self.path] and self.path.exists():
                raise BetonError(
                    f"{self.path} lies beside parts of the same name, such as {self.parts[0].name}. "
                    "Remove the one or the others."
                )
        self._index = open_index(self.path, self.parts)
        columns, summary = self._index.columns, self._index.summary
        self.num_samples: int = self._index.num_samples
        self.sides = columns["heights"], columns["widths"]
        """Heights and widths as plans take them: int32 or, not contiguous, uint16 (N,), pixels."""
        self.modes = columns["modes"]
        """uint8 (N,): MODE_JPEG or MODE_RAW."""
        self.sizes = columns["sizes"]
        """int64 (N,), bytes."""
        self.pointers = columns["pointers"]
        """int64 (N,): the first byte of each sample in `bytes`."""
        self.num_jpeg = self.num_samples - summary.num_raw
        self.is_raw = self.num_jpeg == 0
        self.is_uniform = summary.is_uniform
        """Whether all images have one size."""
        self.is_ascending = summary.is_ascending
        """Whether samples are in `bytes` in the order of their ids."""
        self.stored_bytes, self.decoded_bytes = summary.stored_bytes, summary.decoded_bytes
        """Bytes of all samples, as stored and as decoded uint8 RGB."""
        self.large_sides = summary.jpeg_height, summary.jpeg_width
        """Height and width, pixels, that 99 percent of the JPEGs do not exceed each; 0 without any."""
        self.reasons = summary.reasons
        """How many samples were stored for which reason, by the manifests of all parts."""
        self.manifest = read_manifest(self.parts[summary.manifest_part]) if summary.num_manifests else None
        """The manifest of the first part that has one; those of the others were compared with it."""
        self.classes = list(self.manifest.classes) if self.manifest else None
        """Class names in label order, or None without a manifest."""
        self._outputs: np.ndarray | None = None  # by label, see `relabel`
        if self._index.file is not None:
            self._mapped = self._index.file
        self._looked_at, self._contradicting = np.zeros(-(-self.num_samples // 8), np.uint8), set[int]()
        self._check_labels()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy opens the files anew: the arrays may be maps of them, and a pickle would hold all samples."""
        source = self.path if self._by_name else self.parts
        return type(self)._opened_again, (source, self._outputs, self.classes, self.digests())

    @classmethod
    def _opened_again(
        cls,
        source: Path | list[Path],
        outputs: np.ndarray | None,
        classes: list[str] | None,
        digests: tuple[str, str],
    ) -> Beton:
        """A copy. Raises `BetonError` if the files are gone, or hold other images or labels by now."""
        beton = cls(source)
        beton._outputs, beton.classes = outputs, classes
        if beton.digests() != digests:
            raise BetonError(f"{beton.path} is another set than the one that was copied. Restore it, or open it again.")
        return beton

    def _check_labels(self) -> None:
        # Without a manifest any label is possible, but not one that needs a head of gigabytes.
        limit = len(self.classes) if self.classes else max(self.num_samples, LABELS_UNNAMED)
        if self._index.summary.label_max < limit:
            return
        labels = self.labels_of(slice(None))
        first = int(np.flatnonzero(labels >= limit)[0])
        part = self.parts[self._part_of(first)]
        known = (
            f"its manifest names {limit} classes"
            if self.classes
            else f"there is no manifest, and {self.num_samples:,} samples cannot have that many classes"
        )
        raise BetonError(
            f"{self.describe(first)} has the label {labels[first]}, but {known}. The file is damaged, or its "
            f"manifest is another's: see `python -m data_prep verify {part}`, or convert it again."
        )

    @property
    def unverified(self) -> str:
        """A line about an index that no checksum vouches for; empty if all parts have one."""
        if self._index.summary.num_checked == len(self.parts):
            return ""
        if not self.manifest:
            return f"{self.path.name}: index not verified, since no manifest lies beside it"
        return (
            f"{self.path.name}: index not verified, since its manifest is of an earlier version; "
            f"`python -m data_prep verify {self.path}` checks it once and adds the checksum"
        )

    @property
    def unshared(self) -> str:
        """A line if each process keeps a large index of its own; else empty."""
        size = sum(column.nbytes for column in self._index.columns.values())
        if not (why := self._index.why_private) or size < _MUCH_BYTES:
            return ""
        return (
            f"{self.path.name}: each process keeps {size_in_words(size)} of index, since it could not be written "
            f"({why}). Make room, or let the set's folder be written to"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes by the manifest, else by the greatest label."""
        if self.classes:
            return len(self.classes)
        return 1 + (self._index.summary.label_max if self._outputs is None else int(self.labels.max()))

    def relabel(self, labels: Sequence[int], classes: Sequence[str] | None) -> None:
        """Replace each label by `labels[label]`, a label of `classes`; to be called before a loader is opened."""
        outputs = np.asarray(labels, np.int64)
        if len(outputs) <= self._index.summary.label_max or not np.array_equal(outputs, np.arange(len(outputs))):
            self._outputs = outputs if self._outputs is None else outputs[self._outputs]
            self.__dict__.pop("labels", None)
        self.classes = list(classes) if classes is not None else self.classes

    @cached_property
    def heights(self) -> np.ndarray:
        """int32 (N,), pixels; a copy where a large set is one file, see `sides_of`."""
        return _whole(self._column("heights"), np.int32)

    @cached_property
    def widths(self) -> np.ndarray:
        """int32 (N,), pixels; a copy where a large set is one file, see `sides_of`."""
        return _whole(self._column("widths"), np.int32)

    def sides_of(self, ids: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths of some samples, int64 (B,) each, pixels."""
        heights, widths = self.sides
        return heights[ids].astype(np.int64), widths[ids].astype(np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (N,); a copy where labels are not those of the file, or a large set is one file. See `labels_of`."""
        return _whole(self.labels_of(slice(None)), np.int64)

    def _column(self, name: str) -> np.ndarray:
        """A column that is about to be read as a whole."""
        column = self._index.columns[name]
        if self._index.is_mapped:
            read_through(column)
        return column

    def labels_of(self, ids: np.ndarray | slice) -> np.ndarray:
        """int64 (B,): the labels of some samples. For a slice the whole column is brought into memory first."""
        labels = (self._column("labels") if isinstance(ids, slice) else self._index.columns["labels"])[ids]
        return labels if self._outputs is None else self._outputs[labels]

    def digests(self) -> tuple[str, str]:
        """XXH3-64 of all labels, and of everything about the images in manifests and index except their addresses."""
        summary, labels = self._index.summary, xxhash.xxh3_64()
        for told in (summary.labels_xxh3.encode(), b"" if self._outputs is None else self._outputs.data):
            labels.update(told)
        return labels.hexdigest(), f"{summary.files_sha256_xxh3}{summary.images_xxh3}"

    def blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """The columns, a block of samples at a time, for computations over all samples."""
        return blocks({name: self._column(name) for name in self._index.columns})

    @cached_property
    def _mapped(self) -> MappedFiles:
        try:
            return map_files(self.parts, self._index.file_sizes.tolist())
        except OSError as error:
            raise BetonError(
                f"{self.path} cannot be mapped into memory: {error.strerror or error}. Its file system may not be able "
                "to: copy it to a local disk, which --stage-dir does."
            ) from error

    def check_unchanged(self, ids: np.ndarray | None = None) -> None:
        """Raise `BetonError` if a mapped file has lost bytes: reading them would kill the process (SIGBUS).

        Of the files that hold the samples `ids`, int64 (B,), or of all. Also if a file whose own tables are the index
        was written to, so that they now place these samples outside it. A file that is merely removed or replaced by
        another stays readable through the map. No file is kept open for this, since a set may have thousands.
        """
        if "_mapped" not in self.__dict__:
            return
        one = len(self.parts) == 1
        parts = range(len(self.parts)) if ids is None or one else np.unique(self._parts_of(ids)).tolist()
        for part in parts:
            self._check_size(part)
        if ids is not None and self._index.file is not None and not self._is_possible(ids):
            raise BetonError(f"{self.path} was written to while it was open. Restore it and resume.")

    def _check_size(self, part: int) -> None:
        size, now = int(self._index.file_sizes[part]), self._size_now(part)
        if now < size:
            shown = f"from {size:,} to {now:,} bytes" if now >= 0 else f"from {size:,} bytes"
            raise BetonError(f"{self.parts[part]} was cut {shown} while it was open. Restore it and resume.")

    def _is_possible(self, ids: np.ndarray) -> bool:
        """Whether samples lie in the file, have pixels, and labels that are known."""
        (heights, widths), pointers, sizes = self.sides_of(ids), self.pointers[ids], self.sizes[ids]
        labels, is_raw = self._index.columns["labels"][ids], self.modes[ids] == MODE_RAW
        is_inside = (pointers >= 0) & (sizes > 0) & (sizes <= len(self.bytes)) & (pointers <= len(self.bytes) - sizes)
        is_inside &= (heights > 0) & (widths > 0) & (labels >= 0) & (labels <= self._index.summary.label_max)
        return bool((is_inside & (~is_raw | (sizes == 3 * heights * widths))).all())

    def _size_now(self, part: int) -> int:
        """Bytes of a mapped file; -1 if it is no longer under its name and was cut."""
        with suppress(OSError):
            found = self.parts[part].stat()
            if (found.st_dev, found.st_ino) == self._mapped.ids[part]:
                return found.st_size
        size, start = int(self._index.file_sizes[part]), int(self._mapped.starts[part])
        return size if can_be_read(self.bytes[start + size - 1 : start + size].data) else -1

    @property
    def bytes(self) -> np.ndarray:
        """uint8 (bytes of all parts,): the whole set, read-only, mapped on first use."""
        return self._mapped.bytes

    def sample(self, sample_id: int) -> np.ndarray:
        """uint8 (size,): one sample's stored bytes, a read-only view of the map. Raises `UserError` for another id."""
        if type(sample_id) not in (int, np.int64) or not 0 <= sample_id < self.num_samples:
            check_whole(Range(0, self.num_samples - 1), sample_id=sample_id)
        start = self.pointers[sample_id]
        return self.bytes[start : start + self.sizes[sample_id]]

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Read from `start` in `bytes` on, within one file, into `out`, uint8: many samples in one go.

        Raises `BetonError` if the file has lost these bytes or cannot be read.
        """
        part = int(np.searchsorted(self._mapped.starts, start, side="right")) - 1
        at, left = start - int(self._mapped.starts[part]), out.data
        try:
            with self.parts[part].open("rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                if (found.st_dev, found.st_ino) == self._mapped.ids[part]:
                    file.seek(at)
                    while left and (count := file.readinto(left)):
                        left = left[count:]
        except FileNotFoundError:
            pass  # it stays readable through the map
        except OSError as error:
            raise BetonError(f"{self.parts[part]} cannot be read: {error.strerror or error}.") from error
        if left:
            self._check_size(part)
            end = start + len(out)
            out[:] = self.bytes[start:end]

    def contradicting(self, ids: np.ndarray) -> np.ndarray:
        """Ids of the samples that are not a JPEG of the index's size, or that would take minutes to decode.

        A sample is checked once, without decoding it, when it is first asked about. (The sizes of raw samples were
        checked when the set was opened.)
        """
        bits = (1 << (ids & 7)).astype(np.uint8)
        for i in ids[(self._looked_at[ids >> 3] & bits) == 0].tolist():
            if self.contradicts(i):
                self._contradicting.add(i)
            self._looked_at[i >> 3] |= 1 << (i & 7)
        return (
            np.array([i for i in ids.tolist() if i in self._contradicting], np.int64)
            if self._contradicting
            else ids[:0]
        )

    def contradicts(self, sample_id: int) -> bool:
        """The same for one sample; the answer is not kept."""
        if self.modes[sample_id] == MODE_RAW:
            return False
        height, width = self.sides_of(sample_id)
        data, size = self.sample(sample_id), (int(height), int(width))
        is_sound = turbojpeg.size_at(data.ctypes.data, data.size) == size and math.prod(size) <= MAX_PIXELS
        return not is_sound or has_too_many_scans(data)

    def _parts_of(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._index.first_ids, ids, side="right") - 1

    def _part_of(self, sample_id: int) -> int:
        return int(self._parts_of(np.array(sample_id)))

    def describe(self, sample_id: int) -> str:
        """A sample in words: its file, its number there, and its source file if that is known."""
        part = self._part_of(sample_id)
        path, local = self.parts[part], sample_id - int(self._index.first_ids[part])
        words = f"{path}: sample {local}"
        with suppress(BetonError):  # without sidecars, or damaged ones, there is no more to say
            is_first = self.manifest and part == self._index.summary.manifest_part
            manifest = self.manifest if self.manifest and is_first else read_manifest(path)
            words += f" (from {one_line(Path(manifest.source) / read_sample_name(path, local))})"
        return words


def _whole(column: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """A column as callers may use it with any library: contiguous, aligned and read-only; itself where it is."""
    whole = np.require(column, dtype, ["C", "A"])
    whole.flags.writeable = False
    return whole
