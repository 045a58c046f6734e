"""The installed program: its commands, the line that runs one from here, and the files that come with it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from lowrank_vit.common.begin import SCRIPT
from lowrank_vit.common.errors import UserError

_DECISIVE = ("torch", "timm", "nvidia-dali", "ffcv")
"""Beginnings of the names of libraries whose versions are checked at the start."""
COMMANDS = {
    "train": ("lowrank_vit.train", "train a ViT from .beton files and watch its spectra"),
    "validate": ("lowrank_vit.validate", "score a checkpoint on a validation set"),
    "inference": ("lowrank_vit.inference", "predict the classes of images with a checkpoint"),
    "analyze-spectrum": ("lowrank_vit.analyze_spectrum", "singular values of a checkpoint's weights"),
    "compress": ("lowrank_vit.compress", "accuracy against rank, and a checkpoint that has only the ranks it needs"),
    "export": ("lowrank_vit.export", "a run's weights for timm and the Hugging Face hub, with a model card"),
    "report": ("lowrank_vit.report.__main__", "a run directory as one HTML page and PNGs"),
    "augment": ("lowrank_vit.augment.__main__", "draw what the training flags do to images"),
    "prep": ("data_prep.__main__", "write .beton files (also: python -m data_prep)"),
    "doctor": ("lowrank_vit.doctor", "one page for a bug report: versions, machine, what auto would choose"),
    "completion": ("lowrank_vit.config.completion", "a script for the shell: TAB completes all of this"),
}
"""The commands of `lowrank-vit`, in the order in which they are shown: the module with its `main(argv)`, a line."""
CONFIGS, CLASSES = ".yaml", ".txt"
"""Suffixes of bundled configurations and of bundled lists of classes."""
# In an installed package beside the code; in the repository where people look for them.
_ROOT = Path(__file__).parents[2]
_FOLDERS = (_ROOT / "lowrank_vit" / "configs", _ROOT / "configs")


def check_versions() -> None:
    """Raise `UserError` if a library on which results depend is older than the program needs.

    For a source tree that is not installed, nothing is checked.
    """
    try:
        needed = metadata.requires(SCRIPT) or []
    except metadata.PackageNotFoundError:
        return
    for line in needed:
        match = re.match(r"(?P<name>[\w.-]+)>=(?P<least>[\d.]+)(?: *; *extra .*)?$", line)
        if not match or not match["name"].startswith(_DECISIVE):
            continue
        with suppress(metadata.PackageNotFoundError):  # not installed, as of an extra, or under another name
            found = metadata.version(match["name"])
            if _release(found) < _release(match["least"]):
                newer = f"{match['name']}>={match['least']}"
                raise UserError(f"{match['name']} {found} is too old: `pip install -U '{newer}'`.")


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, without zeros at their end: 2.11.0a0+git is (2, 11)."""
    match = re.match(r"[\d.]+", version)
    numbers = [int(number) for number in match[0].split(".") if number] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def require_one_process(module: str) -> None:
    """Refuse torchrun for a command that is the work of one process: `UserError` on rank 0, the others just end."""
    ranks, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "")
    if ranks == "1" or not rank:  # WORLD_SIZE alone is a leftover
        return
    if rank != "0":
        sys.exit(0)
    raise UserError(
        f"{usage_name(module)} is the work of one process, and {ranks} were started. Start it without torchrun, or "
        "unset RANK and WORLD_SIZE. (train, validate and inference share their work.)"
    )


def usage_name(module: str) -> str:
    """The command that runs `module`: `lowrank-vit train` where the user called the script, else `python -m ...`."""
    if _is_script():
        return f"{SCRIPT} {_command(module)}"
    if _is_package():
        return f"python -m lowrank_vit {_command(module)}"
    return f"python -m {module}"


def pasteable_command(module: str) -> str:
    """`usage_name`, ready to paste here: with the interpreter of `.venv` if the shell finds another one."""
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


def bundled_names(suffix: str) -> tuple[str, ...]:
    """Names of the bundled files: configurations without their suffix, lists of classes with it."""
    files = sorted({path.name for folder in _FOLDERS for path in folder.glob(f"*{suffix}")})
    return tuple(name.removesuffix(CONFIGS) for name in files)


def bundled_text(name: str) -> str:
    """Content of a bundled file, whatever files of that name the user has."""
    return next(folder / name for folder in _FOLDERS if (folder / name).is_file()).read_text(encoding="utf-8")


def find_bundled(path: Path, suffix: str) -> Path:
    """The bundled file that a bare name means, with its suffix or without (`--config quickstart`); else `path` itself.

    A file of the user's own takes precedence.
    """
    if path.exists() or path.parent != Path() or path.suffix not in ("", suffix):
        return path
    name = path.name if path.suffix else path.name + suffix
    return next((folder / name for folder in _FOLDERS if (folder / name).is_file()), path)
