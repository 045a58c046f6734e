"""Monitors of small models, a solver that waits to be let, and what a monitor has recorded and stored."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_vit.spectral.select import DEFAULT_TARGETS, select_targets
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.solving.solve import MatrixStack, solve_stack
from lowrank_vit.spectral.watching import files
from lowrank_vit.spectral.watching.monitor import SpectralMonitor
from lowrank_vit.spectral.watching.refresh import SpectralSettings
from tests.waiting import LONG_S

SETTINGS = SpectralSettings(topk=3, interval=2)
WITH_UPDATES = replace(SETTINGS, updates=True)
TIMES = ("refresh/seconds", "refresh/skipped", "refresh/failed")


def watch(model: nn.Module, store_dir: Path, ema: nn.Module | None = None, **changes: Any) -> SpectralMonitor:
    options: dict[str, Any] = {"targets": DEFAULT_TARGETS, "every": 2, "settings": SETTINGS, "store_dir": store_dir}
    return SpectralMonitor(model, ema, **options | changes)


def targets(model: nn.Module) -> dict[str, torch.Tensor]:
    return select_targets(dict(model.named_parameters()), DEFAULT_TARGETS)


def stored(folder: Path) -> list[int]:
    return [files.read_spectra(path).update for path in files.list_spectra(folder)]


class Gate:
    """A solver that says when it is asked and answers only when let."""

    def __init__(self) -> None:
        self.asked, self.open = threading.Event(), threading.Event()

    def __call__(self, stack: MatrixStack, *args: Any, **more: Any) -> dict[str, Solved]:
        self.asked.set()
        assert self.open.wait(LONG_S)
        return solve_stack(stack, *args, **more)


def nudge(model: nn.Module, seed: int, size: float = 0.02) -> None:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """An update by gradients that are noise."""
    noise = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=noise)
    optimizer.step()
    optimizer.zero_grad()


def comparable(values: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if not key.endswith(TIMES)}


def observe(monitor: SpectralMonitor, model: nn.Module, updates: range) -> list[dict[str, float]]:
    """What is recorded of these updates, each of which moves the weights."""
    for update in updates:
        nudge(model, update)
        monitor.observe(update)
        monitor.wait()
    return [comparable(record.values) for record in monitor.records()]
