"""A data set as a Python object, such as torchvision's: items (picture, label) by number."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.formats.jpeg import BadImageError
from data_prep.sources.rows import Picture, RowSource, read_labels
from data_prep.sources.samples import FileList, Sample
from lowrank_vit.common.errors import UserError, in_short

_TRANSFORMS = ("transform", "transforms", "target_transform")


def python_dataset(dataset: Any, name: str = "", class_map: Path | None = None, fingerprint: str = "") -> RowSource:
    """The items of `dataset`, in order.

    An item is a pair, or a longer tuple that begins with it, or a dict with the keys "image" and "label". The picture
    is a PIL image, a path, an image file's bytes, a NumPy array uint8 (height, width[, 1, 3 or 4]) or a torch tensor
    uint8 ([1, 3 or 4,] height, width). Class names are the object's `classes`, else `class_to_idx`. Where it lists its
    files (`samples` or `imgs`, as torchvision's ImageFolder) and transforms nothing, the files' own bytes are taken;
    labels are its `targets` or `labels`. Otherwise every item is read twice, once for its label. Items are read one at
    a time. `fingerprint` stands for the data's state, see `RowSource`. Raises `UserError`.
    """
    name = name or f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    found = _flat(dataset)
    items = _Items(found)
    labels = read_labels(items.labels(name), name, "the label", _class_names(found.dataset, name), class_map)
    is_known = items.paths is not None or bool(fingerprint)
    return RowSource(
        name,
        labels.classes,
        FileList.pack(zip(labels.values.tolist(), map(items.row_name, range(len(items))), strict=True), 0),
        remarks=labels.remarks,
        read=items.read,
        bad=labels.bad,
        fingerprint=hashlib.sha256(fingerprint.encode()).hexdigest() if fingerprint else "",
        can_resume=is_known,
        stat=items.stat,
    )


def made_by(factory: str) -> Any:
    """The data set that `MODULE:FUNCTION` returns; the module may lie in the working directory. Raises `UserError`."""
    module_name, _, function = factory.partition(":")
    if not module_name or not function:
        raise UserError(f"`{factory}` is not MODULE:FUNCTION, such as my_data:train_set.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        target: Any = importlib.import_module(module_name)
        for part in function.split("."):
            target = getattr(target, part)
    except ModuleNotFoundError as error:
        raise UserError(f"{factory}: there is no module {error.name}, neither here nor installed.") from error
    except AttributeError as error:
        raise UserError(f"{factory}: {error}.") from error
    try:
        return target() if callable(target) and not hasattr(target, "__getitem__") else target
    except UserError:
        raise
    except Exception as error:  # the user's own code
        raise UserError(f"{factory}() failed: {type(error).__name__}: {in_short(error)}.") from error


@dataclass(frozen=True)
class _Flat:
    """A data set below its `Subset`s."""

    dataset: Any
    indices: Sequence[int] | None = None
    """Its items that count, in order; None for all."""


def _flat(dataset: Any) -> _Flat:
    indices: Sequence[int] | None = None
    while hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # torch.utils.data.Subset
        inner = [int(index) for index in dataset.indices]
        indices = inner if indices is None else [inner[index] for index in indices]
        dataset = dataset.dataset
    return _Flat(dataset, indices)


def _class_names(dataset: Any, name: str) -> tuple[str, ...]:
    classes = getattr(dataset, "classes", None)
    if not classes and isinstance(getattr(dataset, "class_to_idx", None), Mapping):
        places: Mapping[Any, int] = dataset.class_to_idx
        if sorted(places.values()) != list(range(len(places))):
            raise UserError(f"{name}: the numbers in class_to_idx are not 0 to {len(places) - 1}, one a class.")
        classes = sorted(places, key=lambda one: places[one])
    if not classes or isinstance(classes, str):
        return ()
    names = tuple(", ".join(map(str, one)) if isinstance(one, tuple | list) else str(one) for one in classes)
    if len(set(names)) < len(names):  # ImageNet's "crane": the number tells them apart
        names = tuple(f"{one} ({n})" if names.count(one) > 1 else one for n, one in enumerate(names))
    return names


class _Items:
    """The items of a data set, for any thread."""

    def __init__(self, found: _Flat) -> None:
        self._dataset, self._indices = found.dataset, found.indices
        self._lock = threading.Lock()
        try:
            self._length = len(self._dataset) if self._indices is None else len(self._indices)
        except TypeError as error:
            raise UserError(
                f"{type(self._dataset).__qualname__} has no length, so its items cannot be read by number. Give a data "
                "set with __len__ and __getitem__."
            ) from error
        self.paths = self._files()
        """Of each item, where its own bytes are taken."""

    def __len__(self) -> int:
        return self._length

    def _at(self, row: int) -> int:
        return row if self._indices is None else self._indices[row]

    def _files(self) -> list[Path] | None:
        samples = getattr(self._dataset, "samples", None) or getattr(self._dataset, "imgs", None)
        if any(getattr(self._dataset, one, None) is not None for one in _TRANSFORMS) or not isinstance(samples, list):
            return None
        loader = getattr(self._dataset, "loader", None)
        if loader is not None and getattr(loader, "__module__", "") != "torchvision.datasets.folder":
            return None
        if len(samples) != len(self._dataset) or not all(
            isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str | Path) for one in samples
        ):
            return None
        return [Path(samples[self._at(row)][0]) for row in range(len(self))]

    def labels(self, name: str) -> list[Any]:
        """The label of every item."""
        listed = next(
            (one for key in ("targets", "labels") if (one := getattr(self._dataset, key, None)) is not None), None
        )
        if getattr(self._dataset, "target_transform", None) is None and listed is not None:
            values = listed.tolist() if hasattr(listed, "tolist") else listed
            if isinstance(values, list | tuple) and len(values) == len(self._dataset):
                return [values[self._at(row)] for row in range(len(self))]
        if self.paths is not None:
            return [self._dataset.samples[self._at(row)][1] for row in range(len(self))]
        found: list[Any] = []
        for row in range(len(self)):
            try:
                found.append(self._item(row)[1])
            except BadImageError:  # reading its picture will say why
                found.append(None)
            except _NoPairError as error:
                raise UserError(f"{name}: item {row} is {error}, expected a pair of picture and label.") from error
        return found

    def _item(self, row: int) -> tuple[Any, Any]:
        """Picture and label. Raises `BadImageError`, `_NoPairError`."""
        try:
            with self._lock:
                item: Any = self._dataset[self._at(row)]
        except MemoryError:
            raise
        except Exception as error:  # the user's own code
            raise BadImageError(self.row_name(row), f"cannot be read: {error or type(error).__name__}") from error
        if isinstance(item, Mapping) and "image" in item and "label" in item:
            return item["image"], item["label"]
        if isinstance(item, tuple | list) and len(item) >= 2:
            return item[0], item[1]
        raise _NoPairError(f"of the kind {type(item).__name__}")

    def row_name(self, row: int) -> str:
        """What an item is called."""
        return f"item {self._at(row)}" + (f" ({self.paths[row].name})" if self.paths is not None else "")

    def read(self, sample: Sample) -> Picture:
        """See `RowSource.read`."""
        if self.paths is not None:
            return self.paths[sample.row]
        try:
            return _picture(self._item(sample.row)[0], sample.name)
        except _NoPairError as error:
            raise BadImageError(sample.name, str(error)) from error

    def stat(self, sample: Sample) -> tuple[int, int]:
        """See `RowSource.stat`."""
        try:
            stat = os.stat(self.paths[sample.row]) if self.paths is not None else None  # noqa: PTH116
        except OSError:
            stat = None
        return (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)


class _NoPairError(TypeError):
    pass


def _picture(value: Any, name: str) -> Picture:
    if isinstance(value, str):
        return Path(value)
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if value is None or isinstance(value, bytes | Path | Image.Image | np.ndarray):
        return value
    if hasattr(value, "numpy") and hasattr(value, "ndim"):  # a tensor: channels come first
        pixels = np.asarray(value.numpy())
        return pixels.transpose(1, 2, 0) if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) else pixels
    raise BadImageError(name, f"its picture is of the kind {type(value).__name__}")
