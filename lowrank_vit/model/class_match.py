"""Whether the labels of a set mean what the outputs of a model do: compared by name, and mapped where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from timm.data import ImageNetInfo, infer_imagenet_subset

from data_prep.sources.samples import TRUST, abbreviated, differences, imagenet1k, in_timms_order, positions
from lowrank_vit.common.errors import UserError

Order = Literal["timm", "code-point"]
"""Of the outputs of a model that does not name its classes: timm's order of their folders, or torchvision's."""


@dataclass(frozen=True)
class Classes:
    """The classes of a set or of a model."""

    what: str
    """What they are of, for messages."""
    count: int
    """Labels, or outputs; of a set without names that of its greatest label."""
    names: Sequence[str] | None
    """Names in label order, where they are known; a model may have more outputs."""


@dataclass(frozen=True)
class Match:
    """What the labels of a set mean to a model."""

    outputs: list[int]
    """The model's output for each label of the set."""
    names: list[str] | None
    """Names of the model's outputs, as far as they are known."""
    remarks: list[str] = field(default_factory=list)
    """What was assumed, a line each."""

    @property
    def is_identity(self) -> bool:
        """True where label N is output N."""
        return self.outputs == list(range(len(self.outputs)))


@dataclass(frozen=True)
class Trust:
    """What the user says of classes that cannot be compared."""

    labels: bool = False
    """--trust-labels: label N is output N where the names of the one are not among those of the other."""
    order: Order = "timm"
    """--class-order."""


def published_names(num_outputs: int) -> list[str] | None:
    """The classes of the ImageNet set with as many of them, as timm tells it; None for no such number."""
    if num_outputs == len(imagenet1k()):
        return list(imagenet1k())
    subset = infer_imagenet_subset({"num_classes": num_outputs})
    return list(ImageNetInfo(subset).label_names()) if subset else None


def match(data: Classes, model: Classes, trust: Trust, advice: str) -> Match:
    """The output of each label of `data`, by the names of the classes where both sides have them.

    Where one side has no names, the numbers must agree, or all classes of the data be of the ImageNet set that has the
    model's number of classes. Raises `UserError` with both lists and `advice` for all else, unless the user trusts.
    """
    same = Match(list(range(data.count)), list(model.names) if model.names else None)
    outputs = positions(data.names, model.names) if data.names and model.names else None
    if trust.labels and outputs is None:
        if data.count > model.count:
            raise UserError(f"--trust-labels: {data.what} has {data.count:,} classes, {_in_words(model)}. {advice}")
        return replace(same, remarks=[f"label N of {data.what} is taken for output N of {model.what} (--trust-labels)"])
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
        assumed = f"{model.what} names no classes: its {model.count:,} outputs are taken for ImageNet's"
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
        f"they are {words[1]} ({_where_they_part(other, names)}), say --class-order {name}"
    )
    return Match(outputs, names, [remark])


def _where_they_part(names: Sequence[str], others: Sequence[str]) -> str:
    """A list up to where it differs from another, in short."""
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
        f"{data.what} names no classes: label N is taken for output N of {model.what} ({abbreviated(model.names, 4)})"
    ]


def _are_numbers(names: Sequence[str]) -> bool:
    return sorted(names) == sorted(str(number) for number in range(len(names)))


def _in_words(classes: Classes) -> str:
    return f"{classes.what} only {classes.count:,}"


def _differ(data: Classes, model: Classes, advice: str) -> UserError:
    if data.names is not None and model.names is not None:
        lists = differences(data.names, data.what, model.names, model.what)
    else:
        sides = (
            f"{one.what}: {one.count:,} {kind}{f' ({abbreviated(one.names)})' if one.names else ', without names'}"
            for one, kind in ((data, "classes"), (model, "outputs"))
        )
        lists = "; ".join(sides)
    return UserError(f"The classes do not fit, so labels would not mean the same. {lists}. {advice} {TRUST}")
