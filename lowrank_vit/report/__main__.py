"""`python -m lowrank_vit.report RUN`: RUN/report.html and its pictures in RUN/report/; RUN may be an analysis too."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lowrank_vit.common.errors import UserError, exit_cleanly
from lowrank_vit.common.program import usage_name
from lowrank_vit.common.terminal import say
from lowrank_vit.config.command_line import read_options
from lowrank_vit.report.metric_plots import cosine_plot, ema_plot, profile_plot, stable_rank_plot
from lowrank_vit.report.page import report_html
from lowrank_vit.report.read import find_analysis, read_analysis, read_run
from lowrank_vit.report.spectra_plots import bulk_plot, spectra_plot, vectors_plot
from lowrank_vit.report.training_plot import training_plot

_PICTURES = (
    ("training.png", "Loss, accuracy, learning rate and throughput over the updates", training_plot),
    ("spectra.png", "Singular values of the weights over the updates", spectra_plot),
    ("bulk.png", "Newest spectra as histograms with the Marchenko-Pastur law and its edge", bulk_plot),
    ("stable_rank.png", "Stable and effective rank of every block over the updates", stable_rank_plot),
    ("cosines.png", "Principal cosines of the top subspaces with the refresh before and with the start", cosine_plot),
    ("vectors.png", "Cosines between the recorded singular vectors then and now", vectors_plot),
    ("ema.png", "Largest singular value and stable rank of the model and of its moving average", ema_plot),
    ("profile.png", "Newest numbers of every matrix over its depth", profile_plot),
)


@dataclass(frozen=True)
class Options:
    """Draw a run, finished or not: RUN/report.html, self-contained, and its pictures in RUN/report/."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """What `python -m lowrank_vit.train` wrote, usually output/<experiment>; or a folder or *_spectral.json of
    `python -m lowrank_vit.analyze_spectrum`."""


def write_report(path: Path) -> tuple[Path, list[str]]:
    """Write the report of one run or analysis; returns the folder it is in and the notes on what was missing.

    Raises:
        UserError: `path` is neither, or its folder cannot be written.
    """
    analysis = find_analysis(path)
    run = read_analysis(analysis) if analysis else read_run(path)
    run_dir = run.path
    drawn = {name: (caption, png) for name, caption, draw in _PICTURES if (png := draw(run)) is not None}
    html = report_html(run, dict(drawn.values()))
    folder = run_dir / "report"
    try:
        folder.mkdir(exist_ok=True)
        for name, _, _ in _PICTURES:
            if name in drawn:
                (folder / name).write_bytes(drawn[name][1])
            else:
                (folder / name).unlink(missing_ok=True)  # an earlier report's must not pass for this one's
        (run_dir / "report.html").write_text(html, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(
            f"cannot write the report into {run_dir}: {error.strerror or error}; is it writable?"
        ) from error
    return run_dir, run.notes


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv` (default: the process's arguments). Raises `UserError`, see `write_report`."""
    argv = sys.argv[1:] if argv is None else argv
    run_dir = read_options(Options, argv, usage_name("lowrank_vit.report")).run
    folder, notes = write_report(run_dir)
    for note in notes:
        say(f"note: {note}")
    say(f"wrote {folder / 'report.html'} and {folder / 'report'}/*.png")


if __name__ == "__main__":
    exit_cleanly(main)
