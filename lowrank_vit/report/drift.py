"""The page of `analyze_spectrum --compare`: how far each matrix moved between two checkpoints, by depth and by type."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.report.compression.read import Table
from lowrank_vit.report.interactive.figures import figure, panel, series_of
from lowrank_vit.report.interactive.packing import Packer, embedded_json, embedded_library
from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.style import MUTED, browser_look, by_type, heading, new_figure, png, tidy, type_look

ENDING = "_drift.json"
_NUMBERS = (
    ("update_rel", msg("change relative to the weights, Frobenius norms"), "‖ΔW‖ / ‖W‖"),
    ("update_normF", msg("Frobenius norm of the change"), "‖ΔW‖"),
    ("update_norm2", msg("spectral norm of the change"), "‖ΔW‖₂"),
    ("delta_sv_rel", msg("change of singular values"), "Δσ / σ"),
    ("turn_bound", msg("bound on the block's turn"), msg("sine (above 1: none)")),
    ("block_cos_u_overlap", msg("left vectors: overlap"), msg("0: chance, 1: the same")),
    ("block_cos_v_overlap", msg("right vectors: overlap"), msg("0: chance, 1: the same")),
    ("block_energy", msg("energy that the old block holds"), msg("share")),
)
"""Key in the file, title and label."""
_TOLD = (
    (
        "update_rel",
        msg("Change relative to the weights, ‖ΔW‖ / ‖W‖, means by type, the largest first: {types}. The largest of a "
            "single matrix is {value:.3g} ({name})."),
    ),
    (
        "delta_sv_rel",
        msg("Change of the singular values, Δσ / σ, means by type, the largest first: {types}. The largest of a single "
            "matrix is {value:.3g} ({name})."),
    ),
    (
        "block_cos_u_overlap",
        msg("Overlap of the top left vectors before and after (1: the same, 0: chance), means by type, the lowest "
            "(most turned) first: {types}. The lowest of a single matrix is {value:.3g} ({name})."),
    ),
)  # fmt: skip
"""Metrics with a sentence, and its form; norms of changes are left out, since they grow with the matrix."""
_IS_LESS = ("block_cos_u_overlap", "block_cos_v_overlap")
"""Metrics whose lowest values moved most; by chance they are 0."""


def find_drift(path: Path) -> Path | None:
    """`path` if it is a `*_drift.json`, or the only one in a folder without a run or an analysis; else None."""
    if path.is_file():
        return path if path.name.endswith(ENDING) else None
    found = list(path.glob(f"*{ENDING}"))
    others = (*path.glob("*_spectral.json"), *path.glob("args.yaml"), *path.glob("metrics.jsonl"))
    return found[0] if len(found) == 1 and not others else None


def drift_parts(path: Path, *, with_png: bool) -> tuple[dict[str, Any], dict[str, bytes | None]]:
    """The parts of the page, as `page.render_page` takes them, and its pictures by file name. Raises `UserError`."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        meta, layers = dict(content["meta"]), {name: dict(of) for name, of in content["layers"].items()}
        before, after = (dict(meta[name]) for name in ("before", "after"))
        types = {name: dict(of) for name, of in content["types"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as a comparison of checkpoints ({error}); write it with "
            "`python -m lowrank_vit.analyze_spectrum --compare BEFORE AFTER --save-dir DIR`."
        ) from error
    numbers = [one for one in _NUMBERS if any(np.isfinite(_number(of, one[0])) for of in layers.values())]
    picture = _picture(layers, numbers, _words(meta, before, after)) if with_png and numbers else None
    parts = {
        "title": path.name.removesuffix(".json"),
        "model": _words(meta, before, after),
        "headline": [],
        "said": [text for key, form in _TOLD if (text := _sentence(layers, key, form))],
        "notes": _notes(layers, numbers),
        "thinned": [],
        "embedded": _embedded(layers, numbers),
        "pictures": {tr("How far each matrix moved, by depth"): picture} if picture else {},
        "tables": [_table(tr("Means by type"), types, numbers), _table(tr("Every matrix"), layers, numbers)],
        "steps": None,
        "arguments": {name: value for name, value in meta.items() if not isinstance(value, dict)},
        "differing": None,
        "environment": {},
    }
    return parts, {"drift.png": picture}


def _words(meta: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    def state(one: Mapping[str, Any]) -> str:
        epoch = one.get("epoch", -1)
        of = ", " + tr("epoch {n:.4g}", n=epoch + 1) if isinstance(epoch, int) and epoch >= 0 else ""
        return f"{one.get('checkpoint', '')}{of}{', EMA' if one.get('use_ema') else ''}"

    between = tr("from {before} to {after}", before=state(before), after=state(after))
    return f"{meta.get('model', '')}  ·  {between}"


def _notes(layers: Mapping[str, Mapping[str, Any]], numbers: Sequence[tuple[str, str, str]]) -> list[str]:
    """Notes on what the charts cannot show."""
    if not numbers:
        return [tr("No number in it is finite.")]
    unbound = [name for name, of in layers.items() if "turn_bound" in of and not np.isfinite(_number(of, "turn_bound"))]
    if not unbound:
        return []
    text = msg(
        "The block's turn has no bound in {n} of {all} matrices ({name} first): they changed by more than the gap "
        "after the block, or are not finite."
    )
    return [tr(text, n=len(unbound), all=len(layers), name=unbound[0])]


def _sentence(layers: Mapping[str, Mapping[str, Any]], key: str, form: str) -> str:
    """The means of all types, the most moved first, and the most moved matrix; empty without this metric."""
    known = {name: value for name, of in layers.items() if math.isfinite(value := _number(of, key))}
    if not known:
        return ""
    sign = 1 if key in _IS_LESS else -1
    means = {kind: float(np.mean([known[name] for name in names])) for kind, names in by_type(known).items()}
    order = sorted(means, key=lambda kind: sign * means[kind])
    chosen = min(known, key=lambda name: sign * known[name])
    types = tr(", ").join(f"{kind} {means[kind]:.3g}" for kind in order)
    return tr(form, types=types, name=chosen, value=known[chosen])


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def _table(title: str, rows: Mapping[str, Mapping[str, Any]], numbers: list[tuple[str, str, str]]) -> Table:
    def text(value: float) -> str:
        return f"{value:.4g}" if np.isfinite(value) else "–"

    cells = [[name, *(text(_number(of, key)) for key, _, _ in numbers)] for name, of in rows.items()]
    return Table(title, ["", *(tr(title) for _, title, _ in numbers)], cells)


def _embedded(layers: Mapping[str, Mapping[str, Any]], numbers: list[tuple[str, str, str]]) -> dict[str, str]:
    pack, types = Packer(), by_type(layers)
    deepest = max(map(len, types.values()), default=0)
    panels = [
        panel(tr(title), tr("block"), tr(label), [
            series_of(kind, np.arange(len(names)), np.array([_number(layers[name], key) for name in names]), pack,
                      look=kind, text=names)
            for kind, names in types.items()
        ] + [
            series_of(tr("chance"), np.arange(deepest), np.zeros(deepest), pack, color="ink", dash="dash", width=1,
                      mode="lines")
        ] * (key in _IS_LESS), whole=True)
        for key, title, label in numbers
    ]  # fmt: skip
    made = figure("drift", tr("Change between the two, by depth"), "", {"all": panels}, logarithmic="off")
    looks = {kind: browser_look(kind) for kind in types}
    columns = {key: np.array([_number(of, key) for of in layers.values()]) for key, _, _ in numbers}
    tables = {"matrices": {"matrix": list(layers), **columns}} if columns else {}
    data = {"figures": [made] if made else [], "matrices": None, "looks": looks, "tables": tables}
    return {"library": embedded_library(), "json": embedded_json(data), "numbers": pack.embedded()}


def _picture(layers: Mapping[str, Mapping[str, Any]], numbers: list[tuple[str, str, str]], words: str) -> bytes:
    rows = -(-len(numbers) // 3)
    drawn = new_figure(12.3, 1.5 + 2.6 * rows)
    grid = drawn.subplots(rows, 3, squeeze=False)
    for axes in grid.flat[len(numbers) :]:
        axes.set_axis_off()
    for axes, (key, title, label) in zip(grid.flat, numbers, strict=False):
        tidy(axes, title, "block", label)
        for kind, names in by_type(layers).items():
            color, mark = type_look(kind)
            values = [_number(layers[name], key) for name in names]
            axes.plot(range(len(names)), values, color=color, marker=mark, markersize=4, linewidth=1.4, label=kind)
        if key in _IS_LESS:
            axes.axhline(0, color=MUTED, linewidth=1, linestyle="--")
        axes.xaxis.get_major_locator().set_params(integer=True)
    heading(drawn, "From one checkpoint to another", words)
    lines = grid.flat[0].get_lines()
    drawn.legend(handles=lines, loc="outside lower left", ncols=min(6, max(1, len(lines))), frameon=False, fontsize=9)
    return png(drawn)
