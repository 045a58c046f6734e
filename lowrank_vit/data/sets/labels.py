"""Give two sets the same numbering of the classes: by the names of the classes, if they have names."""

from __future__ import annotations

from data_prep.sources.samples import TRUST, abbreviated, differences, in_timms_order, positions
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say
from lowrank_vit.data.sets.beton import Beton

MEND = "Convert both from folders with the same class names."


def give_labels_of(train: Beton, val: Beton, say: Say, *, trust_labels: bool, larger_head: bool) -> None:
    """Relabel `val` by the names of `train`, or name `train` by those of `val`. Raises `UserError` if that fails."""
    if train.classes and val.classes:
        _match_names(train, val, train.classes, val.classes, say, trust_labels=trust_labels)
        return
    if val.classes:  # all its classes are known, but only the greatest label of `train`
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
