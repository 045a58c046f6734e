"""The index of a `.beton`: what its samples are and where they lie, without decoding any."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.beton_format import MODE_RAW, read_tables
from data_prep.errors import BetonError
from data_prep.manifest import manifest_path, read_manifest


class Beton:
    """A safely opened `.beton` of N images with integer labels.

    Opening checks the header, the metadata and the allocation table, and the manifest if one lies beside the file;
    anything wrong is a `BetonError` that names the file and the next step. Samples are memory-mapped, not read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        tables = read_tables(self.path)
        self.num_samples = len(tables.labels)
        self.heights, self.widths = tables.heights, tables.widths
        """int32 (N,), pixels."""
        self.labels = tables.labels
        """int64 (N,)."""
        self.pointers, self.sizes = tables.pointers, tables.sizes
        """int64 (N,), bytes."""
        self.is_raw = bool((tables.modes == MODE_RAW).all())
        self.classes = self._read_classes()
        """Class names in label order, or None without a manifest."""

    def _read_classes(self) -> list[str] | None:
        if not manifest_path(self.path).exists():
            return None
        manifest = read_manifest(self.path)
        if manifest.num_samples != self.num_samples or manifest.file_bytes != self.path.stat().st_size:
            raise BetonError(
                f"{self.path} does not belong to its manifest {manifest_path(self.path).name}: the manifest speaks of "
                f"{manifest.num_samples} samples in {manifest.file_bytes} bytes, the file has {self.num_samples} "
                f"samples in {self.path.stat().st_size} bytes. Convert it again with `python -m data_prep`."
            )
        return list(manifest.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes by the manifest, else by the greatest label."""
        return len(self.classes) if self.classes else int(self.labels.max()) + 1

    @property
    def is_uniform(self) -> bool:
        """Whether all images have one size."""
        return bool((self.heights == self.heights[0]).all() and (self.widths == self.widths[0]).all())

    @cached_property
    def bytes(self) -> np.ndarray:
        """uint8 (file size,): the whole file, read-only, mapped on first use."""
        return np.memmap(self.path, np.uint8, mode="r")

    def sample(self, sample_id: int) -> np.ndarray:
        """uint8 (size,): one sample's stored bytes, a read-only view of the map."""
        start = self.pointers[sample_id]
        return self.bytes[start : start + self.sizes[sample_id]]
