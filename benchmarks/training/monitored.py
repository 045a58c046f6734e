"""Training steps with the spectral monitor and without it, in blocks that alternate."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.measure import Case
from lowrank_vit.common.devices import FIRST, in_turn, side_stream
from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.select import DEFAULT_TARGETS
from lowrank_vit.spectral.watching import refresh
from lowrank_vit.spectral.watching.monitor import SpectralMonitor, default_cpu_threads
from lowrank_vit.spectral.watching.refresh import SpectralSettings

EVERY = 10
WARM_UP_STEPS = 20
"""Steps before the first block, for compilation, cuDNN and the allocator."""


class MonitorOfBlocks:
    """A monitor that is on in some blocks of steps and off in others."""

    def __init__(self, model: nn.Module, ema: nn.Module | None, *, has_norms: bool = True) -> None:
        """Without `has_norms` it leaves out |dW|_2 and |dW|_F, to measure their cost."""
        self._has_norms, self._norms = has_norms, refresh.update_norms
        self.figures: dict[str, list[float]] = {"refresh_s": [], "skipped": []}
        """Seconds of each refresh, and how many were skipped in each block."""
        self._watched = model, ema
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._monitor: SpectralMonitor | None = None

    def start(self) -> None:
        """Start before a block with the monitor."""
        self._folder = tempfile.TemporaryDirectory()
        if not self._has_norms:
            refresh.update_norms = lambda *_: {}
        settings = SpectralSettings(cpu_threads=default_cpu_threads())
        self._monitor = SpectralMonitor(
            *self._watched,
            targets=DEFAULT_TARGETS,
            every=EVERY,
            settings=settings,
            store_dir=Path(self._folder.name),
        )
        # The first refresh has no predecessor, and starts the process that computes the host's part.
        self._monitor.observe(0)
        self._monitor.wait()
        self._monitor.records()

    def observe(self, update: int) -> None:
        """Call after each update; does nothing in a block without the monitor."""
        if self._monitor is not None:
            self._monitor.observe(update)

    def stop(self) -> None:
        """Stop after the block: wait for the last refresh, and note figures. Raises `UserError` if there are none."""
        assert self._monitor is not None
        assert self._folder is not None
        self._monitor.close()
        refresh.update_norms = self._norms
        records = self._monitor.records()
        if self._monitor.failed:
            raise UserError("A refresh of the spectra failed, see above, so the figures would be of less work.")
        if not records:
            raise UserError(f"No refresh was due in a block; give --steps {EVERY} or more.")
        self.figures["refresh_s"] += [record.values["spec/refresh/seconds"] for record in records]
        self.figures["skipped"].append(self._monitor.skipped)
        self._monitor = None
        self._folder.cleanup()


class _Training:
    """A model with its EMA, and one synthetic batch that is reused."""

    def __init__(self, model_name: str, batch_size: int, steps: int, device: torch.device) -> None:
        import timm
        from timm.utils import ModelEmaV3

        self._steps, self._device, self._updates = steps, device, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model: nn.Module = timm.create_model(model_name).to(device)
            embedding: Any = self.model.get_submodule("patch_embed")
            side = embedding.img_size[0]
            images = torch.randn(batch_size, 3, side, side)
        self._images = images.to(device).contiguous(memory_format=torch.channels_last)
        self._targets = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._ema = ModelEmaV3(self.model)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device.type == "cuda")
        # dynamic=False: otherwise the second batch size would get code for any size, slower than the first.
        is_compiled = device.type == "cuda"
        self._loss = torch.compile(self._compute_loss, dynamic=False) if is_compiled else self._compute_loss
        self._warm_up_steps = WARM_UP_STEPS if is_compiled else 0
        self._stream = side_stream(device, FIRST)  # as in the trainer with the spectral monitor
        self.monitors = [MonitorOfBlocks(self.model, self._ema.module, has_norms=has) for has in (True, False)]

    def _compute_loss(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            return nn.functional.cross_entropy(self.model(images).float(), targets)

    def warm_up(self) -> None:
        """Run once, not timed."""
        self._train(self._warm_up_steps)

    def run(self) -> None:
        """The timed part: ends when the steps are done, even if the last refresh is not."""
        self._train(self._steps)

    def _train(self, steps: int) -> None:
        with in_turn(self._stream):
            for _ in range(steps):
                self._loss(self._images, self._targets).backward()
                self._optimizer.step()
                self._optimizer.zero_grad()
                self._ema.update(self.model)
                self._updates += 1
                for monitor in self.monitors:
                    monitor.observe(self._updates)
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def step_cases(
    model_name: str, batch_size: int, steps: int, device: torch.device, names: tuple[str, str, str]
) -> tuple[dict[str, Case], dict[str, list[float]]]:
    """Cases by name: steps without the monitor, with it, and with a monitor that leaves out the norms of changes.

    Also returns a dictionary that is filled with "refresh_s" (per refresh) and "skipped" (per block) of the full
    monitor.
    """
    without, with_monitor, without_norms = names
    training = _Training(model_name, batch_size, steps, device)
    images, setting = batch_size * steps, f"{model_name}, batch {batch_size}, AdamW and EMA, {steps} steps a block"
    watched = f"the same with a refresh every {EVERY} updates, model and EMA"
    cases = {without: Case(training.run, images, setting=setting, first=training.warm_up)}
    of_monitors = {with_monitor: watched, without_norms: f"{watched}, but for |dW|_2 and |dW|_F"}
    for (name, said), monitor in zip(of_monitors.items(), training.monitors, strict=True):
        cases[name] = replace(cases[without], setting=said, before=monitor.start, after=monitor.stop)
    return cases, training.monitors[0].figures
