"""The index of a `.beton`, or of its parts: what its samples are and where they lie, without decoding any."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.formats import turbojpeg
from data_prep.formats.beton import MODE_RAW, find_parts, part_path
from data_prep.formats.jpeg import MAX_PIXELS
from data_prep.formats.sidecars import Manifest, check_index, manifest_path, read_manifest, read_sample_table
from data_prep.formats.tables import read_tables
from lowrank_vit.common.arguments import Range, check_type, check_whole
from lowrank_vit.common.errors import BetonError
from lowrank_vit.common.filesystem import map_files
from lowrank_vit.common.terminal import one_line
from lowrank_vit.data.decode.jpeg import has_too_many_scans

LABELS_UNNAMED = 1 << 16
"""Without a manifest labels are below this, or below the number of samples where that is more."""


class Beton:
    """A safely opened `.beton` of N images with integer labels, in one file or in parts.

    `path` FILE.beton stands for FILE-1-of-n.beton and so on where it is not there itself; a list of files is taken as
    parts in that order. Sample ids run through the parts, so that they are those of the undivided file.

    Opening checks the header, the metadata and the allocation table, and the manifest if one lies beside the file, with
    the checksum of the index and the labels; anything wrong is a `BetonError` that names the file and the next step.
    Samples are memory-mapped, not read.

    Example:
        >>> beton = Beton("train.beton")
        >>> beton.num_samples, beton.classes, beton.labels.dtype, beton.heights[:3].tolist()
        (20, ['cat', 'dog'], dtype('int64'), [40, 41, 42])
    """

    def __init__(self, path: str | os.PathLike[str] | list[Path]) -> None:
        check_type((str, os.PathLike, list), "a path, or a list of the paths of parts", path=path)
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
        tables = [read_tables(part) for part in self.parts]
        self._file_sizes, self._index_xxh3 = [t.file_bytes for t in tables], [t.index_xxh3 for t in tables]
        self._first_ids = np.cumsum([0, *(len(t.labels) for t in tables)]).tolist()
        self.num_samples: int = self._first_ids[-1]
        self.heights = np.concatenate([t.heights for t in tables])
        self.widths = np.concatenate([t.widths for t in tables])
        """int32 (N,), pixels."""
        self.labels = np.concatenate([t.labels for t in tables])
        """int64 (N,)."""
        self.modes = np.concatenate([t.modes for t in tables])
        """uint8 (N,): MODE_JPEG or MODE_RAW."""
        self._pointers, self.sizes = [t.pointers for t in tables], np.concatenate([t.sizes for t in tables])
        """int64 (N,), bytes."""
        self.is_raw = bool((self.modes == MODE_RAW).all())
        self._descriptors: list[int] = []  # of the mapped files
        self._contradicts: np.ndarray | None = None
        self.manifests = self._read_manifests()
        """Of the parts that have one."""
        self.classes = list(self.manifests[0].classes) if self.manifests else None
        """Class names in label order, or None without a manifest."""
        self._check_labels()

    def _read_manifests(self) -> list[Manifest]:
        manifests = [self._read_manifest(n) for n in range(len(self.parts))]
        known = [m for m in manifests if m is not None]
        for one, other in pairwise(known):
            differing = {
                "classes": one.classes != other.classes,
                "options": one.options != other.options or one.converter_version != other.converter_version,
                "lists of files": one.whole_list_sha256 != other.whole_list_sha256,
            }
            if any(differing.values()):
                what = next(name for name, differs in differing.items() if differs)
                raise BetonError(f"{self.path}: its parts have different {what}. Convert all parts from one source.")
        for n, manifest in enumerate(manifests):
            is_named = self.parts[n] == part_path(self.path, n + 1, len(self.parts))  # a list may have any order
            if is_named and manifest and manifest.shard != (n + 1, len(self.parts)):
                i, count = manifest.shard or (1, 1)
                raise BetonError(f"{self.parts[n]} says that it is part {i} of {count}. It must have been renamed.")
        return known

    def _read_manifest(self, part: int) -> Manifest | None:
        path = self.parts[part]
        if not manifest_path(path).exists():
            return None
        manifest = read_manifest(path)
        num_samples = self._first_ids[part + 1] - self._first_ids[part]
        if manifest.num_samples != num_samples or manifest.file_bytes != self._file_sizes[part]:
            raise BetonError(
                f"{path} does not belong to its manifest {manifest_path(path).name}: the manifest speaks of "
                f"{manifest.num_samples} samples in {manifest.file_bytes} bytes, the file has {num_samples} "
                f"samples in {self._file_sizes[part]} bytes. Convert it again with `python -m data_prep`."
            )
        check_index(path, self._index_xxh3[part], manifest)
        return manifest

    def _check_labels(self) -> None:
        # Without a manifest any label might be meant; but not one that asks for a head of gigabytes.
        limit = len(self.classes) if self.classes else max(self.num_samples, LABELS_UNNAMED)
        beyond = np.flatnonzero(self.labels >= limit)
        if len(beyond):
            part = self.parts[self._part_of(int(beyond[0]))]
            known = (
                f"its manifest names {limit} classes"
                if self.classes
                else (f"there is no manifest, and {self.num_samples:,} samples cannot have that many classes")
            )
            raise BetonError(
                f"{self.describe(int(beyond[0]))} has the label {self.labels[beyond[0]]}, but {known}. The file is "
                f"damaged, or its manifest is another's: see `python -m data_prep verify {part}`, or convert it again."
            )

    @property
    def unverified(self) -> str:
        """A line about an index that no checksum vouches for; empty where all parts have one."""
        if all(m.index_xxh3 for m in self.manifests) and len(self.manifests) == len(self.parts):
            return ""
        if not self.manifests:
            return f"{self.path.name}: index not verified, since no manifest lies beside it"
        return (
            f"{self.path.name}: index not verified, since its manifest is of an earlier version; "
            f"`python -m data_prep verify {self.path}` checks it once and adds the checksum"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes by the manifest, else by the greatest label."""
        return len(self.classes) if self.classes else int(self.labels.max()) + 1

    def relabel(self, labels: Sequence[int], classes: Sequence[str] | None) -> None:
        """Let each label be another one, `labels[label]`, of these classes; before a loader is opened."""
        self.labels = np.asarray(labels, np.int64)[self.labels]
        self.classes = list(classes) if classes is not None else self.classes

    @property
    def is_uniform(self) -> bool:
        """Whether all images have one size."""
        return bool((self.heights == self.heights[0]).all() and (self.widths == self.widths[0]).all())

    @cached_property
    def _mapped(self) -> tuple[np.ndarray, list[int]]:
        self._descriptors = [os.open(part, os.O_RDONLY) for part in self.parts]
        weakref.finalize(self, _close_all, self._descriptors)
        try:
            return map_files(self.parts, self._file_sizes)
        except OSError as error:
            raise BetonError(
                f"{self.path} cannot be mapped into memory: {error.strerror or error}. Its file system may not be able "
                "to: copy it to a local disk, which --stage-dir does."
            ) from error

    def check_unchanged(self) -> None:
        """Raise `BetonError` if a mapped file has lost bytes: reading them would kill the process (SIGBUS).

        A file that is merely removed or replaced by another stays readable through the map.
        """
        for part, descriptor, size in zip(self.parts, self._descriptors, self._file_sizes, strict=False):
            if (now := os.fstat(descriptor).st_size) < size:
                raise BetonError(
                    f"{part} was cut from {size:,} to {now:,} bytes while it was open. Restore it and resume."
                )

    @property
    def bytes(self) -> np.ndarray:
        """uint8 (bytes of all parts,): the whole set, read-only, mapped on first use."""
        return self._mapped[0]

    @cached_property
    def pointers(self) -> np.ndarray:
        """int64 (N,): where each sample begins in `bytes`."""
        starts = self._mapped[1]
        return np.concatenate([pointers + start for pointers, start in zip(self._pointers, starts, strict=True)])

    def sample(self, sample_id: int) -> np.ndarray:
        """uint8 (size,): one sample's stored bytes, a read-only view of the map. Raises `UserError` for another id."""
        if type(sample_id) not in (int, np.int64) or not 0 <= sample_id < self.num_samples:
            check_whole(Range(0, self.num_samples - 1), sample_id=sample_id)
        start = self.pointers[sample_id]
        return self.bytes[start : start + self.sizes[sample_id]]

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Read from `start` in `bytes` on, within one file, into `out`, uint8: many samples in one go.

        Raises `BetonError` where the file has lost these bytes or cannot be read.
        """
        starts = self._mapped[1]
        part = int(np.searchsorted(starts, start, side="right")) - 1
        at, left = start - starts[part], out.data
        while left:
            try:
                count = os.preadv(self._descriptors[part], [left], at)
            except OSError as error:
                raise BetonError(f"{self.parts[part]} cannot be read: {error.strerror or error}.") from error
            if not count:
                self.check_unchanged()
                raise BetonError(f"{self.parts[part]} ends too early. Convert it again with `python -m data_prep`.")
            at, left = at + count, left[count:]

    def contradicting(self, ids: np.ndarray) -> np.ndarray:
        """Ids of the samples whose JPEG has another size than the index says, is none, or would take minutes.

        A sample is looked at once, without decoding it, when it is first asked about. (That raw samples have the size
        of their pixels is known from opening.)
        """
        if self._contradicts is None:
            self._contradicts = np.where(self.modes == MODE_RAW, np.int8(0), np.int8(-1))  # -1: not yet looked at
        start = self.bytes.ctypes.data
        for i in ids[self._contradicts[ids] < 0].tolist():
            size = int(self.heights[i]), int(self.widths[i])
            found = turbojpeg.size_at(start + int(self.pointers[i]), int(self.sizes[i]))
            is_sound = found == size and math.prod(size) <= MAX_PIXELS
            self._contradicts[i] = not is_sound or has_too_many_scans(self.sample(i))
        return ids[self._contradicts[ids] == 1]

    def _part_of(self, sample_id: int) -> int:
        return int(np.searchsorted(self._first_ids, sample_id, side="right")) - 1

    def describe(self, sample_id: int) -> str:
        """A sample in words: its file, its number there, and its source file where that is known."""
        part = self._part_of(sample_id)
        path, local = self.parts[part], sample_id - self._first_ids[part]
        words = f"{path}: sample {local}"
        with suppress(BetonError, IndexError):  # without sidecars, or damaged ones, there is no more to say
            words += f" (from {one_line(Path(read_manifest(path).source) / read_sample_table(path).names[local])})"
        return words


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
