"""The spectra of one set of weights, or the drift between two, offline: the same numbers as the monitor's, as JSON."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import remove_leftovers, whole_file, write_whole
from lowrank_vit.common.terminal import Steady, one_line
from lowrank_vit.model.low_rank import with_products
from lowrank_vit.spectral.fused import fused_qkv_of_state
from lowrank_vit.spectral.measures.aggregates import aggregates
from lowrank_vit.spectral.measures.circuits import BlockCircuits, circuit_metrics
from lowrank_vit.spectral.measures.initial import FarEntry, far_entries_by_name
from lowrank_vit.spectral.measures.metrics import recorded_indices
from lowrank_vit.spectral.measures.statistics import statistics_of
from lowrank_vit.spectral.measures.subspaces import chance_of_each
from lowrank_vit.spectral.measures.updates import block_energies, update_norms
from lowrank_vit.spectral.select import Targets, choose_targets, fused_of, take_targets
from lowrank_vit.spectral.solving.extremes import EPS, Recorded, Solved, Triplets, not_finite
from lowrank_vit.spectral.solving.pieces import names_in_pieces
from lowrank_vit.spectral.solving.solve import MatrixStack, stack_by_shape
from lowrank_vit.spectral.watching.pace import LONG, foretold_s, in_seconds, operations
from lowrank_vit.spectral.watching.refresh import (
    MODEL,
    SpectralSettings,
    drift_metrics,
    matrix_metrics,
    solve_all,
)

Precision = Literal["float64", "float32"]
_LISTED = ("sv", "sv_last")


@dataclass(frozen=True)
class Analysis:
    """The solutions and scalars of one set of weights, by matrix in model order."""

    settings: SpectralSettings
    solved: dict[str, Solved]
    values: dict[str, dict[str, float]]
    weights: dict[str, Tensor] = field(repr=False)
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Tests of the fitted numbers, see `statistics.statistics_of`; empty where they were not asked for."""
    circuits: dict[str, BlockCircuits] = field(default_factory=dict)
    """By block; empty where they were not asked for."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) by name."""
        return {name: (w.shape[0], w.shape[1]) for name, w in self.weights.items()}

    @cached_property
    def far_entries(self) -> dict[str, list[FarEntry]]:
        """Single entries far from the rest of their matrix; only matrices that have any."""
        return far_entries_by_name(self.weights)

    @property
    def types(self) -> dict[str, dict[str, float]]:
        """Means over the layers of a type; see `aggregates.aggregates`."""
        return by_group("type", self.values)

    @property
    def depths(self) -> dict[str, dict[str, float]]:
        """Means over the matrices of a block, by its number."""
        return by_group("depth", self.values)


def choose_weights(
    state: Mapping[str, Tensor], targets: Targets, split_qkv: bool, device: torch.device, arch: str = ""
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Name to matrix on `device`, and the names of those whose rows are known to be Q, K and V.

    That layout follows from `arch`, timm's name of the model; without it from the names in `state`, for a plain ViT. A
    factorised layer counts as the layer it replaces. Raises `UserError`, see `choose_targets`.
    """
    state = with_products(state)
    watched = choose_targets(state, targets, split_qkv, fused_qkv_of_state(state, arch), flags="--")
    matrices = take_targets(lambda name: state[f"{name}.weight" if f"{name}.weight" in state else name], watched)
    return {name: matrix.detach().to(device) for name, matrix in matrices.items()}, fused_of(watched)


def analyze_weights(
    weights: Mapping[str, Tensor],
    settings: SpectralSettings,
    precision: Precision = "float64",
    bootstraps: int = 0,
    fused: Collection[str] = (),
    say: Callable[[str], object] | None = None,
) -> Analysis:
    """Solve the matrices on their device and describe them as the monitor does.

    Args:
        weights: matrices by name, of any floating-point dtype.
        settings: those of the monitor.
        precision: "float32" describes a plain float32 SVD instead, with its certificates, as most code computes it.
        bootstraps: draws for each matrix's `statistics`; 0 leaves these out. See `statistics.statistics_of`.
        fused: see `choose_weights`.
        say: gets a message about the expected time, where that is long, and then the progress.
    """
    if precision == "float64":
        solved = _solved(weights, settings, fused, say)
    else:
        solved = {name: _float32_svd(weight, settings) for name, weight in weights.items()}
    solved = {name: solved[name] for name in weights}
    values = {name: matrix_metrics(one, settings) for name, one in solved.items()}
    statistics = statistics_of(weights, solved, settings, bootstraps, fused) if bootstraps else {}
    return Analysis(settings, solved, values, dict(weights), statistics)


def _solved(
    weights: Mapping[str, Tensor],
    settings: SpectralSettings,
    fused: Collection[str],
    say: Callable[[str], object] | None,
) -> dict[str, Solved]:
    """Solve the matrices in pieces of one shape; only one piece at a time is copied."""

    def stacks_of(names: Iterable[str]) -> list[MatrixStack]:
        return stack_by_shape({name: weights[name] for name in names}, fused)

    pieces = list(names_in_pieces(weights, 4 * settings.cpu_threads))
    if say and operations((w.shape[0], w.shape[1]) for w in weights.values()) >= LONG:
        seconds = foretold_s(((stacks_of(names[:1])[0], len(names)) for names in pieces), settings)
        say(f"spectra of {len(weights):,} matrices take about {in_seconds(seconds)}")
    progress, solved = Steady(len(weights), say), dict[str, Solved]()
    for names in pieces:
        solved |= solve_all(stacks_of(names), settings)
        progress.tell(len(solved), "spectra: matrix")
    return solved


def compare(before: Analysis, after: Analysis) -> dict[str, dict[str, float]]:
    """By name, what the monitor would log at `after` with `before` as the refresh before it, and "update_rel".

    "update_rel" is |W - W'|_F / |W'|_F, W' of `before`; NaN where W' is zero.

    Raises:
        UserError: the two are not of the same matrices.
    """
    if before.shapes != after.shapes:
        different = sorted(set(before.shapes.items()) ^ set(after.shapes.items()))[0]
        raise UserError(
            f"--compare: the checkpoints are of different models: {different[0]} of shape "
            f"{'x'.join(map(str, different[1]))} is only in one. Give two checkpoints of one model."
        )
    of_weights: dict[str, dict[str, float]] = {}
    threads = after.settings.cpu_threads
    for names in names_in_pieces(before.weights, threads):
        # Two files of one model may store its matrices in different dtypes.
        pair = (stack_by_shape({name: of.weights[name].double() for name in names}) for of in (before, after))
        ((old,), (new,)) = pair
        energies = block_energies(before.solved, after.solved, new, threads)
        for name, norms in update_norms(old, new, threads, after.settings.solver).items():
            size = float(np.linalg.norm(before.solved[name].s))
            relative = norms["update_normF"] / size if size else math.nan
            of_weights[name] = norms | energies[name] | {"update_rel": relative}
    was = before.solved
    return {name: drift_metrics(was[name], now, of_weights[name], was[name]) for name, now in after.solved.items()}


def as_json(analysis: Analysis, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into `<model>_spectral.json`: {"meta", "layers": {name: numbers}, "types": ..., "depths": ...}.

    Every float is the float64 itself (Python writes the shortest text that reads back to the same bits); a NaN or an
    infinity, which JSON does not know, is null. "sv_topk" and "sv_lastk" are the values at "indices_top" and
    "indices_last" (see `recorded_indices`); "chance" is what each principal cosine of these vectors would be
    between random subspaces, by side (see `subspaces.chance_of_each`); "far_entries" are single entries far from the
    rest, as [{"at": [row, column], "value", "deviations"}] (see `initial.far_entries`). The other names are the
    monitor's. "circuits" is `circuits.circuit_metrics` by block, where the analysis has circuits.
    """
    settings, layers = analysis.settings, {}
    for name, solved in analysis.solved.items():
        top, last = recorded_indices(solved.s.size, settings.topk, settings.interval)
        values = analysis.values[name]
        layers[name] = {
            "shape": list(analysis.shapes[name]),
            "solver": solved.solver,
            "note": solved.note,
            "indices_top": top,
            "indices_last": last,
            "chance": chance_of_each(len(top), analysis.shapes[name]),
            "far_entries": [one.content() for one in analysis.far_entries.get(name, ())],
            "sv_topk": _plain([values[f"sv{k}"] for k in range(1, len(top) + 1)]),
            "sv_lastk": _plain([values[f"sv_last{k}"] for k in range(1, len(last) + 1)]),
            "sigma_min": _plain(float(solved.s[-1])),
            **{key: _plain(value) for key, value in values.items() if key.rstrip("0123456789") not in _LISTED},
        }
        if analysis.statistics:
            layers[name]["statistics"] = _plain_values(analysis.statistics[name])
    content = {"meta": dict(meta) | {"topk": settings.topk, "interval": settings.interval}, "layers": layers}
    if analysis.circuits:
        content["circuits"] = {block: _plain_values(circuit_metrics(one)) for block, one in analysis.circuits.items()}
    for heading, groups in (("types", analysis.types), ("depths", analysis.depths)):
        content[heading] = {name: _plain_values(group) for name, group in groups.items()}
    return content


def drift_as_json(drift: Mapping[str, Mapping[str, float]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into `<model>_drift.json`: {"meta", "layers", "types", "depths"} of the numbers of `compare`."""
    groups = {"layers": drift, "types": by_group("type", drift), "depths": by_group("depth", drift)}
    plain = {heading: {name: _plain_values(of) for name, of in group.items()} for heading, group in groups.items()}
    return {"meta": dict(meta), **plain}


def arrays_of(analysis: Analysis, *, vectors: bool, full: bool) -> dict[str, np.ndarray]:
    """The arrays to save, float64, by "<name>:<what>".

    "s" (K,) all values; of a fused qkv matrix also "scaled" (K,), see `extremes.Thirds`. With `vectors` also "top:u"
    (R, k), "top:v" (C, k), "last:u", "last:v" at the recorded indices. With `vectors` and `full` instead "u" (R, K) and
    "v" (C, K) of all values, from a separate float64 SVD: the matrix is u diag(s) v^T.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, solved in analysis.solved.items():
        arrays[f"{name}:s"] = solved.s
        if solved.thirds:
            arrays[f"{name}:scaled"] = solved.thirds.s
        if vectors and full and solved.solver != "none":
            u, s, vh = torch.linalg.svd(analysis.weights[name].double(), full_matrices=False)
            u_RK, s_K, v_CK = (x.cpu().numpy() for x in (u, s, vh.mT))
            arrays |= {f"{name}:u": u_RK, f"{name}:s": s_K, f"{name}:v": v_CK}
        elif vectors:
            for end, triplets in (("top", solved.top), ("last", solved.last)):
                arrays |= {f"{name}:{end}:u": triplets.u, f"{name}:{end}:v": triplets.v}
    return arrays


def free_stem(folder: Path, meta: Mapping[str, Any]) -> str:
    """The beginning of the names of an analysis's files: the model's name, and more where another state has that.

    A state is known by its model, checkpoint and epoch, and by whether it is the EMA or the raw weights. Earlier files
    of the same state are replaced, whatever their settings.
    """
    ema = "_ema" if meta["use_ema"] else ""
    of_file = Path(meta["checkpoint"]).name.split(".")[0]
    stems = [meta["model"], f"{meta['model']}{ema}", f"{meta['model']}_{of_file}{ema}"]
    more = (f"{stems[-1]}_{i}" for i in itertools.count(2))
    return next(stem for stem in itertools.chain(stems, more) if _is_own(folder / f"{stem}_spectral.json", meta))


def _is_own(path: Path, meta: Mapping[str, Any]) -> bool:
    """Whether nothing is at `path`, or the analysis of the same state."""
    if not path.exists():
        return True
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8"))["meta"])
        places = [Path(str(one["checkpoint"])).resolve() for one in (found, meta)]
        return places[0] == places[1] and all(found[key] == meta[key] for key in ("model", "epoch", "use_ema"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write to .npz or, as tensors, to .pt; atomically. Raises `UserError`.

    Leftovers of this file from killed processes are removed first, since they may be large.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        with whole_file(path) as file:
            if path.suffix == ".npz":
                np.savez(file, allow_pickle=False, **{one_line(name): array for name, array in arrays.items()})
            else:
                torch.save({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}, file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; choose another --save-dir") from error


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write atomically, making the directory if need be.

    Raises:
        UserError: the directory cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --save-dir") from error


def by_group(by: str, values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Means of the numbers of matrices by "type" or "depth", see `aggregates.aggregates`."""
    prefix = f"{MODEL}/{by}/"
    found = aggregates({f"{MODEL}/{name}": numbers for name, numbers in values.items()})
    return {key.removeprefix(prefix): group for key, group in found.items() if key.startswith(prefix)}


def _float32_svd(weight: Tensor, settings: SpectralSettings) -> Solved:
    rows, cols = weight.shape
    top, last = recorded_indices(min(rows, cols), settings.topk, settings.interval)
    if not bool(torch.isfinite(weight).all()):
        return not_finite((rows, cols), top[-1]).recorded(Recorded(top, last))
    found = torch.linalg.svd(weight.float(), full_matrices=False)
    u, s, vh = (x.cpu().numpy().astype(np.float64) for x in found)
    a = weight.double().cpu().numpy()

    def end(indices: list[int]) -> Triplets:
        at = [i - 1 for i in indices]
        left, right = u[:, at], vh[at].T
        ahead = np.linalg.norm(a @ right - left * s[at], axis=0)
        back = np.linalg.norm(a.T @ left - right * s[at], axis=0)
        return Triplets(s[at], left, right, np.sqrt((ahead**2 + back**2) / 2) + EPS * max(a.shape) ** 0.5 * s[0])

    ends = end(top), end(last)
    off = max(float(np.abs(x.T @ x - np.eye(x.shape[1])).max()) for one in ends for x in (one.u, one.v))
    block = end(list(range(1, top[-1] + 1))) if top[-1] > len(top) else None
    return Solved(s, *ends, off, "float32 svd", block=block)


def _plain(value: float | Iterable[float]) -> Any:
    if isinstance(value, Iterable):
        return [_plain(one) for one in value]
    return value if math.isfinite(value) else None


def _plain_values(values: Mapping[str, float]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in values.items()}
