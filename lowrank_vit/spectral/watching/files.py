"""The files of a refresh of spectra: their names, and how they are written and read.

`update_00000100.npz`   "update" and a float64 array (K,) per "<kind>/<name>": all singular values, descending; for a
                        fused qkv matrix also "<kind>/<name>:scaled" (K,), see `extremes.Thirds`.
`vectors_00000100.npz`  "update" and the recorded triplets, float64: per "<kind>/<name>" and end (top, last)
                        "<key>:top:u" (R, k), ":v" (C, k), ":s" (k,) and ":certificate" (k,). Triplets between the
                        recorded ones at the top are "<key>:between:u" and so on, in the order of their values.
                        After a refresh of the first values alone both files hold `FIRST_ALONE`: unknown values are
                        NaN, and the last triplets have no columns.
`scalars_00000100.npz`  all scalars but those about the refresh itself, see `StoredScalars`: "values" (N, M) float64,
                        and "keys" and "metrics", the names of its rows and columns as JSON in bytes.
`circuits_00000100.npz` with `--spec-circuits`: the arrays of `circuits.as_arrays`, keys "<kind>/circuit/<block>".
`flows_00000100.npz`    of a validation after that update: "<kind>/<block>:variances" and ":entropies", see `Flows`.

Kinds are "spec" (the model) and "spec_ema" (its moving average). A file is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import whole_file
from lowrank_vit.spectral.flows import Flows
from lowrank_vit.spectral.measures.circuits import BlockCircuits, as_arrays, of_arrays
from lowrank_vit.spectral.solving.extremes import Solved, Triplets

SPECTRA, VECTORS, CIRCUITS, WEIGHTS, FLOWS = "update", "vectors", "circuits", "weights", "flows"
SCALARS = "scalars"
ABOUT = "refresh"
"""The name, after the kind, of the scalars about the refresh itself."""
FIRST_ALONE = "first_values_alone"
"""In files of refreshes that did not compute the whole spectra; others do not have it."""
_ENDS, _BETWEEN = ("top", "last"), "between"
_SCALED = ":scaled"
_FIELDS = ("u", "v", "s", "certificate")
_NAMES = ("keys", "metrics")


class StoredSpectra(NamedTuple):
    """One refresh: the update it was taken at, and "<kind>/<name>" to (K,) float64 singular values, descending."""

    update: int
    spectra: dict[str, np.ndarray]
    full: bool = True
    """Whether the whole spectra are known. Otherwise all but the first values are NaN."""


class StoredVectors(NamedTuple):
    """One refresh: the update it was taken at, and "<kind>/<name>" to the recorded (top, last) triplets.

    After a refresh of the first values alone the last triplets have no columns.
    """

    update: int
    ends: dict[str, tuple[Triplets, Triplets]]
    blocks: dict[str, Triplets]
    """By the same key the first p triplets, p the greatest recorded index, where the recorded ones leave some out."""
    full: bool
    """Whether the last triplets are known too."""


class StoredCircuits(NamedTuple):
    """The circuits of one refresh, or of an analysis; `update` is -1 for an analysis, and where there are none."""

    update: int
    blocks: dict[str, BlockCircuits]
    """By "<kind>/circuit/<block>"."""
    circuits: str
    """Which parameters count, see `heads.Circuits`; empty where there are none."""


class StoredScalars(NamedTuple):
    """The scalars of one refresh as a table: a row for each matrix, circuit and mean, a column for each metric."""

    update: int
    keys: list[str]
    """Row keys "<kind>/<name>"; names of means begin with "type/" or "depth/", those of circuits with "circuit/"."""
    metrics: list[str]
    """Column names."""
    values_NM: np.ndarray
    """(N, M) float64; NaN where a row has no such metric, and where it is not a number."""
    full: bool = True
    """Whether the whole spectra were computed."""

    @classmethod
    def of(cls, update: int, values: Mapping[str, float | None], *, full: bool = True) -> StoredScalars:
        """The table of a record's values by "<key>/<metric>", without those about the refresh."""
        split = [(name.rpartition("/"), value) for name, value in values.items()]
        split = [(key, metric, value) for (key, _, metric), value in split if key.partition("/")[2] != ABOUT]
        rows = {key: n for n, key in enumerate(dict.fromkeys(key for key, _, _ in split))}
        columns = {metric: m for m, metric in enumerate(dict.fromkeys(metric for _, metric, _ in split))}
        values_NM = np.full((len(rows), len(columns)), np.nan)
        places = [rows[key] * len(columns) + columns[metric] for key, metric, _ in split]
        values_NM.reshape(-1)[places] = [np.nan if value is None else value for *_, value in split]
        return cls(update, list(rows), list(columns), values_NM, full)

    def named(self, metrics: Collection[str] = ()) -> dict[str, float]:
        """The values by "<key>/<metric>", as in a record, without NaN. `metrics`: only these; empty: all."""
        wanted = [m for m, name in enumerate(self.metrics) if not metrics or name in metrics]
        of_wanted = self.values_NM[:, wanted]
        rows, columns = np.nonzero(~np.isnan(of_wanted))
        found = zip(rows.tolist(), columns.tolist(), of_wanted[rows, columns].tolist(), strict=True)
        return {f"{self.keys[n]}/{self.metrics[wanted[m]]}": value for n, m, value in found}


NO_CIRCUITS = StoredCircuits(-1, {}, "")


def write_spectra(store_dir: Path, update: int, spectra: Mapping[str, np.ndarray], *, full: bool = True) -> Path:
    """Write the spectra of one refresh, replacing those of the same update; return the path.

    `full`: whether all values are known.

    Raises:
        UserError: the directory cannot be written (full, read-only, gone).
    """
    return _write(store_dir, SPECTRA, update, spectra, full)


def write_refresh(store_dir: Path, update: int, solved: Mapping[str, Solved], *, full: bool = True) -> None:
    """Write the spectra and vectors of one refresh. `full` and errors: see `write_spectra`."""
    scaled = {key + _SCALED: one.thirds.s for key, one in solved.items() if one.thirds}
    write_spectra(store_dir, update, {key: one.s for key, one in solved.items()} | scaled, full=full)
    arrays: dict[str, np.ndarray] = {}
    for key, one in solved.items():
        parts = {"top": one.top, "last": one.last}
        if one.block is not None:
            between = np.flatnonzero(~_is_recorded(one.top.s.size, one.block.s.size))
            parts[_BETWEEN] = one.block.pick(between.tolist())
        arrays |= {f"{key}:{end}:{name}": getattr(of, name) for end, of in parts.items() for name in _FIELDS}
    _write(store_dir, VECTORS, update, arrays, full)


def write_circuits(store_dir: Path, one: StoredCircuits) -> None:
    """Write the circuits of a refresh. Raises `UserError`."""
    _write(store_dir, CIRCUITS, one.update, as_arrays(one.blocks, one.circuits), full=True)


def write_scalars(store_dir: Path, one: StoredScalars) -> None:
    """Write the scalars of a refresh. Raises `UserError`."""
    names = {name: np.frombuffer(json.dumps(of).encode(), np.uint8) for name, of in zip(_NAMES, one[1:3], strict=True)}
    _write(store_dir, SCALARS, one.update, {**names, "values": one.values_NM}, one.full)


def write_flows(store_dir: Path, update: int, flows: Mapping[str, Flows]) -> Path:
    """Write the flows of a validation by kind; return the path. Raises `UserError`."""
    arrays: dict[str, np.ndarray] = {}
    for kind, found in flows.items():
        arrays |= {f"{kind}/{block}:variances": one for block, one in found.variances.items()}
        arrays |= {f"{kind}/{block}:entropies": one for block, one in found.entropies.items()}
    with contextlib.suppress(OSError):  # writing the file reports it
        store_dir.mkdir(exist_ok=True)
    return _write(store_dir, FLOWS, update, arrays, full=True)


def forget_flows(store_dir: Path, update: int) -> None:
    """Delete the flows of validations after `update`, which a run resumed from there makes again."""
    with contextlib.suppress(OSError):
        for path in files_of(store_dir, FLOWS):
            if update_of(path) > update:
                path.unlink(missing_ok=True)


def list_spectra(store_dir: Path) -> list[Path]:
    """The stored refreshes in the order of their updates; empty when there is no such directory."""
    return files_of(store_dir, SPECTRA)


def list_vectors(store_dir: Path) -> list[Path]:
    """The stored vectors in the order of their updates; empty when there is no such directory."""
    return files_of(store_dir, VECTORS)


def list_scalars(store_dir: Path) -> list[Path]:
    """The stored scalars in the order of their updates; empty when there is no such directory."""
    return files_of(store_dir, SCALARS)


def read_scalars(path: Path) -> StoredScalars:
    """Read the scalars of one refresh.

    Raises:
        UserError: the file is missing or damaged.
    """
    update, arrays, full = _read(path)
    try:
        keys, metrics = (list(map(str, json.loads(arrays[name].tobytes()))) for name in _NAMES)
        values_NM = arrays["values"].astype(np.float64, copy=False).reshape(len(keys), len(metrics))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the scalars in {path}: {type(error).__name__}: {error}") from error
    return StoredScalars(update, keys, metrics, values_NM, full)


def read_newest_circuits(store_dir: Path) -> StoredCircuits:
    """The circuits of the newest refresh that has some; `NO_CIRCUITS` where there is none."""
    for path in reversed(files_of(store_dir, CIRCUITS)):
        with contextlib.suppress(UserError, KeyError):
            update, arrays, _ = _read(path)
            return StoredCircuits(update, *of_arrays(arrays))
    return NO_CIRCUITS


def read_circuits(path: Path) -> StoredCircuits:
    """The circuits that an analysis has stored, under the kind "spec"; `NO_CIRCUITS` without a readable file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            blocks, circuits = of_arrays(stored)
            return StoredCircuits(-1, {f"spec/circuit/{block}": one for block, one in blocks.items()}, circuits)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return NO_CIRCUITS


def read_spectra(path: Path) -> StoredSpectra:
    """Read one refresh, matrices in model order.

    Raises:
        UserError: the file is missing or damaged.
    """
    update, arrays, full = _read(path)
    return StoredSpectra(update, {key: s for key, s in arrays.items() if not key.endswith(_SCALED)}, full)


def read_scaled(path: Path) -> dict[str, np.ndarray]:
    """The spectra to compare with noise of a refresh's fused qkv matrices, by "<kind>/<name>"; see `extremes.Thirds`.

    Raises:
        UserError: the file is missing or damaged.
    """
    _, arrays, _ = _read(path)
    return {key.removesuffix(_SCALED): s for key, s in arrays.items() if key.endswith(_SCALED)}


def is_full(path: Path) -> bool:
    """Whether a file is of a refresh of whole spectra; True for a file that cannot be read."""
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as file:
        return f"{FIRST_ALONE}.npy" not in file.NameToInfo
    return True


def read_vectors(path: Path) -> StoredVectors:
    """Read the recorded triplets of one refresh, matrices in model order.

    Raises:
        UserError: the file is missing or damaged.
    """
    update, arrays, full = _read(path)
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
    return StoredVectors(update, ends, blocks, full)


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


def path_of(folder: Path, prefix: str, update: int) -> Path:
    """The path of an update's file with this prefix, such as `SPECTRA`."""
    return folder / f"{prefix}_{update:08d}{_suffix(prefix)}"


def files_of(folder: Path, prefix: str) -> list[Path]:
    """The store's files with this prefix, in the order of their updates; not other names such as update_best.npz."""
    name = re.compile(rf"{prefix}_[0-9]{{8,}}{re.escape(_suffix(prefix))}")
    found = (path for path in folder.glob(f"{prefix}_*") if name.fullmatch(path.name))
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _suffix(prefix: str) -> str:
    return ".pth" if prefix == WEIGHTS else ".npz"


def update_of(path: Path) -> int:
    """The update whose refresh a file of the store holds."""
    return int(path.stem.rpartition("_")[2])


def _write(folder: Path, prefix: str, update: int, arrays: Mapping[str, np.ndarray], full: bool) -> Path:
    path = path_of(folder, prefix, update)
    more = {} if full else {FIRST_ALONE: np.True_}
    try:
        with whole_file(path) as file:
            np.savez(file, allow_pickle=False, update=np.int64(update), **more, **arrays)
    except OSError as error:
        raise UserError(
            f"cannot store the spectra of update {update} in {folder}: {error.strerror or error}. "
            "Free some space, or make the directory writable."
        ) from error
    return path


def _read(path: Path) -> tuple[int, dict[str, np.ndarray], bool]:
    """The update, the arrays by name, and whether these are of whole spectra."""
    try:
        # Opened here: np.load leaves the file open when it finds the archive damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files if key not in ("update", FIRST_ALONE)}
            return int(stored["update"]), arrays, FIRST_ALONE not in stored.files
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the spectra in {path}: {error}") from error
