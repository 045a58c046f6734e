"""What can be converted: every source lists its classes and its samples, in one order that never changes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from data_prep.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""torchvision's list, which contains timm's; compared in lower case."""
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "eval", "evaluation", "test"})
DIGITS_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to convert."""

    label: int
    """Position of its class in the source's `classes`."""
    name: str
    """Where it comes from, relative to the source, with forward slashes."""
    pixels: np.ndarray | None = None
    """uint8 (height, width, 3) where the source holds pixels already, None where `name` is a file to read."""


@dataclass(frozen=True)
class Source:
    """Everything one `.beton` is made of."""

    name: str
    """The source as the user gave it; goes into the manifest."""
    classes: tuple[str, ...]
    """Class names, in the order of the labels."""
    samples: list[Sample]


def image_folder(root: Path, classes_file: Path | None = None) -> Source:
    """List DIR/class/**/image. Classes are the sub-folders sorted by name (by code point, as torchvision does).

    `classes_file` keeps only the folders it names, one a line; labels still follow the sorted names. Links to folders
    are followed; names that start with a dot are ignored, and so are files without an image suffix.
    Raises `UserError` if a folder is missing, unreadable or empty.
    """
    classes = _class_folders(root)
    if not classes:
        raise UserError(f"--src {root} has no class folders. Put the images of each class into a sub-folder of it.")
    if SPLIT_NAMES.issuperset(classes):
        raise UserError(
            f"--src {root} holds {', '.join(classes)}: these look like splits, not classes. "
            f"Convert each split on its own, for example --src {root / classes[0]}."
        )
    if classes_file is not None:
        classes = _choose(classes, classes_file, root)
    samples = []
    for label, name in enumerate(classes):
        files = _images_below(root / name)
        if not files:
            raise UserError(
                f"class folder {root / name} holds no image ({' '.join(IMAGE_SUFFIXES)}). "
                "Fill it, remove it, or leave it out with --classes."
            )
        samples += [Sample(label, f"{name}/{file}") for file in files]
    return Source(str(root), tuple(classes), samples)


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


def digits(split: Literal["train", "val"]) -> Source:
    """scikit-learn's 1,797 scanned handwritten digits (8x8), split 1,437 / 360 once and for all.

    Grey levels 0..16 become uint8 0..255, rounded to nearest, the same in all three channels.
    Raises `UserError` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn, which is missing: `pip install scikit-learn`.") from error
    bunch: Any = load_digits()
    levels, labels = bunch.images.astype(np.int64), bunch.target
    grey = ((levels * 255 + 8) // 16).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    indices = digits_indices(split, len(images))
    samples = [Sample(int(labels[i]), f"digits/{i:04d}", images[i]) for i in indices]
    return Source(f"scikit-learn digits ({split})", tuple(str(name) for name in bunch.target_names), samples)


def digits_indices(split: Literal["train", "val"], total: int) -> np.ndarray:
    """int64, ascending: the samples out of `total` that belong to `split`; 80 % train, 20 % val."""
    # Raw PCG64 output is the same in every NumPy; `Generator.permutation` may change between releases (NEP 19).
    shuffled = np.argsort(np.random.PCG64(DIGITS_SPLIT_SEED).random_raw(total), kind="stable")
    num_train = total * 4 // 5
    return np.sort(shuffled[:num_train] if split == "train" else shuffled[num_train:])
