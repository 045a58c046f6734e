"""The report: one HTML file with the layout of `page.html`, its tables, and its pictures in files beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import write_whole
from lowrank_vit.config import meaning
from lowrank_vit.config.option_types import leaves
from lowrank_vit.config.options import Config
from lowrank_vit.report.compare.groups import typed
from lowrank_vit.report.compare.scores import MEASURES
from lowrank_vit.report.compression.plots import curve_plot, ranks_plot
from lowrank_vit.report.compression.plots import spectra_plot as weighted_spectra_plot
from lowrank_vit.report.compression.read import Compression, Table, find_compression, read_compression, tables
from lowrank_vit.report.compression.read import headline as compression_headline
from lowrank_vit.report.drift import drift_parts, find_drift
from lowrank_vit.report.interactive.embed import embedded, embedded_pictures
from lowrank_vit.report.interactive.packing import script
from lowrank_vit.report.interactive.sentences import sentences
from lowrank_vit.report.language import in_language, language, msg, tr
from lowrank_vit.report.read import Run, find_analysis, read_analysis, read_run, series
from lowrank_vit.report.spectra.circuits import circuits_plot
from lowrank_vit.report.spectra.metrics import cosine_plot, ema_plot, profile_plot, stable_rank_plot
from lowrank_vit.report.spectra.motion import flows_plot, updates_plot
from lowrank_vit.report.spectra.values import bulk_plot, spectra_plot, vectors_plot
from lowrank_vit.report.status import Step, next_steps
from lowrank_vit.report.style import dark_pictures
from lowrank_vit.report.switching import read as switching_read
from lowrank_vit.report.switching.plots import switching_plot
from lowrank_vit.report.training_plot import training_plot
from lowrank_vit.spectral.measures.metrics import effective_rank, stable_rank
from lowrank_vit.spectral.select import module_type

T = TypeVar("T")
_OF_A_RUN = ("args.yaml", "metrics.jsonl", "summary.csv", "last.pth.tar", "spectra", "compression.json")
_PICTURES = (
    ("training.png", msg("Loss, accuracy, learning rate and throughput over the updates"), training_plot),
    ("lowrank.png", msg("Rank of every layer over the updates, and the evidence of the refreshes"), switching_plot),
    ("spectra.png", msg("Singular values of the weights over the updates"), spectra_plot),
    ("bulk.png", msg("Newest spectra as histograms with the Marchenko-Pastur law and its edge"), bulk_plot),
    ("stable_rank.png", msg("Stable and effective rank of every block over the updates"), stable_rank_plot),
    (
        "cosines.png",
        msg("How the top subspaces turn: since the refresh before, with a bound, and since the start"),
        cosine_plot,
    ),
    ("vectors.png", msg("Cosines between the recorded singular vectors then and now"), vectors_plot),
    ("ema.png", msg("Largest singular value and stable rank of the model and of its moving average"), ema_plot),
    (
        "updates.png",
        msg("How the weights move: ranks of their changes, and how much lies in the top block"),
        updates_plot,
    ),
    (
        "flows.png",
        msg("How tokens are spread and how attention is, over the validations and by depth"),
        flows_plot,
    ),
    ("circuits.png", msg("Ranks of each head's circuits by depth, and how heads read the block before"), circuits_plot),
    ("profile.png", msg("Newest numbers of every matrix over its depth"), profile_plot),
)
_OF_COMPRESSION = (
    (
        "curve.png",
        msg("Top-1 and loss over the share of the model that is left, and how well losses were predicted"),
        curve_plot,
    ),
    ("ranks.png", msg("Ranks chosen layer by layer for each budget and method"), ranks_plot),
    (
        "weighted_spectra.png",
        msg("Singular values of the weights as they are and as each method weighs them"),
        weighted_spectra_plot,
    ),
)


@dataclass(frozen=True)
class Drawn:
    """A report that is not written yet."""

    folder: Path
    """Where it will be written."""
    html: str
    pictures: dict[str, bytes | None]
    """File name to PNG bytes; None if the data for it are missing."""
    notes: list[str]
    """Notes on what was missing."""
    name: str = "report"
    """The name of the page and of the folder of its pictures."""

    @property
    def page(self) -> Path:
        """The page's file."""
        return self.folder / f"{self.name}.html"


def write_report(path: Path, png: bool = True) -> tuple[Path, list[str]]:
    """Write the report of one run, analysis or compression; returns its folder and the notes on what was missing.

    Args:
        path: the run, analysis or compression.
        png: whether pictures are drawn too, beside the page and in it for readers without scripts.

    Raises:
        UserError: `path` is none of them, or its folder cannot be written.
    """
    drawn = draw_report(path, png)
    write_drawn(drawn)
    return drawn.folder, drawn.notes


def draw_report(path: Path, png: bool = True) -> Drawn:
    """The report as `write_report` writes it. Raises `UserError` if `path` is no run, analysis or compression."""
    compression = find_compression(path)
    found = read_compression(compression) if compression else None
    of_it = {name: (caption, _drawn(draw, found if png else None)) for name, caption, draw in _OF_COMPRESSION}
    if found and not (found.path.parent / "args.yaml").exists():  # else it is a part of the run's report
        html = compression_html(found, _there(of_it))
        return Drawn(found.path.parent, html, {name: png for name, (_, png) in of_it.items()}, [])
    if not found and (drift := find_drift(path)):
        parts, pictures = drift_parts(drift, with_png=png)
        return Drawn(drift.parent, render_page(**parts), pictures, [], drift.stem)
    analysis = None if found else find_analysis(path)
    run = read_analysis(analysis) if analysis else read_run(found.path.parent if found else path)
    drawn = {name: (caption, _drawn(draw, run if png else None)) for name, caption, draw in _PICTURES} | of_it
    html = report_html(run, _there(drawn), found)
    # In a run's own folder the name "report" belongs to the run.
    name = analysis.stem if analysis and (run.path / "args.yaml").exists() else "report"
    return Drawn(run.path, html, {name: png for name, (_, png) in drawn.items()}, run.notes, name)


def _drawn(draw: Callable[[T], bytes | None], of: T | None) -> bytes | None:
    """A picture, in English (see `language`); None without data."""
    with in_language("en"):
        return None if of is None else draw(of)


def _there(drawn: Mapping[str, tuple[str, bytes | None]]) -> dict[str, bytes]:
    """The pictures that could be drawn, by their captions."""
    return {tr(caption): png for caption, png in drawn.values() if png is not None}


def with_dark_twins(drawn: Drawn, draw: Callable[[], Drawn]) -> Drawn:
    """The report with each picture also on a dark background, as `<name>_dark.png`; `draw` draws everything again."""
    with dark_pictures():
        twins = draw().pictures
    return replace(drawn, pictures=drawn.pictures | {_dark_name(file): png for file, png in twins.items()})


def _dark_name(file: str) -> str:
    return f"{file.removesuffix('.png')}_dark.png"


def in_folder(drawn: Drawn, run: Path, out: Path) -> Drawn:
    """The report of `run` for another folder. Raises `UserError` if that holds another run."""
    folder = run if run.is_dir() else run.parent
    held = next((name for name in _OF_A_RUN if (out / name).exists()), "")
    if held and out.resolve() != folder.resolve():
        raise UserError(f"{out} holds another run ({held}), whose report would be replaced. Give --out a new folder.")
    return replace(drawn, folder=out)


def write_drawn(drawn: Drawn) -> None:
    """Write a page into its folder, and its pictures into one beside it. Raises `UserError`."""
    folder = drawn.folder / drawn.name
    stale = {_dark_name(file): None for file in drawn.pictures if not file.endswith("_dark.png")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, png in (stale | drawn.pictures).items():
            if png is not None:
                write_whole(folder / file, png)
            else:
                (folder / file).unlink(missing_ok=True)  # an earlier report's picture must not seem to be this one's
        page = drawn.html.encode("utf-8", "backslashreplace")
        write_whole(drawn.page, page)
    except OSError as error:
        raise UserError(
            f"cannot write the report into {drawn.folder}: {error.strerror or error}. Give another folder: --out DIR."
        ) from error


def report_html(run: Run, pictures: Mapping[str, bytes], compression: Compression | None = None) -> str:
    """The whole page.

    Args:
        run: the result of `read_run`; its notes are shown.
        pictures: from a picture's caption (its alternative text) to its PNG bytes, in the order of the page.
        compression: that of the run's model, if the run's folder holds one.
    """
    of_it = tables(compression) if compression else []
    switching = switching_read.read_switching(run.path)
    refused = switching_read.notes(switching) if switching else []
    if switching:
        of_it = [*switching_read.tables(switching, run.shapes), *of_it]
    of_it = [*switching_read.beside_the_loss(run.args, run.train), *of_it]
    standing = run.status.in_words if run.status else ""
    data, thinned = embedded(run, switching, compression)
    args = {name: value for name, value in run.args.items() if name != meaning.KEY}  # it is no option
    return render_page(
        title=run.path.resolve().name,
        model=str(run.args.get("model") or ""),
        headline=[*headline(run), *(switching_read.headline(switching) if switching else [])],
        said=sentences(run, switching),
        notes=[note for note in (standing, *run.notes, *refused) if note],
        thinned=thinned,
        embedded=data,
        pictures=pictures,
        tables=[final_numbers(run), spectral_numbers(run), *of_it],
        steps=_what_next(run),
        arguments=args,
        differing=_not_default(args) if run.status and args else None,
        environment=run.environment,
    )


def compression_html(found: Compression, pictures: Mapping[str, bytes]) -> str:
    """The page of a compression; `pictures` as for a run."""
    content = found.content
    data, thinned = embedded(None, None, found)
    return render_page(
        title=found.path.resolve().parent.name,
        model=found.subtitle,
        headline=compression_headline(found),
        said=[],
        notes=[str(note) for note in content.get("notes", ())],
        thinned=thinned,
        embedded=data,
        pictures=pictures,
        tables=tables(found),
        steps=None,
        arguments={**content["source"], **content.get("options", {})},
        differing=None,
        environment=content.get("environment", {}),
    )


def render_page(*, pictures: Mapping[str, bytes], **parts: Any) -> str:
    """`page.html` with its parts; `pictures` as for a run."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["as_typed"] = typed
    templates.globals.update({"tr": tr, "language": language()})  # pyright: ignore[reportArgumentType, reportCallIssue]
    return templates.get_template("page.html").render(pictures=embedded_pictures(pictures), script=script(), **parts)


def _not_default(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a run that differ from the defaults of `train`; unknown ones are among them."""
    defaults = {name: typed(value) for name, _, value in leaves(Config())}
    return {name: value for name, value in args.items() if typed(value) != defaults.get(name)}


def _what_next(run: Run) -> list[Step] | None:
    """Commands with this run's paths, to be typed in the current directory; None where too little is known."""
    if run.status is None:
        return None
    goes_on, is_over = run.status.is_running, run.status.is_finished
    return next_steps(run.path, run.args, is_finished=is_over or goes_on, is_drawn=is_over and not goes_on)


def headline(run: Run) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for first, as (label, value)."""
    figures: list[tuple[str, str]] = []
    for name, label in (("eval_top1", tr("best top-1")), ("eval_ema_top1", tr("best top-1, EMA"))):
        values = _finite(run.epochs.get(name))
        if values.size:
            figures.append((label, f"{values.max():.2f} %"))
    if not figures and (losses := _finite(run.train.get("loss"))).size:  # nothing to validate on, or not yet
        figures.append((tr("newest train loss"), f"{losses[-1]:.4g}"))
    if run.status:
        done, planned = run.status.epochs, run.status.planned
        figures.append((tr("epochs"), tr("{n:,} of {all:,}", n=done, all=planned) if planned else f"{done:,}"))
        figures.append((tr("updates"), f"{run.status.updates:,}"))
    columns = run.epochs if _finite(run.epochs.get("img_per_s")).size else run.train
    rates = _finite(columns.get("img_per_s"))
    if rates.size:
        figures.append((tr("median images / s"), f"{np.median(rates):,.0f}"))
    waits = _finite(columns.get("data_wait"))
    if waits.size:
        figures.append((tr("median data wait"), f"{100 * np.median(waits):.1f} %"))
    return figures


def final_numbers(run: Run) -> Table:
    """Last and best value of every measured quantity; no rows while no epoch is finished."""
    rows: list[list[str]] = []
    for name, label, better in MEASURES:
        values = run.epochs.get(name)
        finite = _finite(values)
        if values is None or not finite.size:
            continue
        best = better(finite)
        at = int(np.flatnonzero(values == best)[0])
        epochs = run.epochs.get("epoch")
        where = (
            tr("epoch {n:.0f}", n=epochs[at] + 1)
            if epochs is not None
            else tr("update {n}", n=f"{run.epochs['update'][at]:.0f}")
        )
        digits = 2 if "top" in name else 4
        last = f"{values[-1]:.{digits}f}" if np.isfinite(values[-1]) else tr("not measured")
        rows.append([tr(label), last, f"{best:.{digits}f}", where])
    return Table(tr("Final numbers"), ["", tr("last"), tr("best"), tr("best at")], rows)


def spectral_numbers(run: Run) -> Table:
    """Means by type at the first and the last refresh, of the model and of its EMA; no rows without spectra."""
    rows: list[list[str]] = []
    for kind, suffix in (("spec", ""), ("spec_ema", ", EMA")):
        _, modules = series(run, kind)
        for module in dict.fromkeys(module_type(name) for name in modules):
            group = [s_TK for name, s_TK in modules.items() if module_type(name) == module]
            cells = []
            for measure in (_sigma_max, stable_rank, effective_rank):
                first, last = (np.mean([measure(s_TK[t]) for s_TK in group]) for t in (0, -1))
                cells.append(f"{first:.4g} → {last:.4g}")
            rows.append([f"{module}{suffix}", str(len(group)), *cells])
    columns = ["", tr("layers"), tr("mean σ₁"), tr("mean stable rank"), tr("mean effective rank")]
    return Table(tr("Spectra, first → last refresh"), columns, rows)


def _sigma_max(s: np.ndarray) -> float:
    return float(s[0])


def _finite(values: np.ndarray | None) -> np.ndarray:
    return np.empty(0) if values is None else values[np.isfinite(values)]
