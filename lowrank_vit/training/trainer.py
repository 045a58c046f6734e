"""The loop that joins the rooms: epochs of steps, validation, checkpoints and the spectral monitor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from lowrank_vit.common import terminal
from lowrank_vit.common.devices import wait_for
from lowrank_vit.config.options import Config
from lowrank_vit.model.flops import memory_gb, mfu
from lowrank_vit.ranks.failing import Failing
from lowrank_vit.ranks.world import World
from lowrank_vit.run.checkpoint_policy import Keeper
from lowrank_vit.run.directory import RunDir
from lowrank_vit.run.metrics import last_recorded
from lowrank_vit.run.outputs import SPECTRA, Outputs
from lowrank_vit.run.progress import Clock, Figures
from lowrank_vit.run.state import Progress, restore
from lowrank_vit.score.evaluate import Scores
from lowrank_vit.spectral.monitor import SpectralMonitor, default_cpu_threads
from lowrank_vit.spectral.refresh import SpectralSettings
from lowrank_vit.training.resume import find_start, open_run_dir
from lowrank_vit.training.setup import make_parts, silent
from lowrank_vit.training.stop import Stopped, StopRequest, UntilStopped

COLD_UPDATES = {False: 2, True: 20}
"""The first updates of a process, without and with --compile: compilers, autotuning and memory pools get ready in them,
so they are no part of img/s, MFU and the share of waiting."""

_REFRESH_TIMEOUT = timedelta(minutes=10)
"""After so long the spectra of a rank that hangs are no longer waited for."""


@dataclass(frozen=True)
class Result:
    """What a run has to say when it ends."""

    run_dir: Path
    metric: str
    """--eval-metric, e.g. top1."""
    best: float | None
    """Best validation score, of the model or of its EMA. None: nothing was validated."""
    best_epoch: int
    """0-based."""
    train_s: float
    """Seconds in training steps, without validation."""
    stopped_by: str = ""
    """The signal on which it ended before its last epoch."""
    num_updates: int = 0
    best_scores: dict[str, float] = field(default_factory=dict[str, float])
    """In the best epoch: of the "model", and of its "ema" where there is one."""


@dataclass(frozen=True)
class EpochStats:
    """One epoch of training, as far as this process did it."""

    loss: float
    lr: float
    """In the epoch's last update."""
    img_per_s: float
    """Of all ranks, without the process's first updates, which compile."""
    data_wait: float
    """Share of that time spent waiting for data, 0-1."""
    train_s: float
    """With them."""


class Trainer:
    """One run of one configuration. Everything that can be wrong is found before the run directory is made."""

    def __init__(
        self, config: Config, default_name: str, world: World | None = None, failing: Failing | None = None
    ) -> None:
        """`default_name` begins the run directory's name where `--experiment` is not given. Raises `UserError`.

        `failing` tells the other ranks of `world` of an error.
        """
        self.world = world or World()
        self._failing = failing or Failing(self.world)
        start = find_start(config, self.world)
        self.config = start.config
        self.parts = make_parts(self.config, start.resumed, self.world)
        self.config = self.parts.config
        self.progress = restore(self.config, self.parts, start.resumed) if start.resumed else Progress()
        self.run_dir = open_run_dir(start, default_name) if self.world.is_first else RunDir(Path(), None)
        self.run_dir.path = self.world.from_first(self.run_dir.path)
        self.stop = StopRequest(self.world)

    def run(self) -> Result:
        """Train to the last epoch. The run directory holds everything; see `docs/design/checkpoints.md`."""
        parts, stopped_by = self.parts, ""
        self.train_s = 0.0
        self._cold_updates = COLD_UPDATES[self.config.step.compile]
        self._say: Callable[[str], object] = terminal.say if self.world.is_first else silent
        with ExitStack() as stack, self._failing.told_at_once():  # before what follows an error is closed
            stack.callback(self.run_dir.close)
            self.monitor = stack.enter_context(self._make_monitor()) if self.config.spectra.spec_monitor else None
            for loader in (parts.train_loader, parts.val_loader):
                if loader:
                    stack.callback(loader.close)
            self.outputs = stack.enter_context(self._make_outputs())
            self._say = self.outputs.display.say
            # Without --log-wandb the run's id is kept for the next time.
            self.progress = replace(self.progress, wandb_id=self.outputs.wandb_id or self.progress.wandb_id)
            self.keeper = Keeper(self.config, parts, self.outputs, self.monitor)
            if self.monitor and parts.step.num_updates == 0:
                self.monitor.observe(0)
            with self.stop.noted():  # to the end: what asked for it once may ask again while all is saved
                try:
                    for epoch in range(self.progress.epoch, parts.num_epochs):
                        stats = self._train_epoch(epoch)
                        self._finish_epoch(epoch, stats)
                except Stopped:
                    stopped_by = self.stop.reason
                    self.progress = self.keeper.save(self.progress)
                self._finish_spectra()
                self.outputs.finish()
        progress, updates = self.progress, parts.step.num_updates
        best = progress.best_metric, progress.best_epoch
        end = self.train_s, stopped_by, updates, progress.best_scores
        return Result(self.run_dir.path, self.config.run.eval_metric, *best, *end)

    def _make_outputs(self) -> Outputs:
        indices = self.monitor.indices_by_type() if self.monitor else {}
        common = self.config, self.parts, self.run_dir, self.progress
        return Outputs(*common, is_first=self.world.is_first, indices=indices)

    def _make_monitor(self) -> SpectralMonitor:
        options, store_dir = self.config.spectra, self.run_dir.path / SPECTRA
        done = self.parts.step.num_updates if self.progress.is_begun else None
        recorded = -1 if done is None else last_recorded(self.run_dir.path, "spec", done)
        return SpectralMonitor(
            self.parts.model,
            self.parts.ema.module if self.parts.ema else None,
            targets=options.spec_targets,
            every=options.spec_every,
            store_dir=store_dir,
            settings=SpectralSettings(
                options.spec_topk,
                options.spec_interval,
                options.spec_solver,
                options.spec_on_cpu,
                options.spec_cpu_threads or default_cpu_threads(),
            ),
            split_qkv=options.spec_split_qkv,
            limit_gb=options.spec_store_gb,
            resumed_update=done,
            recorded_update=self.world.from_first(recorded),
            ranks=self.world.channel(_REFRESH_TIMEOUT),
            say=lambda line: self._say(line),
        )

    def _finish_spectra(self) -> None:
        if not self.monitor:
            return
        self.monitor.close()
        self.outputs.log_spectra(self.monitor.records())
        if self.monitor.skipped:
            self._say(
                f"{self.monitor.skipped} spectral refreshes were skipped, since the one before was still running; a "
                "greater --spec-every avoids that"
            )
        if self.monitor.failed:
            self._say(
                f"{self.monitor.failed} spectral refreshes failed, the first as was said; training missed nothing"
            )

    def _train_epoch(self, epoch: int) -> EpochStats:
        """The rest of an epoch. Raises `Stopped` after the update at which all ranks are to end."""
        parts, interval = self.parts, self.config.run.log_interval
        parts.model.train()
        updates, done = parts.plan.updates_per_epoch, self.progress.updates_done
        clock, num_images, begun, logged = Clock(), 0, _Mark(), _Mark()
        warm_at = done + min(self._cold_updates, (updates - done) // 2)
        self.stop.begin(parts.step.num_updates)
        batches = parts.train_loader.batches(epoch) if done < updates else iter(())
        for batch in clock.timed(batches):
            lr = parts.step.lr
            is_due = (done + 1) % interval == 0 or done + 1 == updates
            num_images += len(batch) * self.world.size
            if not parts.step(batch, measure_norm=is_due):
                continue
            done += 1
            self.progress = replace(self.progress, updates_done=done, lr=lr)
            parts.scheduler.step_update(parts.step.num_updates)
            if self.monitor:
                self.monitor.observe(parts.step.num_updates)
                self.outputs.log_spectra(self.monitor.records())
            if is_due:
                logged = self._log_interval(epoch, clock, num_images, logged)
            if done == warm_at:
                wait_for(parts.device)  # what was asked of it so far is no part of what follows
                clock.tick()
                begun = logged = _Mark(num_images, clock.train_s, clock.wait_s)
                self._cold_updates = 0
            self.progress = self.keeper.save_if_due(self.progress, is_logged=is_due)
            if self.stop.comes_after(parts.step.num_updates):
                raise Stopped
        self.train_s += clock.train_s
        speed = begun.until(_Mark(num_images, clock.train_s, clock.wait_s))
        return EpochStats(self.progress.loss_sum / updates, self.progress.lr, *speed, clock.train_s)

    def _log_interval(self, epoch: int, clock: Clock, num_images: int, before: _Mark) -> _Mark:
        """Log what happened since `before`; the mark for the next time."""
        parts, progress = self.parts, self.progress
        means = parts.step.meter.read(self.world)  # waits for the device, so the clock is right
        clock.tick()
        new = progress.updates_done - progress.updates_logged
        loss_sum = progress.loss_sum + means.loss * new
        self.progress = replace(progress, updates_logged=progress.updates_done, loss_sum=loss_sum)
        loading = parts.train_loader.stats()
        clock.wait_s += loading.device_wait_s
        now = _Mark(num_images, clock.train_s, clock.wait_s)
        img_per_s, wait_share = before.until(now)
        norm = parts.step.grad_norm
        figures = Figures(
            loss=means.loss,
            lr=progress.lr,
            img_per_s=img_per_s,
            wait_share=wait_share,
            memory_gb=memory_gb(parts.device),
            loading=loading,
            mfu=mfu(img_per_s, parts.train_flops, parts.peak, self.world.size) if parts.train_flops else None,
            grad_norm=None if norm is None else float(norm),
        )
        self.outputs.log_interval(epoch, parts.step.num_updates, figures, means.top1)
        return now

    def _finish_epoch(self, epoch: int, stats: EpochStats) -> None:
        """Validate where that is due, save, log."""
        parts = self.parts
        is_last = epoch == parts.num_epochs - 1
        scores = self._validate() if is_last or (epoch + 1) % self.config.run.val_interval == 0 else {}
        row = {"epoch": epoch, "update": parts.step.num_updates, "train_loss": stats.loss}
        speed = {"lr": stats.lr, "img_per_s": stats.img_per_s, "data_wait": stats.data_wait}
        self.outputs.log_epoch(row | speed, scores, stats.train_s)  # before the checkpoint that counts it as done
        self.progress = self.keeper.save_epoch(self.progress, scores)
        parts.scheduler.step(epoch + 1)

    def _validate(self) -> dict[str, Scores]:
        """By prefix of the metric's name. Raises `Stopped` where all ranks are to end meanwhile."""
        parts, world = self.parts, self.world
        if parts.val_loader is None:
            return {}
        world.average_buffers(parts.model)
        # A validation may be long: what ends the run meanwhile must not cost the epoch.
        self.progress = self.keeper.save(self.progress, may_skip=True)
        most_batches = int(world.greatest(parts.val_loader.plan.steps_per_epoch)[0])
        loader = UntilStopped(parts.val_loader, most_batches, self.stop)
        return {prefix: evaluate(loader, parts.val_batch, world.sum) for prefix, evaluate in parts.evaluators.items()}


class _Mark(NamedTuple):
    """A place between two updates, counted from the beginning of the epoch."""

    images: int = 0
    train_s: float = 0.0
    wait_s: float = 0.0

    def until(self, end: _Mark) -> tuple[float, float]:
        """Images a second, and the share of the time spent waiting for data, 0-1, from here on; zeros for nothing."""
        seconds = end.train_s - self.train_s
        if seconds <= 0:
            return 0.0, 0.0
        return (end.images - self.images) / seconds, min(1.0, (end.wait_s - self.wait_s) / seconds)
