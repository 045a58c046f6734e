"""The spectra on disk: a directory that grows by whole files, stays below a stated size, and is readable at any moment.

`update_*.npz`          all singular values of a refresh,
`vectors_*.npz`         its recorded triplets,
`scalars_*.npz`         its scalars,
`circuits_*.npz`        with `--spec-circuits` the circuits of heads, and
`flows_*.npz`           metrics of tokens and attention at a validation; see `files.py`.
`index.json`            the recorded indices and shapes of every matrix, the options, and entries far out at the start.
`weights_00000100.pth`  for a resumed run: the weights of the newest refresh, see `Kept`. Written with a checkpoint, by
                        the code that writes that; only one file, for the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import damaged_member, remove_leftovers, write_whole
from lowrank_vit.spectral.measures.circuits import BlockCircuits
from lowrank_vit.spectral.measures.initial import FarEntry
from lowrank_vit.spectral.solving.extremes import Solved, start_of
from lowrank_vit.spectral.watching.files import (
    CIRCUITS,
    FLOWS,
    SCALARS,
    SPECTRA,
    VECTORS,
    WEIGHTS,
    StoredCircuits,
    StoredScalars,
    files_of,
    is_full,
    path_of,
    read_spectra,
    read_vectors,
    update_of,
    write_circuits,
    write_refresh,
    write_scalars,
)

FAR_ENTRIES = "far_entries"
"""In the index: matrix to its entries far out before the first update (`initial.FarEntry`)."""
SPECTRA_SHARE, SCALARS_SHARE = 0.25, 0.1
"""Shares of the size limit; the rest is for vectors."""
CIRCUITS_SHARE = 0.05
"""The share of circuits, if there are any."""


class Kept(NamedTuple):
    """A snapshot that a resumed run needs, beside the store, to go on as if it had not been interrupted."""

    update: int
    """The update of the newest snapshot."""
    weights: dict[str, Tensor]
    """Its matrices by "<kind>/<name>"."""
    before: Kept | None = None
    """The snapshot before, while the newest is still being computed: after a kill the newest is computed again."""
    full: bool = True
    """Whether its whole spectra are, or were, to be computed."""

    def content(self) -> dict[str, Any]:
        """For `torch.save`."""
        before = self.before.content() if self.before else None
        return {"update": self.update, "weights": self.weights, "before": before, "full": self.full}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Kept:
        """The inverse of `content`."""
        before = cls.of(content["before"]) if content["before"] else None
        return cls(int(content["update"]), dict(content["weights"]), before, bool(content.get("full", True)))


class Stored(NamedTuple):
    """Refreshes of one store up to some update, by "<kind>/<name>"; empty where none can be read."""

    first: dict[str, Solved]
    """The first of whole spectra."""
    last: dict[str, Solved]
    """The newest."""
    last_update: int | None
    whole: dict[str, Solved]
    """The newest of whole spectra."""
    whole_update: int | None


def far_entries_content(found: Mapping[str, list[FarEntry]]) -> dict[str, Any]:
    """The index's entry about these; empty where there are none."""
    return {FAR_ENTRIES: {name: [one.content() for one in of] for name, of in found.items()}} if found else {}


class SpectraStore:
    """Writes refreshes into one directory and keeps it below `limit_bytes`.

    Where a series (spectra, vectors, scalars, circuits) would outgrow its share, every second refresh of it is deleted
    and from then on only every second one is kept, so the series thins out evenly. The first, the newest and the newest
    of whole spectra always stay, so the least size is that of three refreshes.
    """

    def __init__(self, path: Path, limit_bytes: float, index: Mapping[str, Any] | None = None) -> None:
        """`path` and its `index.json` are made at the first write. Without an `index` the store is only read."""
        self.path, self._index = path, index
        more = {CIRCUITS: CIRCUITS_SHARE} if CIRCUITS in (index or {}) else {}
        more |= {SPECTRA: SPECTRA_SHARE, SCALARS: SCALARS_SHARE}
        shares = {**more, VECTORS: 1 - sum(more.values())}
        self._series = {prefix: _Series(path, prefix, share * limit_bytes) for prefix, share in shares.items()}

    def save(
        self,
        update: int,
        solved: Mapping[str, Solved],
        *,
        full: bool = True,
        circuits: Mapping[str, BlockCircuits] | None = None,
        scalars: Mapping[str, float] | None = None,
    ) -> None:
        """Write one refresh, replacing an earlier one of the same update. Raises `UserError` (full, read-only).

        `full`: whether these are whole spectra. `scalars`: as in a `SpectralRecord`.
        """
        if not self.path.exists() and self.path.parent.exists():  # the directory was deleted, but the run is there
            self.begin()
        if scalars:  # the smallest file first, in case the disk runs full
            write_scalars(self.path, StoredScalars.of(update, scalars, full=full))
        write_refresh(self.path, update, solved, full=full)
        if circuits:
            write_circuits(self.path, StoredCircuits(update, dict(circuits), str((self._index or {})[CIRCUITS])))
        for series in self._series.values():
            series.thin()

    def begin(self) -> None:
        """Make the directory if it is missing, and write `index.json` anew. Raises `UserError`."""
        path = self.path / "index.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"cannot make {self.path} for the spectra: it is a file; move it away") from error
        except OSError as error:
            raise UserError(
                f"cannot make {self.path} for the spectra: {error.strerror}; choose a directory that can be written"
            ) from error
        if self._index is None:
            return
        try:
            write_whole(path, json.dumps(dict(self._index), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose a directory that can be written") from error

    def note_far_entries(self, found: Mapping[str, list[FarEntry]]) -> None:
        """Add these, by matrix, to `index.json`. Raises `UserError` as `begin` does."""
        self._index = {**(self._index or {}), **far_entries_content(found)}
        self.begin()

    def forget_after(self, update: int) -> None:
        """Delete what an interrupted run has stored after the checkpoint that it is resumed from."""
        for prefix in (SPECTRA, VECTORS, SCALARS, CIRCUITS, WEIGHTS, FLOWS):
            for path in files_of(self.path, prefix):
                if update_of(path) > update:
                    path.unlink(missing_ok=True)
        remove_leftovers(self.path)

    def forget(self) -> None:
        """Delete all that was stored, and the directory if nothing else is in it (a link to a directory stays)."""
        self.forget_after(-1)
        (self.path / "index.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def kept(self, until: int) -> Kept | None:
        """The snapshot kept with the newest checkpoint up to update `until`; None without a readable file."""
        for path in reversed([path for path in files_of(self.path, WEIGHTS) if update_of(path) <= until]):
            with contextlib.suppress(Exception):  # a damaged file fails in many ways inside torch
                if not damaged_member(path):
                    return Kept.of(torch.load(path, map_location="cpu", weights_only=True))
        return None

    def kept_update(self, until: int) -> int:
        """The update of what `kept` reads, if its file is sound; -1 without a file."""
        return max((update_of(path) for path in files_of(self.path, WEIGHTS) if update_of(path) <= until), default=-1)

    def stored(self, until: int) -> Stored:
        """The stored refreshes that a refresh after the update `until` is compared with."""
        paths = [path for path in files_of(self.path, VECTORS) if update_of(path) <= until]
        _, first = self._first_readable(filter(is_full, paths))
        last_update, last = self._first_readable(reversed(paths))
        whole_update, whole = self._first_readable(filter(is_full, reversed(paths)))
        return Stored(first, last, last_update, whole, whole_update)

    def _first_readable(self, paths: Iterable[Path]) -> tuple[int | None, dict[str, Solved]]:
        for path in paths:
            with contextlib.suppress(UserError):
                return _read_solved(self.path, path)
        return None, {}


class _Series:
    """The files of one prefix, the least distance between two of them in updates, and their limit."""

    def __init__(self, folder: Path, prefix: str, limit_bytes: float) -> None:
        self._folder, self._prefix, self._limit = folder, prefix, limit_bytes
        self._spacing = 0
        with contextlib.suppress(OSError):  # a disk that does not answer is reported when something is written
            paths = files_of(folder, prefix)
            self._spacing = _least_distance(_spaced(paths))

    def thin(self) -> None:
        """Delete files until the limit holds, except the first, the newest and the newest of whole spectra."""
        paths = self._thinned(files_of(self._folder, self._prefix))
        while paths and len(paths) > len({paths[0], *_newest(paths)}) and sum(map(_size, paths)) > self._limit:
            self._spacing = 2 * max(self._spacing, _least_distance(_spaced(paths)))
            paths = self._thinned(paths)

    def _thinned(self, paths: list[Path]) -> list[Path]:
        """Delete the files nearer than the spacing to the one before, and return the others."""
        kept: list[Path] = []
        at, newest = None, _newest(paths)
        for path in paths:
            if at is None or update_of(path) - at >= self._spacing:
                at = update_of(path)
            elif path not in newest:
                path.unlink(missing_ok=True)
                continue
            kept.append(path)
        return kept


def _newest(paths: list[Path]) -> set[Path]:
    """The newest file of a series, and the newest of whole spectra."""
    return {*paths[-1:], *itertools.islice(filter(is_full, reversed(paths)), 1)}


def _spaced(paths: list[Path]) -> list[Path]:
    """The first file of a series, which may be the newest of whole spectra, and those that are not `_newest`."""
    newest = _newest(paths)
    return [path for path in paths if path == paths[0] or path not in newest]


def _least_distance(paths: list[Path]) -> int:
    return min((update_of(b) - update_of(a) for a, b in itertools.pairwise(paths)), default=0)


def read_far_entries(store_dir: Path) -> dict[str, list[FarEntry]]:
    """Matrix to its entries far out before the first update; empty if the index lists none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = json.loads((store_dir / "index.json").read_text(encoding="utf-8"))[FAR_ENTRIES]
        return {str(name): [FarEntry.of(one) for one in entries] for name, entries in found.items()}
    return {}


def _read_solved(folder: Path, vectors: Path) -> tuple[int, dict[str, Solved]]:
    update, ends, blocks, full = read_vectors(vectors)
    # Spectra are thinned less than vectors, but at their own spacing; later comparisons need only sigma_1 of them.
    path = path_of(folder, SPECTRA, update)
    spectra = read_spectra(path).spectra if path.exists() else {}
    solved: dict[str, Solved] = {}
    for key, (top, last) in ends.items():
        block, s = blocks.get(key), spectra.get(key, top.s)
        start = start_of(s, block or top)
        solved[key] = Solved(s, top, last, float("nan"), "stored", block=block, full=full, start=start)
    return update, solved


def kept_name(update: int) -> str:
    """The name, in the store, of the file of a kept snapshot."""
    return path_of(Path(), WEIGHTS, update).name


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
