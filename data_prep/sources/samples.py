"""What can be converted: every source lists its classes and its samples, in one order that never changes."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from data_prep.sources.class_names import positions
from lowrank_vit.common.errors import UserError

DIGITS_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to convert."""

    label: int
    """Position of its class in the source's `classes`."""
    name: str
    """Where it comes from, relative to the source, with forward slashes."""
    pixels: np.ndarray | None = None
    """uint8 (height, width, 3) where the source holds pixels already, None where `name` is a file to read."""


@dataclass(frozen=True)
class Superclasses:
    """A coarser grouping of the classes, as CIFAR-100 has it."""

    names: tuple[str, ...]
    of_class: tuple[int, ...]
    """For each class, in label order, the position of its group in `names`."""


@dataclass(frozen=True)
class Source:
    """Everything one `.beton` is made of."""

    name: str
    """The source as the user gave it; goes into the manifest."""
    classes: tuple[str, ...]
    """Class names, in the order of the labels."""
    samples: Sequence[Sample]
    superclasses: Superclasses | None = None
    remarks: tuple[str, ...] = ()
    """What people should know about it, a line each: files left out, and where timm would read it otherwise."""

    def with_classes(self, classes: tuple[str, ...]) -> Source | None:
        """The same samples with the labels of `classes`, in the order of these; None if a class is not among them."""
        if classes == self.classes:
            return self
        labels = positions(self.classes, classes)
        if labels is None:
            return None
        samples: Iterable[tuple[int, str]] = ((labels[sample.label], sample.name) for sample in self.samples)
        if labels != sorted(labels):
            samples = sorted(samples, key=lambda sample: sample[0])  # which keeps the order within a class
        return replace(self, classes=classes, samples=FileList.pack(samples))


_UNPACKED = 4096
"""Entries of a `FileList` that are unpacked at a time."""


class FileList(Sequence[Sample]):
    """Files to convert, packed: about 12 bytes a file and its name, where a list of `Sample` takes 200 more."""

    def __init__(self, labels: np.ndarray, names: bytes, ends: np.ndarray) -> None:
        self._labels, self._names, self._ends = labels, names, ends

    @classmethod
    def pack(cls, files: Iterable[tuple[int, str]]) -> FileList:
        """Pack `(label, name)` pairs, in order."""
        labels, names, ends = array("i"), bytearray(), array("q")
        for label, name in files:
            labels.append(label)
            names += os.fsencode(name)
            ends.append(len(names))
        return cls(np.frombuffer(labels, np.intc), bytes(names), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """The `Sample` at `index`, or a `FileList` for a slice."""
        if isinstance(index, slice):
            return FileList.pack((s.label, s.name) for s in map(self.__getitem__, range(*index.indices(len(self)))))
        position = range(len(self))[index]
        start = int(self._ends[position - 1]) if position else 0
        name = os.fsdecode(self._names[start : int(self._ends[position])])
        return Sample(int(self._labels[position]), name)

    def __iter__(self) -> Iterator[Sample]:
        start = 0
        for first in range(0, len(self), _UNPACKED):  # Python's own integers are twice as fast here as NumPy's
            part = slice(first, first + _UNPACKED)
            for label, end in zip(self._labels[part].tolist(), self._ends[part].tolist(), strict=True):
                yield Sample(label, os.fsdecode(self._names[start:end]))
                start = end


def file_list_sha256(samples: Iterable[Sample]) -> str:
    """Hexadecimal SHA-256 of every sample's `label`, a space, its name and a NUL, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(b"%d %s\0" % (sample.label, os.fsencode(sample.name)))
    return digest.hexdigest()


def shard(samples: Sequence[Sample], index: int, count: int) -> Sequence[Sample]:
    """Part `index` (1-based) of `count`: consecutive samples, so that the parts in order are the whole."""
    return samples[len(samples) * (index - 1) // count : len(samples) * index // count]


DIGITS = "scikit-learn digits ({split})"
"""What their source is called."""


def digits(split: Literal["train", "val"]) -> Source:
    """scikit-learn's 1,797 scanned handwritten digits (8x8), split 1,437 / 360 once and for all.

    Grey levels 0..16 become uint8 0..255, rounded to nearest, the same in all three channels.
    Raises `UserError` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn, which is missing: `pip install scikit-learn`.") from error
    bunch: Any = load_digits()
    levels, labels = bunch.images.astype(np.int64), bunch.target
    grey = ((levels * 255 + 8) // 16).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    indices = digits_indices(split, len(images))
    samples = [Sample(int(labels[i]), f"digits/{i:04d}", images[i]) for i in indices]
    return Source(DIGITS.format(split=split), tuple(str(name) for name in bunch.target_names), samples)


def digits_indices(split: Literal["train", "val"], total: int) -> np.ndarray:
    """int64, ascending: the samples out of `total` that belong to `split`; 80 % train, 20 % val."""
    # Raw PCG64 output is the same in every NumPy; `Generator.permutation` may change between releases (NEP 19).
    shuffled = np.argsort(np.random.PCG64(DIGITS_SPLIT_SEED).random_raw(total), kind="stable")
    num_train = total * 4 // 5
    return np.sort(shuffled[:num_train] if split == "train" else shuffled[num_train:])
