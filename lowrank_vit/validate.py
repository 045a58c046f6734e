"""`python -m lowrank_vit.validate`: score a checkpoint, or published weights, on a validation set."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError, exit_cleanly
from lowrank_vit.common.program import usage_name
from lowrank_vit.common.terminal import fitted_help
from lowrank_vit.config.timm_line import fit_flags
from lowrank_vit.score.options import ValidateOptions


@dataclass(frozen=True, kw_only=True)
class _CommandLine(ValidateOptions):
    """The options, and timm's old form `validate.py DIR --checkpoint ...`."""

    dir: Positional[Annotated[Path | None, arg(metavar="[DATA]")]] = None
    """The same as --data DATA."""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, score, print."""
    argv = sys.argv[1:] if argv is None else argv
    prog = usage_name("lowrank_vit.validate")
    argv = fit_flags(argv, "validate", terminal.say)
    with fitted_help(argv):
        options = tyro.cli(_CommandLine, args=argv, prog=prog, description=ValidateOptions.__doc__)
    if options.dir is not None and options.data is not None:
        raise UserError(f"{options.dir} and --data {options.data}: give the data once.")
    options = replace(options, data=options.data or options.dir)
    from lowrank_vit.score.validation import score  # torch takes seconds, which a wrong option must not cost

    score(options)


if __name__ == "__main__":
    exit_cleanly(main)
