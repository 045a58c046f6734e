"""Results of `compress`: a table for the terminal, and the files compression.json, .csv and .png."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import write_all
from lowrank_vit.lowrank.curve import LayerPoint, Point, SampleScores, plain
from lowrank_vit.report.compression.read import NAME, Compression
from lowrank_vit.score.results import interval, rows_to_csv


@dataclass
class Result:
    """Everything that was measured."""

    original: SampleScores
    sizes: dict[str, int]
    """`params` and `flops` of the original model."""
    points: list[Point]
    constant: float = 1.0
    constant_from: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    """Into how many parts a target's rows are split; a rank is that of each part."""
    spectra: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Singular values by method, then by layer."""
    layers: list[LayerPoint] = field(default_factory=list)
    layers_by: str = ""
    """The method that truncates `layers`."""
    layer_scores: list[SampleScores] = field(default_factory=list)
    """One for each of `layers` if they were scored, otherwise empty."""
    latency: dict[str, Any] = field(default_factory=dict)

    def content(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The content of compression.json: `about`, then the numbers; its key `environment` comes last."""
        original = self.original
        scores = {"top1": original.top1, "loss": plain(original.loss), **self.sizes}
        num_samples = len(original.losses_N)
        scores |= {"num_samples": num_samples, "top1_interval": list(interval(original.top1, num_samples))}
        return {
            **{key: about[key] for key in about if key != "environment"},
            "original": scores,
            "constant": self.constant_from or None,
            "points": [one.content(original, self.constant) for one in self.points],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "parts": {name: self.parts.get(name, 1) for name in self.shapes},
            "spectra": {name: {method: of[name] for method, of in self.spectra.items()} for name in self.shapes},
            "sensitivities": {"method": self.layers_by, "layers": self._layers()},
            "latency": self.latency or None,
            "environment": about.get("environment", {}),
        }

    def _layers(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for n, one in enumerate(self.layers):
            row: dict[str, Any] = {"layer": one.layer, "share": one.share, "rank": one.rank}
            row["predicted"] = plain(self.constant * one.predicted)
            if self.layer_scores:
                than = self.layer_scores[n].than(self.original)
                row |= {"measured": plain(than.loss), "error": plain(than.loss_error), "top1_difference": than.top1}
            rows.append(row)
        return rows


def files_of(content: Mapping[str, Any], out: Path) -> dict[Path, Callable[[], str | bytes]]:
    """The files of a compression in `out`, each with a function that makes its content."""
    path = out / NAME
    rows = [{key: value for key, value in point.items() if key != "ranks"} for point in content["points"]]

    def picture() -> bytes:
        from lowrank_vit.report.compression.plots import curve_plot  # imports matplotlib: only if files are written

        return curve_plot(Compression(path, dict(content)))

    return {
        path: lambda: json.dumps(content, indent=1, allow_nan=False) + "\n",
        path.with_suffix(".csv"): lambda: rows_to_csv(rows),
        path.with_suffix(".png"): picture,
    }


def write_files(content: Mapping[str, Any], out: Path) -> list[Path]:
    """Write all files, even if one fails. Raises `UserError` with the names of those that could not be written."""
    files = files_of(content, out)
    write_all(files)
    return list(files)


def check_out(out: Path, fingerprint: str) -> None:
    """Raise `UserError` if `out` holds the results of other weights, or an unrelated file of that name."""
    path = out / NAME
    if not path.exists():
        return
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        source = content["source"]
        own, of = source["fingerprint"], f"{source['checkpoint']} ({source['weights']})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out: {path} exists and is not a result of this command. Give another --out.") from error
    if own != fingerprint:
        raise UserError(f"--out: {path} is the result of other weights, {of}, and is kept. Give another --out.")


def _difference(value: float, error: float, digits: int) -> str:
    """A difference with its standard error, which a single sample does not have."""
    return f"{value:+.{digits}f}" + ("" if math.isnan(error) else f"±{error:.{digits}f}")


def print_points(result: Result, points: Sequence[Point], console: Console) -> None:
    """Print a row for each point, at most 80 columns wide: sizes in percent of the original, and score differences."""
    original, several = result.original, len({one.allocation for one in points}) > 1
    of_ranks, of_flops = (("ranks",), ()) if several else ((), ("FLOPs",))  # there is no room for both
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("method", *of_ranks, "budget", "params", *of_flops, "top-1", "loss", "predicted"):
        table.add_column(name, justify="left" if name in ("method", "ranks") else "right", no_wrap=True)
    for one in points:
        assert one.scores is not None
        than = one.scores.than(original)
        row = {
            "method": one.method,
            "ranks": one.allocation,
            "budget": f"{one.budget:g}",
            "params": f"{100 * one.params / result.sizes['params']:.1f}%",
            "FLOPs": f"{100 * one.flops / max(1, result.sizes['flops']):.1f}%",
            "top-1": f"{one.scores.top1:.2f} {_difference(than.top1, than.top1_error, 2)}",
            "loss": f"{one.scores.loss:.4f} {_difference(than.loss, than.loss_error, 4)}",
            "predicted": f"{original.loss + result.constant * one.predicted:.4f}",
        }
        table.add_row(*(row[str(column.header)] for column in table.columns))
    console.print(table)
