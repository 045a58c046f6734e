"""Matching the labels of a data set with the outputs of a model: compared by name, and mapped where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from timm.data import ImageNetInfo, infer_imagenet_subset

from data_prep.sources.samples import TRUST, abbreviated, differences, imagenet1k, in_timms_order, positions
from lowrank_vit.common.errors import UserError

Order = Literal["timm", "code-point"]
"""Order of the outputs of a model without class names: timm's order of class folders, or torchvision's."""


@dataclass(frozen=True)
class Classes:
    """The classes of a data set or of a model."""

    what: str
    """The set or the model, for messages."""
    count: int
    """Number of labels or outputs; for a set without names, its largest label plus one."""
    names: Sequence[str] | None
    """Names in label order, if known; a model may have more outputs."""


@dataclass(frozen=True)
class Match:
    """How the labels of a set map to the outputs of a model."""

    outputs: list[int]
    """The model's output for each label of the set."""
    names: list[str] | None
    """Names of the model's outputs, as far as known."""
    remarks: list[str] = field(default_factory=list)
    """The assumptions made, one line each."""

    @property
    def is_identity(self) -> bool:
        """True if label N is output N for all labels."""
        return self.outputs == list(range(len(self.outputs)))


@dataclass(frozen=True)
class Trust:
    """The user's flags for classes that cannot be compared."""

    labels: bool = False
    """--trust-labels: label N is output N if the class names do not match."""
    order: Order = "timm"
    """--class-order."""


def published_names(num_outputs: int) -> list[str] | None:
    """Timm's class names of the ImageNet set with this number of classes; None if there is none."""
    if num_outputs == len(imagenet1k()):
        return list(imagenet1k())
    subset = infer_imagenet_subset({"num_classes": num_outputs})
    return list(ImageNetInfo(subset).label_names()) if subset else None


def match(data: Classes, model: Classes, trust: Trust, advice: str) -> Match:
    """Map each label of `data` to an output of `model`, by class names if both sides have them.

    If one side has no names, the numbers of classes must agree, or all classes of the data must belong to the ImageNet
    set with the model's number of classes. Otherwise raises `UserError` with both lists and `advice`, unless the user
    trusts the labels.
    """
    same = Match(list(range(data.count)), list(model.names) if model.names else None)
    outputs = positions(data.names, model.names) if data.names and model.names else None
    if trust.labels and outputs is None:
        if data.count > model.count:
            raise UserError(f"--trust-labels: {data.what} has {data.count:,} classes, but {_in_words(model)}. {advice}")
        return replace(same, remarks=[f"label N of {data.what} is taken as output N of {model.what} (--trust-labels)"])
    if data.names is None:
        if data.count != model.count:
            raise _differ(data, model, advice)
        return replace(same, remarks=_of_nameless_data(data, model))
    if model.names is None:
        return _with_nameless_model(data, model, trust, advice)
    is_imagenet = data.count == model.count and tuple(model.names) == imagenet1k()
    if outputs is None and is_imagenet and _are_numbers(data.names):  # such as ImageNetV2's folders
        outputs = [int(name) for name in data.names]
    if outputs is None:
        raise _differ(data, model, advice)
    return _found(outputs, data, model)


def _with_nameless_model(data: Classes, model: Classes, trust: Trust, advice: str) -> Match:
    assert data.names is not None
    known = published_names(model.count)
    if known and (outputs := positions(data.names, known)) is not None:
        found = _found(outputs, data, replace(model, names=known))
        is_all = data.count == model.count
        assumed = f"{model.what} names no classes: its {model.count:,} outputs are taken as ImageNet's"
        return replace(found, remarks=[*([] if is_all else [assumed]), *found.remarks])
    if data.count != model.count:
        raise _differ(data, model, advice)
    by_code_point, by_timm = sorted(data.names), in_timms_order(data.names)
    if by_code_point == by_timm or list(data.names) not in (
        by_code_point,
        by_timm,
    ):  # the second: an order of their own
        return Match(list(range(data.count)), list(data.names))
    names, other, name = by_timm, by_code_point, "code-point"
    words = "timm's order", "by code point, as torchvision sorts,"
    if trust.order == "code-point":
        names, other, name, words = by_code_point, by_timm, "timm", ("order of code points", "in timm's order")
    outputs = positions(data.names, names)
    assert outputs is not None
    remark = (
        f"{model.what} names no classes: its outputs are taken in {words[0]} ({_where_they_part(names, other)}); if "
        f"they are {words[1]} ({_where_they_part(other, names)}), give --class-order {name}"
    )
    return Match(outputs, names, [remark])


def _where_they_part(names: Sequence[str], others: Sequence[str]) -> str:
    """The part of a list around its first difference from another, shortened."""
    first = next(n for n, (a, b) in enumerate(zip(names, others, strict=True)) if a != b)
    shown = list(names[max(0, first - 2) : first + 2])
    return ", ".join([*(["..."] if first > 2 else []), *shown, *(["..."] if first + 2 < len(names) else [])])


def _found(outputs: list[int], data: Classes, model: Classes) -> Match:
    assert model.names is not None
    remarks = []
    if len(outputs) < len(model.names):
        remarks.append(
            f"{data.what} has {data.count:,} of the {len(model.names):,} classes of {model.what}; their labels are "
            "found by name"
        )
    elif outputs != list(range(len(outputs))):
        remarks.append(f"{data.what} has the classes of {model.what} in another order: its labels are mapped by name")
    return Match(outputs, list(model.names), remarks)


def _of_nameless_data(data: Classes, model: Classes) -> list[str]:
    if not model.names or sorted(model.names) == in_timms_order(model.names):
        return []
    return [
        f"{data.what} names no classes: label N is taken as output N of {model.what} ({abbreviated(model.names, 4)})"
    ]


def _are_numbers(names: Sequence[str]) -> bool:
    return sorted(names) == sorted(str(number) for number in range(len(names)))


def _in_words(classes: Classes) -> str:
    return f"{classes.what} has only {classes.count:,}"


def _differ(data: Classes, model: Classes, advice: str) -> UserError:
    if data.names is not None and model.names is not None:
        lists = differences(data.names, data.what, model.names, model.what)
    else:
        sides = (
            f"{one.what}: {one.count:,} {kind}{f' ({abbreviated(one.names)})' if one.names else ', without names'}"
            for one, kind in ((data, "classes"), (model, "outputs"))
        )
        lists = "; ".join(sides)
    return UserError(f"The classes do not fit, so labels would mean something else. {lists}. {advice} {TRUST}")
