"""`python -m lowrank_vit.bench`: the name that the benches had before they left the package."""

from __future__ import annotations

import sys
from typing import NoReturn

from lowrank_vit.common.errors import UserError, exit_cleanly


def main(argv: list[str] | None = None) -> NoReturn:
    """Raise `UserError` with the present form of the command line `argv` (default: the process's own)."""
    line = " ".join(["python -m benchmarks", *(sys.argv[1:] if argv is None else argv)])
    raise UserError(
        f"The benches are no longer part of the installed package. In the repository's folder type `{line}`, or make "
        "bench WHAT=loader."
    )


if __name__ == "__main__":
    exit_cleanly(main)
