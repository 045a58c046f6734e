"""The commands of `lowrank-vit`, and how a command can be typed here: what usage lines and next steps say."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

SCRIPT = "lowrank-vit"
COMMANDS = {
    "train": ("lowrank_vit.train", "train a ViT from .beton files and watch its spectra"),
    "validate": ("lowrank_vit.validate", "score a checkpoint on a validation set"),
    "inference": ("lowrank_vit.inference", "what a checkpoint says of some images"),
    "analyze-spectrum": ("lowrank_vit.analyze_spectrum", "singular values of a checkpoint's weights"),
    "report": ("lowrank_vit.report.__main__", "a run directory as one HTML page and PNGs"),
    "augment": ("lowrank_vit.augment.__main__", "draw what the training flags do to images"),
    "prep": ("data_prep.__main__", "write .beton files (also: python -m data_prep)"),
    "completion": ("lowrank_vit.config.completion", "a script for the shell: TAB completes all of this"),
}
"""The commands of `lowrank-vit`, in the order in which they are shown: the module with its `main(argv)`, a line."""


def usage_name(module: str) -> str:
    """The command that runs `module`: `lowrank-vit train` where the user called the script, else `python -m ...`."""
    if _is_script():
        return f"{SCRIPT} {_command(module)}"
    if _is_package():
        return f"python -m lowrank_vit {_command(module)}"
    return f"python -m {module}"


def typed(module: str) -> str:
    """The same, ready to paste here: with the interpreter of `.venv` where the shell finds another one."""
    name = usage_name(module)
    if _is_script():
        found = shutil.which(SCRIPT)
        is_on_path = bool(found) and Path(found).resolve() == Path(sys.argv[0]).resolve()
        path = Path(sys.argv[0]).absolute()
        near = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        return name if is_on_path else name.replace(SCRIPT, str(near), 1)
    return name.replace("python", interpreter(), 1)


def interpreter() -> str:
    """This interpreter as it can be typed: `python` if that is it, `.venv/bin/python` after `make`, else its path."""
    found = shutil.which("python")
    if found and Path(found).absolute() == Path(sys.executable).absolute():
        return "python"
    local = Path(".venv/bin/python")
    if local.exists() and Path(sys.prefix).resolve() == Path(".venv").resolve():
        return str(local)
    return sys.executable


def _is_script() -> bool:
    return Path(sys.argv[0]).name == SCRIPT


def _is_package() -> bool:
    return Path(sys.argv[0]).parts[-2:] == ("lowrank_vit", "__main__.py")


def _command(module: str) -> str:
    return "prep" if module == "data_prep" else module.rpartition(".")[2].replace("_", "-")
