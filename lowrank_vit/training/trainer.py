"""The loop that joins the rooms: epochs of steps, validation, checkpoints and the spectral monitor."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank_vit.common.devices import Mark, current_stream, each_in_turn, in_turn, wait_for
from lowrank_vit.config.options import Config
from lowrank_vit.data.loader import LoaderStats
from lowrank_vit.model.flops import memory_gb, mfu
from lowrank_vit.ranks.failing import Failing
from lowrank_vit.ranks.world import World
from lowrank_vit.run.checkpoints import Beside, Checkpoints, CheckpointWriter
from lowrank_vit.run.directory import RunDir
from lowrank_vit.run.flows import flows_of
from lowrank_vit.run.outputs import SPECTRA, Outputs, already_finished
from lowrank_vit.run.progress import Figures
from lowrank_vit.run.speed import Clock, FirstUpdates, RankFigures, Speed, Stretch
from lowrank_vit.run.state import Position, RunState
from lowrank_vit.score.evaluate import Scores
from lowrank_vit.spectral.watching.store import kept_name
from lowrank_vit.training.loading import room_beside
from lowrank_vit.training.phases import PhaseListener, Phases, ToldToRanks
from lowrank_vit.training.resume import Start, capture, find_start, finished, open_run_dir, restore
from lowrank_vit.training.setup import set_up
from lowrank_vit.training.step import stream_of_step
from lowrank_vit.training.stop import Stopped, StopRequest, UntilStopped
from lowrank_vit.training.watching import (
    SwitchSpeed,
    after_switch,
    finish_spectra,
    make_monitor,
    observe,
    size_of_records,
)

COLD_UPDATES = {False: 2, True: 20}
"""Warm-up updates of a process, without and with --compile, for compilers, autotuning and memory pools. They do not
count for img/s, MFU and the share of waiting, and neither do those after a switch to factors."""

_RECHECKED_UPDATES = 100
"""Warm updates after which a loader's speed, measured without a step beside it, is checked again."""

_CLOSE_LIMIT_S = 300.0
"""Closing the logs may take this long before it counts as a hang; the last upload has a shorter limit."""


@dataclass(frozen=True)
class Result:
    """The outcome of a run."""

    run_dir: Path
    metric: str
    """--eval-metric, e.g. top1."""
    best: float | None
    """Best validation score, of the model or of its EMA. None without validation."""
    best_epoch: int
    """0-based."""
    train_s: float
    """Seconds in training steps, without validation."""
    stopped_by: str = ""
    """The signal that ended it before its last epoch; empty if none did."""
    num_updates: int = 0
    best_scores: dict[str, float] = field(default_factory=dict[str, float])
    """Scores in the best epoch: of the "model", and of its "ema" if there is one."""
    is_repeated: bool = False
    """Whether the run was already finished when it was started."""


def _result(run_dir: Path, config: Config, state: RunState, **more: Any) -> Result:
    best = state.best
    of_run: dict[str, Any] = {"train_s": 0.0, "num_updates": state.position.num_updates, **more}
    of_best = best.best_metric, best.best_epoch
    return Result(run_dir, config.run.eval_metric, *of_best, best_scores=best.best_scores, **of_run)


@dataclass(frozen=True)
class EpochStats:
    """The part of an epoch's training that this process did."""

    loss: float
    lr: float
    """Learning rate in the epoch's last update."""
    speed: Speed | None
    """Without the warm-up updates; None if all updates were made before the run was resumed."""
    train_s: float
    """Seconds of training, including warm-up updates."""


def train(config: Config, default_name: str, world: World, failing: Failing) -> Result:
    """Train to the last epoch; if an earlier attempt has finished the run, only report that. Raises `UserError`."""
    start = find_start(config, world)
    if (done := finished(start, world)) and start.resumed:
        state, num_epochs = done
        if world.is_first:
            world.say(already_finished(num_epochs))
        return _result(start.resumed.path.parent, start.config, state, is_repeated=True)
    return Trainer(config, default_name, world, failing, start).run()


class Trainer:
    """One run of one configuration. All errors of the configuration are found before the run directory is made.

    A listener is called for every phase of the loop. To take updates one by one, as a bench does, iterate over
    `updates` instead of calling `run`.
    """

    result: Result
    """The outcome, set when the run has ended."""
    stream: torch.cuda.Stream | None
    """The stream of the loop's work; None: the current stream."""

    def __init__(
        self,
        config: Config,
        default_name: str,
        world: World | None = None,
        failing: Failing | None = None,
        start: Start | None = None,
        *,
        listener: PhaseListener | None = None,
    ) -> None:
        """`default_name` begins the run directory's name without `--experiment`. Raises `UserError`.

        `failing` reports an error to the other ranks of `world`; `start` is the result of `find_start`, if it was
        already called; `listener` is called for phases, see `phases.py`.
        """
        self.world = world or World()
        self._failing = failing or Failing(self.world)
        self.state = RunState()
        if self.world.size > 1:
            listener = ToldToRanks(self.world.progress, self.state.position, listener)
        self._phases = Phases(listener)
        start = start or find_start(config, self.world)
        # Setup runs on this stream too: DDP averages gradients on the stream on which it was made.
        self.stream = stream_of_step(start.config, self.world)
        with in_turn(self.stream):
            self.setup = set_up(start.config, start.resumed, self.world, self.state.position, self._phases)
            self.config = self.setup.config
            if start.resumed:
                restore(self.setup, self.state, start.resumed)
        self.world.progress.enter("opening the run directory")
        self.run_dir = open_run_dir(start, default_name) if self.world.is_first else RunDir(Path(), None)
        self.run_dir.path = self.world.from_first(self.run_dir.path)
        self.stop = StopRequest(self.world)

    def run(self) -> Result:
        """Train to the last epoch. The run directory has all results; see `docs/design/checkpoints.md`."""
        for _ in self.updates():
            pass
        return self.result

    def updates(self) -> Generator[Position]:
        """Train to the last epoch and yield after each update; the run pauses until the next one is requested.

        Yields the run's own position, which is read-only. Time between two updates does not count for the run's speed.
        Closing the iterator abandons the run.
        """
        return each_in_turn(self.stream, self._updates())

    def _updates(self) -> Generator[Position]:
        setup, stopped_by = self.setup, ""
        self.train_s, self._bad_counts, self._num_bad = 0.0, np.zeros(self.world.size), 0
        self._cold_updates, self._switch_speed = COLD_UPDATES[self.config.step.compile], SwitchSpeed()
        self._first_updates = FirstUpdates(_RECHECKED_UPDATES * setup.plan.global_batch)
        self._say: Callable[[str], object] = self.world.say
        """For lines about this rank only."""
        # An error is reported before the following contexts are closed.
        with ExitStack() as stack, self._failing.told_at_once():
            stack.callback(self.run_dir.close)
            self.monitor = None
            if self.config.spectra.spec_monitor:
                of_run = setup, self.state.position, self.run_dir.path, self.world
                self.monitor = stack.enter_context(make_monitor(*of_run, say=lambda line: self._say(line)))
            for loader in (setup.train_loader, setup.val_loader):
                if loader:
                    stack.callback(loader.close)
            enter = self.world.progress.enter
            enter("opening the logs")
            self.outputs = stack.enter_context(self._make_outputs())
            if self.world.is_first:
                self._say = self.outputs.display.say
            self.checkpoints = stack.enter_context(self._make_checkpoints())
            if self.monitor and self.state.position.num_updates == 0:
                observe(self.monitor, setup, self.outputs, 0)
            self._failing.save_and_end = self.stop.ask
            # Signals are noted to the end: the sender may repeat them while the run saves.
            with self.stop.noted(), room_beside(setup.train_loader, setup.val_loader):
                try:
                    for epoch in range(self.state.position.epoch, setup.num_epochs):
                        with self._phases("epoch"):
                            stats = yield from self._train_epoch(epoch)
                        self._finish_epoch(epoch, stats)
                except Stopped:
                    stopped_by = self.stop.reason
                    enter("saving", is_background=True)
                    self.checkpoints.save()
                enter("finishing the spectra", is_background=True)
                self._finish_spectra()
                enter("writing the last checkpoint", is_background=True)
                self.checkpoints.finish()
                enter("closing the logs", least_limit_s=_CLOSE_LIMIT_S)
        self.result = _result(self.run_dir.path, self.config, self.state, train_s=self.train_s, stopped_by=stopped_by)

    def _make_outputs(self) -> Outputs:
        return Outputs(
            self.config,
            self.run_dir,
            self.state,
            device=self.setup.device,
            num_epochs=self.setup.num_epochs,
            updates_per_epoch=self.setup.plan.updates_per_epoch,
            description=self.setup.description + size_of_records(self.monitor, self.setup),
            is_first=self.world.is_first,
            indices=self.monitor.indices_by_type() if self.monitor else {},
        )

    def _make_checkpoints(self) -> Checkpoints:
        writer = None
        if self.world.is_first:
            writer = CheckpointWriter(self.run_dir.path, self.setup.device, self.outputs.display.say)
        return Checkpoints(self.config.run, self.state, self._capture, writer, self._kept_spectra)

    def _capture(self) -> dict[str, Any]:
        return capture(self.setup, self.state)

    def _kept_spectra(self) -> Beside | None:
        """The monitor's file beside a checkpoint of now. Finished refreshes are logged before it."""
        if not self.monitor:
            return None
        kept = self.monitor.kept()
        self.outputs.log_spectra(self.monitor.prepared_records())
        return Beside(SPECTRA, kept_name(kept.update), kept.content()) if kept else None

    def _finish_spectra(self) -> None:
        if self.monitor:
            finish_spectra(self.monitor, self.outputs)

    def _train_epoch(self, epoch: int) -> Generator[Position, None, EpochStats]:
        """Train the rest of an epoch. Raises `Stopped` after the update at which all ranks should end."""
        setup, position, phases = self.setup, self.state.position, self._phases
        setup.model.train()
        if setup.low_rank and position.updates_done == 0:
            with phases("refresh"):
                is_changed = setup.low_rank.at_epoch(epoch, position.num_updates)
                after_switch(setup, self.outputs, is_changed=is_changed)
            if is_changed:
                self._begin_cold(position.num_updates + 1)
        updates, interval = setup.plan.updates_per_epoch, self.config.run.log_interval
        clock, speed = Clock(), None
        warm_at = self._warm_at()
        self.stop.begin(position.num_updates)
        batches = setup.train_loader.batches(epoch) if position.updates_done < updates else iter(())
        for batch in clock.timed(phases.each("data", batches)):
            lr = setup.step.lr
            is_due = (position.updates_done + 1) % interval == 0 or position.updates_done + 1 == updates
            clock.images += len(batch) * self.world.size
            if not setup.step(batch, measure_norm=is_due):
                continue
            self.state.sums.lr = lr
            setup.scheduler.step_update(position.num_updates)
            if self.monitor:
                with phases("refresh"):
                    is_changed = observe(self.monitor, setup, self.outputs, position.num_updates)
                if is_changed:
                    self._begin_cold(position.num_updates)
                    warm_at = self._warm_at()
            if is_due:
                with phases("log"):
                    speed = self._log_interval(epoch, clock)
            self.outputs.tick()
            if self._cold_updates and position.updates_done == warm_at < updates:
                wait_for(setup.device)  # work queued so far does not count for what follows
                clock.tick()
                clock.restart()
                self._cold_updates = 0
            with phases("checkpoint"):
                self.checkpoints.save_if_due(is_logged=is_due)
            if self.stop.comes_after(position.num_updates):
                raise Stopped
            with clock.paused(current_stream(setup.device)):
                yield position
        self.train_s += clock.train_s
        return EpochStats(self.state.sums.loss_sum / updates, self.state.sums.lr, speed, clock.train_s)

    def _begin_cold(self, update: int) -> None:
        """Layers were factorised at this update, so the next updates are warm-up again."""
        self._cold_updates = COLD_UPDATES[self.config.step.compile]
        self._switch_speed.begin(update)

    def _warm_at(self) -> int:
        """The update of the epoch after which warm-up ends, at the latest after half of its remaining updates."""
        done = self.state.position.updates_done
        return done + max(1, min(self._cold_updates, (self.setup.plan.updates_per_epoch - done) // 2))

    def _log_interval(self, epoch: int, clock: Clock) -> Speed:
        """Log the interval since the last call; returns the epoch's speed so far."""
        setup, sums, position = self.setup, self.state.sums, self.state.position
        Mark.of(current_stream(setup.device)).wait_on_host()  # so that the clock is right
        clock.tick()
        loading = setup.train_loader.stats()
        clock.wait_s += loading.device_wait_s
        own = RankFigures(*clock.stretches(), memory_gb(setup.device), loading)
        means, numbers_WF = setup.step.meter.read_with(own.numbers(), self.world)
        ranks = RankFigures.of(numbers_WF.T)
        sums.loss_sum += means.loss * (position.updates_done - sums.updates_logged)
        sums.updates_logged = position.updates_done
        speed = Speed.of(ranks.interval)
        waited = RankFigures.of(numbers_WF[speed.wait_rank].tolist()).loading
        norm = setup.step.grad_norm
        figures = Figures(
            loss=means.loss,
            lr=sums.lr,
            img_per_s=speed.img_per_s,
            wait_share=speed.wait_share,
            memory_gb=float(np.max(ranks.memory_gb)),
            loading=replace(waited, bad_samples=self._count_bad(ranks.loading)),
            mfu=mfu(speed.img_per_s, setup.train_flops, setup.peak, self.world.size) if setup.train_flops else None,
            grad_norm=None if norm is None else float(norm),
            wait_rank=speed.wait_rank if self.world.size > 1 else None,
            penalties=setup.step.regulariser.values() if setup.step.regulariser else {},
        )
        self.outputs.log_interval(epoch, position.num_updates, figures, means.top1)
        if not self._cold_updates:
            self._recheck_loader(ranks.interval)
            if found := self._switch_speed.see(speed.img_per_s):
                self.outputs.log_switch_speed(position.num_updates, *found)
        return Speed.of(ranks.epoch)

    def _recheck_loader(self, stretch: Stretch) -> None:
        """Check once whether the first updates waited for a loader whose share of the JPEG engine was chosen."""
        share = self.setup.train_loader.engine_share
        if share and self.world.is_first and (first := self._first_updates.add(stretch)):
            speed, ranks = Speed.of(first), self.world.size
            images, *_, read_bytes = np.reshape(first, (4, -1))
            read = ranks * float(read_bytes[speed.wait_rank] / images[0])
            if line := share.recheck(speed.img_per_s / ranks, speed.wait_share, read):
                self.outputs.display.say(line)

    def _count_bad(self, ranks: LoaderStats) -> int:
        """How many different samples all ranks have skipped as damaged; gathered again when the counts change."""
        counts = np.array(ranks.bad_samples)
        if not np.array_equal(counts, self._bad_counts):
            found = self.world.gather_on_first(self.setup.train_loader.bad) or ()
            self._bad_counts, self._num_bad = counts, self.world.from_first(len(frozenset[int]().union(*found)))
        return self._num_bad

    def _finish_epoch(self, epoch: int, stats: EpochStats) -> None:
        """Validate if that is due, log, save."""
        is_last = epoch == self.setup.num_epochs - 1
        scores = self._validate() if is_last or (epoch + 1) % self.config.run.val_interval == 0 else {}
        row = {"epoch": epoch, "update": self.state.position.num_updates, "train_loss": stats.loss}
        speed: dict[str, float | None] = {"lr": stats.lr, "img_per_s": None, "data_wait": None}
        if stats.speed:
            speed |= {"img_per_s": stats.speed.img_per_s, "data_wait": stats.speed.wait_share}
            if self.world.size > 1:
                speed["data_wait_rank"] = stats.speed.wait_rank
        self.outputs.log_epoch(row | speed, scores, stats.train_s)  # before the checkpoint that counts it as done
        self.state.end_epoch()
        with self._phases("checkpoint"):
            self.checkpoints.save_epoch(epoch, scores)
        self.setup.scheduler.step(epoch + 1)

    def _validate(self) -> dict[str, Scores]:
        """Scores by prefix of the metric's name. Raises `Stopped` if all ranks should end meanwhile."""
        setup, world = self.setup, self.world
        if setup.val_loader is None:
            return {}
        world.average_buffers(setup.model)
        # A validation may be long: if the run ends meanwhile, the epoch must not be lost.
        with self._phases("checkpoint"):
            self.checkpoints.save(may_skip=True)
        most_batches = int(world.greatest(setup.val_loader.plan.steps_per_epoch)[0])
        progress = self.outputs.display.within(most_batches * len(setup.evaluators))

        def tell(done: int) -> None:
            progress.tell(done, "validation: batch")
            # Each evaluator compiles in the first batch of its own pass.
            world.progress.tick(is_compiled=done > most_batches * (len(setup.evaluators) - 1))

        loader = UntilStopped(setup.val_loader, most_batches, self.stop, tell)
        log = partial(self.outputs.log_flows, self.state.position)
        with self._phases("evaluation"), flows_of(loader, setup.flows, log) as seen:
            return {prefix: evaluate(seen, setup.val_batch, world.sum) for prefix, evaluate in setup.evaluators.items()}
