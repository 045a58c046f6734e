"""A data set as a Python object, such as torchvision's: items (picture, label) by number."""

from __future__ import annotations

import hashlib
import importlib
import sys
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_prep.formats.jpeg import BadImageError
from data_prep.sources.rows import Picture, RowSource, read_labels
from data_prep.sources.samples import FileList, Sample, abbreviated
from data_prep.sources.table_columns import NO_COLUMNS, Columns
from lowrank_vit.common.errors import UserError, in_short


def python_dataset(dataset: Any, name: str = "", columns: Columns = NO_COLUMNS, fingerprint: str = "") -> RowSource:
    """The items `dataset[n]`, in order.

    An item is a pair, or a longer tuple that begins with it, or a dict with the keys "image" and "label" (or those of
    `columns`). The picture is a PIL image, a path, an image file's bytes, a NumPy array uint8 (height, width[, 1, 3 or
    4]) or a torch tensor uint8 ([1, 3 or 4,] height, width). Every item is read twice, once for its label, and one at a
    time. A `__getitem__` of the user's own is always called. For the `__getitem__` of torchvision's ImageFolder (or
    DatasetFolder), labels come from its list, and without a `transform` or another loader pictures are the files' own
    bytes; for that of torch's `Subset` and `ConcatDataset`, the sets below are read directly. Class names are the
    object's `classes`, else `class_to_idx`. `fingerprint` stands for the data's state, see `RowSource`. Raises
    `UserError`.
    """
    name = name or f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    items = _Items(dataset, name, columns)
    items.refuse_floats()
    names, remarks = items.class_names()
    labels = read_labels(items.labels(), name, "the label", names, columns.class_map)
    if names or columns.class_map or not _are_numbers(labels.classes):
        remarks = ()
    return RowSource(
        name,
        labels.classes,
        FileList.pack(zip(labels.values.tolist(), map(items.row_name, range(len(items))), strict=True), 0),
        remarks=(*items.remarks(), *remarks, *labels.remarks),
        read=items.read,
        bad=labels.bad,
        fingerprint=hashlib.sha256(fingerprint.encode()).hexdigest() if fingerprint else "",
        can_resume=items.are_files or bool(fingerprint),
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


def _reads_as(dataset: Any, module: str, name: str) -> bool:
    """Whether the library's own `__getitem__` makes the items; that of a derived class may do anything."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(dataset, kind) and type(dataset).__getitem__ is kind.__getitem__


def _is_subset(dataset: Any) -> bool:
    return _reads_as(dataset, "torch.utils.data.dataset", "Subset")


def _is_joined(dataset: Any) -> bool:
    return _reads_as(dataset, "torch.utils.data.dataset", "ConcatDataset")


def _lists_files(dataset: Any) -> bool:
    """Whether an item is an entry of `samples`, read by `loader` and transformed."""
    return _reads_as(dataset, "torchvision.datasets.folder", "DatasetFolder")


def _takes_files(dataset: Any) -> bool:
    """Whether pictures are the files' content, unchanged."""
    if not _lists_files(dataset) or dataset.transform is not None:
        return False
    folder = sys.modules["torchvision.datasets.folder"]
    return dataset.loader in (folder.default_loader, folder.pil_loader, folder.accimage_loader)


class _Leaf(NamedTuple):
    """A data set below all `Subset`s and `ConcatDataset`s."""

    dataset: Any
    lists_files: bool
    takes_files: bool


class _Items:
    """The items of a data set, for any thread."""

    def __init__(self, dataset: Any, name: str, columns: Columns) -> None:
        self._name, self._lock = name, threading.Lock()
        self._keys = columns.input_key or "image", columns.target_key or "label"
        self._leaves: list[_Leaf] = []
        try:
            length = len(dataset)
        except TypeError as error:
            raise UserError(
                f"{type(dataset).__qualname__} has no length, so its items cannot be read by number. Give a data set "
                "with __len__ and __getitem__."
            ) from error
        self._leaf_of, self._at, self._numbers = array("i"), array("q"), array("q")
        places: dict[int, int] = {}
        for row in range(length):
            try:
                leaf, index, number = _below(dataset, row)
            except (IndexError, TypeError, ValueError) as error:
                raise UserError(f"{name}: item {row} is in none of the joined sets: {in_short(error)}.") from error
            if id(leaf) not in places:
                places[id(leaf)] = len(self._leaves)
                self._leaves.append(_Leaf(leaf, _lists_files(leaf), _takes_files(leaf)))
            self._leaf_of.append(places[id(leaf)])
            self._at.append(index)
            self._numbers.append(number)
        if not self._leaves:
            self._leaves.append(_Leaf(dataset, lists_files=False, takes_files=False))

    def __len__(self) -> int:
        return len(self._at)

    @property
    def are_files(self) -> bool:
        """Whether every item is stored from its file's own bytes."""
        return all(leaf.takes_files for leaf in self._leaves)

    def class_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The class names that all sets agree on, else none; and remarks, if there are none."""
        names = list(dict.fromkeys(_class_names(leaf.dataset, self._name, self._keys[1]) for leaf in self._leaves))
        if len(names) > 1:
            sets = "; ".join(abbreviated(some, 3) if some else "no names" for some in names[:3])
            return (), (
                f"warning: {self._name} joins sets of different classes ({sets}{'; ...' if len(names) > 3 else ''}): "
                "labels are numbers, which must mean the same in all of them; --class-map gives names",
            )
        hidden = next(
            (inner for leaf in self._leaves if _has_names(inner := getattr(leaf.dataset, "dataset", None))), None
        )
        if names[0] or hidden is None:
            return names[0], ()
        kind, inner = type(self._leaves[0].dataset).__qualname__, type(hidden).__qualname__
        return (), (
            f"classes have no names: {kind} has its own __getitem__, so its labels may differ from those of its "
            f"{inner}. If they do not, give it `classes`, or give --class-map",
        )

    def remarks(self) -> Iterator[str]:
        """A line for each torchvision class whose files are not stored as they are."""
        for kind in dict.fromkeys(type(leaf.dataset) for leaf in self._leaves if not leaf.takes_files):
            if any(base.__module__ == "torchvision.datasets.folder" for base in kind.__mro__):
                yield (
                    f"pictures of {kind.__qualname__} are decoded and encoded again: its __getitem__, loader or "
                    "transform may change them"
                )

    def refuse_floats(self) -> None:
        """Raise `UserError` if the first and the last picture are float tensors: then all of them are."""
        kinds: list[Any] = []
        for row in (0, len(self) - 1) if len(self) else ():
            if self._leaves[self._leaf_of[row]].takes_files:
                return
            try:
                picture = self._item(row)[0]
            except (BadImageError, _NoPairError):
                return
            kinds.append(getattr(picture, "dtype", None))
        if kinds and all("float" in str(kind) for kind in kinds):
            raise UserError(
                f"{self._name}: pictures are {str(kinds[0]).removeprefix('torch.')}, expected uint8 from 0 to 255. "
                "Leave out transforms such as ToTensor and Normalize, or use PILToTensor: training normalises them."
            )

    def labels(self) -> Iterator[Any]:
        """The label of every item; None if its item cannot be read. Raises `UserError`."""
        for row in range(len(self)):
            try:
                yield self._label(row)
            except BadImageError:  # reading its picture will say why
                yield None
            except _NoPairError as error:
                raise UserError(
                    f"{self._name}: item {row} is {error}, expected a pair of picture and label."
                ) from error

    def _label(self, row: int) -> Any:
        dataset, lists_files, _ = self._leaves[self._leaf_of[row]]
        if not lists_files:
            return self._item(row)[1]
        try:
            label = dataset.samples[self._at[row]][1]
            return label if dataset.target_transform is None else dataset.target_transform(label)
        except MemoryError:
            raise
        except Exception as error:  # the user's own code
            raise UserError(f"{self._name}: the label of item {row} cannot be read: {in_short(error)}.") from error

    def _item(self, row: int) -> tuple[Any, Any]:
        """Picture and label. Raises `BadImageError`, `_NoPairError`."""
        try:
            with self._lock:
                item: Any = self._leaves[self._leaf_of[row]].dataset[self._at[row]]
        except MemoryError:
            raise
        except Exception as error:  # the user's own code
            raise BadImageError(self.row_name(row), f"cannot be read: {error or type(error).__name__}") from error
        if isinstance(item, Mapping) and all(key in item for key in self._keys):
            return item[self._keys[0]], item[self._keys[1]]
        if isinstance(item, tuple | list) and len(item) >= 2:
            return item[0], item[1]
        keys = f" with the keys {abbreviated(map(str, item), 6)}" if isinstance(item, Mapping) else ""
        raise _NoPairError(f"of the kind {type(item).__name__}{keys}")

    def _path(self, row: int) -> Path | None:
        leaf = self._leaves[self._leaf_of[row]]
        return Path(leaf.dataset.samples[self._at[row]][0]) if leaf.takes_files else None

    def row_name(self, row: int) -> str:
        """An item's name in the manifest and in messages."""
        path = self._path(row)
        return f"item {self._numbers[row]}" + (f" ({path.name})" if path else "")

    def read(self, sample: Sample) -> Picture:
        """See `RowSource.read`."""
        if path := self._path(sample.row):
            return path
        try:
            return _picture(self._item(sample.row)[0], sample.name)
        except _NoPairError as error:
            raise BadImageError(sample.name, str(error)) from error

    def stat(self, sample: Sample) -> tuple[int, int]:
        """See `RowSource.stat`."""
        try:
            stat = path.stat() if (path := self._path(sample.row)) else None
        except OSError:
            stat = None
        return (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)


def _below(dataset: Any, row: int) -> tuple[Any, int, int]:
    """The innermost set of item `row`, its number there, and its number in the set inside the outer `Subset`s."""
    number = None
    while True:
        if _is_subset(dataset):
            row = int(dataset.indices[row])
            dataset = dataset.dataset
            continue
        number = row if number is None else number
        if not _is_joined(dataset):
            return dataset, row, number
        row += len(dataset) if row < 0 else 0
        part = bisect_right(dataset.cumulative_sizes, row)
        row -= dataset.cumulative_sizes[part - 1] if part else 0
        dataset = dataset.datasets[part]


def _has_names(dataset: Any) -> bool:
    return bool(getattr(dataset, "classes", None) or getattr(dataset, "class_to_idx", None))


def _class_names(dataset: Any, name: str, label: str) -> tuple[str, ...]:
    classes = getattr(dataset, "classes", None)
    if not classes and isinstance(getattr(dataset, "class_to_idx", None), Mapping):
        places: Mapping[Any, int] = dataset.class_to_idx
        if sorted(places.values()) != list(range(len(places))):
            raise UserError(f"{name}: the numbers in class_to_idx are not 0 to {len(places) - 1}, one a class.")
        classes = sorted(places, key=lambda one: places[one])
    if not classes and isinstance(features := getattr(dataset, "features", None), Mapping):  # one of `datasets`
        classes = getattr(features.get(label), "names", None)
    if not classes or isinstance(classes, str):
        return ()
    names = tuple(", ".join(map(str, one)) if isinstance(one, tuple | list) else str(one) for one in classes)
    if len(set(names)) < len(names):  # ImageNet's "crane": the number tells them apart
        names = tuple(f"{one} ({n})" if names.count(one) > 1 else one for n, one in enumerate(names))
    return names


def _are_numbers(classes: Sequence[str]) -> bool:
    return list(classes) == [str(n) for n in range(len(classes))]


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
