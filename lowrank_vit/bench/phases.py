"""Training steps whose phases are timed: by CUDA events on a GPU, which wait for nothing, by a clock on a CPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.bench.limits import wait
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.choose import LoaderOptions, open_loader
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.plan import BatchPlan
from lowrank_vit.engine.setup import make_parts
from lowrank_vit.options import Config
from lowrank_vit.spectral.monitor import SpectralMonitor, default_cpu_threads
from lowrank_vit.spectral.refresh import Settings
from lowrank_vit.spectral.select import DEFAULT_TARGETS

PHASES = ("data", "augment", "forward", "backward", "optimizer", "ema", "monitor", "other")
"""In the order of a step; "augment" is beside the step on CUDA."""

Mark = Any
"""A moment: seconds of the clock, or a CUDA event."""


@dataclass(frozen=True)
class Phases:
    """Milliseconds a step of each phase, a sample a round."""

    ms: Mapping[str, tuple[float, ...]]
    overlaps: frozenset[str] = frozenset()
    """Phases that run beside the others."""

    @classmethod
    def of(cls, rounds: Sequence[Mapping[str, float]], steps: int, overlaps: frozenset[str] = frozenset()) -> Phases:
        """`rounds`: seconds of each phase in `steps` steps."""
        return cls({name: tuple(1e3 * one[name] / steps for one in rounds) for name in PHASES}, overlaps)

    def shares(self) -> dict[str, float]:
        """Median share of each phase in the step's time, 0-1; those that run beside it are not in the sum."""
        steps = [sum(self.ms[name][n] for name in PHASES if name not in self.overlaps) for n in range(self._rounds)]
        return {name: median(a / b for a, b in zip(self.ms[name], steps, strict=True)) for name in PHASES}

    def bottleneck(self) -> str:
        """The phase that takes most of the step; what runs beside the step shows as waiting for data, if at all."""
        shares = self.shares()
        return max((name for name in PHASES if name not in self.overlaps), key=lambda name: shares[name])

    @property
    def _rounds(self) -> int:
        return len(self.ms[PHASES[0]])


class Timer:
    """Adds up the time between marks by the name of what ended; nothing waits for the device but `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._last: Mark = None

    def now(self) -> Mark:
        """This moment on the current stream."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """The first phase begins."""
        self._last = self.now()

    def end(self, name: str) -> None:
        """The phase `name` ends and the next begins."""
        now = self.now()
        self._spans.append((name, self._last, now))
        self._last = now

    def span(self, name: str, begin: Mark) -> None:
        """What began at `begin` ends, be it inside another phase or on another stream."""
        self._spans.append((name, begin, self.now()))

    def seconds(self) -> dict[str, float]:
        """By phase since the last call; waits for the device."""
        wait(self._device)
        sums: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        is_event = self._device.type == "cuda"
        for name, begin, end in self._spans:
            sums[name] += begin.elapsed_time(end) / 1e3 if is_event else end - begin
        self._spans.clear()
        return sums


class TimedSteps:
    """The trainer's loop with its monitor, `steps` steps a round, each phase timed."""

    def __init__(self, config: Config, steps: int, spec_every: int) -> None:
        """Raises `UserError` as making the parts of a run does."""
        self._config, self._steps, self._every = config, steps, spec_every
        self.parts = make_parts(config, None)
        self.rounds: list[dict[str, float]] = []
        """Seconds of each phase, by round."""
        self._timer = Timer(self.parts.device)
        self._stack = ExitStack()
        # The parts' own loader is not begun: this one tells how long it augments.
        for loader in (self.parts.train_loader, self.parts.val_loader):
            if loader:
                loader.close()
        self._loader, self.description = self._open_loader()
        self._hook_step()

    def _open_loader(self) -> tuple[Loader, str]:
        parts, data = self.parts, self._config.data
        assert data.data_dir is not None
        smoothing, remode = self._config.augment.smoothing, self._config.augment.remode
        spec, compile = parts.spec, self._config.step.compile
        augment = Augment(spec.mean, spec.std, parts.num_classes, smoothing, remode, compile=compile).to(parts.device)

        def prepare(images: Tensor, plan: BatchPlan) -> Tensor:
            begin = self._timer.now()
            prepared = augment.prepare(images, plan)
            self._timer.span("augment", begin)
            return prepared

        options = LoaderOptions(data.loader, data.workers, data.prefetch, data.hw_decoder_load, data.on_bad_sample)
        beton = Beton(data.data_dir / "train.beton")
        return open_loader(beton, parts.plan, parts.device, options, prepare=prepare)

    def _hook_step(self) -> None:
        """Have forward, backward, optimizer and EMA tell when they end."""
        parts, timer = self.parts, self._timer
        loss_of: Any = parts.step._loss_of  # the compiled module; hooks on it run outside of the compiled code
        loss_of.register_forward_hook(lambda *_: timer.end("forward"))
        parts.optimizer.register_step_pre_hook(lambda *_: timer.end("backward"))
        assert parts.ema is not None
        update = parts.ema.update

        def timed_update(model: torch.nn.Module, step: int | None = None) -> None:
            timer.end("optimizer")
            update(model, step=step)
            timer.end("ema")

        parts.ema.update = timed_update  # type: ignore[method-assign]

    def __enter__(self) -> TimedSteps:
        self._stack.callback(self._loader.close)
        store = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        assert self.parts.ema is not None
        self._monitor = self._stack.enter_context(
            SpectralMonitor(
                self.parts.model,
                self.parts.ema.module,
                targets=DEFAULT_TARGETS,
                every=self._every,
                settings=Settings(cpu_threads=default_cpu_threads()),
                store_dir=store,
            )
        )
        self._batches = self._endless()
        self._stack.callback(self._batches.close)
        self.parts.model.train()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _endless(self) -> Generator[Batch, None, None]:
        for epoch in count():
            yield from self._loader.batches(epoch)

    def run(self) -> None:
        """The timed part: `steps` steps, and waiting for the device."""
        parts, timer = self.parts, self._timer
        timer.start()
        for _ in range(self._steps):
            batch = next(self._batches)
            timer.end("data")
            parts.step(batch)
            parts.scheduler.step_update(parts.step.num_updates)
            timer.end("other")
            self._monitor.observe(parts.step.num_updates)
            timer.end("monitor")
        wait(parts.device)

    def collect(self) -> None:
        """Not timed: note the phases of the round."""
        seconds = self._timer.seconds()
        if self.parts.device.type == "cpu":  # the trainer's thread augments while it "waits"
            seconds["data"] -= seconds["augment"]
        self.rounds.append(seconds)
