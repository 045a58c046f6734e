"""Decoding speeds of a set: measured on its first samples, kept beside it, used again while they are valid.

Each entry of FILE.beton.speed.json holds measured images per second by name, under a key that says what was measured.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lowrank_vit.common.devices import Mark, cuda_path, current_stream
from lowrank_vit.common.files import write_whole
from lowrank_vit.common.resources import available_cores, cpu_name
from lowrank_vit.common.threads import beat
from lowrank_vit.data.decode.backend import Backend, DamagedSamples, Schedule
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import TrainPlan

_SAMPLES, _GPU_BATCHES = 256, 8
"""Samples that one timing of a backend decodes on a CPU, in a fraction of a second; and batches on a GPU."""
_ROUND_S, _LEAST_BATCHES = 0.5, 2
"""On a GPU a timing ends after so many seconds, but not before so many batches: batches may be large, GPUs slow."""
_ROUNDS = 3

Key = Mapping[str, Any]
"""Everything that an entry's figures depend on; plain values."""


def speed_path(beton: Beton) -> Path:
    """Path of the file that keeps a set's measurements: FILE.beton.speed.json."""
    return beton.path.with_name(beton.path.name + ".speed.json")


def key_of(beton: Beton, plan: TrainPlan, workers: int, **more: Any) -> dict[str, Any]:
    """The key for a speed of decoding: CPU, cores, threads, image size and the set; and `more`."""
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "workers": workers,
        "img_size": plan.img_size,
        "bytes": beton.stored_bytes,
        "samples": beton.num_samples,
        **more,
    }


def dali_version() -> str:
    """DALI's version, also if it is copied into place, or installed under another distribution's name."""
    try:
        return metadata.version("nvidia-dali-cuda130")
    except metadata.PackageNotFoundError:
        from nvidia import dali  # takes half a second to import

        return dali.__version__


def kept(beton: Beton, key: Key) -> dict[str, float]:
    """The speeds that are kept under a key; empty if there are none."""
    return _read(speed_path(beton)).get(json.dumps(key), {})


def keep(beton: Beton, key: Key, speeds: Mapping[str, float]) -> bool:
    """Keep speeds under a key; return whether they could be written."""
    path = speed_path(beton)
    try:
        write_whole(path, json.dumps({**_read(path), json.dumps(key): speeds}, indent=1) + "\n")
    except OSError:
        return False
    return True


def kept_or_measured(
    beton: Beton, key: Key, names: Iterable[str], measured: Callable[[], dict[str, float]]
) -> tuple[dict[str, float], str]:
    """Images per second by name, and their origin in words.

    Kept speeds count if key and names are the same. There are no speeds if the first samples do not decode.
    """
    speeds = kept(beton, key)
    if set(speeds) == set(names):
        return speeds, f"measured before ({speed_path(beton).name})"
    try:
        speeds = measured()
    except DamagedSamples:
        return {}, "not measured, since the first samples are damaged"
    is_kept = keep(beton, key, speeds)
    return speeds, "measured just now" if is_kept else "measured (but the folder cannot be written to keep it)"


def measure(backends: Mapping[str, Backend], plan: TrainPlan, device: torch.device) -> dict[str, float]:
    """Measure each backend in turn on the same batches: its median images per second. Closes the backends."""
    taken: dict[str, list[float]] = {kind: [] for kind in backends}
    few, limit_s = max(_LEAST_BATCHES, _SAMPLES // plan.batch_size), math.inf
    if cuda_path(device):
        few, limit_s = _GPU_BATCHES, _ROUND_S
    try:
        for n in range(1 + _ROUNDS):
            for kind, backend in backends.items():
                img_per_s = _timed(backend, Schedule(plan, 0, most=few), device, limit_s)
                if n:  # the first round warms up
                    taken[kind].append(img_per_s)
    finally:
        for backend in backends.values():
            backend.close()
    return {kind: median(speeds) for kind, speeds in taken.items()}


def _timed(backend: Backend, schedule: Schedule, device: torch.device, limit_s: float) -> float:
    """Images per second until the schedule, or the time, is over."""
    begun, count = time.perf_counter(), 0
    with closing(backend.decode(schedule)) as batches:
        for n, batch in enumerate(batches, 1):
            count += len(batch)
            beat()
            if n >= _LEAST_BATCHES and time.perf_counter() - begun > limit_s:
                break
        # The host may be ahead of the device: wait for the batches that were counted, not for those decoded ahead.
        Mark.of(current_stream(device)).wait_on_host()
        return count / (time.perf_counter() - begun)


def _read(path: Path) -> dict[str, dict[str, float]]:
    """The entries of a file that are speeds; empty if the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: entry for key, entry in entries if isinstance(entry, dict) and _are_speeds(entry)}


def _are_speeds(entry: dict[str, Any]) -> bool:
    return all(isinstance(speed, int | float) and speed >= 0 for speed in entry.values())
