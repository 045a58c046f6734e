"""Which CPU decoder is faster for a set on this machine: measured once, kept beside the set."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from data_prep.formats import turbojpeg
from lowrank_vit.common.files import write_whole
from lowrank_vit.common.resources import available_cores
from lowrank_vit.data.decode.backend import Backend, DamagedSamples
from lowrank_vit.data.schedule import Schedule
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import TrainPlan

_SAMPLES = 256
"""Decoded for one timing."""
_ROUNDS = 3


def speed_path(beton: Beton) -> Path:
    """Where measurements of a set are kept: FILE.beton.speed.json."""
    return beton.path.with_name(beton.path.name + ".speed.json")


def kept_or_measured(
    beton: Beton, plan: TrainPlan, workers: int, makers: Mapping[str, Callable[[], Backend]]
) -> tuple[dict[str, float], str]:
    """Images a second by backend, and in words where that comes from.

    A kept figure counts if CPU, cores, threads, image size, libraries and the set are the same. No figures where the
    first samples do not decode.
    """
    path, key = speed_path(beton), _key(beton, plan, workers)
    kept = _read(path)
    if key in kept and set(kept[key]) == set(makers):
        return kept[key], f"measured before ({path.name})"
    try:
        speeds = measure({kind: make() for kind, make in makers.items()}, plan)
    except DamagedSamples:
        return {}, "not measured, since the first samples are damaged"
    try:
        write_whole(path, json.dumps({**kept, key: speeds}, indent=1) + "\n")
    except OSError:
        return speeds, "measured (but the folder cannot be written to keep it)"
    return speeds, "measured just now"


def measure(backends: Mapping[str, Backend], plan: TrainPlan) -> dict[str, float]:
    """Median images a second of each, taken in turn on the same batches. Closes the backends."""
    taken: dict[str, list[float]] = {kind: [] for kind in backends}
    try:
        for n in range(1 + _ROUNDS):
            for kind, backend in backends.items():
                begun, count = time.perf_counter(), 0
                for batch in backend.decode(_Few(plan)):
                    count += len(batch)
                if n:  # the first round warms up
                    taken[kind].append(count / (time.perf_counter() - begun))
    finally:
        for backend in backends.values():
            backend.close()
    return {kind: median(speeds) for kind, speeds in taken.items()}


class _Few(Schedule):
    """The first batches of the first epoch, about `_SAMPLES` samples."""

    def __init__(self, plan: TrainPlan) -> None:
        super().__init__(plan, 0, 0, set())
        self.ids = self.ids[: max(2, _SAMPLES // plan.batch_size)]


def _key(beton: Beton, plan: TrainPlan, workers: int) -> str:
    return json.dumps(
        {
            "cpu": _cpu(),
            "cores": available_cores(),
            "workers": workers,
            "img_size": plan.img_size,
            "bytes": int(beton.sizes.sum()),
            "samples": beton.num_samples,
            "ffcv": f"numba {metadata.version('numba')}, {turbojpeg.identity()}",
            "dali": metadata.version("nvidia-dali-cuda130"),
        }
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
