"""`python -m lowrank_vit.inference`: predict classes of images with a checkpoint, or with published weights."""

from __future__ import annotations

import os
import sys

from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.common.program import check_versions, usage_name
from lowrank_vit.common.terminal import say_beside
from lowrank_vit.config.command_line import read_options
from lowrank_vit.config.timm_line import fit_flags
from lowrank_vit.score.options import PredictOptions


def main(argv: list[str] | None = None) -> None:
    """Read the command line and classify; under torchrun as one of the ranks.

    Raises `UserError`, also if no image could be read.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = None if "WORLD_SIZE" in os.environ else _read(argv)
    from lowrank_vit.ranks.failing import as_rank  # torch takes seconds, which a wrong option must not cost
    from lowrank_vit.score.prediction import classify

    as_rank(
        lambda world, failing: classify(options or _read(argv, is_first=world.is_first), say_beside, world, failing)
    )


def _read(argv: list[str], *, is_first: bool = True) -> PredictOptions:
    """The options; only the first rank prints notes on them."""
    say = say_beside if is_first else lambda text: None
    prog = usage_name("lowrank_vit.inference")
    line = fit_flags(argv, "inference", say)
    options = read_options(PredictOptions, line.tokens, prog, word="input", refused=line.refused)
    options.check()
    check_versions()
    return options


if __name__ == "__main__":
    exit_cleanly(main)
