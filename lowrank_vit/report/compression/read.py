"""Reads `compression.json` and makes its tables: points, ranks, sensitivities of layers, predictions, latency."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.report.language import msg, tr

NAME = "compression.json"
_SEQUENTIAL = msg(" Losses are predicted for these ranks without --sequential, so for other factors than those scored.")
_KEYS = ("original", "points", "source")
_POINT = ("method", "allocation", "budget", "params", "flops", "top1", "loss", "ranks")


@dataclass(frozen=True)
class Table:
    """A heading and rows of text; the first cell of a row is its name."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    """An explanation above the table."""


@dataclass(frozen=True)
class Compression:
    """The content of a `compression.json` whose points have all necessary keys."""

    path: Path
    """The file."""
    content: dict[str, Any]

    @property
    def original(self) -> dict[str, Any]:
        """top1, loss, params, flops, num_samples."""
        return self.content["original"]

    @property
    def points(self) -> list[dict[str, Any]]:
        """The measured points, in the order of the file."""
        return self.content["points"]

    @property
    def methods(self) -> list[str]:
        """The lines of a picture, in the points' order: by method and, if there are several, by allocation."""
        return list(dict.fromkeys(map(self.line_of, self.points)))

    def line_of(self, point: dict[str, Any]) -> str:
        """The line that a point lies on."""
        several = len({one["allocation"] for one in self.points}) > 1
        return f"{point['method']}, {point['allocation']}" if several else str(point["method"])

    @property
    def full_ranks(self) -> dict[str, int]:
        """The full rank of each target; for a target whose rows are in parts, that of one part."""
        parts = self.content.get("parts", {})
        return {name: min(R // parts.get(name, 1), C) for name, (R, C) in self.content.get("shapes", {}).items()}

    @property
    def is_sequential(self) -> bool:
        """Whether some points' moments were taken after compressed layers, which predictions do not describe."""
        return any(point.get("sequential") for point in self.points)

    @property
    def subtitle(self) -> str:
        """Model, weights and number of scored samples."""
        source = self.content["source"]
        words = [
            str(source.get("model", "")),
            tr("EMA weights") if source.get("weights") == "ema" else tr("own weights"),
        ]
        return "  ·  ".join([*filter(None, words), tr("{n:,} validation samples", n=self.original["num_samples"])])


def find_compression(path: Path) -> Path | None:
    """The `compression.json` that a path is, or that its folder holds; None if there is none."""
    if path.is_file() and path.name == NAME:
        return path
    return path / NAME if (path / NAME).is_file() else None


def read_compression(path: Path) -> Compression:
    """Read the file that `lowrank_vit.compress --out` wrote. Raises `UserError` if it is damaged or another file."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Run `python -m lowrank_vit.compress` again.") from error
    is_whole = isinstance(content, dict) and all(key in content for key in _KEYS)
    if not is_whole or any(key not in point for point in content["points"] for key in _POINT):
        raise UserError(f"{path} is not complete as a file of `python -m lowrank_vit.compress`. Run that again.")
    return Compression(path, content)


def headline(found: Compression) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for first, as (label, value)."""
    original = found.original
    figures = [(tr("original top-1"), f"{original['top1']:.2f} %"), (tr("its loss"), _number(original["loss"]))]
    figures.append((tr("parameters"), f"{original['params']:,}"))
    if small := smallest_within(found, 1.0):
        share = small["params"] / original["params"]
        figures.append((tr("kept within 1 point of top-1"), f"{100 * share:.1f} % ({small['method']})"))
    return figures


def smallest_within(found: Compression, points: float) -> dict[str, Any] | None:
    """The smallest model that is at most so many percentage points of top-1 below the original; None without one."""
    near = [one for one in found.points if one["top1"] >= found.original["top1"] - points]
    return min(near, key=lambda one: one["params"], default=None)


def tables(found: Compression) -> list[Table]:
    """All tables of the page that have rows."""
    made = [_points(found), _prediction(found), _ranks(found), _sensitivities(found), _latency(found), _layers(found)]
    return [table for table in made if table.rows]


def _points(found: Compression) -> Table:
    rows = []
    original = found.original
    for point in found.points:
        rows.append(
            [
                f"{point['method']}, {point['allocation']}",
                f"{point['budget']:g}",
                f"{100 * point['params'] / original['params']:.1f} %",
                f"{100 * point['flops'] / original['flops']:.1f} %" if original["flops"] else "",
                f"{point['top1']:.2f}",
                _difference(point.get("top1_difference"), point.get("top1_error"), 2),
                _number(point["loss"]),
                _difference(point.get("loss_difference"), point.get("loss_error"), 4),
                _number(point.get("predicted_loss")),
            ]
        )
    columns = ["", tr("budget"), tr("params"), "FLOPs", "top-1", tr("against the original"), tr("loss"),
               tr("against it"), tr("predicted")]  # fmt: skip
    note = tr(
        "± is one standard error of the differences sample by sample: it reflects the choice of samples, not what "
        "another training would give."
    )
    note += tr(_SEQUENTIAL) if found.is_sequential else ""
    return Table(tr("Points"), columns, rows, note)


def prediction_quality(found: Compression) -> dict[str, tuple[int, float, float, float, float]]:
    """How good the prediction was, by method, over the points whose loss rises measurably.

    Returns:
        Their number; median, least and greatest ratio of measured to predicted rise; and the correlation of the
        logarithms of both, NaN below three points.
    """
    quality: dict[str, tuple[int, float, float, float, float]] = {}
    for method in dict.fromkeys(point["method"] for point in found.points):
        measured, predicted = rises(found, method)
        if len(measured):
            ratio = measured / predicted
            logs = np.log(measured), np.log(predicted)
            varies = len(measured) > 2 and min(np.ptp(one) for one in logs) > 0
            correlation = float(np.corrcoef(*logs)[0, 1]) if varies else math.nan
            low, middle, high = (float(np.quantile(ratio, q)) for q in (0, 0.5, 1))
            quality[method] = len(measured), middle, low, high, correlation
    return quality


def rises(found: Compression, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Measured and predicted rise of the loss, in nats, of a method's points where it is above two standard errors."""
    original = found.original["loss"]
    kept = [
        (point["loss_difference"], point["predicted_loss"] - original)
        for point in found.points
        if point["method"] == method and None not in (point.get("predicted_loss"), point.get("loss_error"))
        if point["loss_difference"] > 2 * point["loss_error"] and point["predicted_loss"] > original
    ]
    measured, predicted = zip(*kept, strict=True) if kept else ((), ())
    return np.array(measured, float), np.array(predicted, float)


def _prediction(found: Compression) -> Table:
    rows = []
    for method, (count, middle, low, high, correlation) in prediction_quality(found).items():
        shown = "" if math.isnan(correlation) else f"{correlation:.3f}"
        rows.append(
            [method, str(count), f"{middle:.2g}", tr("{low} to {high}", low=f"{low:.2g}", high=f"{high:.2g}"), shown]
        )
    columns = ["", tr("points"), tr("measured / predicted, median"), tr("least to greatest"),
               tr("correlation of the logarithms")]  # fmt: skip
    constant = found.content.get("constant") or {}
    note = tr("Over the points whose loss rises by more than two standard errors.")
    if constant.get("value"):
        note += tr(
            " The prediction is c/2 Σ tr(G ΔW S ΔWᵀ) with c = {value:.3g}, measured on the calibration images with "
            "{method} at {budget:.3g} of the model. 1 is a right prediction.",
            **{name: constant[name] for name in ("value", "method", "budget")},
        )
    if found.is_sequential:
        note += tr(_SEQUENTIAL)
    if not constant.get("is_clear", True):
        note += tr(" No rise could be told from chance there, so c is left out.")
    return Table(tr("How good the predicted loss was"), columns, rows, note)


def _ranks(found: Compression) -> Table:
    method = found.points[-1]["method"] if found.points else ""
    wanted = [p for p in found.points if p["method"] == method and p["allocation"] == found.points[-1]["allocation"]]
    rows, parts = [], found.content.get("parts", {})
    for name, full in found.full_ranks.items():
        ranks = [point["ranks"].get(name) for point in wanted]
        shown = tr("{n} of {parts} parts", n=full, parts=parts[name]) if parts.get(name, 1) > 1 else str(full)
        rows.append([name, shown, *(tr("whole") if rank is None else str(rank) for rank in ranks)])
    columns = ["", tr("full"), *(f"{point['budget']:g}" for point in wanted)]
    title = tr("Ranks by layer and budget, {which}", which=found.line_of(wanted[-1]) if wanted else "")
    note = (
        tr("For layers whose rows are in parts, ranks are of each part.") if max(parts.values(), default=1) > 1 else ""
    )
    return Table(title, columns, rows, note)


def _sensitivities(found: Compression) -> Table:
    held = found.content.get("sensitivities") or {}
    cells: dict[str, dict[float, str]] = {}
    measured = False
    for one in held.get("layers", ()):
        text = f"{one['rank']}: {_number(one['predicted'])}"
        if "measured" in one:
            measured, text = True, f"{text} ({_number(one['measured'])})"
        cells.setdefault(one["layer"], {})[one["share"]] = text
    shares = sorted({share for of_layer in cells.values() for share in of_layer}, reverse=True)
    rows = [[name, *(of_layer.get(share, "") for share in shares)] for name, of_layer in cells.items()]
    note = tr("Rank, and the predicted rise of the loss (nats) if this layer alone has it.")
    if measured:
        note = tr("Rank, and the predicted (in brackets: measured) rise of the loss (nats) if this layer alone has it.")
    columns = ["", *(tr("{n:g} % of it kept", n=100 * share) for share in shares)]
    return Table(tr("Sensitivities of the layers, {method}", method=held.get("method", "")), columns, rows, note)


def _latency(found: Compression) -> Table:
    rows = []
    for one in (found.content.get("latency") or {}).get("models", ()):
        name = tr("original") if one["method"] is None else f"{one['method']}, {one['allocation']}, {one['budget']:g}"
        spread = (
            ""
            if one["method"] is None
            else tr("{n:.2f} ({low:.2f} to {high:.2f})", n=one["ratio"], low=one["ratio_low"], high=one["ratio_high"])
        )
        share = f"{100 * one['flops'] / found.original['flops']:.0f} %" if found.original["flops"] else ""
        rows.append([name, one["device"], str(one["images"]), f"{one['ms']:.3g}", spread, share])
    columns = ["", tr("device"), tr("images"), "ms", tr("of the original's time"), tr("of its FLOPs")]
    note = tr(
        "Forward passes in float32, not compiled, alternating with the original's: medians, quartiles in brackets."
    )
    return Table(tr("Latency"), columns, rows, note)


def _layers(found: Compression) -> Table:
    rows = []
    for one in (found.content.get("latency") or {}).get("layers", ()):
        faster = one["faster_up_to"]
        ratios = ", ".join(f"{rank}: {ratio:.2f}" for rank, ratio in one["ratios"].items())
        parts = one.get("parts", 1)
        shape = f"{one['rows']} x {one['columns']}" + (tr(" in {n} parts", n=parts) if parts > 1 else "")
        rows.append([shape, one["device"], str(one["tokens"]), str(one["pays_up_to"]), faster_in_words(faster), ratios])
    columns = [
        "",
        tr("device"),
        tr("tokens"),
        tr("fewer FLOPs up to rank"),
        tr("faster up to rank"),
        tr("share of the whole layer's time, by rank"),
    ]
    return Table(tr("Up to which rank a layer is faster"), columns, rows)


def faster_in_words(rank: int | None) -> str:
    """The rank as text, or that none was tried."""
    return tr("none tried") if rank is None else str(rank)


def _difference(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _number(value: float | None) -> str:
    if value is None:
        return tr("not finite")
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"
