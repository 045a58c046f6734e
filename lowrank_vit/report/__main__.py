"""`python -m lowrank_vit.report RUN`: RUN/report.html and its pictures; also of an analysis or a compression."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.common.program import require_one_process, usage_name
from lowrank_vit.common.terminal import output_is_in_files, say
from lowrank_vit.config.command_line import read_options


@dataclass(frozen=True)
class Options:
    """Draw a run, finished or not: RUN/report.html, self-contained, and its pictures in RUN/report/."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """What `python -m lowrank_vit.train` wrote, usually output/<experiment>; or a folder or *_spectral.json of
    `python -m lowrank_vit.analyze_spectrum`; or the --out of `python -m lowrank_vit.compress`."""
    against: Annotated[Path | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="(default: none)")] = None
    """Another run, whose scores and spectra stand beside this one's: of the same plan, with another optimizer, say."""
    png: bool = True
    """Draw pictures too: RUN/report/*.png, and in the page for readers without scripts. Without them it is faster."""


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv` (default: the process's arguments). Raises `UserError`, see `write_report`."""
    require_one_process("lowrank_vit.report")
    argv = sys.argv[1:] if argv is None else argv
    options = read_options(Options, argv, usage_name("lowrank_vit.report"))
    from lowrank_vit.report.page import write_report  # torch takes seconds, which a wrong option must not cost

    folder, notes = write_report(options.run, options.against, options.png)
    output_is_in_files()
    for note in notes:
        say(f"note: {note}")
    say(f"wrote {folder / 'report.html'}" + (f" and {folder / 'report'}/*.png" if options.png else ""))


if __name__ == "__main__":
    exit_cleanly(main)
