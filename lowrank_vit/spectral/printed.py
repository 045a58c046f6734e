"""An analysis, or the drift between two, as tables in a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_vit.common.terminal import one_line
from lowrank_vit.spectral.analyze import Analysis, by_group
from lowrank_vit.spectral.measures.circuits import circuit_metrics

_COLUMNS = {
    "sigma_max": "σ max",
    "sigma_min": "σ min",
    "stable_rank": "stable\nrank",
    "effective_rank": "eff.\nrank",
    "alpha": "α",
    "mp_outliers": "out-\nliers",
}
_STATISTICS = {
    "alpha_p": "p of the\nlaw",
    "lr_exponential": "expo-\nnential",
    "lr_lognormal": "log-\nnormal",
    "lr_truncated": "cut\noff",
    "spikes": "spikes",
    "shuffled_alpha": "shuf-\nfled α",
    "shuffled_mp_outliers": "out-\nliers",
}
_WORTH = "Tests of the fits (ln likelihood ratio of the power law to others; * p < 0.1)"
_OF_HEADS = "Heads (z: how many standard deviations the mean composition lies above chance)"
_CIRCUITS = {
    "qk_sigma_max": "QK\nσ max",
    "qk_stable_rank_mean": "stable\nrank",
    "ov_sigma_max": "OV\nσ max",
    "ov_stable_rank_mean": "stable\nrank",
    "q_composition_z": "Q-comp.\nz",
    "q_composition_max": "\nmax",
    "k_composition_z": "K-comp.\nz",
    "k_composition_max": "\nmax",
}
_ERRORS = {"alpha": "alpha_sigma", "shuffled_alpha": "shuffled_alpha_sigma", "alpha_p": "alpha_p_error"}
"""The key of the standard error of a number that is shown with one."""
_CHANCES = {f"lr_{rival}": f"lr_{rival}_p" for rival in ("exponential", "lognormal", "truncated")}
"""The key of the p-value of a ratio, which gets a star if p is small."""
_DRIFT = {
    "update_rel": "|ΔW|F\n/ |W|F",
    "update_normF": "|ΔW|F",
    "update_norm2": "|ΔW|₂",
    "delta_sv_rel": "Δσ/σ",
    "turn_bound": "turn\nbound",
    "block_cos_u_overlap": "over-\nlap u",
    "block_cos_v_overlap": "over-\nlap v",
    "block_energy": "block\nenergy",
}


def print_analysis(analysis: Analysis, console: Console) -> None:
    """Print spectra by layer and means by type; the smallest singular value is shown by layer alone."""
    minima = {name: {"sigma_min": float(one.s[-1])} for name, one in analysis.solved.items()}
    layers = {name: values | minima[name] for name, values in analysis.values.items()}
    shapes = {name: f"{rows}x{cols}" for name, (rows, cols) in analysis.shapes.items()}
    console.print(_table("Spectra by layer", "layer", _COLUMNS, layers, shapes))
    by_type = {key: heading for key, heading in _COLUMNS.items() if key != "sigma_min"} | {"rank95": "rank\n95 %"}
    console.print(_table("Spectra by type, means", "type", by_type, analysis.types))
    if analysis.statistics:
        rows = {name: values | analysis.statistics[name] for name, values in analysis.values.items()}
        console.print(_table(_WORTH, "layer", _STATISTICS, rows))
    if analysis.circuits:
        blocks = {name: circuit_metrics(one) for name, one in analysis.circuits.items()}
        console.print(_table(_OF_HEADS, "block", _CIRCUITS, blocks))


def print_drift(drift: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Print the drift between two checkpoints by layer and by type."""
    console.print(_table("Drift by layer", "layer", _DRIFT, drift))
    console.print(_table("Drift by type, means", "type", _DRIFT, by_group("type", drift)))


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
        table.add_row(Text(one_line(name)), *shape, *(_text(key, numbers) for key in columns))
    return table


def _text(key: str, numbers: Mapping[str, float]) -> str:
    """Four significant digits: 12.35, 0.0421, 3.1e-07; fewer where a standard error or a p-value limits them."""
    value = float("nan") if (found := numbers.get(key)) is None else found
    if key in _ERRORS:
        error = numbers.get(_ERRORS[key], float("nan"))
        return f"{value:.3g}±{error:.0f}" if error >= 1 else f"{value:.3g}±{error:.1g}"
    if key in _CHANCES:
        return f"{value:+.2g}{'*' if numbers.get(_CHANCES[key], 1.0) < 0.1 else ' '}"
    return "none" if key == "turn_bound" and value == math.inf else f"{value:.4g}"
