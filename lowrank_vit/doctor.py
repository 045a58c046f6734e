"""`lowrank-vit doctor`: one page for a bug report, of versions, the machine and what `auto` would choose there."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.common.program import usage_name
from lowrank_vit.common.terminal import say
from lowrank_vit.config.command_line import read_options
from lowrank_vit.run.diagnosis import Page, diagnosis

WIDTH = 80
_NAME = 18


@dataclass(frozen=True)
class Options:
    """Print one page for a bug report: versions, machine, file systems, and what auto would choose.

    It names no folder, user or host. A line whose value cannot be found out says why.
    """

    output: Annotated[Path, arg(metavar="DIR")] = Path("output")
    """Folder of the runs; a small file tests its file system."""
    data_dir: Annotated[Path, arg(metavar="DIR")] = Path("data")
    """Folder of the data; tested the same way. If it has a train.beton, the page says which backend would decode it."""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """Print JSON instead of text."""


def text_of(page: Page) -> str:
    """The page as text of `WIDTH` columns."""
    lines = list[str]()
    for section, entries in page.items():
        lines += [section]
        for name, told in entries.items():
            indent = " " * (_NAME + 2)
            first = f"  {name:<{_NAME - 1}} " if len(name) < _NAME else f"  {name} "
            lines += textwrap.wrap(told or "-", WIDTH, initial_indent=first, subsequent_indent=indent)
    return "\n".join(lines)


def _run(argv: list[str]) -> None:
    options = read_options(Options, argv, usage_name("lowrank_vit.doctor"))
    page = diagnosis(options.output, options.data_dir)
    say(json.dumps(page, indent=2) if options.json else text_of(page))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    exit_cleanly(lambda: _run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
