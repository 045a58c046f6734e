"""Folders of images listed once, in a file, so that each of many processes reads its own part instead of the tree.

The file: a line `list of files, lowrank-vit 1`; for each image `LABEL SIZE NAME` and a NUL, in the order of the
samples, the name relative to its folder and spelt as the file system does, the size in bytes or -1; a line of JSON, see
`ListFile` and `ListedFolder`; a line with the length and the XXH3-64 of that JSON, sixteen hexadecimal digits each. The
JSON has the end and the XXH3-64 of every block of a thousand images, so a reader checks only the blocks it needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast, get_args

import xxhash

from data_prep.formats.jpeg import BadImageError, EncodedImage, ImageOptions, UnreadableImageError, encode_file
from data_prep.sources.image_folder import (
    NO_CLASSES,
    Listing,
    Nested,
    chosen_classes,
    list_folder,
    split_folders,
    top_folders,
)
from data_prep.sources.samples import Sample, Source, sample_line
from data_prep.writing.workers import ConversionProgress, map_ordered
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import whole_file, writing

VERSION = 1
LINES = 1000
"""Images in a block."""
_MAGIC = b"list of files, lowrank-vit "
_END = re.compile(rb"([0-9a-f]{16}) ([0-9a-f]{16})\n")
_END_BYTES = 34
_SIZES_AT_ONCE = 16
"""Threads that ask for sizes: a network file system answers slowly, but many requests at a time."""
_AGAIN = "List the folder again: `python -m data_prep list DIR --out LIST`."


@dataclass(frozen=True)
class ListedFolder:
    """A folder of classes in a list."""

    source: str
    """As the user gave it."""
    place: str
    """Its path with all links resolved."""
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    """Images of each class."""
    remarks: tuple[str, ...]
    sha256: str
    """`file_list_sha256` of all its samples."""
    begin: int
    """The byte in the file at which its first line begins."""
    blocks: tuple[tuple[int, str], ...]
    """For each block the byte at which it ends, and its XXH3-64 in hexadecimal."""

    def __len__(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class ListFile:
    """A list's header, read and checked; its lines are read when they are needed."""

    path: Path
    nested: Nested
    classes_file: str | None
    """As the user gave it to the listing."""
    classes_sha256: str
    """`_digest` of the classes that `classes_file` names; empty without such a file."""
    folders: tuple[ListedFolder, ...]


class _Sized(NamedTuple):
    label: int
    name: str
    size: int


def write_list(
    root: Path, out: Path, classes_file: Path | None, nested: Nested, *, progress: bool = False
) -> tuple[ListedFolder, ...]:
    """List the classes and images below `root`, or below each of its splits, to the file `out`, whole or not at all.

    `classes_file`, `nested`: see `image_folder`, which finds the same. A name takes its length and one byte of memory.
    Raises `UserError` as `image_folder` does, and if `out` cannot be written or lies below `root`.
    """
    if root.exists() and out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--out {out} lies in {root}, which is listed and would change by that. Give another place.")
    folders = split_folders(root) if set(top_folders(root)) <= NO_CLASSES else {}
    listings = [list_folder(folder, classes_file, nested) for folder in folders.values() or (root,)]
    names = sorted(chosen_classes(classes_file)) if classes_file else []
    with writing(out, "Check the free space and the permissions of its folder, or give another --out."):
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out) as file:
            file.write(b"%s%d\n" % (_MAGIC, VERSION))
            written = tuple(_write_folder(file, listing, progress=progress) for listing in listings)
            header: dict[str, Any] = {
                "nested_classes": nested,
                "classes_file": str(classes_file) if classes_file else None,
                "classes_sha256": _digest(names) if classes_file else "",
                "folders": [asdict(folder) for folder in written],
            }
            told = json.dumps(header).encode("ascii") + b"\n"
            file.write(told + b"%016x %016x\n" % (len(told), xxhash.xxh3_64_intdigest(told)))
    return written


def _write_folder(file: Any, listing: Listing, *, progress: bool) -> ListedFolder:
    begin, blocks, digest = file.tell(), list[tuple[int, str]](), hashlib.sha256()
    end = begin
    counts = [0] * len(listing.classes)
    with ConversionProgress(listing.count, progress) as bar:
        bar.describe("list")
        sized = map_ordered(partial(_with_size, str(listing.root)), listing.files(), _SIZES_AT_ONCE)
        with closing(sized):
            while lines := list(islice(sized, LINES)):
                block = bytearray()
                for label, name, size in lines:
                    plain = os.fsencode(name)
                    block += b"%d %d %s\0" % (label, size, plain)
                    digest.update(sample_line(label, plain))
                    counts[label] += 1
                    bar.advance(0, {}, 0)
                file.write(block)
                end += len(block)
                blocks.append((end, xxhash.xxh3_64_hexdigest(block)))
    return ListedFolder(
        str(listing.root),
        str(listing.root.resolve()),
        listing.classes,
        tuple(counts),
        listing.remarks,
        digest.hexdigest(),
        begin,
        tuple(blocks),
    )


def _with_size(root: str, file: tuple[int, str]) -> _Sized:
    label, name = file
    try:
        return _Sized(label, name, os.stat(f"{root}/{name}").st_size)  # noqa: PTH116
    except OSError:
        return _Sized(label, name, -1)  # reading the file will say why


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256(b"\0".join(map(os.fsencode, names))).hexdigest()


def read_list(path: Path) -> ListFile:
    """The header of a list. Raises `UserError` if it is no list, of another version, cut off or changed."""
    try:
        with path.open("rb") as file:
            first = file.readline(len(_MAGIC) + 20)
            if not first.startswith(_MAGIC):
                raise UserError(f"--file-list {path} is not a list of files. {_AGAIN}")
            if first != b"%s%d\n" % (_MAGIC, VERSION):
                version = first[len(_MAGIC) :].strip().decode("ascii", "replace")
                raise UserError(
                    f"--file-list {path} was written by another version of this program: its format is {version}, "
                    f"expected {VERSION}. {_AGAIN}"
                )
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END_BYTES))
            end = _END.fullmatch(file.read())
            length = int(end[1], 16) if end else 0
            start = size - _END_BYTES - length
            if end is None or start < len(first):
                raise UserError(f"--file-list {path} is cut off, or was changed at its end. {_AGAIN}")
            file.seek(start)
            told = file.read(length)
    except OSError as error:
        raise UserError(f"--file-list {path} cannot be read: {error.strerror}. {_AGAIN}") from error
    if xxhash.xxh3_64_intdigest(told) != int(end[2], 16):
        _refuse_changed(path)
    try:
        header = json.loads(told)
        folders = tuple(_folder(one) for one in header["folders"])
        nested, classes_file = header["nested_classes"], header["classes_file"]
        if nested not in get_args(Nested) or folders[-1].blocks[-1][0] != start:
            raise ValueError
        return ListFile(path, cast(Nested, nested), classes_file, str(header["classes_sha256"]), folders)
    except (ValueError, KeyError, TypeError, IndexError):
        _refuse_changed(path)


def _folder(told: dict[str, Any]) -> ListedFolder:
    told["blocks"] = tuple((int(end), str(code)) for end, code in told["blocks"])
    for name in ("classes", "counts", "remarks"):
        told[name] = tuple(told[name])
    found = ListedFolder(**told)
    if len(found.classes) != len(found.counts) or len(found.blocks) != -(-len(found) // LINES):
        raise ValueError
    return found


def _refuse_changed(path: Path) -> NoReturn:
    raise UserError(f"--file-list {path} was changed since it was written, or is damaged. {_AGAIN}")


class ListedFiles(Sequence[Sample]):
    """Samples of a list, or a part of them, read in blocks as they are needed, by one thread at a time."""

    def __init__(
        self, path: Path, folder: ListedFolder, stretch: range | None = None, labels: Sequence[int] | None = None
    ) -> None:
        """`stretch`: which samples of the folder; `labels`: `labels[label]` replaces `label`."""
        self._path, self._folder, self._labels = path, folder, labels
        self._stretch = range(len(folder)) if stretch is None else stretch
        self._block: tuple[int, list[bytes]] = (-1, [])

    def __len__(self) -> int:
        return len(self._stretch)

    @property
    def sha256(self) -> str:
        """`file_list_sha256` if it is known without reading: of all samples with their listed labels. Else empty."""
        return self._folder.sha256 if len(self) == len(self._folder) and self._labels is None else ""

    def relabelled(self, labels: Sequence[int]) -> ListedFiles:
        """The same samples in the same order, with `labels[label]` for each label."""
        labels = labels if self._labels is None else [labels[label] for label in self._labels]
        is_same = list(labels) == list(range(len(labels)))
        return ListedFiles(self._path, self._folder, self._stretch, None if is_same else labels)

    def __getitem__(self, index: Any) -> Any:
        """The `Sample` at `index`, or `ListedFiles` for a slice without steps. Raises `UserError` if it changed."""
        if isinstance(index, slice):
            return ListedFiles(self._path, self._folder, self._stretch[index], self._labels)
        line = self._stretch[index]
        return self._sample(self._lines(line // LINES)[line % LINES])

    def __iter__(self) -> Iterator[Sample]:
        first, last = self._stretch.start, self._stretch.stop
        for number in range(first // LINES, -(-last // LINES)):
            start = number * LINES
            yield from map(self._sample, self._lines(number)[max(first - start, 0) : last - start])

    def _sample(self, line: bytes) -> Sample:
        label, size, name = line.split(b" ", 2)
        number = int(label)
        number = number if self._labels is None else self._labels[number]
        return Sample(number, os.fsdecode(name), None, -1, int(size))

    def _lines(self, number: int) -> list[bytes]:
        """The lines of block `number`, without their NULs."""
        if self._block[0] != number:
            blocks = self._folder.blocks
            start, (end, code) = blocks[number - 1][0] if number else self._folder.begin, blocks[number]
            try:
                with self._path.open("rb") as file:
                    content = os.pread(file.fileno(), end - start, start)
            except OSError as error:
                raise UserError(f"--file-list {self._path} cannot be read: {error.strerror}. {_AGAIN}") from error
            if len(content) != end - start or xxhash.xxh3_64_hexdigest(content) != code:
                _refuse_changed(self._path)
            self._block = number, content[:-1].split(b"\0")
        return self._block[1]


@dataclass(frozen=True)
class ListedSource(Source):
    """A folder of images as a list describes it; the folder itself is not read."""

    def _relabelled(self, labels: list[int]) -> Sequence[Sample]:
        assert isinstance(self.samples, ListedFiles)
        return self.samples.relabelled(labels) if labels == sorted(labels) else super()._relabelled(labels)


def listed_source(files: ListFile, root: Path) -> ListedSource:
    """`image_folder(root)` from a list. Raises `UserError` if the list is of other folders."""
    place = str(root.resolve())
    folder = next((one for one in files.folders if one.place == place), None)
    if folder is None:
        of = " and ".join(one.place for one in files.folders)
        raise UserError(
            f"--file-list {files.path} is of {of}, not of {place}. If that folder was moved or renamed, list it again: "
            "`python -m data_prep list DIR --out LIST`."
        )
    if not root.is_dir():
        raise UserError(
            f"--src {root} does not exist or is not a folder. --file-list {files.path} only names its files."
        )
    return ListedSource(str(root), folder.classes, ListedFiles(files.path, folder), remarks=folder.remarks)


def refuse_other_options(files: ListFile, classes_file: Path | None, nested: Nested | None) -> None:
    """Raise `UserError` if an option differs from the one the list was made with; None if it is not given."""
    if nested is not None and nested != files.nested:
        raise UserError(
            f"--nested-classes {nested} does not fit --file-list {files.path}, which was made with --nested-classes "
            f"{files.nested}. Leave the flag out, or list the folder again with it."
        )
    if classes_file is not None and _digest(sorted(chosen_classes(classes_file))) != files.classes_sha256:
        made = f"from another list, --classes {files.classes_file}" if files.classes_file else "of all classes"
        raise UserError(
            f"--classes {classes_file} names other classes than --file-list {files.path}, which was made {made}. Leave "
            "the flag out, or list the folder again with it."
        )


def encode_listed(sample: Sample, root: Path, options: ImageOptions) -> EncodedImage:
    """`encode_file`; raises `UnreadableImageError` if a file is not as listed, so that it is not skipped."""
    try:
        image = encode_file(sample, root, options)
    except BadImageError as error:
        _refuse_another(sample, root, file_stat(str(root), sample)[0], error)
        raise
    _refuse_another(sample, root, image.source_stat[0])
    return image


def _refuse_another(sample: Sample, root: Path, size: int, error: BadImageError | None = None) -> None:
    """Raise `UnreadableImageError` if a size was listed for the sample's file and it is not `size`."""
    if sample.size in (-1, size):
        return
    why = f"has {size:,} bytes, {sample.size:,} when it was listed"
    if error and not (root / sample.name).exists():
        why = "no longer exists, though the file list names it"
    raise UnreadableImageError(sample.name, f"{why}: list the folder again") from error


def file_stat(root: str, sample: Sample) -> tuple[int, int]:
    """Size in bytes and modification time in ns of a source file below `root`; zeros if it cannot be looked at."""
    try:
        stat = os.stat(f"{root}/{sample.name}")  # noqa: PTH116  `Path.stat` takes twice as long, for each of a million files
    except OSError:
        return 0, 0  # reading the file will say why
    return stat.st_size, stat.st_mtime_ns
