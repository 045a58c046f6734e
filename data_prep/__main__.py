"""Convert images to FFCV .beton files, once, before training."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep.convert import Conversion, convert_digits, convert_image_folder
from data_prep.errors import exit_cleanly
from data_prep.manifest import manifest_path

app = tyro.extras.SubcommandApp()


@app.command(name="digits")
def digits_command(out: Annotated[Path, tyro.conf.arg(metavar="DIR")]) -> None:
    """Convert scikit-learn's 1,797 handwritten digits (8x8); no download.

    - Writes train.beton (1,437 images) and val.beton (360) into DIR.
    - A manifest, FILE.beton.json, goes beside each.
    - Files that are there already are replaced, each in one step.

    Args:
        out: Directory to write into; made if it is missing.
    """
    for conversion in convert_digits(out):
        print(summary(conversion))


@app.command(name="imagefolder")
def imagefolder_command(
    src: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.beton")],
    classes: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: all)")] = None,
    max_side: int = 500,
    quality: int = 90,
    workers: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")
    ] = None,
    on_bad: Literal["error", "skip"] = "error",
) -> None:
    """Convert a directory with one sub-folder of images for each class.

    - An RGB JPEG, upright and within --max-side, is stored byte for byte.
    - Every other image is converted to one, once.
    - Each image is decoded completely, so that damage shows now.
    - The output does not depend on the number of workers.
    - An existing FILE.beton is replaced in one step, at the very end.

    Args:
        src: Directory with one sub-folder for each class. Labels follow the sorted names.
        out: File to write. The manifest FILE.beton.json goes beside it.
        classes: Text file with one folder name a line: convert only these classes.
        max_side: Longest side in pixels, 16 to 65500; larger images are made smaller.
        quality: JPEG quality of converted images, 1 to 100.
        workers: Worker processes, 1 or more.
        on_bad: What to do about images that do not decode: list them all and write nothing, or leave them out and
            list them in the manifest.
    """
    conversion = convert_image_folder(
        src,
        out,
        classes=classes,
        max_side=max_side,
        quality=quality,
        workers=workers,
        on_bad=on_bad,
        progress=True,
    )
    print(summary(conversion))


def summary(conversion: Conversion) -> str:
    """A short paragraph: what was written, how many, how long, where."""
    manifest, seconds = conversion.manifest, conversion.seconds
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.reasons.items())
    lines = [
        f"wrote {conversion.beton}",
        f"  {manifest.num_samples:,} images, {len(manifest.classes):,} classes, {manifest.file_bytes / 1e6:,.1f} MB "
        f"in {seconds:.1f} s ({manifest.num_samples / seconds:,.0f} img/s)",
        f"  stored as: {reasons}",
    ]
    if manifest.skipped:
        lines.append(f"  left out: {len(manifest.skipped):,} bad, listed in {manifest_path(conversion.beton)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own). Exits with 2 on a user's error, 130 on Ctrl-C."""
    command = partial(app.cli, args=argv, prog="python -m data_prep", description=__doc__)
    with _exit_on_sigterm():
        exit_cleanly(command)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    # Batch systems stop a job with SIGTERM: leave through the same clean-up as for Ctrl-C.
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    main()
