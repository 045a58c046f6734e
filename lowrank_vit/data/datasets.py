"""Open a run's two sets and see that they fit each other."""

from __future__ import annotations

from pathlib import Path

from data_prep import terminal
from data_prep.errors import UserError
from data_prep.parts import find_parts
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.locate import DataOptions, locate
from lowrank_vit.data.one_process import Say
from lowrank_vit.data.staging import stage_all


def open_datasets(
    options: DataOptions, num_classes: int | None, stage_dir: Path | None = None, say: Say = terminal.say
) -> tuple[Beton, Beton, int]:
    """Find or make the sets and open them: training set, validation set, number of classes.

    `stage_dir`: open copies there. Raises `UserError` if something is missing or damaged, if the two sets disagree
    about their classes, or if `num_classes` is too small for the labels.
    """
    paths = locate(options, say)
    for path in paths:
        if not path.exists() and not find_parts(path):
            raise UserError(
                f"{path.parent}: {path.name} is not there. Write it with `python -m data_prep imagefolder "
                f"--src DIR --out {path}`."
            )
    if stage_dir is not None:
        paths = stage_all(paths, stage_dir, say)
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
            f"--num-classes {num_classes} is too small: {paths[0].parent} has {of_data} classes. "
            f"Leave the flag out or give at least {of_data}."
        )
    return train, val, num_classes or of_data
