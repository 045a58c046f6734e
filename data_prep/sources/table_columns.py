"""Which columns of a table hold the images and the labels: found by their names and kinds, or named by flags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources.rows import files_fingerprint
from data_prep.sources.samples import abbreviated
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.terminal import one_line

IMAGE, LABEL = "image", "label"
"""timm's default columns."""

_OF_AN_IMAGE = {"bytes": ("binary", "binary_view"), "path": ("string", "string_view")}
"""Fields of a struct that is an image, and the ends of their types' names (large_binary counts, too)."""
_PLAIN = ("string", "binary", "string_view", "binary_view")
"""Ends of the names of column types whose values are paths or bytes."""


@dataclass(frozen=True)
class Columns:
    """The options that choose columns and labels, named like the flags."""

    input_key: str = ""
    target_key: str = ""
    class_map: Path | None = None

    def options(self) -> dict[str, str]:
        """The options that are set, for the manifest; a class map as the fingerprint of its file."""
        given = {"input_key": self.input_key, "target_key": self.target_key}
        if self.class_map:
            given["class_map"] = files_fingerprint(self.class_map)
        return {name: value for name, value in given.items() if value}


NO_COLUMNS = Columns()
"""All columns are to be found by their names and kinds."""


def holds_images(feature: Any) -> bool:
    """Whether a column's type is `datasets`' image, or an image as pyarrow, pandas or Spark write it.

    The latter is struct<bytes, path>, or one of the two, without `datasets`' own mark in the table.
    """
    if type(feature).__name__ == "Image":
        return True
    kinds: dict[str, str] = {}
    if isinstance(feature, Mapping):
        kinds = {str(key): str(getattr(one, "dtype", "")) for key, one in feature.items()}
    given = kinds.keys() & _OF_AN_IMAGE.keys()
    return bool(given) and all(kinds[key] == "null" or kinds[key].endswith(_OF_AN_IMAGE[key]) for key in given)


def image_column(name: str, features: Any, columns: Columns) -> str:
    """The column of the images, see `holds_images`. Raises `UserError` if it is unclear which one that is."""
    images = [key for key, feature in features.items() if holds_images(feature)]
    key = columns.input_key or (IMAGE if IMAGE in features else images[0] if len(images) == 1 else "")
    if key not in features:
        what = f"--input-key {key} is not a column" if key else "it is not clear which column holds the images"
        of_them = f"; images are {', '.join(images)}" if images else "; none holds images"
        raise UserError(f"{name}: {what}. Its columns are {_described(features)}{of_them}. Give --input-key NAME.")
    dtype = str(getattr(features[key], "dtype", ""))
    if not holds_images(features[key]) and not dtype.endswith(_PLAIN):
        raise UserError(
            f"{name}: column {key} is {one_line(str(features[key]))[:80]}, not images, their bytes or paths. Its "
            f"columns are {_described(features)}. Give --input-key NAME."
        )
    return key


def label_column(name: str, features: Any, columns: Columns, image: str) -> str:
    """The column of the labels, beside `image`. Raises `UserError` if it is unclear which one, or there is none."""
    labels = [key for key, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    key = columns.target_key or (LABEL if LABEL in features else labels[0] if len(labels) == 1 else "")
    if "," in key:
        raise UserError(f"--target-key {key} names several labels; images are trained on with one label each.")
    unlabelled = "to predict without labels give `python -m lowrank_vit.inference` a folder of the images."
    if not key and all(one == image or holds_images(feature) for one, feature in features.items()):
        of_them = f"Its {'columns are' if len(features) > 1 else 'only column is'} {_described(features)}"
        raise UserError(f"{name} has no labels. {of_them}; {unlabelled}")
    if key not in features:
        what = f"--target-key {key} is not a column" if key else "it is not clear which column holds the labels"
        of_them = f"; classes are {', '.join(labels)}" if labels else "; none holds classes"
        raise UserError(
            f"{name}: {what}. Its columns are {_described(features)}{of_them}. Give --target-key NAME; {unlabelled}"
        )
    return key


def _described(features: Any) -> str:
    kinds = ((key, getattr(feature, "dtype", None)) for key, feature in features.items())
    return abbreviated((f"{key} ({type(features[key]).__name__ if kind is None else kind})" for key, kind in kinds), 12)


def column_remarks(image: str, label: str, columns: Columns) -> Iterator[str]:
    """A line on the columns that were found, if they are not timm's defaults."""
    if (not columns.input_key and image != IMAGE) or (not columns.target_key and label != LABEL):
        yield f"images are from column {image}, labels from column {label}"
