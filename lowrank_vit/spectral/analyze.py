"""The spectra of one set of weights, offline: the same numbers as the monitor's, as tables and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_prep.errors import UserError
from lowrank_vit.spectral.metrics import effective_rank, recorded_indices, stable_rank
from lowrank_vit.spectral.select import module_type, select_targets
from lowrank_vit.spectral.solve import singular_values


@dataclass(frozen=True)
class LayerSpectrum:
    """One weight matrix: its shape (rows, columns) and all its singular values, float64, descending."""

    shape: tuple[int, int]
    s: np.ndarray

    @property
    def stable_rank(self) -> float:
        """See `metrics.stable_rank`."""
        return stable_rank(self.s)

    @property
    def effective_rank(self) -> float:
        """See `metrics.effective_rank`."""
        return effective_rank(self.s)


def analyze_weights(weights: Mapping[str, Tensor], targets: str) -> dict[str, LayerSpectrum]:
    """Module name to its spectrum, in model order; computed where the weights are.

    Args:
        weights: a state dict.
        targets: see `select_targets`, whose `UserError` this raises.
    """
    chosen = select_targets(weights, targets)
    spectra = singular_values(chosen)
    return {name: LayerSpectrum((w.shape[0], w.shape[1]), spectra[name]) for name, w in chosen.items()}


def by_type(layers: Mapping[str, LayerSpectrum]) -> dict[str, list[LayerSpectrum]]:
    """The layers grouped by `module_type`, in model order."""
    groups: dict[str, list[LayerSpectrum]] = {}
    for name, layer in layers.items():
        groups.setdefault(module_type(name), []).append(layer)
    return groups


def as_json(layers: Mapping[str, LayerSpectrum], meta: Mapping[str, Any], topk: int, interval: int) -> dict[str, Any]:
    """What goes into `<model>_spectral.json`: {"meta", "layers": {module: numbers}, "types": {type: means}}.

    Every float is the float64 itself (Python writes the shortest text that reads back to the same bits); a NaN, which
    JSON does not know, is null. "sv_topk" and "sv_lastk" follow `recorded_indices`.
    """
    rows: dict[str, Any] = {}
    for name, layer in layers.items():
        top, last = recorded_indices(layer.s.size, topk, interval)
        rows[name] = {
            "shape": list(layer.shape),
            "sigma_max": _number(layer.s[0]),
            "sigma_min": _number(layer.s[-1]),
            "sv_topk": [_number(layer.s[i - 1]) for i in top],
            "sv_lastk": [_number(layer.s[i - 1]) for i in last],
            "stable_rank": _number(layer.stable_rank),
            "effective_rank": _number(layer.effective_rank),
        }
    types = {
        kind: {
            "layers": len(group),
            "sigma_max_mean": _number(_mean_sigma_max(group)),
            "stable_rank_mean": _number(_mean(layer.stable_rank for layer in group)),
            "effective_rank_mean": _number(_mean(layer.effective_rank for layer in group)),
        }
        for kind, group in by_type(layers).items()
    }
    return {"meta": dict(meta) | {"topk": topk, "interval": interval}, "layers": rows, "types": types}


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write atomically, making the directory if need be.

    Raises:
        UserError: the directory cannot be made or written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --save-dir") from error


def print_tables(layers: Mapping[str, LayerSpectrum], console: Console) -> None:
    """One line a layer, then one line a type. Fits 80 columns for a ViT's names."""
    table = _table("Spectra by layer", "layer", "shape", "σ max", "σ min", "stable\nrank", "effective\nrank")
    for name, layer in layers.items():
        rows, cols = layer.shape
        numbers = (layer.s[0], layer.s[-1], layer.stable_rank, layer.effective_rank)
        table.add_row(name, f"{rows}x{cols}", *(_text(number) for number in numbers))
    console.print(table)
    headings = ("layers", "mean\nσ max", "largest\nσ max", "mean\nstable rank", "mean\neffective rank")
    table = _table("Spectra by type", "type", *headings)
    for kind, group in by_type(layers).items():
        largest = float(np.max([layer.s[0] for layer in group]))
        ranks = (_mean(layer.stable_rank for layer in group), _mean(layer.effective_rank for layer in group))
        table.add_row(kind, str(len(group)), *(_text(v) for v in (_mean_sigma_max(group), largest, *ranks)))
    console.print(table)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _mean_sigma_max(group: list[LayerSpectrum]) -> float:
    return _mean(layer.s[0] for layer in group)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _text(value: float) -> str:
    """Four significant digits: 12.35, 0.0421, 3.1e-07."""
    return f"{value:.4g}"
