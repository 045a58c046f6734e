"""Benchmarks of this project beside its peers: tables, and JSON and plots on request."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.common.program import usage_name
from lowrank_vit.config.command_line import run_subcommand

# Another bench is a module with `Options` and `run`, a function in `commands.py` and a description here.
DESCRIPTIONS = {
    "prep": """Convert a folder of JPEGs: `data_prep` beside FFCV's own writer and beside copying the files.

    Takes about a minute per round on 2 cores, and 1 GB of disk space.
    """,
    "loader": """Read training crops: our backends beside stock FFCV, a plain DALI pipeline and timm's loader.

    Takes about fifteen seconds per round on 2 cores.
    """,
    "augment": """Augment decoded crops with timm's published recipe, beside timm's own transforms.

    Takes about ten seconds per round on 2 cores.
    """,
    "spectral": """Singular values and vectors of a ViT's weights: accuracy, and speed beside a plain SVD and before.

    Takes about twenty seconds per round on 2 cores.
    """,
    "step": """Training steps on synthetic images, eager and compiled, beside those of timm's train.py.

    Takes about ten seconds per round on 2 cores, and a minute to compile.
    """,
    "end-to-end": """Train from a .beton with the full recipe: phases of a step, bottleneck, and the step without data.

    Takes about ten seconds per round on 2 cores.
    """,
    "training": """One figure of a training run: its step beside timm's, with data, with the monitor, or its kernels.

    --json is written after each round.
    """,
    "limits": """The machine's limits: JPEG decoding, copying memory, reading cached files, matrix products.

    Takes about five seconds per round on 2 cores.
    """,
    "growth": """How speed and memory grow with workers, batch and image size, samples, files, classes, ranks and width.

    Takes about four minutes per round on 2 cores, mostly for processes whose memory is measured, and 1 GB of disk
    space. --json is written after each measurement; the same command continues an unfinished file.
    """,
    "all": """All benches, one after the other, and one table of the ratios with their targets.

    Takes less than 15 minutes on 2 idle cores with --short, 3.6 on a GPU. --json is written after each bench, so an
    interruption keeps what is done. Exits with 1 if something of ours failed; a missed target is not a failure.
    """,
    "record": """Join the records of the GPU tests and of `all` into one JSON file and a page for docs/benchmarks.""",
    "gpu-check": """Run the GPU tests and the benches in their short form, and record both, as `make gpu-check` does.

    Takes 6 minutes; the record names what was not reached in that time. Exits with 1 if a test or something of ours in
    a bench failed; the record is written all the same.
    """,
}
"""What each bench does, for its help; in this order."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own). Exits with 2 on a user's error, 130 on Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    exit_cleanly(lambda: run_command(argv))


def run_command(argv: list[str]) -> None:
    """As `main`, for a caller that continues. Raises `UserError`, and `SystemExit` if something of ours failed."""
    if argv and argv[0].replace("_", "-") in DESCRIPTIONS:
        from benchmarks.commands import described  # loads torch and timm

        commands = described(DESCRIPTIONS)
    else:
        commands = {name: _without_options(text) for name, text in DESCRIPTIONS.items()}
    run_subcommand(commands, argv, usage_name("benchmarks"), __doc__)


def _without_options(text: str) -> Callable[..., None]:
    """A stand-in for a command in the list of all of them."""

    def command() -> None: ...

    command.__doc__ = text
    return command


if __name__ == "__main__":
    main()
