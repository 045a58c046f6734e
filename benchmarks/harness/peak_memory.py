"""How much memory a conversion takes per image, measured with whole conversions in separate processes.

`python -m benchmarks.harness.peak_memory SRC OUT.beton WORKERS` converts and prints its peak in bytes. Only `data_prep`
is imported, so that torch does not count.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.harness.measure import nothing
from data_prep.convert import convert_image_folder
from data_prep.formats.beton import PAGE_SIZE
from lowrank_vit.common.errors import UserError

COUNTS = (50_000, 100_000)
PAGE_COUNT = 5000
"""Tiny images that fill one page exactly: a partly empty page costs up to its size while it is written, which would
look like a cost of the images."""
BASELINE_COUNT = 4 * PAGE_COUNT
"""More pages than are ever in memory at once."""
IMAGE_BYTES = PAGE_SIZE // PAGE_COUNT
SIDE = 16
_COMMENT_MARKER_BYTES = 4
_FILES_A_CLASS = 1000


def measure_memory(
    scratch: Path, workers: int, counts: tuple[int, ...] = COUNTS, note: Callable[[str], object] = nothing
) -> dict[str, Any]:
    """Convert each of `counts` tiny JPEGs in a fresh process; report how far their peaks are above the baseline's.

    Returns {"unit": "bytes/image", "baseline": {...}, "cases": {count: {"peak_bytes", "bytes_per_image"}}}, the peaks
    in bytes. Needs Linux and a free file for each image. Raises `UserError`.
    """
    baseline = _peak(scratch, BASELINE_COUNT, workers)
    cases = {}
    for count in counts:
        note(f"peak memory of {count:,} images of {SIDE} x {SIDE} pixels")
        peak = _peak(scratch, count, workers)
        cases[str(count)] = {"peak_bytes": peak, "bytes_per_image": (peak - baseline) / (count - BASELINE_COUNT)}
    return {
        "unit": "bytes/image",
        "setting": f"{SIDE} x {SIDE} JPEGs of {IMAGE_BYTES} bytes, {workers} threads; above the peak of the baseline",
        "baseline": {"images": BASELINE_COUNT, "peak_bytes": baseline},
        "cases": cases,
    }


def _peak(scratch: Path, count: int, workers: int) -> int:
    root = scratch / f"tiny-{count}"
    try:
        _write_tiny_images(root, count)
        command = [sys.executable, "-m", "benchmarks.harness.peak_memory"]
        command += [str(root), str(scratch / "tiny.beton"), str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"the conversion of {count:,} tiny images failed:\n{done.stderr.strip()}")
        return int(done.stdout)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror}. Choose --scratch on a larger disk.") from error
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _write_tiny_images(root: Path, count: int) -> None:
    data = _tiny_jpeg()
    data = _tiny_jpeg(b" " * (IMAGE_BYTES - len(data) - _COMMENT_MARKER_BYTES))
    for first in range(0, count, _FILES_A_CLASS):
        folder = root / f"class_{first // _FILES_A_CLASS:06d}"
        folder.mkdir(parents=True)
        for index in range(first, min(first + _FILES_A_CLASS, count)):
            (folder / f"{index:08d}.jpg").write_bytes(data)


def _tiny_jpeg(comment: bytes = b"") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (90, 120, 60)).save(file, "JPEG", comment=comment)
    return file.getvalue()


def peak_resident_bytes() -> int:
    """The largest resident memory of this process so far, in bytes. Raises `UserError` without /proc."""
    # Not `getrusage`: its maximum also counts the process before `exec`, which is its parent.
    try:
        status = Path("/proc/self/status").read_text()
    except OSError as error:
        raise UserError("--memory reads /proc/self/status, which only Linux has.") from error
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    convert_image_folder(Path(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3]))
    print(peak_resident_bytes())
