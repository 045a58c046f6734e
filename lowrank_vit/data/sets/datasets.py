"""Open a run's two sets and see that they fit each other."""

from __future__ import annotations

from pathlib import Path

from data_prep.formats.beton import find_parts
from data_prep.sources.image_folder import count_remarks
from data_prep.sources.samples import TRUST, abbreviated, differences, in_timms_order, positions
from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.locate import DataOptions, locate
from lowrank_vit.data.sets.staging import stage_all

MEND = "Convert both from folders with the same class names."


def open_datasets(
    options: DataOptions,
    num_classes: int | None,
    stage_dir: Path | None = None,
    say: Say = terminal.say,
    *,
    larger_head: bool = False,
) -> tuple[Beton, Beton, int]:
    """Find or make the sets and open them: training set, validation set, number of classes.

    The validation set gets the labels of the training set, by the names of the classes; it may lack some. A training
    set without names gets those of the validation set. `stage_dir`: open copies there. `larger_head`: `num_classes` may
    be more than the data have. Raises `UserError` if something is missing or damaged, if the validation set has a class
    of its own, or if `num_classes` is not that of the data.
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
    for beton in (train, val):
        for remark in count_remarks(beton.path, beton.path.stem, beton.classes or (), beton.num_samples):
            say(remark)
    _give_labels_of(train, val, say, trust_labels=options.trust_labels, larger_head=larger_head)
    of_data = max(train.num_classes, val.num_classes)
    if num_classes is None or num_classes == of_data or (larger_head and num_classes > of_data):
        return train, val, num_classes or of_data
    has = f"{paths[0].parent} has {of_data:,} classes{f' ({abbreviated(train.classes)})' if train.classes else ''}"
    if num_classes < of_data:
        raise UserError(f"--num-classes {num_classes} is too small: {has}. Leave the flag out.")
    raise UserError(
        f"--num-classes {num_classes} is too large: {has}. Leave the flag out, or add --larger-head if the model is "
        "meant to have outputs without a class."
    )


def _give_labels_of(train: Beton, val: Beton, say: Say, *, trust_labels: bool, larger_head: bool) -> None:
    """Relabel `val` by the names of `train`, or name `train` by those of `val`. Raises `UserError` where that fails."""
    if train.classes and val.classes:
        _match_names(train, val, train.classes, val.classes, say, trust_labels=trust_labels)
        return
    if val.classes:  # all of them are known, of `train` only the greatest label
        fits, may_differ = val.num_classes == train.num_classes, trust_labels
    else:
        fits = val.num_classes <= train.num_classes
        may_differ = not train.classes and (trust_labels or larger_head)
    if not fits and not may_differ:
        sides = "; ".join(
            f"{one.path}: {one.num_classes:,} classes ({abbreviated(one.classes)})"
            if one.classes
            else f"{one.path}: labels up to {one.num_classes - 1}, without names"
            for one in (train, val)
        )
        raise UserError(
            "The two sets have different numbers of classes, so their labels do not mean the same. "
            f"{sides}. {MEND}{'' if train.classes else f' {TRUST}'}"
        )
    if not fits and trust_labels:
        say(f"label N of {val.path} is taken for label N of {train.path} (--trust-labels)")
        if val.num_classes < train.num_classes:
            val.classes = None  # they would name only some of the outputs
    one, other = (train, val) if train.classes else (val, train)
    if one.classes and (one is val or sorted(one.classes) != in_timms_order(one.classes)):
        say(
            f"{other.path} names no classes: its labels are taken in the order of {one.path} "
            f"({abbreviated(one.classes, 4)})"
        )
    train.classes = train.classes or val.classes  # for the checkpoint


def _match_names(
    train: Beton, val: Beton, names: list[str], of_val: list[str], say: Say, *, trust_labels: bool
) -> None:
    if names == of_val:
        return
    labels = positions(of_val, names)
    if labels is None and trust_labels and len(of_val) <= len(names):
        say(f"label N of {val.path} is taken for label N of {train.path} (--trust-labels)")
        labels = list(range(len(of_val)))
    if labels is None:
        lists = differences(names, str(train.path), of_val, str(val.path))
        trust = "--trust-labels cannot help, since the latter has more." if trust_labels else TRUST
        raise UserError(
            f"The two sets have different classes, so their labels do not mean the same. {lists}. {MEND} {trust}"
        )
    if len(labels) < len(names):
        missing = [name for n, name in enumerate(names) if n not in set(labels)]
        count = f"{len(missing):,} of the {len(names):,} classes"
        say(f"{val.path} has no sample of {count} ({abbreviated(missing)})")
    val.relabel(labels, names)
