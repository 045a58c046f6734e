"""The trainer's own loop in rounds with timed phases, so that a round is a part of a long run.

The trainer yields after each update, so a round takes a number of updates and then pauses the run. A round starts with
the decoder, its queue and the step as in the middle of an epoch, and it pays for all that it uses: as much is decoded
before it as for the time after it. Therefore a round starts with updates that do not count, and ends by waiting until
the decoder is as far ahead as possible and stops, since nothing may decode while other cases run.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness.limits import wait
from benchmarks.harness.measure import nothing
from lowrank_vit.common.devices import in_turn, pick_device
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.options import Config
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.synthetic import SyntheticLoader
from lowrank_vit.run.metrics import Meter
from lowrank_vit.training.phases import Phase
from lowrank_vit.training.trainer import COLD_UPDATES, Trainer

PHASES = ("data", "augment", "inputs", "forward", "backward", "optimizer", "ema", "monitor", "other")
"""Phases in the order of a step; on CUDA "augment" runs beside the step."""
_OF_TRAINER: Mapping[Phase, str] = {
    "data": "data",
    "augment": "augment",
    "inputs": "inputs",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "ema": "ema",
    "refresh": "monitor",
}
"""The phases here by the trainer's names."""
HELD_PLANS = 8
"""Different draws of mixing and erasing, used in turn while the step runs on one batch."""

Moment = Any
"""Seconds of the clock, or a CUDA event."""


@dataclass(frozen=True)
class Phases:
    """Milliseconds per step of each phase, one sample per round."""

    ms: Mapping[str, tuple[float, ...]]
    overlaps: frozenset[str] = frozenset()
    """Phases that run beside the others."""

    @classmethod
    def of(cls, rounds: Sequence[Mapping[str, float]], steps: int, overlaps: frozenset[str] = frozenset()) -> Phases:
        """`rounds`: seconds of each phase in `steps` steps."""
        return cls({name: tuple(1e3 * one[name] / steps for one in rounds) for name in PHASES}, overlaps)

    def shares(self) -> dict[str, float]:
        """Median share of each phase in the step's time, 0-1; phases beside the step are not in the sum."""
        steps = [sum(self.ms[name][n] for name in PHASES if name not in self.overlaps) for n in range(self._rounds)]
        return {name: median(a / b for a, b in zip(self.ms[name], steps, strict=True)) for name in PHASES}

    def bottleneck(self) -> str:
        """The phase that takes most of the step; a phase beside the step only shows as waiting for data."""
        shares = self.shares()
        return max((name for name in PHASES if name not in self.overlaps), key=lambda name: shares[name])

    @property
    def _rounds(self) -> int:
        return len(self.ms[PHASES[0]])


class Timer:
    """Listens to a trainer and adds up the time of its phases; only `seconds` waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Moment, Moment]] = []
        self._begun: dict[str, Moment] = {}

    def begin(self, phase: Phase) -> None:
        """Start a phase of the trainer, on the current stream; phases outside of rounds are not timed."""
        if phase in _OF_TRAINER and "round" in self._begun:
            self._begun[phase] = self._now()

    def end(self, phase: Phase) -> None:
        """End a phase."""
        if phase in _OF_TRAINER and phase in self._begun:
            self._spans.append((_OF_TRAINER[phase], self._begun.pop(phase), self._now()))

    def begin_round(self) -> None:
        """Discard everything noted so far."""
        self._spans.clear()
        self._begun = {"round": self._now()}

    def end_round(self) -> None:
        """End the round; its last update was requested."""
        self._spans.append(("other", self._begun.pop("round"), self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase of the round; waits for the device. "other" is the time outside of all phases."""
        wait(self._device)
        sums: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        is_event = self._device.type == "cuda"
        for name, begin, end in self._spans:
            sums[name] += begin.elapsed_time(end) / 1e3 if is_event else end - begin
        if not is_event:  # the trainer's thread augments while it "waits" for data
            sums["data"] -= sums["augment"]
        beside = ("other", "augment") if is_event else ("other",)
        sums["other"] -= sum(value for name, value in sums.items() if name not in beside)
        return sums

    def _now(self) -> Moment:
        """The current time on the current stream."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def batches_ahead(prefetch: int) -> int:
    """How many batches a loader may have in work or ready: decoding, waiting, and on CUDA one prepared."""
    return 2 * prefetch + 1


def warming_updates(prefetch: int) -> int:
    """Updates before a round that do not count: more than the loader can be ahead, so that its queue is steady."""
    return batches_ahead(prefetch) + 2


def first_updates(config: Config, steps: int) -> int:
    """Updates before the first round: for compilation, and as many more as put a refresh into each round.

    With a refresh every `warming_updates` + `steps` updates it is due at the first update of each round.
    """
    period, count = warming_updates(config.data.prefetch) + steps, steps - 1
    while count < COLD_UPDATES[config.step.compile]:
        count += period
    return count


def updates_of_rounds(config: Config, steps: int, rounds: int) -> int:
    """All updates of so many rounds, plus one, so that the epoch does not end with the last round."""
    return first_updates(config, steps) + rounds * (warming_updates(config.data.prefetch) + steps) + 1


@dataclass(frozen=True)
class Round:
    """Measurements of one round."""

    seconds: dict[str, float]
    """Seconds by phase."""
    queue_depth: float
    """Mean number of decoded batches that waited when one was asked for."""
    waiting_at_start: int
    waiting_at_end: int
    """Decoded batches waiting then; if there are more at the start, they were decoded outside of the timed part."""
    refreshes: int
    """Refreshes of the spectra that were due in the round and not skipped."""
    skipped: int
    """Refreshes that were due while the previous one was still running."""
    refresh_tail_s: float
    """How long the last refresh ran after the round; this is not timed."""


class TimedSteps:
    """A run of the trainer with `steps` updates per round, each phase timed.

    `before` and `after` belong to a round and are not timed.
    """

    def __init__(
        self, config: Config, steps: int, spec_every: int | None, rounds: int, *, is_watched: bool = True
    ) -> None:
        """`spec_every`: updates between two refreshes; None: one at the first update of each round.

        `is_watched`: whether there are refreshes at all.
        Raises `UserError` as making a run does, and if an epoch is shorter than all the rounds.
        """
        self.rounds: list[Round] = []
        self._held: list[Batch] = []
        self._steps, self._warming = steps, warming_updates(config.data.prefetch)
        self._first, self._has_begun = first_updates(config, steps), False
        self._every = spec_every or self._warming + steps
        self._stack = ExitStack()
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            # One log line per round, and a run directory that is removed when the bench ends.
            in_run = replace(config.run, output=folder, log_interval=self._warming + steps)
            monitored = replace(config.spectra, spec_monitor=is_watched, spec_every=self._every)
            self._timer = Timer(pick_device(config.step.device))
            with _quiet():
                self.trainer = Trainer(replace(config, run=in_run, spectra=monitored), "bench", listener=self._timer)
            self._updates = self.trainer.updates()
            self._stack.callback(self._updates.close)
            needed = updates_of_rounds(config, steps, rounds)
            if (there := self.trainer.setup.plan.updates_per_epoch) < needed:
                raise UserError(
                    f"an epoch has {there} updates, and {rounds} rounds take {needed}: the end of an epoch would be "
                    "timed. Give fewer --steps or --repeats, or more images."
                )
        except BaseException:
            self._stack.close()
            raise

    @property
    def is_over(self) -> bool:
        """Whether the run's loop has ended, as after any error in it."""
        return inspect.getgeneratorstate(self._updates) == inspect.GEN_CLOSED

    def __enter__(self) -> TimedSteps:
        return self

    def __exit__(self, *error: object) -> None:
        with _quiet():
            self._stack.close()

    def before(self) -> None:
        """Not timed: make updates until the decoder is as far ahead as it will be."""
        self._train(self._warming + (0 if self._has_begun else self._first))
        self._has_begun = True
        wait(self.trainer.setup.device)
        self._finish_refresh()
        self._loader.stats()  # counts from here on
        self._waiting_at_start, self._skipped_before = self._loader.waiting, self._skipped

    def run(self) -> None:
        """The timed part: `steps` updates, and waiting for the device."""
        self._timer.begin_round()
        self._train(self._steps)
        self._timer.end_round()
        wait(self.trainer.setup.device)

    def held(self, count: int, after_each: Callable[[int], object] = nothing) -> None:
        """Make `count` steps on a batch that stays on the device, with the run's own compiled step, and wait for it.

        The run pauses meanwhile; the steps only change its weights. The batch has pixels of `SyntheticLoader` and is
        mixed and erased as in the run; nothing is decoded, and no operation is applied. `after_each` is called with the
        number of steps so far.
        """
        setup, position = self.trainer.setup, self.trainer.state.position
        if not self._held:
            loader = SyntheticLoader(setup.plan, setup.num_classes, setup.device)
            self._held = list(islice(loader.batches(0), HELD_PLANS))
        kept, meter = replace(position), setup.step.meter
        setup.step.meter = Meter(setup.device, setup.plan.accum_steps)
        setup.model.train()
        try:
            with in_turn(self.trainer.stream):
                for n in range(count):
                    setup.step(self._held[n % len(self._held)])
                    after_each(n + 1)
            wait(setup.device)
        finally:
            setup.step.meter = meter
            vars(position).update(vars(kept))

    def after(self) -> None:
        """Not timed: wait for the monitor and until the decoder stops, and note the round."""
        stats, waiting = self._loader.stats(), (self._waiting_at_start, self._loader.waiting)
        skipped = self._skipped - self._skipped_before
        end = self.trainer.state.position.num_updates
        due = end // self._every - (end - self._steps) // self._every if self._monitor else 0
        tail_s = self._finish_refresh()
        seconds = self._timer.seconds()
        self.rounds.append(Round(seconds, stats.queue_depth, *waiting, due - skipped, skipped, tail_s))
        self._let_decoder_finish(3e-3 * stats.decode_ms_p90)

    @property
    def _loader(self) -> Any:
        return self.trainer.setup.train_loader

    @property
    def _monitor(self) -> Any:
        return self.trainer.monitor

    @property
    def _skipped(self) -> int:
        return self._monitor.skipped if self._monitor else 0

    def _train(self, count: int) -> None:
        with _quiet():
            for _ in range(count):
                if next(self._updates, None) is None:  # the trainer ends cleanly on Ctrl-C, and so does the bench
                    raise KeyboardInterrupt

    def _finish_refresh(self) -> float:
        """Wait for the running refresh; returns the seconds waited."""
        if not self._monitor:
            return 0.0
        begun = time.perf_counter()
        self._monitor.wait()
        if self._monitor.failed:
            raise UserError("A refresh of the spectra failed, see above, so the figures would be of less work.")
        return time.perf_counter() - begun

    def _let_decoder_finish(self, batch_s: float) -> None:
        """Wait until no batch has been decoded for longer than one takes, at least 0.2 s."""
        still_since, waiting = time.perf_counter(), self._loader.waiting
        while time.perf_counter() - still_since < max(0.2, batch_s):
            time.sleep(0.02)
            if self._loader.waiting != waiting:
                still_since, waiting = time.perf_counter(), self._loader.waiting


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Hide the run's own output."""
    return contextlib.redirect_stdout(io.StringIO())
