"""`python -m lowrank_vit.validate`: score a checkpoint, or published weights, on a validation set."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.common.program import check_versions, usage_name
from lowrank_vit.config.command_line import asks_for_help, read_options, show_help
from lowrank_vit.config.timm_line import fit_flags
from lowrank_vit.score.options import ValidateOptions


@dataclass(frozen=True, kw_only=True)
class _Shown(ValidateOptions):
    """The options, and timm's old form `validate.py DIR --checkpoint ...`, for `--help`."""

    dir: Positional[Annotated[Path | None, arg(metavar="[DATA]")]] = None
    """The same as --data DATA."""


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score; under torchrun as one of the ranks. Raises `UserError`."""
    argv = sys.argv[1:] if argv is None else argv
    prog = usage_name("lowrank_vit.validate")
    if asks_for_help(argv):
        show_help(_Shown, argv, prog, ValidateOptions.__doc__)
    options = None if "WORLD_SIZE" in os.environ else _read(argv, prog)
    from lowrank_vit.ranks.failing import as_rank  # torch takes seconds, which a wrong option must not cost
    from lowrank_vit.score.validation import score

    as_rank(lambda world, failing: score(options or _read(argv, prog, is_first=world.is_first), world, failing))


def _read(argv: list[str], prog: str, *, is_first: bool = True) -> ValidateOptions:
    """The options; only the first rank prints notes on them."""
    say = terminal.say if is_first else lambda text: None
    line = fit_flags(argv, "validate", say)
    options = read_options(ValidateOptions, line.tokens, prog, word="data", refused=line.refused)
    options.check()
    check_versions()
    return options


if __name__ == "__main__":
    exit_cleanly(main)
