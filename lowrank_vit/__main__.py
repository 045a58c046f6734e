"""`lowrank-vit COMMAND ...`: the same commands as `python -m lowrank_vit.COMMAND`."""

from __future__ import annotations

import importlib
import sys

from lowrank_vit import __version__
from lowrank_vit.bench import main as moved
from lowrank_vit.common.errors import UserError, did_you_mean, exit_cleanly
from lowrank_vit.common.program import COMMANDS


def run(argv: list[str]) -> None:
    """Run the command that `argv` begins with; without one, list the commands. Raises `UserError`."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: lowrank-vit COMMAND ...   (COMMAND --help tells more)\n")
        for name, (_, description) in COMMANDS.items():
            print(f"  {name:<18}{description}")
        print(f"\n  {'--version':<18}print the version")
        return
    if argv[0] == "--version":
        print(f"lowrank-vit {__version__}")
        return
    name = argv[0].replace("_", "-")  # analyze_spectrum, as the module is called
    if name == "bench":
        moved(argv[1:])
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        raise UserError(f"`{argv[0]}` is not a command.{near} There are: {', '.join(COMMANDS)}.")
    importlib.import_module(COMMANDS[name][0]).main(argv[1:])


def main() -> None:
    """The console script."""
    exit_cleanly(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
