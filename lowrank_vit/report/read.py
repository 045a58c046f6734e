"""Reads the data of a report: a run directory, finished or not, or an analysis.

Missing or damaged parts are left out with a note.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lowrank_vit.common.errors import UserError
from lowrank_vit.report.events import (
    MAX_SNAPSHOTS,
    SCALARS,
    Columns,
    as_float,
    by_update,
    read_flows,
    read_scalars,
    read_train,
    thinned,
)
from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.status import RunStatus, run_status
from lowrank_vit.spectral.measures.initial import FarEntry, in_words
from lowrank_vit.spectral.watching.files import (
    NO_CIRCUITS,
    StoredCircuits,
    StoredSpectra,
    StoredVectors,
    read_circuits,
    read_newest_circuits,
    read_scaled,
)
from lowrank_vit.spectral.watching.stored import Spectra, store_dir_of


@dataclass(frozen=True)
class Run:
    """The contents of a run directory. Any part may be empty; `notes` then tells the reader."""

    path: Path
    epochs: Columns
    """`summary.csv`, a row per epoch, by update."""
    train: Columns
    """The "train" events of `metrics.jsonl`, by update."""
    args: dict[str, Any]
    environment: dict[str, Any]
    """`environment.json` with nested names joined by dots."""
    spectra: list[StoredSpectra]
    """By update; each maps "spec/<module>" or "spec_ema/<module>" to singular values, in some only the first ones."""
    scalars: Columns = field(default_factory=dict)
    """`SCALARS` of each refresh, by update, as "spec/<name>/<metric>" or "spec_ema/...", including means."""
    flows: Columns = field(default_factory=dict)
    """The "flow" events of `metrics.jsonl`, by update."""
    vectors: list[StoredVectors] = field(default_factory=list)
    """The first, the last but one and the newest stored ones, or fewer."""
    scaled: dict[str, np.ndarray] = field(default_factory=dict)
    """Fused qkv matrix to its newest spectrum to compare with noise (`extremes.Thirds`)."""
    circuits: StoredCircuits = NO_CIRCUITS
    """The newest circuits of heads."""
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Matrix to (rows, columns)."""
    moment: Callable[[], str] | None = None
    """The moment that an analysis is of, in words of `tr`'s language; None for a run, which has updates."""
    status: RunStatus | None = None
    """The progress of a run; None for an analysis."""
    notes: list[str] = field(default_factory=list)


def read_run(path: Path, *, spectra: bool = True) -> Run:
    """Read what `lowrank_vit.train` has written to `path` so far, or the `store_dir` of a monitor.

    With `spectra` False the store of the spectra is not read. A half-written last line, and damaged or missing files,
    are left out with a note and are no error.

    Raises:
        UserError: there is no such directory, or nothing of a run in it.
    """
    if path.is_file():
        raise UserError(
            f"{path} is a file, but not one of a run. Give the directory that `python -m lowrank_vit.train` wrote, "
            f"usually output/<experiment>, or a file that analyze_spectrum wrote: *{ENDING}, *_drift.json."
        )
    if not path.is_dir():
        raise UserError(
            f"no run directory at {path}. Give the directory that `python -m lowrank_vit.train` wrote, "
            "usually output/<experiment>."
        )
    notes: list[str] = []
    stored = Spectra(store_dir_of(path))
    of_files = [] if stored.path == path else notes  # a monitor's own directory has none of these files
    args = read_args(path / "args.yaml", of_files)
    epochs = read_summary(path / "summary.csv", [] if args.get("synthetic") else of_files)  # synthetic: no validation
    train = read_train(path / "metrics.jsonl", of_files)
    environment = _read_environment(path / "environment.json", of_files)
    run = Run(
        path,
        epochs=epochs,
        train=train,
        args=args,
        environment=environment,
        spectra=[],
        shapes=stored.shapes,
        status=run_status(path, args, epochs, train),
        notes=notes,
    )
    if spectra:
        run = _with_spectra(run, stored)
    if not (run.epochs or run.train or run.args or run.environment or stored.updates):
        raise UserError(
            f"{path} holds no run: expected some of summary.csv, metrics.jsonl, args.yaml, environment.json, spectra/. "
            "Give the directory that `python -m lowrank_vit.train` wrote, usually output/<experiment>, or a monitor's "
            "store_dir."
        )
    return run


def _with_spectra(run: Run, stored: Spectra) -> Run:
    spectra, log = _read_all_spectra(stored, run.notes), run.path / "metrics.jsonl"
    if stored.far_entries:
        text = msg(
            "At the start single entries stand far out: {entries}. They alone may decide sigma_max, stable rank and "
            "cosines of these matrices."
        )
        run.notes.append(tr(text, entries=_entries(stored.far_entries)))
    return dataclasses.replace(
        run,
        spectra=spectra,
        scaled=_read_newest_scaled(stored, spectra),
        scalars=read_scalars(log, stored.history),
        flows=read_flows(log),
        vectors=_read_some_vectors(stored),
        circuits=read_newest_circuits(stored.path),
    )


def series(run: Run, kind: str, *, whole: bool = True) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The spectra of one kind ("spec" or "spec_ema") over time.

    `whole`: only refreshes of whole spectra; otherwise unknown values of the others are NaN.

    Returns:
        updates (T,) int64, and module to (T, K) float64, descending along K, in model order. Refreshes that lack a
        module or hold it in another size (another run's leftovers) are left out of both.
    """
    prefix = kind + "/"
    refreshes = [
        (stored.update, {key.removeprefix(prefix): s for key, s in stored.spectra.items() if key.startswith(prefix)})
        for stored in run.spectra
        if stored.full or not whole
    ]
    if not refreshes or not refreshes[-1][1]:
        return np.empty(0, dtype=np.int64), {}
    modules = {name: s.shape for name, s in refreshes[-1][1].items()}
    kept = [(update, s) for update, s in refreshes if {name: v.shape for name, v in s.items()} == modules]
    updates = np.array([update for update, _ in kept], dtype=np.int64)
    return updates, {name: np.stack([s[name] for _, s in kept]) for name in modules}


def read_summary(path: Path, notes: list[str]) -> Columns:
    """The rows of a `summary.csv`; problems are added to `notes`."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{key: as_float(cell) for key, cell in row.items() if key} for row in csv.DictReader(file)]
    except FileNotFoundError:
        notes.append(tr("summary.csv is not there yet: no epoch has been validated."))
        return {}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        notes.append(tr("summary.csv cannot be read ({why}).", why=error))
        return {}
    whole = [row for row in rows if not math.isnan(row.get("update", math.nan))]
    if len(whole) < len(rows):
        notes.append(tr("summary.csv has {n} incomplete row(s), left out.", n=len(rows) - len(whole)))
    return by_update(whole)


def _read_some_vectors(stored: Spectra) -> list[StoredVectors]:
    updates = stored.vector_updates
    found: list[StoredVectors] = []
    for update in dict.fromkeys([*updates[:1], *updates[-2:]]):
        with contextlib.suppress(UserError):
            found.append(stored.refresh_vectors(update))
    return found


def read_args(path: Path, notes: list[str]) -> dict[str, Any]:
    """The options of an `args.yaml`; problems are added to `notes`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        notes.append(tr("args.yaml is missing or cannot be read: the run's arguments are not shown."))
        return {}
    return dict(content) if isinstance(content, Mapping) else {}


def _read_environment(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        notes.append(tr("environment.json is missing or cannot be read: versions and hardware are not shown."))
        return {}
    return _flatten(content) if isinstance(content, Mapping) else {}


def _read_all_spectra(stored: Spectra, notes: list[str]) -> list[StoredSpectra]:
    updates = stored.updates
    if not updates:
        notes.append(
            tr("There are no spectra: the spectral monitor (--spec-monitor) was off or has not stored any yet.")
        )
    if len(updates) > MAX_SNAPSHOTS:
        notes.append(tr("{n} of {all} stored spectra are used, evenly spaced.", n=MAX_SNAPSHOTS, all=len(updates)))
        whole = thinned(stored.full_updates, MAX_SNAPSHOTS)
        others = [update for update in updates if update not in whole]
        updates = sorted([*whole, *thinned(others, MAX_SNAPSHOTS - len(whole))])
    spectra: list[StoredSpectra] = []
    for update in updates:
        try:
            spectra.append(stored.refresh(update))
        except UserError:
            if stored.file(update).exists():  # else a running training has thinned it out in the meantime
                notes.append(tr("{file} is damaged, left out.", file=stored.file(update).name))
    return spectra


def _read_newest_scaled(stored: Spectra, spectra: list[StoredSpectra]) -> dict[str, np.ndarray]:
    with contextlib.suppress(UserError, IndexError):
        found = read_scaled(stored.file([one.update for one in spectra if one.full][-1]))
        return {key.removeprefix("spec/"): s for key, s in found.items() if key.startswith("spec/")}
    return {}


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


ENDING = "_spectral.json"


def find_analysis(path: Path) -> Path | None:
    """`path` if it is a `*_spectral.json`, or the one in a folder that is not a run's; else None.

    Raises:
        UserError: the folder holds several.
    """
    if path.is_file():
        return path if path.name.endswith(ENDING) else None
    found = [] if (path / "args.yaml").exists() else sorted(path.glob(f"*{ENDING}"))
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise UserError(f"{path} holds several analyses ({names}); give one of these files.")
    return found[0] if found else None


def read_analysis(path: Path) -> Run:
    """The analysis, and its full spectra if `--full` or `--save-vectors` wrote them beside it as .npz.

    Raises:
        UserError: the file cannot be read, or is not an analysis.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        meta, layers = dict(content["meta"]), dict(content["layers"])
        shapes = {name: (int(one["shape"][0]), int(one["shape"][1])) for name, one in layers.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as an analysis ({error}); write it with `python -m lowrank_vit.analyze_spectrum`."
        ) from error
    epoch, is_ema = int(meta.get("epoch", -1)), bool(meta.get("use_ema"))
    scalars: Columns = {"update": np.zeros(1)}
    for name, numbers in layers.items():
        scalars |= {
            f"spec/{name}/{key}": np.array([math.nan if value is None else float(value)])
            for key, value in numbers.items()
            if key in SCALARS
        }
    notes: list[str] = []
    far: dict[str, list[FarEntry]] = {}
    with contextlib.suppress(KeyError, TypeError, ValueError):
        far = {name: of for name, one in layers.items() if (of := [FarEntry.of(e) for e in one.get("far_entries", ())])}
    if far:
        text = msg(
            "Here single entries stand far out: {entries}. They alone may decide sigma_max, stable rank and "
            "cosines of these matrices."
        )
        notes.append(tr(text, entries=_entries(far)))
    spectra, scaled = _read_full(path.with_name(path.name.removesuffix(ENDING) + "_vectors.npz"), list(layers))
    if not spectra:
        notes.append(tr("Only the recorded values are there; `analyze_spectrum --full` also saves the full spectra."))
    return Run(
        path.parent,
        epochs={},
        train={},
        args=_shown(meta),
        environment={},
        spectra=[StoredSpectra(0, spectra)] if spectra else [],
        scaled=scaled,
        scalars=scalars,
        circuits=read_circuits(path.with_name(path.name.removesuffix(ENDING) + "_circuits.npz")),
        shapes=shapes,
        moment=lambda: _moment(epoch, is_ema),
        notes=notes,
    )


def _moment(epoch: int, is_ema: bool) -> str:
    weights = tr("EMA weights") if is_ema else tr("raw weights")
    return tr("epoch {n}, {weights}", n=epoch + 1, weights=weights) if epoch >= 0 else weights


def _entries(found: Mapping[str, Sequence[FarEntry]]) -> str:
    one = tr("{name}[{at}] = {value:.4g} ({deviations:.0f} standard deviations)")
    return in_words(found, one, tr(" and {n} more"))


def _read_full(path: Path, names: list[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Spectra by "spec/<name>", and by name the spectra of fused qkv matrices to compare with noise; or empty."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            scaled = {name: stored[key] for name in names if (key := f"{name}:scaled") in stored}
            return {f"spec/{name}": stored[f"{name}:s"] for name in names}, scaled
    except (OSError, ValueError, KeyError, EOFError):
        return {}, {}


def _shown(meta: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in meta.items() if not isinstance(value, dict)}
