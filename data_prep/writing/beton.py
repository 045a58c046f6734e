"""Write a `.beton`: the same bytes for any number of workers and interruptions, complete or not there at all."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from data_prep.formats import beton as layout
from data_prep.formats import jpeg_segments
from data_prep.formats.jpeg import REASONS, BadImageError, EncodedImage, UnreadableImageError
from data_prep.formats.sample_table import SampleTable, checksum, sample_table_path
from data_prep.formats.sidecars import Repaired, Skipped, remove_manifest
from data_prep.sources.samples import Sample
from data_prep.writing.bad_images import bad_images_error, bad_list_path
from data_prep.writing.direct_io import sha256_of
from data_prep.writing.resuming import BAD, RECORD, STORED, PartialFile, pack_stat, resumable
from data_prep.writing.workers import ConversionProgress, map_ordered
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filesystem import sync

Encode = Callable[[Sample], EncodedImage]


@dataclass(frozen=True)
class Resume:
    """What `write_beton` needs to resume an interrupted run."""

    key: str
    """64 hexadecimal digits that stand for everything that decides the output."""
    source_stat: Callable[[Sample], tuple[int, int]]
    """A sample's size in bytes and modification time in ns now, to compare with `EncodedImage.source_stat`."""


@dataclass
class Written:
    """What `write_beton` wrote."""

    num_samples: int
    reasons: dict[str, int]
    skipped: tuple[Skipped, ...]
    file_bytes: int
    sha256: str
    index_xxh3: str
    """See `beton.index_checksum`."""
    sample_bytes: int
    """Sum of the samples' sizes."""
    table: SampleTable
    source_stat_sha256: str
    """SHA-256 of all source files' sizes and modification times, see `pack_stat`."""
    repaired: tuple[Repaired, ...] = ()
    emptied: tuple[int, ...] = ()
    """Labels of which all samples were bad, ascending, without -1."""
    resumed: int = 0
    """How many images an interrupted run had finished."""


def write_beton(
    out: Path,
    samples: Sequence[Sample],
    encode: Encode,
    *,
    workers: int = 1,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = False,
    page_size: int = layout.PAGE_SIZE,
    resume: Resume | None = None,
    before_rename: Callable[[Written], None] = lambda written: None,
) -> Written:
    """Encode `samples` in order and write them to `out`, which appears, or is replaced, in one step at the end.

    `encode` runs in `workers` threads. If it raises `BadImageError`, the image is left out (`on_bad="skip"`), or all
    bad images are listed at the end and the file does not appear ("error", and always for unreadable files). The
    sidecars of an older `out` are removed, since they describe another file. With `resume` an interrupted run is
    continued, and this one can be; without it nothing is kept. `before_rename` gets the result when everything is on
    the disk and only the rename is left. `progress` shows a bar on stderr if that is a terminal.

    Memory: 50 bytes of tables and the name for each sample, three pages, and the encoded images that wait for their
    turn (48 for each worker); see `map_ordered`.
    Raises `BadImagesError`, and `UserError` for an image larger than a page, a full disk, or a second writer.
    """
    report = partial(_encode_or_report, encode)
    with (
        resumable(out, resume.key if resume else None) as partial_file,
        ConversionProgress(len(samples), progress) as bar,
    ):
        work = _Work(_BetonFile(partial_file, len(samples), page_size), bar, resume)
        done = _replay(partial_file, samples, report, resume, work, workers) if resume else 0
        results = map_ordered(report, islice(samples, done, None), workers)
        with closing(results):
            try:
                for sample, image in zip(islice(samples, done, None), results, strict=True):
                    work.add(sample, image)
            finally:
                work.beton.note_pages(wait=True)
        beton, bad = work.beton, work.bad
        if work.unreadable or (bad and (on_bad == "error" or beton.num_samples == 0)):
            raise bad_images_error(out, bad, work.unreadable, len(samples))
        bad_list_path(out).unlink(missing_ok=True)
        if beton.num_samples == 0:
            raise UserError(f"{out} would hold no images. Check the source.")
        file_bytes = beton.finish()
        bar.describe("checksum")
        # The disk finishes writing while the checksum is computed. A failing disk shows here, while an older output and
        # its sidecars are still untouched.
        with ThreadPoolExecutor(1) as pool:
            on_disk = pool.submit(sync, partial_file.file.fileno())
            sha256 = sha256_of(partial_file.path, partial_file.pages.kept)
            on_disk.result()
        written = _written(samples, work, file_bytes, sha256, done)
        before_rename(written)
        # The last thing before the rename, see `data_prep.formats.sidecars`.
        remove_manifest(out)
        sample_table_path(out).unlink(missing_ok=True)
    return written


def _written(samples: Sequence[Sample], work: _Work, file_bytes: int, sha256: str, resumed: int) -> Written:
    beton = work.beton
    names = (sample.name for sample, stored in zip(samples, beton.stored, strict=True) if stored)
    n = beton.num_samples
    return Written(
        num_samples=n,
        reasons=dict(sorted(work.reasons.items())),
        skipped=tuple(work.bad),
        file_bytes=file_bytes,
        sha256=sha256,
        index_xxh3=beton.index_xxh3,
        sample_bytes=int(beton.sizes.sum(dtype=np.uint64)),
        table=SampleTable.of(beton.checksums[:n], beton.reasons[:n], names),
        source_stat_sha256=work.stats.hexdigest(),
        repaired=tuple(work.repaired),
        emptied=tuple(sorted(work.bad_labels - work.good_labels - {-1})),
        resumed=resumed,
    )


@dataclass
class _Work:
    """State that the loop over the samples updates."""

    beton: _BetonFile
    bar: ConversionProgress
    resume: Resume | None
    bad: list[Skipped] = field(default_factory=list)
    unreadable: int = 0
    """How many of `bad`."""
    repaired: list[Repaired] = field(default_factory=list)
    bad_labels: set[int] = field(default_factory=set)
    good_labels: set[int] = field(default_factory=set)
    reasons: Counter[str] = field(default_factory=Counter)
    stats: Any = field(default_factory=hashlib.sha256)

    def add(self, sample: Sample, image: EncodedImage | BadImageError) -> None:
        if isinstance(image, BadImageError):
            self.bad.append(Skipped(sample.name, image.reason))
            self.unreadable += isinstance(image, UnreadableImageError)
            self.bad_labels.add(sample.label)
            self.beton.append_bad(sample)
            size, stat = 0, self.resume.source_stat(sample) if self.resume else (0, 0)
        else:
            self.beton.append(sample, image)
            self.reasons[image.reason] += 1
            self.good_labels.add(sample.label)
            if image.repairs:
                self.repaired.append(Repaired(sample.name, image.repairs))
            size, stat = len(image.data), image.source_stat
        self.stats.update(pack_stat(stat))
        self.bar.advance(size, self.reasons, len(self.bad))


def name_hash(sample: Sample) -> int:
    """XXH3-64 of a sample's name."""
    return xxhash.xxh3_64_intdigest(os.fsencode(sample.name))


def _replay(
    partial_file: PartialFile,
    samples: Sequence[Sample],
    report: Callable[[Sample], EncodedImage | BadImageError],
    resume: Resume,
    work: _Work,
    workers: int,
) -> int:
    """Take over the samples that an interrupted run finished, up to the first that is no longer valid; return how many.

    Every sample's data are read back, in `workers` threads, and compared with their checksum, and its source file must
    not have changed. A bad image must still be bad, or have been removed. Memory as for converting: results that wait
    for their turn, see `map_ordered`.
    """
    beton, count = work.beton, 0
    beton.replaying = True
    work.bar.describe("resume")
    records = partial_file.records()
    kept = np.zeros(len(records), bool)
    check = partial(_as_recorded, beton, report, resume)
    with closing(map_ordered(check, _finished(records, samples, beton), workers)) as results:
        for one, image in results:
            if image is None:
                break
            work.add(one.sample, image)
            kept[one.number] = True
            count += 1
    beton.replaying = False
    beton.journaled = len(beton.unwritten)
    partial_file.replace_records(records[kept])
    work.bar.describe("convert")
    return count


class _Finished(NamedTuple):
    """A sample that an interrupted run has finished, if its record is still valid."""

    number: int
    """Position of its record."""
    sample: Sample
    record: np.void
    pointer: int
    """The byte at which its data begin, if all samples before it stay."""


def _finished(records: np.ndarray, samples: Sequence[Sample], beton: _BetonFile) -> Generator[_Finished]:
    """The samples that have records, in order, up to the first one whose record is of another sample or missing."""
    rest = iter(samples)
    sample = next(rest, None)
    start, used = beton.page_start, beton.page_used
    for number, record in enumerate(records):
        if sample is None:
            return
        if record["name_hash"] != name_hash(sample):
            if record["outcome"] == BAD:  # it was removed
                continue
            return
        size = int(record["size"]) if record["outcome"] == STORED else 0
        if used + size > beton.page_size:
            start, used = start + beton.page_size, 0
        yield _Finished(number, sample, record, start + used)
        used += size
        sample = next(rest, None)


def _as_recorded(
    beton: _BetonFile, report: Callable[[Sample], EncodedImage | BadImageError], resume: Resume, one: _Finished
) -> tuple[_Finished, EncodedImage | BadImageError | None]:
    """A record's image, read back or found bad again; None if the record is no longer valid."""
    sample, record = one.sample, one.record
    if record["outcome"] == BAD:
        image = report(sample)
        return one, image if isinstance(image, BadImageError) else None
    if record["outcome"] != STORED or record["reason"] >= len(REASONS):
        return one, None
    stat = int(record["source_size"]), int(record["source_mtime_ns"])
    size = int(record["size"])
    if resume.source_stat(sample) != stat or size > beton.page_size:
        return one, None
    data = beton.read_at(one.pointer, size)
    mode, width, height = (int(record[name]) for name in ("mode", "width", "height"))
    row = layout.PACK_SAMPLE.pack(mode, width, height, one.pointer, sample.label)
    if len(data) != size or checksum(row, data) != record["checksum"]:
        return one, None
    repairs = jpeg_segments.from_bits(int(record["repairs"]))
    return one, EncodedImage(mode, width, height, data, REASONS[record["reason"]], stat, repairs)


def _encode_or_report(encode: Encode, sample: Sample) -> EncodedImage | BadImageError:
    try:
        return encode(sample)
    except BadImageError as error:
        return error
    except MemoryError as error:
        raise UserError(f"out of memory at {sample.name}. Try again with fewer --workers.") from error


class _BetonFile:
    """The growing file: samples go into pages, the tables stay in memory (46 bytes a sample), the header comes last."""

    def __init__(self, partial_file: PartialFile, capacity: int, page_size: int) -> None:
        self.partial_file, self.file, self.page_size = partial_file, partial_file.file, page_size
        self.rows = bytearray(capacity * layout.SAMPLE.itemsize)
        self.pointers = np.zeros(capacity, np.uint64)
        self.sizes = np.zeros(capacity, np.uint32)
        self.checksums = np.zeros(capacity, np.uint64)
        self.reasons = np.zeros(capacity, np.uint8)
        self.stored = np.zeros(capacity, bool)
        self.num_samples = self.num_seen = 0
        self.index_xxh3 = ""  # set by `finish`
        self.unwritten: list[tuple[int, ...]] = []
        """Journal records of the page in memory."""
        self.journaled = 0
        """How many of them are in the journal already: those of a page that is filled up and written again."""
        self.replaying = False
        """The pages are on the disk already."""
        self.page = partial_file.pages.empty_page(page_size)
        self.writing: deque[tuple[Future[None], np.ndarray]] = deque()
        """Pages that are being written, and their journal records."""
        self.page_used = 0
        self.page_start = layout.align_to_page(layout.METADATA_START + len(self.rows), page_size)

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes of the file; fewer at its end."""
        return os.pread(self.file.fileno(), size, offset)

    def append_bad(self, sample: Sample) -> None:
        """Note a sample that is left out."""
        self.num_seen += 1
        self.unwritten.append((BAD, *[0] * 9, name_hash(sample)))

    def append(self, sample: Sample, image: EncodedImage) -> None:
        """Add a sample. Raises `UserError` if it does not fit a page or the format."""
        size = len(image.data)
        if size > self.page_size:
            raise UserError(
                f"{sample.name} takes {size:,} bytes, more than the {self.page_size:,} of a page. "
                "Lower --max-side, --quality or --raw."
            )
        if not (1 <= image.width <= 65535 and 1 <= image.height <= 65535):
            raise UserError(
                f"{sample.name} has {image.width} x {image.height} pixels; a .beton holds 1 to 65535 a side. "
                "Lower --max-side."
            )
        if self.page_used + size > self.page_size:
            self._flush_page()
        n, pointer, reason = self.num_samples, self.page_start + self.page_used, REASONS.index(image.reason)
        self.page[self.page_used : self.page_used + size] = image.data
        self.page_used += size
        row = layout.PACK_SAMPLE.pack(image.mode, image.width, image.height, pointer, sample.label)
        self.rows[n * len(row) : (n + 1) * len(row)] = row
        self.pointers[n], self.sizes[n] = pointer, size
        self.checksums[n] = code = checksum(row, image.data)
        self.reasons[n] = reason
        self.stored[self.num_seen] = True
        self.num_samples += 1
        self.num_seen += 1
        repairs = jpeg_segments.to_bits(image.repairs)
        stored = (STORED, image.mode, reason, repairs, image.width, image.height, size, code)
        self.unwritten.append((*stored, *image.source_stat, name_hash(sample)))

    def _flush_page(self) -> None:
        # Whole pages only, as FFCV writes them: its page cache reads whole pages.
        self.page[self.page_used :] = bytes(self.page_size - self.page_used)
        if not self.replaying:
            written = self.partial_file.pages.write(self.page, self.page_start)
            self.writing.append((written, np.array(self.unwritten[self.journaled :], RECORD)))
            self.journaled = 0
            self.note_pages(wait=False)
            self.page = self.partial_file.pages.empty_page(self.page_size)
        self.unwritten.clear()
        self.page_start += self.page_size
        self.page_used = 0

    def note_pages(self, *, wait: bool) -> None:
        """Add the pages that are written to the journal; `wait` for all. Raises `OSError`."""
        while self.writing and (wait or self.writing[0][0].done()):
            written, records = self.writing.popleft()
            written.result()
            self.partial_file.add_records(records)

    def finish(self) -> int:
        """Write the tables and, last, the header; return the file's size in bytes."""
        self._flush_page()
        self.note_pages(wait=True)
        table = layout.allocations(self.pointers[: self.num_samples], self.sizes[: self.num_samples])
        self.file.seek(self.page_start)
        table_bytes = table.view(np.uint8).data
        self.file.write(table_bytes)
        file_bytes = self.file.tell()
        self.file.truncate(file_bytes)
        head = layout.head_bytes(self.num_samples, self.page_size, self.page_start)
        self.file.seek(layout.HEADER.itemsize)
        self.file.write(head[layout.HEADER.itemsize :])
        rows = memoryview(self.rows)[: self.num_samples * layout.SAMPLE.itemsize]
        self.file.write(rows)
        self.file.seek(0)
        self.file.write(head[: layout.HEADER.itemsize])
        self.file.flush()
        self.index_xxh3 = layout.index_checksum(head, rows, table_bytes)
        return file_bytes
