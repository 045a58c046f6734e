"""`python -m lowrank_vit.report RUN` writes RUN/report.html and its pictures; RUN may be an analysis or compression."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lowrank_vit.common.arguments import Range
from lowrank_vit.common.errors import UserError, exit_cleanly
from lowrank_vit.common.program import require_one_process, usage_name
from lowrank_vit.common.terminal import output_is_in_files, say
from lowrank_vit.config.check import check_ranges
from lowrank_vit.config.command_line import read_options
from lowrank_vit.report.language import Language, in_language

if TYPE_CHECKING:
    from lowrank_vit.report.page import Drawn

NONE = "(default: none)"


@dataclass(frozen=True)
class Options:
    """Draw a run, finished or not: RUN/report.html, self-contained, and its pictures in RUN/report/."""

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]
    """What `python -m lowrank_vit.train` wrote, usually output/<experiment>; or a folder or *_spectral.json of
    `python -m lowrank_vit.analyze_spectrum`, or a *_drift.json of its --compare; or the --out of
    `python -m lowrank_vit.compress`. Several runs, or several analyses, are compared in a page of their own,
    comparison.html; their own reports stay."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder for the page; default: the run's own; for several runs, a folder named after them beside the first."""
    against: Annotated[Path | None, tyro.conf.arg(metavar="RUN", help_behavior_hint=NONE)] = None
    """Another run to compare with: `report RUN --against OTHER` is `report RUN OTHER`."""
    png: bool = True
    """Also draw RUN/report/*.png, which the page shows if scripts are off. --no-png is faster."""
    dark: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also draw each picture on a dark background, *_dark.png. The page itself follows the browser's setting."""
    lang: Language = "en"
    """The page's language: English or Chinese. Pictures stay English."""
    export: Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="csv|parquet DIR", help_behavior_hint=NONE)] = None
    """Only write the run's numbers as tables into a folder: csv DIR, or parquet DIR (needs pyarrow)."""
    watch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write nothing. Serve the page on this machine and rebuild it while the run continues, until Ctrl-C."""
    port: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=""), Range(0, 65535)] = None
    """With --watch: port on 127.0.0.1; 0: any free one; default: 8642, or another if it is taken."""


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv` (default: the process's arguments). Raises `UserError`, see `write_report`."""
    require_one_process("lowrank_vit.report")
    argv = sys.argv[1:] if argv is None else argv
    options = read_options(Options, argv, usage_name("lowrank_vit.report"))
    check_ranges(options)
    with in_language(options.lang):
        _report(options)


def _report(options: Options) -> None:
    if options.port is not None and not options.watch:
        raise UserError("--port needs --watch. Add --watch, or leave --port out.")
    if options.dark and (options.watch or options.export or not options.png):
        raise UserError("--dark is about PNG files, and --watch, --export and --no-png write none. Leave --dark out.")
    runs = [*options.runs, *([options.against] if options.against else [])]
    if len(runs) > 1:
        _compare(runs, options)
        return
    (run,) = runs
    if options.out is not None and (options.watch or options.export):
        raise UserError("--out is the folder of a written page, and --watch and --export write none. Leave --out out.")
    if options.export is not None:
        if options.watch:
            raise UserError("--export only writes tables. Leave --watch out.")
        from lowrank_vit.report.export import export_run, format_of

        form, folder = options.export
        files = export_run(run, format_of(form), Path(folder))
        output_is_in_files()
        say(f"wrote {', '.join(map(str, files))}")
        return
    if options.watch:
        from lowrank_vit.report.watch import serve_page

        serve_page(run, options.port, options.png)
        return
    from lowrank_vit.report.page import (
        draw_report,
        in_folder,
    )  # importing torch takes seconds; a wrong option is refused before that

    def draw() -> Drawn:
        return draw_report(run, options.png)

    _write(in_folder(draw(), run, options.out) if options.out else draw(), options, draw)


def _write(drawn: Drawn, options: Options, draw: Callable[[], Drawn]) -> None:
    from lowrank_vit.report.page import with_dark_twins, write_drawn

    drawn = with_dark_twins(drawn, draw) if options.dark else drawn
    write_drawn(drawn)
    output_is_in_files()
    for note in drawn.notes:
        say(f"note: {note}")
    say(f"wrote {drawn.page}" + (f" and {drawn.page.with_suffix('')}/*.png" if options.png else ""))


def _compare(runs: Sequence[Path], options: Options) -> None:
    for name in ("watch", "export"):
        if getattr(options, name):
            raise UserError(f"--{name} takes one run, but {len(runs)} are given. Leave --{name} out.")
    from lowrank_vit.report.compare.page import draw_comparison

    def draw() -> Drawn:
        return draw_comparison(runs, options.out, with_png=options.png)

    _write(draw(), options, draw)


if __name__ == "__main__":
    exit_cleanly(main)
