"""The conversions themselves, for the command line and for other code: a source in, a `.beton` and its manifest out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from PIL import features

from data_prep.beton_format import MIN_PAGE_SIZE, PAGE_SIZE
from data_prep.errors import UserError
from data_prep.jpeg import JPEG_MAX_SIDE, EncodedImage, encode_file, encode_pixels
from data_prep.manifest import Manifest, write_manifest
from data_prep.sources import DIGITS_SPLIT_SEED, Sample, Source, digits, image_folder
from data_prep.write_beton import write_beton


@dataclass(frozen=True)
class Conversion:
    """One finished `.beton`."""

    beton: Path
    manifest: Manifest
    seconds: float
    """Wall-clock time from listing the source to the finished manifest."""


def convert_digits(out_dir: Path) -> tuple[Conversion, Conversion]:
    """Write `out_dir`/train.beton and val.beton: 1,437 and 360 raw 8x8 digits. Raises `UserError`."""
    options: dict[str, str | int | None] = {"split_seed": DIGITS_SPLIT_SEED}
    # The smallest page FFCV allows: all digits fill a seventh of one, so larger pages would only be empty.
    write = partial(_convert, encode=encode_pixels, options=options, page_size=MIN_PAGE_SIZE)
    return (
        write(lambda: digits("train"), out_dir / "train.beton"),
        write(lambda: digits("val"), out_dir / "val.beton"),
    )


def convert_image_folder(
    src: Path,
    out: Path,
    *,
    classes: Path | None = None,
    max_side: int = 500,
    quality: int = 90,
    workers: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = False,
) -> Conversion:
    """Convert `src`/class/**/image to `out`; see `image_folder`, `encode_image` and `write_beton` for the options.

    `max_side` is in pixels (16..65500), `quality` is JPEG's (1..100), `workers` None means one a core. With several
    workers the calling script needs the usual `if __name__ == "__main__":`. Raises `UserError`.
    """
    if not 16 <= max_side <= JPEG_MAX_SIDE:
        raise UserError(f"--max-side is {max_side}, expected 16 to {JPEG_MAX_SIDE} pixels.")
    if not 1 <= quality <= 100:
        raise UserError(f"--quality is {quality}, expected 1 (smallest file) to 100 (best image).")
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}, expected 1 or more. Leave it out for one a core.")
    if out.suffix != ".beton":
        raise UserError(
            f"--out {out} does not end in .beton. Give the file to write, for example --out {out / 'train.beton'}."
        )
    encode = partial(encode_file, root=src, max_side=max_side, quality=quality)
    options: dict[str, str | int | None] = {
        "classes": None if classes is None else str(classes),
        "max_side": max_side,
        "quality": quality,
        "on_bad": on_bad,
    }
    return _convert(
        lambda: image_folder(src, classes),
        out,
        encode,
        options,
        workers=_available_cores() if workers is None else workers,
        on_bad=on_bad,
        progress=progress,
    )


def _convert(
    list_source: Callable[[], Source],
    out: Path,
    encode: Callable[[Sample], EncodedImage],
    options: dict[str, str | int | None],
    *,
    workers: int = 1,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = False,
    page_size: int = PAGE_SIZE,
) -> Conversion:
    start = time.perf_counter()
    source = list_source()
    written = write_beton(
        out, source.samples, encode, workers=workers, on_bad=on_bad, progress=progress, page_size=page_size
    )
    manifest = Manifest(
        num_samples=written.num_samples,
        classes=source.classes,
        reasons=written.reasons,
        skipped=written.skipped,
        source=source.name,
        options=options,
        libraries={
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "libjpeg_turbo": str(features.version("libjpeg_turbo")),
        },
        file_bytes=written.file_bytes,
        sha256=written.sha256,
    )
    write_manifest(out, manifest)
    return Conversion(out, manifest, time.perf_counter() - start)


def _available_cores() -> int:
    # Only Linux says how many cores this process may use; elsewhere take all.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
