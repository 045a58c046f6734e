"""Write a `.beton`: the same bytes for any number of workers, complete or not there at all."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep import beton_format as layout
from data_prep.atomic import replacing
from data_prep.errors import UserError
from data_prep.jpeg import BadImageError, EncodedImage
from data_prep.manifest import Skipped, remove_manifest
from data_prep.parallel import map_ordered
from data_prep.progress import ConversionProgress
from data_prep.sources import Sample

BAD_IMAGES_SHOWN = 10


@dataclass(frozen=True)
class Written:
    """What `write_beton` wrote."""

    num_samples: int
    reasons: dict[str, int]
    skipped: tuple[Skipped, ...]
    file_bytes: int
    sha256: str


def write_beton(
    out: Path,
    samples: Sequence[Sample],
    encode: Callable[[Sample], EncodedImage],
    *,
    workers: int = 1,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = False,
    page_size: int = layout.PAGE_SIZE,
) -> Written:
    """Encode `samples` in order and write them to `out`, which appears, or is replaced, in one step at the end.

    `encode` must pickle if `workers` > 1. Where it raises `BadImageError` the image is left out (`on_bad="skip"`), or
    all bad images are collected and nothing is written ("error"). A manifest beside an older `out` is removed, since it
    describes another file. `progress` shows a bar on stderr if that is a terminal.
    Raises `UserError`: bad images, an image larger than a page, a full disk, a dead worker.
    """
    bad: list[Skipped] = []
    reasons: Counter[str] = Counter()
    with replacing(out) as file, ConversionProgress(len(samples), progress) as bar:
        beton = _BetonFile(file, len(samples), page_size)
        results = map_ordered(partial(_encode_or_report, encode), samples, workers)
        with closing(results):
            for sample, image in zip(samples, results, strict=True):
                if isinstance(image, Skipped):
                    bad.append(image)
                elif not bad or on_bad == "skip":  # otherwise the file is lost: only look for more bad images
                    beton.append(sample, image)
                    reasons[image.reason] += 1
                bar.advance(0 if isinstance(image, Skipped) else len(image.data))
        if bad and (on_bad == "error" or beton.num_samples == 0):
            raise UserError(_bad_images_message(bad, len(samples)))
        if beton.num_samples == 0:
            raise UserError(f"{out} would hold no images. Check the source.")
        file_bytes = beton.finish()
        bar.describe("checksum")
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        # The last thing before the rename, see `data_prep.manifest`.
        remove_manifest(out)
    return Written(beton.num_samples, dict(sorted(reasons.items())), tuple(bad), file_bytes, sha256)


def _encode_or_report(encode: Callable[[Sample], EncodedImage], sample: Sample) -> EncodedImage | Skipped:
    try:
        return encode(sample)
    except BadImageError as error:
        return Skipped(sample.name, error.reason)
    except MemoryError as error:
        raise UserError(f"memory ran out at {sample.name}. Try again with fewer --workers.") from error


def _bad_images_message(bad: list[Skipped], total: int) -> str:
    lines = [f"  {image.name}: {image.reason}" for image in bad[:BAD_IMAGES_SHOWN]]
    if len(bad) > BAD_IMAGES_SHOWN:
        lines.append(f"  ... and {len(bad) - BAD_IMAGES_SHOWN:,} more")
    what = f"{len(bad):,} of {total:,} images cannot be converted, so nothing was written:"
    advice = "Check the source." if len(bad) == total else "Mend or remove them, or leave them out with --on-bad skip."
    return "\n".join([what, *lines, advice])


class _BetonFile:
    """The growing file: samples go into pages, the tables into memory (48 bytes a sample), the header in last."""

    def __init__(self, file: io.BufferedRandom, capacity: int, page_size: int) -> None:
        self.file, self.page_size = file, page_size
        self.rows = np.zeros(capacity, layout.SAMPLE)
        self.table = np.zeros(capacity, layout.ALLOCATION)
        self.num_samples = 0
        self.page = bytearray(page_size)
        self.page_used = 0
        self.page_start = layout.align_to_page(layout.METADATA_START + self.rows.nbytes, page_size)

    def append(self, sample: Sample, image: EncodedImage) -> None:
        size = len(image.data)
        if size > self.page_size:
            raise UserError(
                f"{sample.name} takes {size:,} bytes, more than the {self.page_size:,} of a page. "
                "Lower --max-side or --quality."
            )
        if not (1 <= image.width <= 65535 and 1 <= image.height <= 65535):
            raise UserError(
                f"{sample.name} has {image.width} x {image.height} pixels; a .beton holds 1 to 65535 a side. "
                "Lower --max-side."
            )
        if self.page_used + size > self.page_size:
            self._flush_page()
        pointer = self.page_start + self.page_used
        self.page[self.page_used : self.page_used + size] = image.data
        self.page_used += size
        self.rows[self.num_samples] = ((image.mode, image.width, image.height, pointer), sample.label)
        self.table[self.num_samples] = (self.num_samples, pointer, size)
        self.num_samples += 1

    def _flush_page(self) -> None:
        # Whole pages only, as FFCV writes them: its page cache reads whole ones.
        self.page[self.page_used :] = bytes(self.page_size - self.page_used)
        self.file.seek(self.page_start)
        self.file.write(self.page)
        self.page_start += self.page_size
        self.page_used = 0

    def finish(self) -> int:
        """Write the tables and, last, the header; return the file's size in bytes."""
        self._flush_page()
        self.file.write(self.table[: self.num_samples].tobytes())
        file_bytes = self.file.tell()
        fields = np.zeros(2, layout.FIELD)
        fields["type_id"] = layout.TYPE_RGB_IMAGE, layout.TYPE_INT
        fields["name"] = b"image", b"label"
        self.file.seek(layout.HEADER.itemsize)
        self.file.write(fields.tobytes() + self.rows[: self.num_samples].tobytes())
        header = np.array((layout.VERSION, 2, self.page_size, self.num_samples, self.page_start), layout.HEADER)
        self.file.seek(0)
        self.file.write(header.tobytes())
        # Find out about a failing disk now, while an older output and its manifest are still untouched.
        self.file.flush()
        os.fsync(self.file.fileno())
        return file_bytes
