"""The offline analysis in the terminal: one line a layer, then one line a type. Fits 80 columns for a ViT's names."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_vit.common.terminal import one_line
from lowrank_vit.spectral.analyze import Analysis

_COLUMNS = {
    "sigma_max": "σ max",
    "sigma_min": "σ min",
    "stable_rank": "stable\nrank",
    "effective_rank": "effect.\nrank",
    "alpha": "α",
    "mp_outliers": "out-\nliers",
}
_DRIFT = {
    "update_normF": "|ΔW|F",
    "update_norm2": "|ΔW|₂",
    "delta_sv_rel": "Δσ/σ",
    "cos_u_mean": "cos u\nmean",
    "cos_v_mean": "cos v\nmean",
}


def print_analysis(analysis: Analysis, console: Console) -> None:
    """Spectra by layer and by type; the smallest value is that of the layer, and the mean of them of a type."""
    minima = {name: {"sigma_min": float(one.s[-1])} for name, one in analysis.solved.items()}
    layers = {name: values | minima[name] for name, values in analysis.values.items()}
    shapes = {name: f"{rows}x{cols}" for name, (rows, cols) in analysis.shapes.items()}
    console.print(_table("Spectra by layer", "layer", _COLUMNS, layers, shapes))
    by_type = {key: heading for key, heading in _COLUMNS.items() if key != "sigma_min"} | {"rank95": "rank\n95 %"}
    console.print(_table("Spectra by type, means", "type", by_type, analysis.types))


def print_drift(
    layers: Mapping[str, Mapping[str, float]], types: Mapping[str, Mapping[str, float]], console: Console
) -> None:
    """Drift between two checkpoints by layer and by type."""
    console.print(_table("Drift by layer", "layer", _DRIFT, layers))
    console.print(_table("Drift by type, means", "type", _DRIFT, types))


def _table(
    title: str,
    first: str,
    columns: Mapping[str, str],
    rows: Mapping[str, Mapping[str, float]],
    shapes: Mapping[str, str] | None = None,
) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold")
    if shapes is not None:
        table.add_column("shape", justify="right", no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, numbers in rows.items():
        shape = [] if shapes is None else [shapes[name]]
        table.add_row(Text(one_line(name)), *shape, *(_text(key, numbers.get(key, float("nan"))) for key in columns))
    return table


def _text(key: str, value: float) -> str:
    """Four significant digits: 12.35, 0.0421, 3.1e-07; three of alpha, whose error is in the second."""
    return f"{value:.3g}" if key == "alpha" else f"{value:.4g}"
