"""WebDataset shards: tar files whose members with the same key are a sample, found by pattern and read by offset.

Python's own `tarfile` reads them: it tells where each member's bytes lie, so that images are read in any order by any
thread, and nothing needs the package webdataset.
"""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.formats.image_formats import image_suffixes
from data_prep.formats.jpeg import BadImageError
from data_prep.sources.image_folder import SPLIT_NAMES
from data_prep.sources.rows import RowSource, files_fingerprint, read_at, read_labels
from data_prep.sources.samples import FileList, Sample, abbreviated
from data_prep.sources.table_columns import Columns
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.terminal import one_line

INFO = ("_info.json", "info.json")
"""timm's description of the shards: {"splits": {NAME: {"filenames": [...], "num_samples": N}}}."""
_LABEL = "label"
"""The key of a sample's .json that is taken if there is no .cls."""
_MOST_SHARDS = 1_000_000
_END = 512
"""A tar file ends in at least this many zero bytes."""


def is_pattern(split: str, *folders: Path) -> bool:
    """Whether a split's name is a pattern of shards, as in timm, and not a folder, here or below one of `folders`."""
    looks_like_one = ".tar" in split or re.search(r"\{[^{}]*\.\.", split)
    return bool(looks_like_one) and not any((folder / split).is_dir() for folder in folders or (Path(),))


def expanded(pattern: str) -> list[str]:
    """`a-{000..002}.tar` -> a-000.tar, a-001.tar, a-002.tar; also {a,b}, several patterns joined by ::, and nesting.

    Raises `UserError` for a malformed range.
    """
    if "::" in pattern:
        return [one for part in pattern.split("::") for one in expanded(part)]
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    before, inner, behind = pattern[: found.start()], found[1], pattern[found.end() :]
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = map(int, bounds.groups())
        if abs(last - first) >= _MOST_SHARDS:
            raise UserError(f"{pattern}: {{{inner}}} would be {abs(last - first) + 1:,} shards. Check the range.")
        width = len(bounds[1]) if bounds[1].startswith("0") or len(bounds[1]) == len(bounds[2]) else 0
        step = 1 if last >= first else -1
        choices = [f"{n:0{width}d}" for n in range(first, last + step, step)]
    elif "," in inner:
        choices = inner.split(",")
    else:
        raise UserError(f"{pattern}: {{{inner}}} is neither a range such as {{000..146}} nor a list such as {{a,b}}.")
    return [one for choice in choices for one in expanded(f"{before}{choice}{behind}")]


@dataclass(frozen=True)
class Shards:
    """The shards of a split."""

    files: tuple[Path, ...]
    split: str
    label_key: str = ""
    """timm's `alt_label`: the key of the label in a sample's .json."""
    expected: int = 0
    """The number of samples that `_info.json` or the pattern announces; 0 if unknown."""
    remarks: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """`files_fingerprint` of the shards, which does not depend on the folder they are in."""
        return files_fingerprint(self.files[0].parent, self.files)


def find_shards(root: Path, split: str, flag: str = "--split") -> Shards:
    """The shards of a split below `root`, in order: by a pattern, by `_info.json`, else by the names of files.

    A number of samples may follow a pattern, `...tar|50000`. Without a pattern and `_info.json`, the shards are
    SPLIT/*.tar, or SPLIT*.tar and *-SPLIT-*.tar in `root`. Raises `UserError` also if shards are missing.
    """
    if is_pattern(split, root):
        return _by_pattern(root, split)
    info = _info(root)
    names = (split, *next((names for names in SPLIT_NAMES.values() if split in names), ()))
    if info is not None:
        splits = info.get("splits")
        if not isinstance(splits, Mapping) or not splits:
            raise UserError(f"{root / INFO[0]} names no splits. Give the shards as a pattern with {flag}.")
        known: Mapping[str, Any] = splits
        name = next((name for name in names if name in known), "")
        if not name:
            raise UserError(
                f"{root} has no split {split}; there are {abbreviated(known, 10)}. Name one, or a pattern of shards, "
                f"with {flag}."
            )
        entry = known[name]
        entry = entry if isinstance(entry, Mapping) else {}
        files = [str(one) for one in entry.get("filenames") or ()]
        label_key, expected = str(entry.get("alt_label") or ""), int(entry.get("num_samples") or 0)
        return Shards(_present(root, files, f"{INFO[0]}'s split {name}"), name, label_key, expected)
    for name, test in [*((name, False) for name in dict.fromkeys(names)), ("test", True)]:
        if test and split not in SPLIT_NAMES["val"]:
            break
        files = _by_name(root, name)
        if files:
            remark = f"{root} has no shards of {split}: validating on those of test ({flag} chooses)"
            return Shards(files, name, remarks=(remark,) * test)
    there = sorted(path.name for path in root.glob("*.tar")) if root.is_dir() else []
    what = f"its shards are {abbreviated(there)}" if there else "there are no .tar files in it"
    what = what if root.is_dir() else "it is not a folder"
    raise UserError(
        f"{root} has neither {INFO[0]} nor shards named {split}; {what}. Give a pattern with {flag}, such as "
        f"{flag} 'imagenet-{split}-{{000..146}}.tar'."
    )


def _by_name(root: Path, name: str) -> tuple[Path, ...]:
    inside = sorted((root / name).glob("*.tar"))
    word = re.compile(rf"(^|[-_.]){re.escape(name)}([-_.\d])", re.IGNORECASE)
    return tuple(inside or sorted(path for path in root.glob("*.tar") if word.search(path.name)))


def _by_pattern(root: Path, split: str) -> Shards:
    pattern, _, count = split.partition("|")
    if count and not count.isdigit():
        raise UserError(f"{split}: a number of samples must follow |, not {count}.")
    if "://" in pattern or pattern.startswith("pipe:"):
        raise UserError(
            f"{pattern} is not on a disk: shards are read at their offsets, by several threads. Download them first."
        )
    names: list[str] = []
    for one in expanded(pattern):
        if not re.search(r"[*?[]", one):
            names.append(one)
        elif found := sorted(path.relative_to(root).as_posix() for path in root.glob(one)):
            names += found
        else:
            raise UserError(f"{root / one} matches no file. Check the pattern and the folder.")
    info = _info(root) or {}
    splits: Any = info.get("splits") if isinstance(info.get("splits"), Mapping) else {}
    entry = next((one for one in splits.values() if set(names) <= set(one.get("filenames") or ())), {})
    shards = _present(root, names, f"the pattern {pattern}")
    return Shards(shards, pattern, str(entry.get("alt_label") or ""), int(count or 0))


def _info(root: Path) -> Mapping[str, Any] | None:
    path = next((root / name for name in INFO if (root / name).is_file()), None)
    if path is None:
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    return content if isinstance(content, Mapping) else {}


def _present(root: Path, names: Sequence[str], what: str) -> tuple[Path, ...]:
    files = [root / name for name in names]
    missing = [name for name, path in zip(names, files, strict=True) if not path.is_file()]
    if not files:
        raise UserError(f"{what} names no shards.")
    if missing:
        raise UserError(
            f"{len(missing):,} of the {len(files):,} shards of {what} are not in {root}: {abbreviated(missing, 5)}. "
            "Copy them there, or give a pattern of those that are there."
        )
    if same := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
        raise UserError(f"{what} names {abbreviated(same)} more than once.")
    return tuple(files)


def tar_shards(root: Path, split: str, columns: Columns, flag: str = "--split") -> RowSource:
    """The samples of a split's shards (`find_shards`), in the order of the shards and of the members in them.

    The members with the same key are a sample; the key is a member's name up to the first dot after its folder. The
    image is the only member with an image suffix, or the one with `columns.input_key` (timm's "jpg;png;webp"). The
    label is the key `columns.target_key` of the .json if that is given, else the .cls, else the key "label" of the
    .json. Raises `UserError`, also for a shard that is cut off.
    """
    shards = find_shards(root, split, flag)
    listed = _Listed(columns.input_key, columns.target_key or shards.label_key)
    for number, path in enumerate(shards.files):
        listed.add(number, path)
    what = source_name(root, shards.split)
    if not listed.names:
        raise UserError(f"{what}: its {len(shards.files):,} shards hold no samples.")
    listed.refuse_unclear(what)
    labels = read_labels(listed.labels, what, listed.label_key or "label", class_map=columns.class_map)
    bad = labels.bad | {row: why for row, why in listed.bad.items() if "image" in why or row in labels.bad}

    def read(sample: Sample) -> bytes:
        row = sample.row
        content = read_at(shards.files[listed.shards[row]], listed.offsets[row], listed.sizes[row], sample.name)
        if len(content) < listed.sizes[row]:
            raise BadImageError(sample.name, "its shard has become shorter")
        return content

    remarks = [*shards.remarks, *listed.remarks(shards.files), *labels.remarks]
    if shards.expected and shards.expected != len(listed.names):
        remarks.append(f"warning: {what} holds {len(listed.names):,} samples, {shards.expected:,} were announced")
    return RowSource(
        what,
        labels.classes,
        FileList.pack(zip(labels.values.tolist(), listed.names, strict=True), 0),
        remarks=tuple(remarks),
        read=read,
        bad=bad,
        options=columns.options(),
        fingerprint=shards.fingerprint,
    )


def source_name(root: Path, split: str) -> str:
    """A set's name in its manifest."""
    return f"wds/{root / split}"


@dataclass
class _Listed:
    """The content of the shards, with a row for each sample."""

    input_key: str
    label_key: str
    names: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    shards: array[int] = field(default_factory=lambda: array("i"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    _suffixes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """How many samples have each suffix."""
    _two: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Suffixes of several images in one sample, and the first such sample."""
    _json_keys: set[str] = field(default_factory=set)

    def add(self, number: int, path: Path) -> None:
        """The samples of one shard. Raises `UserError`."""
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        with _opened(path) as tar:
            for member in _members(tar, path):
                key, suffix = _split_name(member.name)
                if not member.isreg() or not suffix or key.rpartition("/")[2].startswith("__"):
                    continue
                parts = samples.setdefault(key, {})
                if suffix in parts:
                    raise UserError(f"{path} contains {member.name} twice. Make the shard again.")
                parts[suffix] = member
            for key, parts in samples.items():
                self._add_sample(number, f"{path.name}/{key}", parts, tar)

    def _add_sample(self, number: int, name: str, parts: Mapping[str, tarfile.TarInfo], tar: tarfile.TarFile) -> None:
        row = len(self.names)
        for suffix in parts:
            self._suffixes[suffix] += 1
        image = self._image(name, parts)
        if image is None:
            self.bad[row] = f"there is no image among its files ({abbreviated(parts)})"
        try:
            label = self._label(parts, tar)
        except ValueError as error:
            label = None
            self.bad.setdefault(row, str(error))
        member = parts[image] if image else None
        self.names.append(one_line(f"{name}.{image}" if image else name))
        self.labels.append(label)
        self.shards.append(number)
        self.offsets.append(member.offset_data if member else 0)
        self.sizes.append(member.size if member else 0)

    def _image(self, name: str, parts: Mapping[str, tarfile.TarInfo]) -> str | None:
        if self.input_key:
            return next((key for key in self.input_key.lower().split(";") if key in parts), None)
        images = [suffix for suffix in parts if f".{suffix.rpartition('.')[2]}" in image_suffixes()]
        if len(images) > 1:
            self._two.setdefault(tuple(images), name)
        return images[0] if images else None

    def _label(self, parts: Mapping[str, tarfile.TarInfo], tar: tarfile.TarFile) -> Any:
        """The label's value. Raises `ValueError` where there is none."""
        if not self.label_key and "cls" in parts:
            text = _content(tar, parts["cls"]).decode("utf-8", "replace").strip()
            return int(text) if re.fullmatch(r"[-+]?\d+", text) else text
        if "json" not in parts:
            raise ValueError(f"there is no label: neither .cls nor .json among its files ({abbreviated(parts)})")
        try:
            content = json.loads(_content(tar, parts["json"]))
        except ValueError as error:
            raise ValueError(f"its .json is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError("its .json is not an object, so it has no label")
        found: Any = content
        self._json_keys.update(map(str, found))
        for key in (self.label_key or _LABEL).split("/"):
            if not isinstance(found, dict) or key not in found:
                raise ValueError(f"there is no label: its .json has no key {self.label_key or _LABEL}")
            found = found[key]
        return found

    def refuse_unclear(self, what: str) -> None:
        """Raise `UserError` if samples have several images, or none has an image or a label as asked for."""
        there = f"Files of a sample end in {abbreviated(sorted(self._suffixes), 12)}"
        if self._two:
            images, name = next(iter(self._two.items()))
            raise UserError(
                f"{what}: {name} has {len(images)} images, {', '.join(images)}. Say which with --input-key, such as "
                f"--input-key {images[0]}."
            )
        if not any(self.sizes):
            asked = f"--input-key {self.input_key}" if self.input_key else "images"
            raise UserError(f"{what} has no {asked}. {there}. Give --input-key.")
        if all(label is None for label in self.labels):
            keys = f"; keys of the .json are {abbreviated(sorted(self._json_keys), 12)}" if self._json_keys else ""
            asked = f"--target-key {self.label_key}" if self.label_key else "labels"
            raise UserError(
                f"{what} has no {asked}. {there}{keys}. Give --target-key with a key of the .json; to predict without "
                "labels give `python -m lowrank_vit.inference` a folder of the images."
            )

    def remarks(self, files: Sequence[Path]) -> Iterator[str]:
        """A warning if a key is in several shards."""
        keys: dict[str, int] = {}
        again: list[str] = []
        for name, shard in zip(self.names, self.shards, strict=True):
            key = name[len(files[shard].name) + 1 :]
            if keys.setdefault(key, shard) != shard:
                again.append(key)
        if again:
            yield (
                f"warning: {len(again):,} keys are in several shards ({abbreviated(again, 3)}); each is a sample of "
                "its own. Check that no shard is there twice"
            )


def _split_name(name: str) -> tuple[str, str]:
    """Key and suffix as in webdataset: the name up to the first dot after its folder; the rest in lower case."""
    folder, slash, plain = name.removeprefix("./").rpartition("/")
    key, _, suffix = plain.partition(".")
    return f"{folder}{slash}{key}", suffix.lower() if key else ""


def _opened(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except tarfile.ReadError as error:
        if path.suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst"):
            raise UserError(
                f"{path} is compressed, so it cannot be read at offsets. Unpack it to a plain .tar."
            ) from error
        raise UserError(f"{path} is not a tar file, or is damaged: {error}. Copy it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _members(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a shard. Raises `UserError` if the file is cut off."""
    end = 0
    size = path.stat().st_size
    cut = f"{path} is cut off: copy it again. Images after the cut would be missing"
    try:
        for member in tar:
            end = member.offset_data + member.size
            if end > size:
                raise UserError(f"{cut} ({member.name} should end at {end:,} of {size:,} bytes).")
            yield member
    except tarfile.TarError as error:
        raise UserError(f"{cut} ({error}).") from error
    if tar.offset + _END > size and end:  # no end marker: it was cut between two members
        raise UserError(f"{cut} (nothing marks its end).")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""
