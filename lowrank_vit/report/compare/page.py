"""`report RUN_A RUN_B ...`: the page of a comparison, in its own folder; differences come first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.report.compare import curves
from lowrank_vit.report.compare.curves import Figure, Line, Panel
from lowrank_vit.report.compare.differences import measures, sentences
from lowrank_vit.report.compare.extract import TIMES
from lowrank_vit.report.compare.groups import Compared, read_compared
from lowrank_vit.report.compare.scores import BEST, scores_of, spread_of
from lowrank_vit.report.compression.read import Table
from lowrank_vit.report.interactive import figures as interactive
from lowrank_vit.report.interactive.embed import DATA_AT_MOST
from lowrank_vit.report.interactive.packing import Packer, embedded_json, embedded_library
from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.page import Drawn, render_page
from lowrank_vit.report.style import MUTED, heading, log_ticks, new_figure, png, tidy, update_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "comparison"
"""The name of the page and of the folder of its pictures; no report of a run has this name."""
_LONGEST = 120
"""Most characters of a folder's name."""
_OF_A_RUN = ("args.yaml", "metrics.jsonl", "summary.csv", "last.pth.tar", "report.html", "spectra", "compression.json")


def draw_comparison(paths: Sequence[Path], out: Path | None, *, with_png: bool = True) -> Drawn:
    """The comparison of runs or analyses, for the folder `out`, or for one beside the first run, named after them.

    Raises `UserError`, see `read_compared`, and if `out` is a run's folder.
    """
    folder = out or _beside(paths)
    _require_own(folder)
    compared = read_compared(paths)
    made, embedded, thinned = _bounded(compared)
    pictures = {f"{one.name}.png": (one.title, _picture(one, compared)) for one in made} if with_png else {}
    notes = [f"{name}: {note}" for name, run in zip(compared.names, compared.runs, strict=True) for note in _notes(run)]
    notes += [*compared.notes, *_ends(compared)]
    if any(len(group.at) > 1 for group in compared.groups):
        of_seeds = msg("Runs that differ in the seed alone are one line: their mean, in a band of ± one standard "
                       "deviation (n - 1).")  # fmt: skip
        notes.insert(0, tr(of_seeds))
    tables = comparison_tables(compared)
    html = render_page(
        title=tr(" beside ").join(group.name for group in compared.groups) if len(compared.groups) > 1 else NAME,
        model=", ".join(dict.fromkeys(str(run.args["model"]) for run in compared.runs if run.args.get("model"))),
        headline=headline(compared),
        said=sentences(compared),
        notes=notes,
        thinned=thinned,
        embedded={"library": embedded_library(), **embedded},
        pictures=dict(pictures.values()),
        leading=tables[:2],
        tables=tables[2:],
        steps=None,
        arguments={},
        differing=None,
        environment={},
    )
    files = {f"{name}.png": None for name in ("scores", "types", "layers")} | {n: p for n, (_, p) in pictures.items()}
    return Drawn(folder, html, files, notes, NAME)


def _require_own(folder: Path) -> None:
    """Raise `UserError` for a folder that is a run's, lies in one, or holds something else under this name."""
    if held := next((name for name in _OF_A_RUN if (folder / name).exists()), ""):
        raise UserError(f"{folder} holds a run or its report ({held}). Give the comparison its own folder, --out DIR.")
    if run := next((one for one in folder.absolute().parents if (one / "args.yaml").exists()), None):
        raise UserError(f"{folder} lies in the run {run}. Give the comparison its own folder, --out DIR.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but a comparison is written to a folder: --out DIR.")
    if (folder / NAME).exists() and not (folder / f"{NAME}.html").exists():
        raise UserError(f"{folder / NAME} exists and is no comparison. Give another folder, --out DIR.")


def _bounded(compared: Compared) -> tuple[list[Figure], dict[str, str], list[str]]:
    """The figures, their data for the page, and notes on what the page leaves out."""
    leading = [one for one in (make(compared) for make in (curves.score_figure, curves.type_figure)) if one]
    notes: list[str] = []
    for every, times in ((True, TIMES), (True, TIMES // 4), (False, TIMES // 4), (False, 8)):
        layers = curves.layer_figure(compared, every=every, times=times)
        made = [*leading, *([layers] if layers else [])]
        embedded = _embedded(compared, made)
        notes = [] if every else [tr("This page holds the first, the middle and the last layer of each type.")]
        if times < TIMES:
            notes.append(tr("Lines of one layer have up to {n} points, evenly spaced.", n=times))
        if sum(map(len, embedded.values())) <= DATA_AT_MOST:
            break
    refreshes = max((len(numbers.updates_T) for numbers in compared.numbers), default=0)
    if refreshes >= TIMES:
        notes.append(tr("This page holds {n} refreshes of each run, evenly spaced.", n=TIMES))
    return made, embedded, notes


def _ends(compared: Compared) -> list[str]:
    """A note if spectra are compared long before some run's end, since another run has not come as far."""
    last = [float(compared.on_axis(at, of.updates_T[-1:])[0]) if len(of.updates_T) else math.nan
            for at, of in enumerate(compared.numbers)]  # fmt: skip
    early = [name for name, at in zip(compared.names, last, strict=True) if at <= compared.end + 1e-6]
    if not early or not any(at > 1.1 * compared.end for at in last):
        return []
    text = msg("Spectra are compared at {moment}, the last moment of {runs}.")
    return [tr(text, moment=curves.moment(compared), runs=", ".join(early))]


def _beside(paths: Sequence[Path]) -> Path:
    """The folder for a comparison beside the first run; relative if that lies in the current folder."""
    parent, here = paths[0].absolute().parent, Path.cwd()
    return (parent.relative_to(here) if parent.is_relative_to(here) else parent) / _folder_name(paths)


def _folder_name(paths: Sequence[Path]) -> str:
    names = [path.resolve().name.removesuffix("_spectral.json") for path in paths]
    shown, more = "-beside-".join(names[:2]), len(names) - 2
    return shown[:_LONGEST] + (f"-and-{more}-more" if more > 0 else "")


def _notes(run: Any) -> list[str]:
    return [note for note in (run.status.in_words if run.status else "", *run.notes) if note]


def headline(compared: Compared) -> list[tuple[str, str]]:
    """The best top-1 of each group, for the model and its EMA, as in the table of scores."""
    labels = {
        "top-1 accuracy (%)": msg("best top-1, {run}"),
        "top-1 accuracy, EMA (%)": msg("best top-1, EMA, {run}"),
    }
    best = [one for one in scores_of([run.epochs for run in compared.runs]) if one.when == BEST and one.label in labels]
    return [
        (tr(labels[one.label], run=group.name), f"{one.spread(group.at)} %")
        for group in compared.groups
        for one in best
        if any(np.isfinite(one.values[i]) for i in group.at)
    ]


def comparison_tables(compared: Compared) -> list[Table]:
    """Tables of differing options, scores, spectra at the last common moment, and versions and hardware."""
    names = [group.name for group in compared.groups]
    options = [[f"--{name}", *values] for name, values in compared.options_that_differ.items()]
    scores = scores_of([run.epochs for run in compared.runs])
    labels = [tr(", ").join([tr(one.label), tr(one.when)]) for one in scores]
    rows = [[label, *(one.spread(group.at) for group in compared.groups)]
            for label, one in zip(labels, scores, strict=True)]  # fmt: skip
    spectra = [
        [one.label, *(spread_of([one.values[i] for i in group.at], one.text) for group in compared.groups)]
        for one in measures(compared) if one.of_matrices
    ]  # fmt: skip
    tables = [
        Table(tr("Options that differ"), ["", *names], options, "" if options else tr("None.")),
        Table(tr("Scores"), ["", *names], rows),
        Table(tr("Spectra, {moment}", moment=curves.moment(compared)), ["", *names], spectra,
              tr("Means over the blocks.")),
        Table(tr("Versions and hardware that differ"), ["", *names], [[n, *v] for n, v in
              compared.environment_that_differs.items()]),
    ]  # fmt: skip
    if any(len(group.at) > 1 for group in compared.groups):
        each = [[label, *map(one.text, one.values)] for label, one in zip(labels, scores, strict=True)]
        tables.insert(2, Table(tr("Scores of each run"), ["", *compared.names], each))
    return tables


def _embedded(compared: Compared, made: Sequence[Figure]) -> dict[str, str]:
    """The figures for the page's scripts."""
    pack, found = Packer(), []
    for one in made:
        weights = {
            label: {
                name: [
                    interactive.panel(panel.title, panel.x, panel.y, [_series(line, pack) for line in panel.lines],
                                      log=panel.is_log)
                    for panel in panels
                ]
                for name, panels in views.items()
            }
            for label, views in one.views.items()
        }  # fmt: skip
        log = {} if one.name == "layers" else {"logarithmic": "off"}
        first = next(iter(weights.values()))
        found.append(interactive.figure(one.name, one.title, one.note, first, weights=weights, **log))
    data = {"figures": [one for one in found if one], "matrices": None, "looks": {}}
    data["tables"] = _long(compared)
    return {"json": embedded_json(data), "numbers": pack.embedded()}


def _long(compared: Compared) -> dict[str, dict[str, list[Any]]]:
    """Tables for other programs: a row for each run and score, or metric of the spectra at the last common moment."""
    groups = {at: group.name for group in compared.groups for at in group.at}
    scores = [
        {"run": name, "group": groups[at], "score": one.label, "when": one.when, "value": one.values[at]}
        for one in scores_of([run.epochs for run in compared.runs])
        for at, name in enumerate(compared.names)
    ]
    spectra = [
        {"run": name, "group": groups[at], "number": one.label, "value": one.values[at]}
        for one in measures(compared) if one.of_matrices
        for at, name in enumerate(compared.names)
    ]  # fmt: skip
    found = {"scores": scores, "spectra": spectra}
    return {name: {key: [row[key] for row in rows] for key in rows[0]} for name, rows in found.items() if rows}


def _series(line: Line, pack: Packer) -> dict[str, Any] | None:
    """A line, with the band of its seeds."""
    group = line.group
    band = {} if line.deviation_T is None else {"band": pack(line.deviation_T)}
    dash = "dash" if group.is_dashed else "solid"
    return interactive.series_of(
        group.name, line.x_T, line.y_T, pack, width=2, color=group.color, symbol=group.mark[0], dash=dash, **band
    )


def _picture(one: Figure, compared: Compared) -> bytes:
    """A figure's first view as PNG; for layers the middle one."""
    names = list(one.first)
    chosen = names[len(names) // 2] if one.name == "layers" else names[0]
    panels = one.first[chosen]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = new_figure(0.6 + 3.9 * columns, 1.5 + 2.7 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel)
    text = {"scores": "at each validation", "types": chosen + ", means over the blocks"}.get(one.name, chosen)
    heading(figure, one.title, text)
    lines = {line.group.name: _handle(line) for panel in panels for line in panel.lines}
    figure.legend(
        handles=list(lines.values()), loc="outside lower left", ncols=min(3, len(lines)), frameon=False, fontsize=9,
        labelcolor=MUTED,
    )  # fmt: skip
    return png(figure)


def _draw(axes: Axes, panel: Panel) -> None:
    tidy(axes, panel.title if len(panel.title) < 40 else "", panel.x, panel.y)
    axes.title.set_parse_math(False)
    for line in panel.lines:
        few: dict[str, Any] = {"marker": line.group.mark[1], "markersize": 4} if len(line.x_T) <= 40 else {}
        style = (0, (3, 2)) if line.group.is_dashed else "-"
        axes.plot(line.x_T, line.y_T, color=line.group.color, linewidth=1.6, linestyle=style, **few)
        if line.deviation_T is not None:
            low, high = line.y_T - line.deviation_T, line.y_T + line.deviation_T
            axes.fill_between(line.x_T, low, high, color=line.group.color, alpha=0.2, linewidth=0)
    if panel.is_log:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    update_ticks(axes.xaxis)


def _handle(line: Line) -> Any:
    from matplotlib.lines import Line2D

    style, name = (0, (3, 2)) if line.group.is_dashed else "-", line.group.name
    shown = name if len(name) <= 48 else name[:47] + "…"
    handle = Line2D([], [], color=line.group.color, marker=line.group.mark[1], markersize=4, linestyle=style)
    handle.set_label(shown.replace("$", r"\$"))
    return handle
