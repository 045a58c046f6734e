"""`python -m lowrank_vit.compress`: accuracy against rank, and checkpoints that have only the ranks they need."""

from __future__ import annotations

import sys

from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.common.program import check_versions, require_one_process, usage_name
from lowrank_vit.config.command_line import read_options
from lowrank_vit.lowrank.options import CompressOptions


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv` (default: the process's arguments). Raises `UserError`."""
    require_one_process("lowrank_vit.compress")
    argv = sys.argv[1:] if argv is None else argv
    options = read_options(CompressOptions, argv, usage_name("lowrank_vit.compress"))
    options.check()
    check_versions()
    from lowrank_vit.lowrank.command import compress  # torch takes seconds, which a wrong option must not cost

    compress(options)


if __name__ == "__main__":
    exit_cleanly(main)
