"""`python -m lowrank_vit.inference`: what a checkpoint, or published weights, say of some images."""

from __future__ import annotations

import sys

import tyro

from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.common.program import usage_name
from lowrank_vit.common.terminal import fitted_help, printable
from lowrank_vit.config.timm_line import fit_flags, with_images_first
from lowrank_vit.score.options import PredictOptions


def note(text: object) -> None:
    """Say something that is no result."""
    print(printable(text), file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, classify, print. Raises `UserError` where no image could be read."""
    argv = sys.argv[1:] if argv is None else argv
    argv = with_images_first(fit_flags(argv, "inference", note), PredictOptions)
    with fitted_help(argv):
        prog = usage_name("lowrank_vit.inference")
        options = tyro.cli(PredictOptions, args=argv, prog=prog, description=PredictOptions.__doc__)
    from lowrank_vit.score.prediction import classify  # torch takes seconds, which a wrong option must not cost

    classify(options, note)


if __name__ == "__main__":
    exit_cleanly(main)
