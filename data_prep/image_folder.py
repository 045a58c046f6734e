"""A tree of class folders, as torchvision and timm read it: its splits, its classes and its image files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from data_prep.errors import UserError
from data_prep.sources import FileList, Source

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""torchvision's list, which contains timm's; compared in lower case."""
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
}
"""timm's synonyms; where a directory has several of them, the first one here is taken."""
_NO_CLASSES = {"test", *(name for names in SPLIT_NAMES.values() for name in names)}
"""Folders of these names alone are splits, not classes."""


def image_folder(root: Path, classes_file: Path | None = None) -> Source:
    """List DIR/class/**/image. Classes are the sub-folders sorted by name (by code point, as torchvision does).

    `classes_file` keeps only the folders it names, one a line; labels still follow the sorted names. Links to folders
    are followed; names that start with a dot are ignored, and so are files without an image suffix.
    Raises `UserError` if a folder is missing, unreadable or empty.
    """
    classes = _class_folders(root)
    if not classes:
        raise UserError(_no_classes_message(root))
    if set(classes) <= _NO_CLASSES:
        raise UserError(
            f"--src {root} holds {', '.join(classes)}: these look like splits, not classes. Convert both in one "
            f"command by giving a directory as --out, or one of them with --src {root / classes[0]}."
        )
    if classes_file is not None:
        classes = _choose(classes, classes_file, root)
    return Source(str(root), tuple(classes), FileList.pack(_files(root, classes)))


def split_folders(root: Path) -> dict[str, Path]:
    """{"train": folder, "val": folder} for the splits below `root`, by timm's synonyms; only those that are there.

    Raises `UserError` if `root` cannot be listed.
    """
    present = set(_class_folders(root))
    found = {}
    for split, names in SPLIT_NAMES.items():
        first = next((name for name in names if name in present), None)
        if first is not None:
            found[split] = root / first
    return found


def _files(root: Path, classes: list[str]) -> Iterator[tuple[int, str]]:
    for label, name in enumerate(classes):
        files = _images_below(root / name)
        if not files:
            raise UserError(
                f"class folder {root / name} holds no image ({' '.join(IMAGE_SUFFIXES)}). "
                "Fill it, remove it, or leave it out with --classes."
            )
        yield from ((label, f"{name}/{file}") for file in files)


def _no_classes_message(root: Path) -> str:
    message = f"--src {root} has no class folders. Put the images of each class into a sub-folder of it"
    with os.scandir(root) as entries:
        if any(entry.name.startswith("ILSVRC2012_val_") for entry in entries):
            message += " (ImageNet's own validation archive comes without them: sort it by its ground truth first)"
    return message + "."


def _class_folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else "is not a directory"
        raise UserError(f"--src {root} {what}. Give a directory with one sub-folder for each class.") from error
    except OSError as error:
        _unreadable(error)


def _choose(present: list[str], classes_file: Path, root: Path) -> list[str]:
    try:
        lines = [line.strip() for line in classes_file.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UserError(f"--classes {classes_file} cannot be read: {error.strerror}. Give a text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--classes {classes_file} is not UTF-8 text. Give one folder name a line.") from error
    wanted = [line for line in lines if line]
    if not wanted:
        raise UserError(f"--classes {classes_file} names no class. Give one folder name a line.")
    missing = sorted(set(wanted) - set(present))
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise UserError(
            f"--src {root} lacks {len(missing)} of the {len(wanted)} classes that {classes_file} names: {shown}. "
            "Check the names (one folder name a line) and the directory."
        )
    return sorted(set(wanted))


def _images_below(folder: Path) -> list[str]:
    """Paths of all images below `folder`, relative to it, sorted."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back to a folder above would be walked for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(parent, folder)
        for file in files:
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                found.append(file if inside == "." else f"{inside}/{file}".replace(os.sep, "/"))
    return sorted(found)


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}. Check its permissions.") from error
