"""List the images among a command's files and folders once, on the disk, however many they are."""

from __future__ import annotations

import heapq
import itertools
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import xxhash

from data_prep.formats.image_formats import image_suffixes, is_of_the_system
from lowrank_vit.common.errors import UserError

_SORTED_AT_ONCE = 1 << 16
"""Names of one folder that are sorted in memory; more are sorted in parts and merged from the disk."""
_BLOCK = 1 << 16
"""Bytes that are read at once."""


class ImageList:
    """The images of some files and folders, in the order of `sorted(folder.rglob("*"))`; use it as a context.

    Names lie in a temporary file (TMPDIR) without a name. Memory has 8 bytes for each batch.
    """

    def __init__(self, paths: Iterable[Path], batch_size: int, note: Callable[[str], object]) -> None:
        """List everything. `note` is called with the number of files in a folder that are not images.

        Raises `UserError` for a folder without images, and if there is no room for the names.
        """
        self._batch_size, self._size, self._starts = batch_size, 0, array("q")
        digest = xxhash.xxh3_64()
        try:
            with ExitStack() as stack:
                self._names: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
                last = b""
                for folder, name in _all(paths, note):
                    if self._size % batch_size == 0:
                        self._starts.append(self._names.tell())
                        last = b""
                    own = os.fsencode(folder)
                    if own != last:
                        self._names.write(b"/" + own + b"\0")  # no name begins so
                        last = own
                    self._names.write(os.fsencode(name) + b"\0")
                    digest.update((b"\0" if self._size else b"") + os.fsencode(_joined(folder, name)))
                    self._size += 1
                self._starts.append(self._names.tell())
                self._names.flush()
                self._open = stack.pop_all()
        except OSError as error:
            raise UserError(
                f"the images cannot be listed: {error.strerror or error}"
                f"{f' ({error.filename})' if error.filename else ''}. Their names need room in "
                f"{tempfile.gettempdir()}; TMPDIR=DIR chooses another folder."
            ) from error
        self.digest = digest.hexdigest()
        """XXH3-64 of all names, in order."""

    def __len__(self) -> int:
        return self._size

    def __enter__(self) -> ImageList:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def batch(self, number: int) -> list[Path]:
        """The images of one batch; empty past the end."""
        if number >= len(self._starts) - 1:
            return []
        start, end = self._starts[number], self._starts[number + 1]
        folder, files = "", list[Path]()
        for record in os.pread(self._names.fileno(), end - start, start).split(b"\0")[:-1]:
            if record.startswith(b"/"):
                folder = os.fsdecode(record[1:])
            else:
                files.append(Path(_joined(folder, os.fsdecode(record))))
        return files


def _joined(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}{'' if folder.endswith('/') else '/'}{name}"


def _all(paths: Iterable[Path], note: Callable[[str], object]) -> Iterator[tuple[str, str]]:
    for path in paths:
        if not path.is_dir():
            yield str(path.parent), path.name
            continue
        others = Counter[str]()
        is_empty = True
        for image in _below(str(path), others):
            is_empty = False
            yield image
        most = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:5]
        kinds = ", ".join(f"{n:,} {suffix or 'without suffix'}" for suffix, n in most)
        if is_empty:
            raise UserError(f"--input {path} holds no image{f', only other files ({kinds})' if kinds else ''}.")
        if kinds:
            note(f"{path}: left out {others.total():,} files without an image suffix ({kinds})")


def _below(folder: str, others: Counter[str]) -> Iterator[tuple[str, str]]:
    """Folders and names of the images below a folder; `others` counts other files by suffix.

    Hidden files and those of file servers are neither, and links to folders are not followed.
    """
    for name, is_folder in _sorted(_entries(folder, others)):
        if is_folder:
            yield from _below(_joined(folder, name), others)
        else:
            yield folder, name


def _entries(folder: str, others: Counter[str]) -> Iterator[tuple[str, bool]]:
    """Names of images and folders directly in a folder, and whether each is a folder."""
    suffixes = image_suffixes()
    try:
        opened = os.scandir(folder)
    except PermissionError:
        return
    with opened as entries:
        for entry in entries:
            name = entry.name
            if is_of_the_system(name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield name, True
                continue
            dot = name.rfind(".")
            suffix = name[dot:].lower() if 0 < dot < len(name) - 1 else ""
            try:
                is_file = entry.is_file()
            except OSError:  # a link to itself
                continue
            if is_file and suffix in suffixes:
                yield name, False
            elif is_file:
                others[suffix] += 1


def _sorted(entries: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """The entries, sorted; millions of them through a temporary file."""
    few = _some(entries)
    if len(few) < _SORTED_AT_ONCE:
        yield from few
        return
    with tempfile.TemporaryFile() as file:
        bounds = [0]
        while few:
            for name, is_folder in few:
                file.write(os.fsencode(name) + (b"/\0" if is_folder else b"\0"))
            bounds.append(file.tell())
            few = _some(entries)
        file.flush()
        runs = itertools.pairwise(bounds)
        yield from heapq.merge(*(_read_back(file.fileno(), start, end) for start, end in runs))


def _some(entries: Iterator[tuple[str, bool]]) -> list[tuple[str, bool]]:
    return sorted(entry for _, entry in zip(range(_SORTED_AT_ONCE), entries, strict=False))


def _read_back(descriptor: int, start: int, end: int) -> Iterator[tuple[str, bool]]:
    rest = b""
    while start < end:
        block = os.pread(descriptor, min(_BLOCK, end - start), start)
        start += len(block)
        *records, rest = (rest + block).split(b"\0")
        for record in records:
            yield os.fsdecode(record.removesuffix(b"/")), record.endswith(b"/")


def digest_of_stats(files: Sequence[Path]) -> str:
    """16 hexadecimal digits that stand for the size and the modification time of some files; one may be missing."""
    digest = xxhash.xxh3_64()
    for file in files:
        try:
            found = file.stat()
            digest.update(b"%d %d\0" % (found.st_size, found.st_mtime_ns))
        except OSError:
            digest.update(b"\0")
    return digest.hexdigest()
