"""The trainer's loop in rounds, its phases timed, so that a round is a stretch of a long run.

A stretch begins with the decoder, its queue and the step as they are in the middle of an epoch, and pays for all that
it uses: what was decoded before it is as much as what is decoded for the time after it. So a round is begun by steps
that do not count, and ended by taking the decoder's threads away, since nothing may decode while other cases run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.limits import wait
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.options import Config
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.choose import LoaderOptions, open_loader
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import BatchPlan
from lowrank_vit.spectral.monitor import SpectralMonitor, default_cpu_threads
from lowrank_vit.spectral.refresh import SpectralSettings
from lowrank_vit.spectral.select import DEFAULT_TARGETS
from lowrank_vit.training.setup import set_up

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


_POLL_S, _REFRESH_LIMIT_S = 0.002, 600.0


def batches_ahead(prefetch: int) -> int:
    """As many batches as a loader may have under way or ready: decoding, waiting, and on CUDA one prepared."""
    return 2 * prefetch + 1


def warming_steps(prefetch: int) -> int:
    """Steps before a round that do not count: more than the loader can have ahead, so that its queue is steady."""
    return batches_ahead(prefetch) + 2


@dataclass(frozen=True)
class Round:
    """What was seen of one round."""

    seconds: dict[str, float]
    """By phase."""
    queue_depth: float
    """Mean number of decoded batches that waited when one was asked for."""
    waiting_at_start: int
    waiting_at_end: int
    """Decoded batches that waited then; if more at the start, those were decoded in nobody's time."""
    refreshes: int
    """Refreshes of the spectra that were begun in the round, all of which were finished."""
    skipped: int
    """Those that were due while one was still being computed."""
    refresh_tail_s: float
    """How long the last refresh went on after the round; this is in nobody's time."""


class TimedSteps:
    """The trainer's loop with its monitor, `steps` steps a round, each phase timed.

    `before` and `after` belong to a round and are not timed.
    """

    def __init__(self, config: Config, steps: int, spec_every: int) -> None:
        """Raises `UserError` as making the parts of a run does, and if an epoch is shorter than a round."""
        self._config, self._steps, self._every = config, steps, spec_every
        self.parts = set_up(config, None)
        self.rounds: list[Round] = []
        self._timer = Timer(self.parts.device)
        self._stack = ExitStack()
        self._warming = warming_steps(config.data.prefetch)
        if self.parts.plan.steps_per_epoch < self._warming + steps:
            raise UserError(
                f"an epoch has {self.parts.plan.steps_per_epoch} batches, and a round takes {self._warming + steps}: "
                "the beginning of another epoch would be timed. Give fewer --steps or more images."
            )
        # The parts' own loader is not begun: this one tells how long it augments.
        for loader in (self.parts.train_loader, self.parts.val_loader):
            if loader:
                loader.close()
        self._loader, self.description = self._open_loader()
        self._epochs, self._batches = count(), iter(())
        self._waiting_at_start = self._due = self._finished = self._skipped = 0
        # The count that the monitor is told, of the steps that are timed. With it a round's first step is due, so that
        # as much as can be of the refresh is in the round's time.
        self._observed = spec_every - 1
        self._hook_step()

    def _open_loader(self) -> tuple[Loader, str]:
        parts, data = self.parts, self._config.data
        assert data.data_dir is not None
        spec, recipe = parts.spec, self._config.augment
        of_data = spec.mean, spec.std, parts.num_classes, recipe.smoothing, recipe.remode
        augment = Augment(*of_data, erase_first=recipe.erase_first).to(parts.device)

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
        # The compiled module, which is nobody else's business; hooks on it run outside of the compiled code.
        loss_of: Any = parts.step._loss_of  # pyright: ignore[reportPrivateUsage]
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
        """Start the monitor, and have it note the weights before the first update as the trainer does."""
        self._stack.callback(self._loader.close)
        store = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        assert self.parts.ema is not None
        self._monitor = self._stack.enter_context(
            SpectralMonitor(
                self.parts.model,
                self.parts.ema.module,
                targets=DEFAULT_TARGETS,
                every=self._every,
                settings=SpectralSettings(cpu_threads=default_cpu_threads()),
                store_dir=store,
            )
        )
        self._observe(0)
        self._finish_refreshes()
        self.parts.model.train()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def before(self) -> None:
        """Not timed: begin an epoch, and take steps until the decoder is as far ahead as it will be."""
        self._timer.start()
        self._batches = self._loader.batches(next(self._epochs))
        for _ in range(self._warming):
            self._step(next(self._batches))
        self._loader.stats()  # counts from here on
        self._timer.seconds()
        self._waiting_at_start = self._loader.waiting

    def run(self) -> None:
        """The timed part: `steps` steps, and waiting for the device."""
        self._timer.start()
        for _ in range(self._steps):
            batch = next(self._batches)
            self._timer.end("data")
            self._step(batch)
            self._observed += 1
            self._observe(self._observed)
            self._timer.end("monitor")
        wait(self.parts.device)

    def after(self) -> None:
        """Not timed: leave the epoch, wait for the monitor, and note the round."""
        waiting_at_end, queue_depth = self._loader.waiting, self._loader.stats().queue_depth
        _close(self._batches)
        seconds = self._timer.seconds()
        if self.parts.device.type == "cpu":  # the trainer's thread augments while it "waits"
            seconds["data"] -= seconds["augment"]
        skipped, self._skipped = self._monitor.skipped - self._skipped, self._monitor.skipped
        refreshes, tail_s = self._finish_refreshes()
        waiting = self._waiting_at_start, waiting_at_end
        self.rounds.append(Round(seconds, queue_depth, *waiting, refreshes, skipped, tail_s))

    def _step(self, batch: Batch) -> None:
        self.parts.step(batch)
        self.parts.scheduler.step_update(self.parts.step.position.num_updates)
        self._timer.end("other")

    def _observe(self, num_updates: int) -> None:
        self._monitor.observe(num_updates)
        self._due += num_updates % self._every == 0

    def _finish_refreshes(self) -> tuple[int, float]:
        """Wait for the refreshes that were begun; returns how many since the last call, and the seconds waited."""
        begun, before = time.perf_counter(), self._finished
        while True:
            self._finished += len(self._monitor.records())
            if self._monitor.failed:
                raise UserError("A refresh of the spectra failed, as said above: these would be figures of less work.")
            waited = time.perf_counter() - begun
            if self._finished == self._due - self._monitor.skipped:
                return self._finished - before, waited
            if waited > _REFRESH_LIMIT_S:
                raise UserError(f"a refresh of the spectra has not ended after {_REFRESH_LIMIT_S:.0f} s.")
            time.sleep(_POLL_S)


def _close(batches: Iterator[Batch]) -> None:
    """End the epoch now, with its threads."""
    if close := getattr(batches, "close", None):
        close()
