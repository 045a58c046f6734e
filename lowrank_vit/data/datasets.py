"""Find a run's `.beton` files, and make the embedded ones on first use."""

from __future__ import annotations

from pathlib import Path

from data_prep.errors import UserError
from data_prep.parts import find_parts
from lowrank_vit.data.beton import Beton


def open_datasets(dataset: str, data_dir: Path, num_classes: int | None) -> tuple[Beton, Beton, int]:
    """Open a folder with train.beton and val.beton, or their parts: training set, validation set, number of classes.

    `dataset` "digits" writes both files there first if neither exists. Raises `UserError` if a file is missing or
    damaged, if the two sets disagree about their classes, or if `num_classes` is too small for the labels.
    """
    paths = [data_dir / "train.beton", data_dir / "val.beton"]
    if dataset == "digits" and not any(path.exists() for path in paths):  # never over a file of the user's
        from data_prep.convert import convert_digits

        convert_digits(data_dir)
    for path in paths:
        if not path.exists() and not find_parts(path):
            raise UserError(
                f"--data-dir {data_dir}: {path.name} is not there. Write it with `python -m data_prep imagefolder "
                f"--src DIR --out {path}`, or train on the embedded digits with --dataset digits."
            )
    train, val = (Beton(path) for path in paths)
    if train.classes and val.classes and train.classes != val.classes:
        both = next((pair for pair in zip(train.classes, val.classes, strict=False) if pair[0] != pair[1]), None)
        where = f"{both[0]} against {both[1]}" if both else f"{len(train.classes)} against {len(val.classes)}"
        raise UserError(
            f"{paths[0]} and {paths[1]} have different classes ({where}), so their labels do not mean the same. "
            "Convert both from folders with the same class names."
        )
    of_data = max(train.num_classes, val.num_classes)
    if num_classes is not None and num_classes < of_data:
        raise UserError(
            f"--num-classes {num_classes} is too small: {data_dir} has {of_data} classes. "
            f"Leave the flag out or give at least {of_data}."
        )
    return train, val, num_classes or of_data
