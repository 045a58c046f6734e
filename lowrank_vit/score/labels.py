"""What the classes of a scored model are called: by its training set, else by timm where it is of ImageNet."""

from __future__ import annotations

from functools import cache
from typing import Literal

from timm.data import ImageNetInfo, infer_imagenet_subset

from lowrank_vit.common.errors import UserError
from lowrank_vit.score.scorer import Scorer

LabelType = Literal["auto", "none", "name", "description", "detail", "detailed"]


def labels_of(scorer: Scorer, label_type: LabelType) -> list[str]:
    """A text for each class, in label order.

    `auto`: the training set's names, else ImageNet's descriptions where the number of classes is that of one of its
    sets (as timm tells them), else numbers. `none`: numbers. `name`: the training set's names, else ImageNet's synsets.
    `description` and `detail`: ImageNet's, found by the synset where the training set's names are such. Raises
    `UserError` where there is no description.
    """
    numbers = [str(label) for label in range(scorer.num_classes)]
    trained = scorer.class_names() if scorer.trained_names else []
    if label_type == "none":
        return numbers
    if trained and label_type in ("auto", "name"):
        return trained
    if trained:
        described = [_describe(name, label_type) for name in trained]
        if not all(described):
            raise UserError(
                f"--label-type {label_type}: the model's classes have names of their own, such as {trained[0]}. Use "
                "--label-type name."
            )
        return [text or "" for text in described]
    subset = infer_imagenet_subset({"num_classes": scorer.num_classes})
    if subset is None:
        if label_type in ("auto", "name"):
            return numbers
        raise UserError(
            f"--label-type {label_type}: nothing tells what the {scorer.num_classes} classes are. Leave it out."
        )
    info = ImageNetInfo(subset)
    if label_type == "name":
        return list(info.label_names())
    return [info.index_to_description(label, detailed=_is_detailed(label_type)) for label in range(scorer.num_classes)]


def _describe(name: str, label_type: str) -> str | None:
    try:
        return _imagenet().label_name_to_description(name, detailed=_is_detailed(label_type))
    except KeyError:
        return None


@cache
def _imagenet() -> ImageNetInfo:
    """Its synsets do not matter: the words for all are the same table."""
    return ImageNetInfo("imagenet-1k")


def _is_detailed(label_type: str) -> bool:
    return label_type.startswith("detail")
