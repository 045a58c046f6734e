"""Choose the decode backend for a set and a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from lowrank_vit.data.batch import Batch
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.plan import EvalPlan, TrainPlan
from lowrank_vit.data.resident_backend import ResidentBackend, why_not_resident

RESIDENT_SHARE = 0.25
"""`auto` lets a set take at most this share of the device's memory."""


class Loader(Protocol):
    """What every backend offers: the plan's batches, decoded."""

    name: str

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch (0-based) from `first_step` on, in the plan's order."""
        ...

    def close(self) -> None:
        """Give back memory and threads."""
        ...


def choose_backend(beton: Beton, device: torch.device) -> tuple[str, str]:
    """`("resident" | "ffcv", the reason in words)` for `--loader auto`."""
    reason = why_not_resident(beton)
    if reason:
        return "ffcv", reason
    raw_bytes = int(beton.sizes.sum())
    budget = RESIDENT_SHARE * memory_bytes(device)
    size, share = f"{raw_bytes / 1e6:.1f} MB raw", f"{RESIDENT_SHARE:.0%} of {device} memory"
    return ("ffcv", f"{size} exceed {share}") if raw_bytes > budget else ("resident", f"{size} fit {share}")


def memory_bytes(device: torch.device) -> int:
    """Total memory of the device, or of the host for `cpu`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total


def open_loader(
    kind: str, beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, workers: int
) -> tuple[Loader, str]:
    """Open `auto`, `ffcv` or `resident`; returns the loader and one line that says which and why.

    The resident backend resizes as PIL does, with the plan's interpolation; FFCV has OpenCV's area filter.
    """
    if kind == "auto":
        kind, reason = choose_backend(beton, device)
    else:
        reason = f"--loader {kind}"
    line = f"{beton.path.name}: {beton.num_samples} samples, {kind} loader ({reason})"
    if kind == "resident":
        return ResidentBackend(beton, plan, device), line
    from lowrank_vit.data.ffcv_backend import FfcvBackend  # imports and compiles for a second

    return FfcvBackend(beton, plan, device, workers), line
