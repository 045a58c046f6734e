"""A large set's index, checked by one process of a node and mapped by all others and by later runs.

One file in the order of its addresses, as a converter leaves it, is its own index: all map its tables, and only what
follows of them is published. Of parts, and of other orders, the columns are published too.

The file is `.FILE.beton.index2-UID` beside the set (of parts, `.FILE.beton.HASH.index2-UID`). Where that folder cannot
be written, or is on another disk than the set's files, it lies in the folder for temporary files or in shared memory.
Only its owner can read it, and nobody else's is opened. It is taken while all files and manifests of the set have the
inode, size and time that they had when they were checked; else it is replaced.

    header 64 KiB: magic, version, length and XXH3-64 of what follows, JSON | columns | ids | sizes
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
import struct
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.formats.beton import METADATA_START, SAMPLE, align_to_page
from data_prep.formats.sidecars import manifest_path
from data_prep.formats.tables import COLUMNS, Layout, columns_in_place
from lowrank_vit.common.errors import BetonError
from lowrank_vit.common.files import remove_leftovers, whole_file
from lowrank_vit.common.filesystem import map_descriptor, map_files, read_by_pieces
from lowrank_vit.common.locks import try_flock
from lowrank_vit.common.terminal import as_bytes
from lowrank_vit.common.threads import beat
from lowrank_vit.data.sets.index import Index, Summary, places_of, read_index, read_layouts, summary_in_place

VERSION = 2
"""Goes up when the bytes change, and with it the file's name, so that two versions do not replace each other's."""
PUBLISHED_FROM = 1 << 16
"""Samples; the index of a smaller set is read in less time than it takes to look for another."""
_MAGIC = b"LRVINDEX"
_HEAD = struct.Struct("<8sIIQ")
_HEADER_BYTES = 1 << 16
_ALIGNMENT = 1 << 16
"""The largest page of any machine."""
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, struct.error)
"""Errors of `_map`."""
_WAIT_S, _POLL_S = 600.0, 0.05
"""How long another process may take; its lock is released when it dies."""


def open_index(path: Path, parts: Sequence[Path]) -> Index:
    """The index of the set `path` that consists of these files, mapped if it is large. Raises `BetonError`."""
    places = list(_places(path, parts))
    if found := _find(places, parts):
        return found
    layouts = read_layouts(path, parts)
    num_samples = sum(layout.num_samples for layout in layouts)
    if num_samples < PUBLISHED_FROM:
        return read_index(path, layouts)
    reasons = []
    for place in places:
        try:
            with _one_at_a_time(place):
                if found := _find([place], parts):
                    return found
                _publish(place, path, layouts)
            return _read_back(place, parts)
        except OSError as error:
            reasons.append(f"{place.parent}: {error.strerror or error}")
    return replace(read_index(path, layouts), why_private="; ".join(reasons))


def _places(path: Path, parts: Sequence[Path]) -> Iterator[Path]:
    """The paths at which the index may be, in the order in which they are tried; its name depends on the parts."""
    names = "" if len(parts) == 1 else xxhash.xxh3_64_hexdigest(b"\0".join(as_bytes(part.name) for part in parts))
    ending = f"{names and '.'}{names}.index{VERSION}-{os.geteuid()}"
    yield path.parent / f".{path.name}{ending}"
    origin = hashlib.sha256(as_bytes(str(path.absolute()))).hexdigest()[:16]
    folders = [Path("/dev/shm")]
    with suppress(OSError):  # there may be no folder for temporary files
        folders.insert(0, Path(tempfile.gettempdir()))
    for folder in dict.fromkeys(folders):
        yield folder / f"lowrank_vit-{origin}{ending}"


def _find(places: Sequence[Path], parts: Sequence[Path]) -> Index | None:
    for place in places:
        with suppress(*_UNUSABLE):
            return _map(place, parts)
    return None


def _read_back(place: Path, parts: Sequence[Path]) -> Index:
    """Map what was just published. Raises `OSError` with the reason, and removes the file, where that is impossible."""
    try:
        return _map(place, parts)
    except _UNUSABLE as error:
        place.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise OSError(None, f"what is written there cannot be trusted ({reason})") from error


def _map(place: Path, parts: Sequence[Path]) -> Index:
    """Map a published index. Raises one of `_UNUSABLE`: there is none, or not for these files."""
    descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError("it is not this user's alone")
        header = os.pread(descriptor, _HEADER_BYTES, 0)
        magic, version, length, checksum = _HEAD.unpack_from(header)
        text = header[_HEAD.size : _HEAD.size + length]
        if (magic, version) != (_MAGIC, VERSION) or xxhash.xxh3_64_intdigest(text) != checksum:
            raise ValueError("it is of another version, or damaged")
        told = json.loads(text)
        table_start: int | None = told["table_start"]
        starts = _starts(told["num_samples"], told["num_parts"], has_columns=table_start is None)
        # Mapped before it is compared, so that what is compared is what is mapped.
        file = map_files(parts[:1], [0]) if table_start is not None else None
        # A map of a file that is shorter than it should be would end the process where it is read.
        if told["num_parts"] != len(parts) or starts["end"][0] != found.st_size or told["key"] != _key(place, parts):
            raise ValueError("it is of other files")
        mapped = map_descriptor(descriptor)
        read_by_pieces(np.frombuffer(mapped, np.uint8))
        columns = _arrays(mapped, starts)
        if file is not None and table_start is not None:
            now = parts[0].stat()
            if file.ids != [(now.st_dev, now.st_ino)] or len(file.bytes) != columns["file_sizes"][0]:
                raise ValueError("another file was mapped")
            columns |= columns_in_place(file.bytes, told["num_samples"], table_start)
            read_by_pieces(file.bytes[: METADATA_START + told["num_samples"] * SAMPLE.itemsize])
            read_by_pieces(file.bytes[table_start:])
    finally:
        os.close(descriptor)
    first_ids, file_sizes = columns.pop("first_ids"), columns.pop("file_sizes")
    return Index(columns, first_ids, file_sizes, Summary(**told["summary"]), is_mapped=True, file=file)


def _publish(place: Path, path: Path, layouts: Sequence[Layout]) -> None:
    """Read, check and publish an index. Raises `OSError` where that cannot be written, `BetonError` of the set."""
    if not os.access(place.parent, os.W_OK):
        raise PermissionError(13, os.strerror(13))
    with suppress(FileNotFoundError):
        if place.lstat().st_uid != os.geteuid():
            raise PermissionError(1, "another user's file lies there")
    parts = [layout.path for layout in layouts]
    first_ids, file_sizes = places_of(layouts)
    key = _key(place, parts)
    summary = summary_in_place(path, layouts[0]) if len(parts) == 1 else None
    starts = _starts(int(first_ids[-1]), len(parts), has_columns=summary is None)
    remove_leftovers(place.parent, place.name)
    with whole_file(place, through_link=False, mode=0o600) as file:
        # Room is taken before it is mapped: writing to a map of a full disk would end the process.
        os.posix_fallocate(file.fileno(), 0, starts["end"][0])
        mapped = mmap.mmap(file.fileno(), starts["end"][0])
        arrays = _arrays(mapped, starts)
        arrays.pop("first_ids")[:], arrays.pop("file_sizes")[:] = first_ids, file_sizes
        table_start = None if summary is None else layouts[0].table_start
        summary = summary or read_index(path, layouts, arrays).summary
        told = {"key": key, "num_samples": int(first_ids[-1]), "num_parts": len(parts), "summary": asdict(summary)}
        told |= {"table_start": table_start}
        text = json.dumps(told).encode("ascii")
        if len(text) > _HEADER_BYTES - _HEAD.size:
            raise OSError(None, "the manifests give more reasons than there is room for")
        mapped[: _HEAD.size + len(text)] = _HEAD.pack(_MAGIC, VERSION, len(text), xxhash.xxh3_64_intdigest(text)) + text
        if _key(place, parts) != key:
            raise BetonError(f"{path} was changed while it was read. Try again when its conversion is finished.")


def _starts(num_samples: int, num_parts: int, *, has_columns: bool) -> dict[str, tuple[int, int, np.dtype[Any]]]:
    """Where each array begins, how long it is, and of what; `end` is where the file ends."""
    arrays = {name: (num_samples, dtype) for name, dtype in COLUMNS.items() if has_columns}
    arrays |= {"first_ids": (num_parts + 1, np.dtype(np.int64)), "file_sizes": (num_parts, np.dtype(np.int64))}
    starts, at = {}, _HEADER_BYTES
    for name, (length, dtype) in arrays.items():
        starts[name] = at, length, dtype
        at = align_to_page(at + length * dtype.itemsize, _ALIGNMENT)
    return starts | {"end": (at, 0, np.dtype(np.uint8))}


def _arrays(mapped: mmap.mmap, starts: dict[str, tuple[int, int, np.dtype[Any]]]) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(mapped, dtype, length, at) for name, (at, length, dtype) in starts.items() if name != "end"
    }


def _key(place: Path, parts: Sequence[Path]) -> str:
    """A hash of device, inode, size and time of all files and manifests, and of the first manifest's bytes.

    Beside the set, devices do not count, since machines number a network's devices differently, and each machine would
    replace the index that another has mapped: raises `OSError` if a file is on another device than the index, as behind
    a link.
    """
    own_disk, is_beside = place.parent.stat().st_dev, place.parent == parts[0].parent
    digest = xxhash.xxh3_128(struct.pack("<2q", VERSION, mmap.PAGESIZE))  # where a part begins depends on pages

    def add(path: Path) -> None:
        of = path.stat()
        if is_beside and of.st_dev != own_disk:
            raise OSError(None, "files of the set are on another disk")
        device = 0 if of.st_dev == own_disk else of.st_dev + 1
        digest.update(struct.pack("<3Qq", device, of.st_ino, of.st_size, of.st_mtime_ns))

    for part in parts:
        add(part)
        with suppress(FileNotFoundError):
            add(manifest_path(part))
    with suppress(FileNotFoundError):
        digest.update(manifest_path(parts[0]).read_bytes())
    return digest.hexdigest()


@contextmanager
def _one_at_a_time(place: Path) -> Generator[None]:
    """Hold the lock of a place, and remove it afterwards; wait while another process of this user has it.

    Raises `OSError` if no lock is possible, or if it is another user's.
    """
    path = place.with_name(f"{place.name}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(1, "another user's lock lies there")
        begun = time.monotonic()
        while try_flock(descriptor) is False:
            if time.monotonic() - begun > _WAIT_S:
                raise TimeoutError(None, "another process holds the lock for too long")
            beat()
            time.sleep(_POLL_S)
        try:
            yield
        finally:  # a process that waits for it looks for the index first
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(descriptor)
