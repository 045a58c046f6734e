"""The bench `limits`: the machine's limits, without any of our code."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from benchmarks.harness.limits import (
    copy_case,
    decode_case,
    disk_read_case,
    disk_write_case,
    page_cache_case,
    products_case,
)
from benchmarks.harness.measure import DEFAULT_REPEATS, Case, Result, environment, measure, nothing
from benchmarks.harness.sets import HEIGHT, WIDTH, photographs
from benchmarks.prep import CACHE
from data_prep.formats import turbojpeg
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filesystem import sync
from lowrank_vit.common.resources import available_cores

_TERA = 1e12
NOTES = (
    "Each of the other benches measures the limit of its own cases in its own rounds; these are for orientation.",
    "A virtual machine's disk may have a cache of its own below the system's, which fsync and O_DIRECT do not see.",
)


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    count: Annotated[int, tyro.conf.arg(metavar="N")] = 500
    """Photographs of 500 x 375 pixels, made once and kept in data/bench."""
    megabytes: Annotated[int, tyro.conf.arg(metavar="N")] = 256
    """Size of the memory that is copied and of the files that are written and read."""
    gflop: Annotated[float | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: by the device)")] = None
    """Arithmetic of the matrix products in a round; by default 20 on a CPU and 20,000 on cuda."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Which device to measure: on cuda also its memory and its matrix products."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Measured rounds, after one that warms up. Fewer than 5 are a smoke test."""
    scratch: Annotated[Path, tyro.conf.arg(metavar="DIR")] = CACHE
    """Where photographs and the files are kept: the disk under test."""


def run(options: Options, note: Callable[[str], object] = nothing) -> Result:
    """Measure all limits. Raises `UserError`."""
    for name in ("count", "megabytes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, expected 1 or more.")
    if options.gflop is not None and not (0 < options.gflop < math.inf):
        raise UserError(f"--gflop is {options.gflop:g}, expected more than 0.")
    from lowrank_vit.common.devices import pick_device

    device, cpu = pick_device(options.device), torch.device("cpu")
    cores = available_cores()
    torch.set_num_threads(cores)
    photos = sorted(photographs(options.scratch, options.count, note).glob("*/*.jpg"))
    num_bytes = options.megabytes * 10**6
    file, written = (options.scratch / f"{use}_{options.megabytes}.bin" for use in ("read", "written"))
    memory = {where: _two_buffers(num_bytes, where) for where in {cpu, device}}
    try:
        _write_and_sync(file, num_bytes)
        cases = {
            "jpeg_decode_1_core": decode_case(photos, 1),
            f"jpeg_decode_{cores}_cores": decode_case(photos, cores),
            "jpeg_entropy_1_core": _entropy_case(photos),
            "memory_copy": copy_case(*memory[cpu], 2),
            "page_cache_read": page_cache_case(file),
            "disk_write": disk_write_case(written, num_bytes),
            "disk_read": disk_read_case(file),
            **_products(cpu, options.gflop or 20.0, (torch.float32, torch.float64, torch.bfloat16)),
        }
        if device.type == "cuda":
            pinned = memory[cpu][0].pin_memory()
            cases |= {"gpu_memory_copy": copy_case(*memory[device], 20)}
            cases |= {"host_to_gpu": copy_case(pinned, memory[device][0], 4)}
            cases |= _products(device, options.gflop or 20e3, (torch.bfloat16, torch.float32, torch.float64))
        repeats = options.repeats
        surroundings = environment(device.type)
        return measure("limits", cases, {}, environment=surroundings, repeats=repeats, limits=NOTES, note=note)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}. Choose --scratch on a larger disk.") from error
    finally:
        for one in (file, written):
            one.unlink(missing_ok=True)


def _write_and_sync(file: Path, num_bytes: int) -> None:
    """Write whole MiB and sync, so that the file can be read back from the disk."""
    with file.open("wb") as opened:
        opened.write(os.urandom(1 << 20) * max(1, num_bytes >> 20))
        opened.flush()
        sync(opened.fileno())


def _two_buffers(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    return source, torch.zeros_like(source).fill_(2)  # both are written, so that their pages exist


def _products(device: torch.device, gflop: float, dtypes: tuple[torch.dtype, ...]) -> dict[str, Case]:
    """Cases of TFLOP/s by dtype: an item is a TFLOP."""
    where = "gpu" if device.type == "cuda" else "cpu"
    cases = {}
    for dtype in dtypes:
        name = f"{where}_product_{str(dtype).removeprefix('torch.')}"
        cases[name] = products_case(1e9 * gflop, 1, "TFLOP/s", device, dtype, unit_flops=_TERA)
    return cases


def _entropy_case(photos: list[Path]) -> Case:
    """The least work to read a JPEG to its end: decoding it in grey at an eighth of its size."""
    files = [photo.read_bytes() for photo in photos]
    check = partial(turbojpeg.check, width=WIDTH, height=HEIGHT)

    def run() -> None:
        for data in files:
            check(data)

    return Case(run, len(files), setting="libjpeg-turbo's entropy decoder alone, on one thread")
