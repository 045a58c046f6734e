"""`lowrank-vit COMMAND ...`: the same commands as `python -m lowrank_vit.COMMAND`."""

from __future__ import annotations

import importlib
import sys

from data_prep.errors import UserError, exit_cleanly

COMMANDS = {
    "train": ("lowrank_vit.train", "train a ViT from .beton files and watch its spectra"),
    "validate": ("lowrank_vit.validate", "score a checkpoint on a validation set"),
    "inference": ("lowrank_vit.inference", "what a checkpoint says of some images"),
    "analyze-spectrum": ("lowrank_vit.analyze_spectrum", "singular values of a checkpoint's weights"),
    "report": ("lowrank_vit.report.__main__", "a run directory as one HTML page and PNGs"),
    "augment": ("lowrank_vit.augment.__main__", "draw what the training flags do to images"),
    "bench": ("lowrank_vit.bench.__main__", "measure this project beside its peers"),
    "prep": ("data_prep.__main__", "write .beton files (also: python -m data_prep)"),
}


def run(argv: list[str]) -> None:
    """Hand `argv` on to the command it begins with; print the commands without one. Raises `UserError`."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: lowrank-vit COMMAND ...   (COMMAND --help tells more)\n")
        for name, (_, description) in COMMANDS.items():
            print(f"  {name:<18}{description}")
        return
    if argv[0] not in COMMANDS:
        raise UserError(f"`{argv[0]}` is not a command. Choose one of: {', '.join(COMMANDS)}.")
    importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])


def main() -> None:
    """The console script."""
    exit_cleanly(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
