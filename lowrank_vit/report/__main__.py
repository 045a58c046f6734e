"""`python -m lowrank_vit.report RUN`: RUN/report.html and its pictures in RUN/report/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from data_prep.errors import UserError, exit_cleanly
from lowrank_vit.report.html import report_html
from lowrank_vit.report.read_run import read_run
from lowrank_vit.report.spectra_plots import spectra_plot, stable_rank_plot
from lowrank_vit.report.training_plot import training_plot

_PICTURES = (
    ("training.png", "Loss, accuracy, learning rate and throughput over the updates", training_plot),
    ("spectra.png", "Singular values of the weights over the updates", spectra_plot),
    ("stable_rank.png", "Stable and effective rank of every block over the updates", stable_rank_plot),
)


@dataclass(frozen=True)
class Options:
    """Draw a run, finished or not: RUN/report.html, self-contained, and its pictures in RUN/report/."""

    run: tyro.conf.Positional[Path]
    """The directory that `python -m lowrank_vit.train` wrote, usually output/<experiment>."""


def write_report(run_dir: Path) -> list[str]:
    """Write the report of one run; returns the notes on what was missing.

    Raises:
        UserError: `run_dir` is no run, or cannot be written.
    """
    run = read_run(run_dir)
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
        (run_dir / "report.html").write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write the report into {run_dir}: {error.strerror or error}; is it writable?"
        ) from error
    return run.notes


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv` (default: the process's arguments). Raises `UserError`, see `write_report`."""
    run_dir = tyro.cli(Options, args=argv, prog="python -m lowrank_vit.report").run
    console = Console(soft_wrap=True, highlight=False)
    for note in write_report(run_dir):
        console.print(f"note: {note}", markup=False)
    console.print(f"wrote {run_dir / 'report.html'} and {run_dir / 'report'}/*.png", markup=False)


if __name__ == "__main__":
    exit_cleanly(main)
