"""`python -m lowrank_vit.inference`: what a checkpoint, or published weights, say of some images."""

from __future__ import annotations

import sys

from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.common.program import check_versions, usage_name
from lowrank_vit.common.terminal import say_beside
from lowrank_vit.config.command_line import read_options
from lowrank_vit.config.timm_line import fit_flags
from lowrank_vit.score.options import PredictOptions


def main(argv: list[str] | None = None) -> None:
    """Read the command line and classify. Raises `UserError`, also where no image could be read."""
    argv = sys.argv[1:] if argv is None else argv
    prog = usage_name("lowrank_vit.inference")
    options = read_options(PredictOptions, fit_flags(argv, "inference", say_beside), prog, word="input")
    options.check()
    check_versions()
    from lowrank_vit.score.prediction import classify  # torch takes seconds, which a wrong option must not cost

    classify(options, say_beside)


if __name__ == "__main__":
    exit_cleanly(main)
