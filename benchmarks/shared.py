"""`python -m benchmarks.shared`: the process in which `all` runs a GPU's benches, see `harness/processes.py`."""

from __future__ import annotations

from benchmarks.__main__ import run_command
from benchmarks.harness.processes import serve
from benchmarks.training.run import kept_open
from lowrank_vit.common.errors import exit_cleanly


def main() -> None:
    """Run benches until standard input ends."""
    with kept_open():
        serve(run_command)


if __name__ == "__main__":
    exit_cleanly(main)
