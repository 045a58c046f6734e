"""Simulated sets: as many samples, files and classes as wanted, over a few hundred small JPEGs that samples share.

Headers, rows, allocation tables, manifests and sample tables are those that the converter would write; neighbouring
samples of a file point to the same bytes, which the format allows. So a set of 14.2 million samples takes under 1 GB
on the disk, opens as a real one does, and every loader decodes it.

`python -m benchmarks.harness.simulated --samples 14200000 --classes 21841 --out DIR` writes DIR/train.beton.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from benchmarks.harness.measure import nothing
from benchmarks.harness.sets import photograph_arrays
from data_prep.convert import library_versions
from data_prep.formats import beton as layout
from data_prep.formats.jpeg import REASONS, ImageOptions
from data_prep.formats.sample_table import SampleTable, checksum, sample_table_path
from data_prep.formats.sidecars import Manifest, manifest_path, manifest_text
from lowrank_vit.common.errors import UserError, exit_cleanly
from lowrank_vit.common.files import writing
from lowrank_vit.common.filesystem import map_file
from lowrank_vit.common.program import usage_name
from lowrank_vit.config.command_line import read_options

NAME = "train.beton"
SHARED = 256
"""JPEGs in all."""
_SHARES = 8
"""A file has at most one JPEG for so many of its samples, so that many small files stay small."""
_SIDES = (48, 97)
_CHUNK = 1 << 20
"""Rows in memory at a time."""


@dataclass(frozen=True)
class Options:
    """A simulated set."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for train.beton, or for its parts, and their sidecars."""
    samples: Annotated[int, tyro.conf.arg(metavar="N")] = 100_000
    """Number of samples."""
    files: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Number of files that the set is divided into."""
    classes: Annotated[int, tyro.conf.arg(metavar="N")] = 1000
    """Classes, one after the other as folders are listed, all of about one size."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Seed of the JPEGs."""


@dataclass(frozen=True)
class _Jpegs:
    data: list[bytes]
    heights: np.ndarray
    widths: np.ndarray
    sizes: np.ndarray


def simulate(options: Options, note: Callable[[str], object] = nothing) -> Path:
    """Write the set; return what `Beton` opens: DIR/train.beton, which stands for its parts where there are several.

    Memory: its samples' names and 9 bytes a sample. Raises `UserError`: numbers that do not fit one another, a folder
    that cannot be written.
    """
    if not 1 <= options.files <= options.samples:
        raise UserError(f"--files is {options.files}, expected 1 or more and at most --samples ({options.samples}).")
    if not 1 <= options.classes <= options.samples:
        raise UserError(f"--classes is {options.classes}, expected 1 or more and at most --samples.")
    out = options.out / NAME
    jpegs, names = _jpegs(options.seed), _Names(options.samples, options.classes)
    with writing(options.out, "Check the free space and the permissions."):
        options.out.mkdir(parents=True, exist_ok=True)
        whole_list = names.sha256(0, options.samples)
        for n in range(options.files):
            note(f"file {n + 1:,} of {options.files:,}") if n % 100 == 0 else None
            part = None if options.files == 1 else (n + 1, options.files)
            first, last = (options.samples * i // options.files for i in (n, n + 1))  # as `samples.shard` divides
            path = out if part is None else layout.part_path(out, *part)
            _write(path, jpegs, names, range(first, last), part, whole_list)
    return out


def small_jpegs(seed: int) -> list[bytes]:
    """The JPEG files that samples share, `SHARED` of 48 to 96 pixels a side."""
    return _jpegs(seed).data


@cache
def _jpegs(seed: int) -> _Jpegs:
    """Windows of photographs, made smaller."""
    rng = np.random.default_rng(seed)
    photos = [Image.fromarray(photo) for photo in photograph_arrays()]
    data, sizes = list[bytes](), rng.integers(*_SIDES, size=(SHARED, 2))
    for n, (width, height) in enumerate(sizes.tolist()):
        photo, file = photos[n % len(photos)], io.BytesIO()
        left, top = (
            int(rng.integers(max(side - 3 * wanted, 1)))
            for side, wanted in zip(photo.size, (width, height), strict=True)
        )
        box = (left, top, min(left + 3 * width, photo.width), min(top + 3 * height, photo.height))
        photo.resize((width, height), box=box).save(file, "JPEG", quality=90)
        data.append(file.getvalue())
    return _Jpegs(data, sizes[:, 1], sizes[:, 0], np.array([len(one) for one in data]))


@dataclass(frozen=True)
class _Names:
    """Labels and source files of the whole set: c00002/00000123.jpg."""

    num_samples: int
    num_classes: int

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(f"c{label:0{self._digits}d}" for label in range(self.num_classes))

    @property
    def _digits(self) -> int:
        return len(str(self.num_classes - 1))

    def labels(self, first: int, last: int) -> np.ndarray:
        """int64 (last - first,), ascending."""
        return np.arange(first, last) * self.num_classes // self.num_samples

    def lines(self, first: int, last: int) -> np.ndarray:
        """uint8 (last - first, length): each name and a NUL."""
        labels, ids = self.labels(first, last), np.arange(first, last)
        digits, width = self._digits, len(str(self.num_samples - 1))
        lines = np.zeros((last - first, 1 + digits + 1 + width + 5), np.uint8)
        lines[:, 0], lines[:, 1 + digits] = ord("c"), ord("/")
        lines[:, -5:-1] = np.frombuffer(b".jpg", np.uint8)
        for start, count, left in ((1, digits, labels), (2 + digits, width, ids)):
            for column in range(start + count - 1, start - 1, -1):
                left, digit = np.divmod(left, 10)
                lines[:, column] = ord("0") + digit
        return lines

    def chunks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Ranges of ids."""
        return ((at, min(at + _CHUNK, last)) for at in range(first, last, _CHUNK))

    def sha256(self, first: int, last: int) -> str:
        """`samples.file_list_sha256` of the samples from `first` to `last`."""
        digest = hashlib.sha256()
        for begin, end in self.chunks(first, last):
            lines, labels = self.lines(begin, end), self.labels(begin, end)
            for run in np.split(np.arange(len(labels)), np.flatnonzero(np.diff(labels)) + 1):
                prefix = np.frombuffer(b"%d " % labels[run[0]], np.uint8)
                digest.update(np.hstack([np.tile(prefix, (len(run), 1)), lines[run[0] : run[-1] + 1]]).tobytes())
        return digest.hexdigest()


def _write(out: Path, jpegs: _Jpegs, names: _Names, ids: range, part: tuple[int, int] | None, whole_list: str) -> None:
    num_samples = len(ids)
    chosen = (ids.start + np.arange(min(SHARED, -(-num_samples // _SHARES)))) % SHARED
    sizes = jpegs.sizes[chosen]
    page_size = layout.MIN_PAGE_SIZE if num_samples * layout.SAMPLE.itemsize < layout.PAGE_SIZE else layout.PAGE_SIZE
    start = layout.align_to_page(layout.METADATA_START + num_samples * layout.SAMPLE.itemsize, page_size)
    offsets, end = _placed(sizes, start, page_size)
    checksums = np.empty(num_samples, np.uint64)
    blob = bytearray()
    with out.open("wb") as file:
        file.write(layout.head_bytes(num_samples, page_size, end))
        for begin, stop in names.chunks(ids.start, ids.stop):
            own = np.arange(begin - ids.start, stop - ids.start)
            which, labels = own * len(chosen) // num_samples, names.labels(begin, stop)
            rows = np.zeros(len(own), layout.SAMPLE)
            rows["image"]["mode"], rows["image"]["data_ptr"] = layout.MODE_JPEG, offsets[which]
            rows["image"]["width"], rows["image"]["height"] = jpegs.widths[chosen][which], jpegs.heights[chosen][which]
            rows["label"] = labels
            file.write(rows.tobytes())
            # Neighbours of one label and JPEG have equal rows, hence one checksum.
            firsts = np.flatnonzero(np.diff(which, prepend=-1) | np.diff(labels, prepend=-1))
            codes = [checksum(rows[i].tobytes(), jpegs.data[chosen[which[i]]]) for i in firsts.tolist()]
            checksums[own] = np.repeat(np.array(codes, np.uint64), np.diff(firsts, append=len(own)))
            blob += names.lines(begin, stop).data.cast("B")
        for k, offset in zip(chosen.tolist(), offsets.tolist(), strict=True):
            file.seek(offset)  # what lies between is a hole
            file.write(jpegs.data[k])
        file.seek(end)
        counts = np.zeros(len(chosen), np.int64)
        for begin, stop in names.chunks(0, num_samples):
            which = np.arange(begin, stop) * len(chosen) // num_samples
            counts += np.bincount(which, minlength=len(chosen))
            file.write(layout.allocations(offsets[which], sizes[which], begin).tobytes())
    table = SampleTable(checksums, np.full(num_samples, REASONS.index("passthrough"), np.uint8), REASONS, bytes(blob))
    content = table.to_bytes()
    # Not `write_manifest` and `write_sample_table`: those list the folder and wait for the disk, for every file.
    sample_table_path(out).write_bytes(content)
    options: dict[str, Any] = {"classes": None, **asdict(ImageOptions()), "on_bad": "error"}
    with closing(map_file(out)) as data:
        manifest = Manifest(
            num_samples=num_samples,
            classes=names.classes,
            reasons={"passthrough": num_samples},
            skipped=(),
            source="simulated",
            options=options,
            libraries=library_versions(),
            file_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            index_xxh3=_index_checksum(data, num_samples, end),
            sample_bytes=int(counts @ sizes),
            page_size=page_size,
            file_list_sha256=whole_list if part is None else names.sha256(ids.start, ids.stop),
            whole_list_sha256=whole_list,
            sample_table_sha256=hashlib.sha256(content).hexdigest(),
            shard=part,
        )
    manifest_path(out).write_text(manifest_text(vars(manifest)), encoding="ascii")


def _placed(sizes: np.ndarray, start: int, page_size: int) -> tuple[np.ndarray, int]:
    """Where each JPEG goes from `start` on, none over two pages, and where the last page ends."""
    offsets, at = [], start
    for size in sizes.tolist():
        if at // page_size != (at + size - 1) // page_size:
            at = layout.align_to_page(at, page_size)
        offsets.append(at)
        at += size
    return np.array(offsets), layout.align_to_page(at, page_size)


def _index_checksum(data: mmap.mmap, num_samples: int, table_start: int) -> str:
    with memoryview(data) as view:
        rows_end = layout.METADATA_START + num_samples * layout.SAMPLE.itemsize
        with view[:rows_end] as head_and_rows, view[table_start:] as table:
            return layout.index_checksum(head_and_rows, table)


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own)."""

    def write() -> None:
        words = sys.argv[1:] if argv is None else argv
        print(simulate(read_options(Options, words, usage_name("benchmarks.harness.simulated")), print))

    exit_cleanly(write)


if __name__ == "__main__":
    main()
