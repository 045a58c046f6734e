"""The spectra on disk: a directory that grows by whole files, stays below a stated size, and is readable at any moment.

`update_00000100.npz`   "update" and a float64 array (K,) per "<kind>/<name>": all singular values, descending; of a
                        fused qkv matrix also "<kind>/<name>:scaled" (K,), see `extremes.Thirds`.
`vectors_00000100.npz`  "update" and the recorded triplets, float64: per "<kind>/<name>" and end (top, last)
                        "<key>:top:u" (R, k), ":v" (C, k), ":s" (k,) and ":certificate" (k,). Where the recorded ones
                        leave some out at the top, those as "<key>:between:u" and so on, in the order of their values.
`circuits_00000100.npz` with `--spec-circuits` per "<kind>/circuit/<block>" what `circuits.as_arrays` says.
`flows_00000100.npz`    of a validation after that update, per "<kind>/<block>:variances" and ":entropies", see `Flows`.
`index.json`            the recorded indices and shapes of every matrix, the options, and entries far out at the start.
`weights_00000100.pth`  for a run that is resumed: the weights that the newest refresh was taken of, see `Kept`. Written
                        with a checkpoint, by whoever writes that; one file, of the newest checkpoint.

Kinds are "spec" (the model) and "spec_ema" (its moving average). A file is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import damaged_member, remove_leftovers, whole_file, write_whole
from lowrank_vit.spectral.flows import Flows
from lowrank_vit.spectral.measures.circuits import BlockCircuits, as_arrays, of_arrays
from lowrank_vit.spectral.measures.initial import FarEntry
from lowrank_vit.spectral.solving.extremes import Solved, Triplets

SPECTRA, VECTORS, CIRCUITS, WEIGHTS, FLOWS = "update", "vectors", "circuits", "weights", "flows"
FAR_ENTRIES = "far_entries"
"""In the index: matrix to the entries far out of it before the first update (`initial.FarEntry`)."""
SPECTRA_SHARE = 0.25
"""Of the size limit; the rest is for vectors."""
CIRCUITS_SHARE = 0.05
"""Likewise, where there are circuits."""
_ENDS, _BETWEEN = ("top", "last"), "between"
_SCALED = ":scaled"
_FIELDS = ("u", "v", "s", "certificate")


class StoredSpectra(NamedTuple):
    """One refresh: the update it was taken at, and "<kind>/<name>" to (K,) float64 singular values, descending."""

    update: int
    spectra: dict[str, np.ndarray]


class StoredVectors(NamedTuple):
    """One refresh: the update it was taken at, and "<kind>/<name>" to the recorded (top, last) triplets."""

    update: int
    ends: dict[str, tuple[Triplets, Triplets]]
    blocks: dict[str, Triplets]
    """The same key to the first p triplets, p the greatest recorded index, where the recorded ones leave some out."""


class Kept(NamedTuple):
    """What a resumed run needs, beside the store, to go on as if it had never ended."""

    update: int
    """Of the newest snapshot."""
    weights: dict[str, Tensor]
    """Its matrices by "<kind>/<name>"."""
    before: Kept | None = None
    """The snapshot before, while the newest is still being computed: after a kill that is done again."""

    def content(self) -> dict[str, Any]:
        """For `torch.save`."""
        before = self.before.content() if self.before else None
        return {"update": self.update, "weights": self.weights, "before": before}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Kept:
        """Of what `content` returned."""
        before = content["before"]
        return cls(int(content["update"]), dict(content["weights"]), cls.of(before) if before else None)


def far_entries_content(found: Mapping[str, list[FarEntry]]) -> dict[str, Any]:
    """For the index; nothing where there are none."""
    return {FAR_ENTRIES: {name: [one.content() for one in of] for name, of in found.items()}} if found else {}


class SpectraStore:
    """Writes refreshes into one directory and keeps it below `limit_bytes`.

    Where a series (spectra, vectors) would outgrow its share, every second refresh of it goes and only every second one
    to come is kept: the series thins out evenly. The first and the newest always stay, so the least size is that of
    two refreshes.
    """

    def __init__(self, path: Path, limit_bytes: float, index: Mapping[str, Any] | None = None) -> None:
        """`path` and its `index.json` are made when something is written. Without an `index` it is only read."""
        self.path, self._index = path, index
        more = {CIRCUITS: CIRCUITS_SHARE} if CIRCUITS in (index or {}) else {}
        shares = {SPECTRA: SPECTRA_SHARE, VECTORS: 1 - SPECTRA_SHARE - sum(more.values()), **more}
        self._series = {prefix: _Series(path, prefix, share * limit_bytes) for prefix, share in shares.items()}

    def save(
        self, update: int, solved: Mapping[str, Solved], circuits: Mapping[str, BlockCircuits] | None = None
    ) -> None:
        """Write one refresh, replacing an earlier one of the same update. Raises `UserError` (full, read-only)."""
        if not self.path.exists() and self.path.parent.exists():  # it went, but not the run with it
            self.begin()
        scaled = {key + _SCALED: one.thirds.s for key, one in solved.items() if one.thirds}
        write_spectra(self.path, update, {key: one.s for key, one in solved.items()} | scaled)
        arrays: dict[str, np.ndarray] = {}
        for key, one in solved.items():
            parts = {"top": one.top, "last": one.last}
            if one.block is not None:
                between = np.flatnonzero(~_is_recorded(one.top.s.size, one.block.s.size))
                parts[_BETWEEN] = one.block.pick(between.tolist())
            arrays |= {f"{key}:{end}:{name}": getattr(of, name) for end, of in parts.items() for name in _FIELDS}
        _write(self.path, VECTORS, update, arrays)
        if circuits:
            _write(self.path, CIRCUITS, update, as_arrays(circuits))
        for series in self._series.values():
            series.thin()

    def begin(self) -> None:
        """Make the directory, if it is missing, and `index.json` anew. Raises `UserError`."""
        path = self.path / "index.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"cannot make {self.path} for the spectra: it is a file; move it away") from error
        except OSError as error:
            raise UserError(
                f"cannot make {self.path} for the spectra: {error.strerror}; choose a writable output directory"
            ) from error
        if self._index is None:
            return
        try:
            write_whole(path, json.dumps(dict(self._index), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose a writable output directory") from error

    def note_far_entries(self, found: Mapping[str, list[FarEntry]]) -> None:
        """Have `index.json` tell of these, by matrix. Raises `UserError` as `begin` does."""
        self._index = {**(self._index or {}), **far_entries_content(found)}
        self.begin()

    def forget_after(self, update: int) -> None:
        """Delete what a run that was cut off has stored after the checkpoint it is resumed from."""
        for prefix in (SPECTRA, VECTORS, CIRCUITS, WEIGHTS, FLOWS):
            for path in _files(self.path, prefix):
                if update_of(path) > update:
                    path.unlink(missing_ok=True)
        remove_leftovers(self.path)

    def forget(self) -> None:
        """Delete all that was stored, and the directory where nothing else is in it, but not a link to one."""
        self.forget_after(-1)
        (self.path / "index.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def kept(self, until: int) -> Kept | None:
        """What was kept with the checkpoint of the update `until` or before; None without a readable file."""
        for path in reversed([path for path in _files(self.path, WEIGHTS) if update_of(path) <= until]):
            with contextlib.suppress(Exception):  # a damaged file fails in many ways inside torch
                if not damaged_member(path):
                    return Kept.of(torch.load(path, map_location="cpu", weights_only=True))
        return None

    def kept_update(self, until: int) -> int:
        """The update of what `kept` reads, if its file is sound; -1 without a file."""
        return max((update_of(path) for path in _files(self.path, WEIGHTS) if update_of(path) <= until), default=-1)

    def first_and_last(self, until: int) -> tuple[dict[str, Solved], int | None, dict[str, Solved]]:
        """The first refresh, and the newest up to the update `until`, with its update; empty where none can be read."""
        usable: list[tuple[int, dict[str, Solved]]] = []
        paths = [path for path in _files(self.path, VECTORS) if update_of(path) <= until]
        for candidates in (paths, paths[::-1]):
            for path in candidates:
                with contextlib.suppress(UserError):
                    usable.append(_read_solved(self.path, path))
                    break
        if not usable:
            return {}, None, {}
        return usable[0][1], usable[1][0], usable[1][1]


class _Series:
    """The files of one prefix, the least distance between two of them in updates, and their limit."""

    def __init__(self, folder: Path, prefix: str, limit_bytes: float) -> None:
        self._folder, self._prefix, self._limit = folder, prefix, limit_bytes
        updates: list[int] = []
        with contextlib.suppress(OSError):  # a disk that does not answer is met, and said, when something is written
            updates = [update_of(path) for path in _files(folder, prefix)][
                :-1
            ]  # the newest may be nearer than the rest
        self._spacing = min((b - a for a, b in itertools.pairwise(updates)), default=0)

    def thin(self) -> None:
        """Delete what is not to be kept beside the newest file."""
        paths = _files(self._folder, self._prefix)
        if len(paths) > 2 and update_of(paths[-2]) - update_of(paths[-3]) < self._spacing:
            paths.pop(-2).unlink(missing_ok=True)
        while len(paths) > 2 and sum(map(_size, paths)) > self._limit:
            updates = [update_of(path) for path in paths[:-1]]
            nearest = min((b - a for a, b in itertools.pairwise(updates)), default=0)
            self._spacing = 2 * max(self._spacing, nearest)
            for path in paths[1:-1:2]:
                path.unlink(missing_ok=True)
            paths = _files(self._folder, self._prefix)


def write_spectra(store_dir: Path, update: int, spectra: Mapping[str, np.ndarray]) -> Path:
    """Write the spectra of one refresh, replacing an earlier one of the same update; return its path.

    Raises:
        UserError: the directory cannot be written (full, read-only, gone).
    """
    return _write(store_dir, SPECTRA, update, spectra)


def write_flows(store_dir: Path, update: int, flows: Mapping[str, Flows]) -> Path:
    """Write what was found out of the models of these kinds at a validation; return the path. Raises `UserError`."""
    arrays: dict[str, np.ndarray] = {}
    for kind, found in flows.items():
        arrays |= {f"{kind}/{block}:variances": one for block, one in found.variances.items()}
        arrays |= {f"{kind}/{block}:entropies": one for block, one in found.entropies.items()}
    with contextlib.suppress(OSError):  # writing tells of it
        store_dir.mkdir(exist_ok=True)
    return _write(store_dir, FLOWS, update, arrays)


def forget_flows(store_dir: Path, update: int) -> None:
    """Delete what validations after `update` have found out, which a run that goes on from there makes again."""
    with contextlib.suppress(OSError):
        for path in _files(store_dir, FLOWS):
            if update_of(path) > update:
                path.unlink(missing_ok=True)


def list_spectra(store_dir: Path) -> list[Path]:
    """The stored refreshes in the order of their updates; empty when there is no such directory."""
    return _files(store_dir, SPECTRA)


def list_vectors(store_dir: Path) -> list[Path]:
    """The stored vectors in the order of their updates; empty when there is no such directory."""
    return _files(store_dir, VECTORS)


def read_newest_circuits(store_dir: Path) -> tuple[int, dict[str, BlockCircuits]]:
    """The newest refresh that has circuits, and these by "<kind>/circuit/<block>"; -1 and none where there is none."""
    for path in reversed(_files(store_dir, CIRCUITS)):
        with contextlib.suppress(UserError, KeyError):
            update, arrays = _read(path)
            return update, of_arrays(arrays)
    return -1, {}


def read_spectra(path: Path) -> StoredSpectra:
    """Read one refresh, matrices in model order.

    Raises:
        UserError: the file is missing or damaged.
    """
    update, arrays = _read(path)
    return StoredSpectra(update, {key: s for key, s in arrays.items() if not key.endswith(_SCALED)})


def read_scaled(path: Path) -> dict[str, np.ndarray]:
    """Of the fused qkv matrices of a refresh, "<kind>/<name>" to what to compare with noise; see `extremes.Thirds`.

    Raises:
        UserError: the file is missing or damaged.
    """
    _, arrays = _read(path)
    return {key.removesuffix(_SCALED): s for key, s in arrays.items() if key.endswith(_SCALED)}


def read_far_entries(store_dir: Path) -> dict[str, list[FarEntry]]:
    """Matrix to the entries far out of it before the first update; empty where the index tells of none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = json.loads((store_dir / "index.json").read_text(encoding="utf-8"))[FAR_ENTRIES]
        return {str(name): [FarEntry.of(one) for one in entries] for name, entries in found.items()}
    return {}


def read_vectors(path: Path) -> StoredVectors:
    """Read the recorded triplets of one refresh, matrices in model order.

    Raises:
        UserError: the file is missing or damaged.
    """
    update, arrays = _read(path)
    ends: dict[str, tuple[Triplets, Triplets]] = {}
    blocks: dict[str, Triplets] = {}
    try:
        for key in dict.fromkeys(name.rsplit(":", 2)[0] for name in arrays):
            top, last = ({f: arrays[f"{key}:{end}:{f}"] for f in _FIELDS} for end in _ENDS)
            ends[key] = (Triplets(**top), Triplets(**last))
            if f"{key}:{_BETWEEN}:s" in arrays:
                blocks[key] = _block(ends[key][0], Triplets(**{f: arrays[f"{key}:{_BETWEEN}:{f}"] for f in _FIELDS}))
    except KeyError as error:
        raise UserError(f"cannot read the vectors in {path}: {error} is missing") from error
    return StoredVectors(update, ends, blocks)


def _is_recorded(k: int, p: int) -> np.ndarray:
    """(p,) bool: which of the first p indices are the k recorded ones, at equal distances from first to last."""
    interval = (p - 1) // max(k - 1, 1)
    return np.arange(p) % interval == 0


def _block(top: Triplets, between: Triplets) -> Triplets:
    """The recorded triplets and those between them, in the order of their indices."""
    k, p = top.s.size, top.s.size + between.s.size
    is_recorded = _is_recorded(k, p)
    order = np.where(is_recorded, np.cumsum(is_recorded) - 1, k + np.cumsum(~is_recorded) - 1).tolist()
    both = (np.concatenate([getattr(top, f), getattr(between, f)], axis=-1) for f in _FIELDS)
    return Triplets(**dict(zip(_FIELDS, both, strict=True))).pick(order)


def _read_solved(folder: Path, vectors: Path) -> tuple[int, dict[str, Solved]]:
    update, ends, blocks = read_vectors(vectors)
    # Spectra are thinned less than vectors, but on their own stride; what is compared later needs only sigma_1 of them.
    path = _path(folder, SPECTRA, update)
    spectra = read_spectra(path).spectra if path.exists() else {}
    return update, {
        key: Solved(spectra.get(key, top.s), top, last, float("nan"), "stored", block=blocks.get(key))
        for key, (top, last) in ends.items()
    }


def kept_name(update: int) -> str:
    """The name, in the store, of what is kept of a snapshot."""
    return _path(Path(), WEIGHTS, update).name


def _path(folder: Path, prefix: str, update: int) -> Path:
    return folder / f"{prefix}_{update:08d}{_suffix(prefix)}"


def _files(folder: Path, prefix: str) -> list[Path]:
    """In the order of their updates. What has another name, such as update_best.npz, is not the store's."""
    name = re.compile(rf"{prefix}_[0-9]{{8,}}{re.escape(_suffix(prefix))}")
    found = (path for path in folder.glob(f"{prefix}_*") if name.fullmatch(path.name))
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _suffix(prefix: str) -> str:
    return ".pth" if prefix == WEIGHTS else ".npz"


def update_of(path: Path) -> int:
    """The update whose refresh a file of the store holds."""
    return int(path.stem.rpartition("_")[2])


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _write(folder: Path, prefix: str, update: int, arrays: Mapping[str, np.ndarray]) -> Path:
    path = _path(folder, prefix, update)
    try:
        with whole_file(path) as file:
            np.savez(file, allow_pickle=False, update=np.int64(update), **arrays)
    except OSError as error:
        raise UserError(
            f"cannot store the spectra of update {update} in {folder}: {error.strerror or error}. "
            "Free some space, or make it writable."
        ) from error
    return path


def _read(path: Path) -> tuple[int, dict[str, np.ndarray]]:
    try:
        # Opened here: np.load leaves the file open when it finds the archive damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files if key != "update"}
            return int(stored["update"]), arrays
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the spectra in {path}: {error}") from error
