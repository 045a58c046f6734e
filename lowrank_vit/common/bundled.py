"""Files that come with the program and can be named without their folder: `--config quickstart`."""

from __future__ import annotations

from pathlib import Path

CONFIGS, CLASSES = ".yaml", ".txt"
"""Suffixes of configurations and of lists of classes."""
# In an installed package beside the code; in the repository where people look for them.
_ROOT = Path(__file__).parents[2]
_FOLDERS = (_ROOT / "lowrank_vit" / "configs", _ROOT / "configs")


def shipped_names(suffix: str) -> tuple[str, ...]:
    """What can be named: configurations without their suffix, lists of classes with it."""
    files = sorted({path.name for folder in _FOLDERS for path in folder.glob(f"*{suffix}")})
    return tuple(name.removesuffix(CONFIGS) for name in files)


def shipped_text(name: str) -> str:
    """What stands in a shipped file, whatever files of that name the user has."""
    return next(folder / name for folder in _FOLDERS if (folder / name).is_file()).read_text(encoding="utf-8")


def find_shipped(path: Path, suffix: str) -> Path:
    """The shipped file that a bare name means, with its suffix or without; any other path as it is.

    A file of the user's own goes first.
    """
    if path.exists() or path.parent != Path() or path.suffix not in ("", suffix):
        return path
    name = path.name if path.suffix else path.name + suffix
    return next((folder / name for folder in _FOLDERS if (folder / name).is_file()), path)
