"""Stored spectra, read by the name of a matrix and an update; `files.py` describes the files' format."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lowrank_vit.common.arguments import check_path, check_type
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.packages import needs
from lowrank_vit.spectral.measures.initial import FarEntry
from lowrank_vit.spectral.solving.extremes import Recorded, Triplets
from lowrank_vit.spectral.watching.files import (
    StoredSpectra,
    StoredVectors,
    is_full,
    list_spectra,
    list_vectors,
    read_spectra,
    read_vectors,
    update_of,
)
from lowrank_vit.spectral.watching.scalars import ScalarHistory, columns_of
from lowrank_vit.spectral.watching.store import read_far_entries

T = TypeVar("T")

_CHECKPOINTS = (".pt", ".pth", ".tar", ".safetensors")
"""Endings of a run's files of weights."""


class Spectra:
    """The spectra that a run has stored so far, read from disk when they are asked for; made by `open_spectra`.

    Values and certificates are float64, in the unit of the weights: a true singular value lies within the certificate
    of the value given. Shapes: R rows and C columns of a matrix, K = min(R, C), k recorded triplets.
    """

    def __init__(self, path: Path) -> None:
        """`path`: the directory of the store."""
        self.path = path
        self._spectra = {update_of(file): file for file in list_spectra(path)}
        self._vectors = {update_of(file): file for file in list_vectors(path)}
        self.shapes: dict[str, tuple[int, int]] = {}
        """By name of a matrix, in model order: (R, C); empty where `index.json` cannot be read."""
        self.indices: dict[str, Recorded] = {}
        """By name: the 1-based indices, in the descending spectrum, of the recorded triplets of both ends."""
        self.far_entries: dict[str, list[FarEntry]] = read_far_entries(path)
        """By name: single entries far out before the first update; matrices without any are left out."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            matrices = json.loads((path / "index.json").read_text(encoding="utf-8"))["matrices"]
            self.shapes = {name: (int(one["shape"][0]), int(one["shape"][1])) for name, one in matrices.items()}
            self.indices = {name: Recorded(one["top"], one["last"]) for name, one in matrices.items()}
        self._newest_read: StoredSpectra | None = None
        self._newest_vectors: StoredVectors | None = None

    @property
    def updates(self) -> list[int]:
        """The updates whose singular values are stored, ascending."""
        return list(self._spectra)

    @property
    def full_updates(self) -> list[int]:
        """The `updates` whose whole spectra are stored, ascending; the others have the first values alone."""
        return [update for update, file in self._spectra.items() if is_full(file)]

    @property
    def vector_updates(self) -> list[int]:
        """The updates whose singular vectors are stored, ascending; they are thinned out more than the values."""
        return list(self._vectors)

    @property
    def names(self) -> list[str]:
        """The matrices of the newest refresh, in model order. Raises `UserError` if its file is damaged."""
        keys = self.refresh(self.updates[-1]).spectra
        return [key.removeprefix("spec/") for key in keys if key.startswith("spec/")]

    def values(self, name: str, update: int | None = None, *, ema: bool = False) -> np.ndarray:
        """(K,) float64, descending: all singular values of a matrix, of the model or of its EMA.

        `update`: one of `updates`; default: the newest of `full_updates`. At updates that are not in `full_updates` all
        but the first values are NaN. Raises `UserError` for a name or an update that is not there.
        """
        return self._named(self.refresh(_newest(self._spectra) if update is None else update).spectra, name, ema)

    def series(self, name: str, *, ema: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(T,) int64 updates, and (T, K) float64 singular values of a matrix at each of them, NaN where not known.

        Refreshes without the matrix, or of a matrix of another size, are left out. Raises `UserError` for a name that
        is not there, and for a damaged file.
        """
        newest = self.values(name, ema=ema)
        key = f"{'spec_ema' if ema else 'spec'}/{name}"
        found = {update: self.refresh(update).spectra.get(key) for update in self.updates}
        kept = {update: s for update, s in found.items() if s is not None and s.shape == newest.shape}
        return np.array(list(kept), np.int64), np.stack(list(kept.values()))

    def vectors(self, name: str, update: int | None = None, *, ema: bool = False) -> tuple[Triplets, Triplets]:
        """The recorded triplets of the greatest and of the smallest values, both in the order of `indices`.

        Each has `s` (k,), unit columns of `u` (R, k) and `v` (C, k), and `certificate` (k,), float64. `update`: one of
        `vector_updates`; default: the newest with whole spectra. Without whole spectra the second has none (k = 0).
        Raises `UserError` for a name or an update that is not there.
        """
        newest = _newest(self._vectors) if self._vectors else self.updates[-1]
        return self._named(self.refresh_vectors(newest if update is None else update).ends, name, ema)

    @cached_property
    def history(self) -> ScalarHistory:
        """The scalars, refresh by refresh."""
        return ScalarHistory(self.path)

    @property
    def scalar_updates(self) -> list[int]:
        """The updates whose scalars are there, ascending; beyond the store's size limit they are thinned out too."""
        return self.history.updates

    def scalars(self, *metrics: str, updates: Collection[int] | None = None) -> dict[str, np.ndarray]:
        """The scalars of all refreshes as the columns of one table, a row for each refresh and matrix or mean.

        `metrics`: names such as "sigma_max"; default: all, which takes 350 MB for a long run of ViT-B. `updates`: some
        of `scalar_updates`; default: all. Refreshes that cannot be read are left out.

        Returns the columns "update" int64, "ema" bool, "name", and each metric float64 with NaN where there is none,
        see `columns_of`. Raises `UserError` for a metric that no refresh has, and for an update that is not there.
        """
        for metric in metrics:
            check_type(str, "names of metrics, each an argument", metrics=metric)
        known, found = self.scalar_updates, []
        for update in known if updates is None else updates:
            with contextlib.suppress(*((UserError,) if update in known else ())):
                found.append(self.history.read(update))
        there = {metric for one in found for metric in one.metrics}
        if missing := [metric for metric in metrics if metric not in there]:
            some = ", ".join(difflib.get_close_matches(missing[0], there, n=3) or sorted(there)[:8]) or "none"
            raise UserError(f"{self.path} has no metric {missing[0]}. There are {some}.")
        return columns_of(found, metrics)

    def to_pandas(self, *metrics: str, updates: Collection[int] | None = None) -> Any:
        """`scalars` as a pandas DataFrame. Raises `UserError` where pandas is not installed."""
        pandas = needs("pandas", extra="tables", to="to_pandas()", instead="use `scalars`, without it")
        return pandas.DataFrame(self.scalars(*metrics, updates=updates))

    def file(self, update: int) -> Path:
        """The file of the singular values of an update."""
        return self._chosen(self._spectra, update)

    def refresh(self, update: int) -> StoredSpectra:
        """All singular values of one update at once; `full` tells whether the whole spectra are known.

        Raises `UserError` if there is no such update, or its file is gone or damaged.
        """
        if self._newest_read is None or self._newest_read.update != update:
            self._newest_read = read_spectra(self.file(update))
        return self._newest_read

    def refresh_vectors(self, update: int) -> StoredVectors:
        """All recorded triplets of one update at once, and those between. Raises `UserError` as `refresh` does."""
        if self._newest_vectors is None or self._newest_vectors.update != update:
            self._newest_vectors = read_vectors(self._chosen(self._vectors, update))
        return self._newest_vectors

    def _chosen(self, files: Mapping[int, Path], update: int) -> Path:
        if update not in files:
            some = ", ".join(map(str, list(files)[:8])) or "none"
            raise UserError(f"{self.path} has nothing stored of update {update}. There are {some}.")
        return files[update]

    def _named(self, found: Mapping[str, T], name: str, ema: bool) -> T:
        check_type(str, "the name of a matrix", name=name)
        kind = "spec_ema" if ema else "spec"
        if f"{kind}/{name}" not in found:
            known = [key.partition("/")[2] for key in found if key.startswith(f"{kind}/")]
            some = ", ".join(difflib.get_close_matches(name, known, n=3) or known[:8]) or "none"
            raise UserError(f"{self.path} has no {name} of the {'EMA' if ema else 'model'}. There are {some}.")
        return found[f"{kind}/{name}"]


def _newest(files: Mapping[int, Path]) -> int:
    """The newest update of whole spectra, or the newest of all if there is none."""
    updates = list(files)
    return next((update for update in reversed(updates) if is_full(files[update])), updates[-1])


def store_dir_of(folder: Path) -> Path:
    """The directory of a run's spectra: its folder spectra/, unless `folder` is a `store_dir` itself."""
    inside = folder / "spectra"
    return folder if not inside.is_dir() and list_spectra(folder) else inside


def open_spectra(run: str | os.PathLike[str]) -> Spectra:
    """Open the stored spectra of a run directory, of a checkpoint's run, or of a `store_dir` of `SpectralMonitor`.

    Raises `UserError` where there are none.

    Example:
        >>> spectra = open_spectra("run")
        >>> spectra.updates, spectra.names[0], spectra.shapes[spectra.names[0]]
        ([0, 2], 'blocks.0.attn.qkv', (48, 16))
        >>> spectra.values("blocks.0.attn.qkv", update=2).shape, spectra.values("head", ema=True).shape
        ((16,), (3,))
        >>> top, last = spectra.vectors("blocks.0.attn.qkv")
        >>> top.s.shape, top.u.shape, top.v.shape, spectra.indices["blocks.0.attn.qkv"].top
        ((2,), (48, 2), (16, 2), [1, 2])
    """
    check_path(run=run)
    path = Path(run)
    if path.is_file() and not (path.suffix in _CHECKPOINTS and (path.parent / "spectra").is_dir()):
        raise UserError(f"{path} is a file, but no checkpoint of a run with spectra. Give the run's directory.")
    folder = path.parent if path.is_file() else path
    store_dir = store_dir_of(folder)
    if not path.exists():
        raise UserError(f"{path} does not exist. Give the directory of a run, or the store_dir of a monitor.")
    if not list_spectra(store_dir):
        raise UserError(f"{path} has no spectra: no monitor has stored any in it yet. Give another directory.")
    return Spectra(store_dir)
