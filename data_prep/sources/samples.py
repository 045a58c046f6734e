"""Sources of a conversion: every source lists its classes and its samples, in orders that never change."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from lowrank_vit.common.packages import needs
from lowrank_vit.common.program import CLASSES, bundled_text
from lowrank_vit.common.terminal import one_line


def natural_key(name: str) -> list[int | str]:
    """The key by which timm sorts names: in lower case, runs of digits as numbers (`timm.utils.misc.natural_key`)."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]  # every other part is a run of digits


def in_timms_order(names: Iterable[str]) -> list[str]:
    """Names in the order of timm's labels; names with equal keys ("Dog" and "dog", "1" and "01") by code point."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def ties(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that timm's order does not distinguish."""
    alike: dict[tuple[int | str, ...], list[str]] = defaultdict(list)
    for name in in_timms_order(names):
        alike[tuple(natural_key(name))].append(name)
    return [group for group in alike.values() if len(group) > 1]


TRUST = "If label N nevertheless means the same class in both, give --trust-labels."
"""The last sentence of messages about classes that cannot be compared."""


@cache
def imagenet1k() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1k's 1,000 classes, in the order of their labels."""
    return tuple(bundled_text(f"imagenet1k_classes{CLASSES}").split())


def abbreviated(names: Iterable[str], shown: int = 6) -> str:
    """The first names of a list, for a message."""
    listed = list(names)
    return ", ".join(map(one_line, listed[:shown])) + (", ..." if len(listed) > shown else "")


def positions(names: Sequence[str], among: Sequence[str]) -> list[int] | None:
    """The position of each name in `among`; None if one is missing there, or if a list has a name twice.

    Accented letters may be one character or two, in which file systems differ; both count as the same.
    """
    plain, plain_among = ([unicodedata.normalize("NFC", name) for name in some] for some in (names, among))
    if len(set(plain)) < len(plain) or len(set(plain_among)) < len(plain_among):
        plain, plain_among = list(names), list(among)
    place_of = {name: place for place, name in enumerate(plain_among)}
    if len(place_of) < len(plain_among) or len(set(plain)) < len(plain) or not place_of.keys() >= set(plain):
        return None
    return [place_of[name] for name in plain]


def spelt_as(names: Iterable[str], among: Iterable[str]) -> set[str]:
    """The names, each with accents as in `among` (see `positions`) if `among` spells it in one way only."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for name in among:
        spellings[unicodedata.normalize("NFC", name)].add(name)
    found = ((name, spellings.get(unicodedata.normalize("NFC", name), set[str]())) for name in names)
    return {next(iter(same)) if len(same) == 1 else name for name, same in found}


def nearest(name: str, among: Iterable[str]) -> str:
    """The name that may have been meant: the same but for its case, else a similar one; empty if there is none."""
    plain = {other.casefold(): other for other in among}
    close = difflib.get_close_matches(name.casefold(), plain, 1, 0.75)
    return plain[close[0]] if close else ""


def differences(names: Sequence[str], of: str, others: Sequence[str], of_others: str) -> str:
    """Two lists of classes side by side, for a message: both abbreviated, and the names in only one of them."""
    text = f"{of}: {len(names):,} classes ({abbreviated(names)}); {of_others}: {len(others):,} ({abbreviated(others)})"
    for some, rest, which in ((names, set(others), "former"), (others, set(names), "latter")):
        if alone := [name for name in some if name not in rest]:
            text += f"; only the {which} has {abbreviated(alone)}"
    return text


DIGITS_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to convert."""

    label: int
    """Position of its class in the source's `classes`."""
    name: str
    """Its path relative to the source, with forward slashes, or another name for it."""
    pixels: np.ndarray | None = None
    """uint8 (height, width, 3) where the source holds pixels already, None where `name` is a file to read."""
    row: int = -1
    """Its number in a source that is read by number, see `rows.RowSource`; -1 elsewhere."""
    size: int = -1
    """Bytes of its file as a list tells them, see `file_list`; -1 if unknown."""


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
    """Lines to print about the source: files left out, and differences from how timm would read it."""

    def with_classes(self, classes: tuple[str, ...]) -> Source | None:
        """The same samples with labels by `classes`, in label order; None if a class is missing in `classes`."""
        if classes == self.classes:
            return self
        labels = positions(self.classes, classes)
        if labels is None:
            return None
        return replace(self, classes=classes, samples=self._relabelled(labels))

    def _relabelled(self, labels: list[int]) -> Sequence[Sample]:
        """The samples with `labels[label]` for each label, ordered by the new labels, as folders are listed."""
        samples: Iterable[tuple[int, str]] = ((labels[sample.label], sample.name) for sample in self.samples)
        if labels != sorted(labels):
            samples = sorted(samples, key=lambda sample: sample[0])  # stable: keeps the order within a class
        return FileList.pack(samples)


_UNPACKED = 4096
"""Entries of a `FileList` that are unpacked at a time."""


class FileList(Sequence[Sample]):
    """Samples to convert, packed: about 12 bytes and the name for each; a list of `Sample` takes 200 bytes more."""

    def __init__(self, labels: np.ndarray, names: bytes, ends: np.ndarray, first_row: int | None = None) -> None:
        self._labels, self._names, self._ends, self._first_row = labels, names, ends, first_row

    @classmethod
    def pack(cls, files: Iterable[tuple[int, str]], first_row: int | None = None) -> FileList:
        """Pack `(label, name)` pairs, in order; `first_row`: the first one's row, if they are rows of a source."""
        labels, names, ends = array("i"), bytearray(), array("q")
        for label, name in files:
            labels.append(label)
            names += os.fsencode(name)
            ends.append(len(names))
        return cls(np.frombuffer(labels, np.intc), bytes(names), np.frombuffer(ends, np.int64), first_row)

    def __len__(self) -> int:
        return len(self._ends)

    def _row(self, position: int) -> int:
        return -1 if self._first_row is None else self._first_row + position

    def __getitem__(self, index: Any) -> Any:
        """The `Sample` at `index`, or a `FileList` for a slice without steps."""
        if isinstance(index, slice):
            chosen = range(*index.indices(len(self)))
            samples = ((s.label, s.name) for s in map(self.__getitem__, chosen))
            return FileList.pack(samples, None if self._first_row is None else self._row(chosen.start))
        position = range(len(self))[index]
        start = int(self._ends[position - 1]) if position else 0
        name = os.fsdecode(self._names[start : int(self._ends[position])])
        return Sample(int(self._labels[position]), name, row=self._row(position))

    def relabelled(self, labels: Sequence[int]) -> FileList:
        """The same samples in the same order, with `labels[label]` for each label; those without one, -1, keep it."""
        table = np.array([*labels, -1], np.intc)
        return FileList(table[self._labels], self._names, self._ends, self._first_row)

    def __iter__(self) -> Iterator[Sample]:
        start = 0
        for first in range(0, len(self), _UNPACKED):  # Python's own integers are twice as fast here as NumPy's
            part = slice(first, first + _UNPACKED)
            pairs = zip(self._labels[part].tolist(), self._ends[part].tolist(), strict=True)
            for position, (label, end) in enumerate(pairs, first):
                yield Sample(label, os.fsdecode(self._names[start:end]), None, self._row(position))
                start = end


def file_list_sha256(samples: Iterable[Sample]) -> str:
    """Hexadecimal SHA-256 of every sample's `label`, a space, its name and a NUL, in order.

    `samples` may know it already (`sha256`), as `ListedFiles` do.
    """
    if known := getattr(samples, "sha256", ""):
        return known
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample_line(sample.label, os.fsencode(sample.name)))
    return digest.hexdigest()


def sample_line(label: int, name: bytes) -> bytes:
    """The bytes of one sample in `file_list_sha256`."""
    return b"%d %s\0" % (label, name)


def shard(samples: Sequence[Sample], index: int, count: int) -> Sequence[Sample]:
    """Part `index` (1-based) of `count`: consecutive samples, so that the parts in order are the whole."""
    return samples[len(samples) * (index - 1) // count : len(samples) * index // count]


DIGITS = "scikit-learn digits ({split})"
"""Name of their source."""


def digits(split: Literal["train", "val"]) -> Source:
    """scikit-learn's 1,797 scanned handwritten digits (8x8), split 1,437 / 360 once and for all.

    Grey levels 0..16 become uint8 0..255, rounded to nearest, the same in all three channels.
    Raises `UserError` without scikit-learn.
    """
    bunch = needs("sklearn.datasets", extra="quickstart", to="Making the handwritten digits").load_digits()
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
