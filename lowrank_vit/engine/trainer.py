"""The loop that joins the rooms: epochs of steps, validation, checkpoints and the spectral monitor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lowrank_vit.config_check import parse_interval
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.loader import Loader
from lowrank_vit.engine.checkpoint import read_checkpoint
from lowrank_vit.engine.distributed import World
from lowrank_vit.engine.evaluate import Scores
from lowrank_vit.engine.outputs import Outputs
from lowrank_vit.engine.pace import wait_for
from lowrank_vit.engine.peak import memory_gb, mfu
from lowrank_vit.engine.progress import Clock, Figures
from lowrank_vit.engine.run_dir import RunDir
from lowrank_vit.engine.saver import BEST, LAST
from lowrank_vit.engine.setup import make_parts
from lowrank_vit.engine.state import Progress, capture, restore
from lowrank_vit.engine.stop import StopRequest
from lowrank_vit.options import Config
from lowrank_vit.spectral.monitor import SpectralMonitor, default_cpu_threads
from lowrank_vit.spectral.ranks import GlooRanks
from lowrank_vit.spectral.refresh import Settings

COLD_UPDATES = {False: 2, True: 20}
"""The first updates of a process, without and with --compile: compilers, autotuning and memory pools get ready in them,
so they are no part of img/s, MFU and the share of waiting."""


@dataclass(frozen=True)
class Result:
    """What a run has to say when it ends."""

    run_dir: Path
    metric: str
    """--eval-metric, e.g. top1."""
    best: float | None
    """Best validation score: of the EMA where there is one. None: nothing was validated."""
    best_epoch: int
    """0-based."""
    train_s: float
    """Seconds in training steps, without validation."""
    stopped_by: str = ""
    """The signal on which it ended before its last epoch."""
    num_updates: int = 0


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


class _Stopped(Exception):
    """All ranks are to end here; the state is that after the last update."""


class Trainer:
    """One run of one  Everything that can be wrong is found before the run directory is made."""

    def __init__(self, config: Config, default_name: str, world: World | None = None) -> None:
        """`default_name` begins the run directory's name where `--experiment` is not given. Raises `UserError`."""
        self.world = world or World()
        is_first = self.world.is_first
        earlier = RunDir.restarted(config.run.output, config.run.experiment) if is_first else None
        earlier = self.world.from_first(earlier)
        if earlier and not config.run.resume and (earlier / LAST).exists():
            config = replace(config, run=replace(config.run, resume=earlier / LAST))
        self.config = config
        if is_first and not earlier and not config.run.resume:
            RunDir.require_free(config.run.output, config.run.experiment)  # before data are converted for nothing
        resumed = read_checkpoint(config.run.resume) if config.run.resume else None
        self.parts = make_parts(config, resumed, self.world)
        self.progress = restore(config, self.parts, resumed) if resumed else Progress()
        self.run_dir = RunDir(Path(), None)
        if is_first and (resumed or earlier):
            self.run_dir = RunDir.reopen(resumed.path.parent if resumed else earlier)
        elif is_first:
            self.run_dir = RunDir.create(config.run.output, config.run.experiment, default_name)
        if is_first and not resumed:
            self.run_dir.forget()
        self.run_dir.path = self.world.from_first(self.run_dir.path)
        self.stop = StopRequest(self.world)

    def run(self) -> Result:
        """Train to the last epoch. The run directory holds everything; see `docs/architecture.md`."""
        parts, stopped_by = self.parts, ""
        self.train_s = 0.0
        self._cold_updates = COLD_UPDATES[self.config.step.compile]
        self._interval_updates, self._interval_s = parse_interval(self.config.run.checkpoint_interval)
        self._saved_at = time.monotonic()
        with ExitStack() as stack:
            stack.callback(self.run_dir.close)
            self.monitor = stack.enter_context(self._make_monitor()) if self.config.spectra.spec_monitor else None
            for loader in (parts.train_loader, parts.val_loader):
                if loader:
                    stack.callback(loader.close)
            self.outputs = stack.enter_context(self._make_outputs())
            self.progress = replace(self.progress, wandb_id=self.outputs.wandb_id)
            if self.monitor and parts.step.num_updates == 0:
                self.monitor.observe(0)
            with self.stop.noted():  # to the end: what asked for it once may ask again while all is saved
                try:
                    for epoch in range(self.progress.epoch, parts.num_epochs):
                        stats = self._train_epoch(epoch)
                        self._finish_epoch(epoch, stats)
                except _Stopped:
                    stopped_by = self.world.stop_reason
                    self._save()
                self._finish_spectra()
                self.outputs.finish()
        progress, updates = self.progress, parts.step.num_updates
        best = progress.best_metric, progress.best_epoch
        return Result(self.run_dir.path, self.config.run.eval_metric, *best, self.train_s, stopped_by, updates)

    def _make_outputs(self) -> Outputs:
        indices = self.monitor.indices_by_type() if self.monitor else {}
        common = self.config, self.parts, self.run_dir, self.progress
        return Outputs(*common, is_first=self.world.is_first, indices=indices)

    def _make_monitor(self) -> SpectralMonitor:
        options = self.config.spectra
        return SpectralMonitor(
            self.parts.model,
            self.parts.ema.module if self.parts.ema else None,
            targets=options.spec_targets,
            every=options.spec_every,
            store_dir=self.run_dir.path / "spectra",
            settings=Settings(
                options.spec_topk,
                options.spec_interval,
                options.spec_solver,
                options.spec_on_cpu,
                options.spec_cpu_threads or default_cpu_threads(),
            ),
            split_qkv=options.spec_split_qkv,
            limit_gb=options.spec_store_gb,
            resumed_update=self.parts.step.num_updates if self.progress.is_begun else None,
            ranks=GlooRanks() if self.world.size > 1 else None,
        )

    def _finish_spectra(self) -> None:
        if not self.monitor:
            return
        self.monitor.close()
        self.outputs.log_spectra(self.monitor.records())
        if self.monitor.skipped:
            self.outputs.display.say(
                f"{self.monitor.skipped} spectral refreshes were skipped, since the one before was still running; a "
                "greater --spec-every avoids that"
            )

    def _train_epoch(self, epoch: int) -> EpochStats:
        """The rest of an epoch. Raises `_Stopped` after the update at which all ranks are to end."""
        parts, interval = self.parts, self.config.run.log_interval
        parts.model.train()
        updates, done = parts.plan.updates_per_epoch, self.progress.updates_done
        clock, lr, num_images, begun, logged = Clock(), parts.step.lr, 0, _Mark(), _Mark()
        warm_at = done + min(self._cold_updates, (updates - done) // 2)
        batches = parts.train_loader.batches(epoch) if done < updates else iter(())
        for batch in clock.timed(batches):
            lr = parts.step.lr
            is_due = (done + 1) % interval == 0 or done + 1 == updates
            num_images += len(batch) * self.world.size
            if not parts.step(batch, measure_norm=is_due):
                continue
            done += 1
            self.progress = replace(self.progress, updates_done=done)
            parts.scheduler.step_update(parts.step.num_updates)
            if self.monitor:
                self.monitor.observe(parts.step.num_updates)
            if is_due:
                logged = self._log_interval(epoch, lr, clock, num_images, logged)
            if done == warm_at:
                wait_for(parts.device)  # what was asked of it so far is no part of what follows
                clock.tick()
                begun = logged = _Mark(num_images, clock.train_s, clock.wait_s)
                self._cold_updates = 0
            self._save_if_due(is_due)
            if self.world.stops_after(parts.step.num_updates):
                raise _Stopped
        self.train_s += clock.train_s
        speed = begun.until(_Mark(num_images, clock.train_s, clock.wait_s))
        return EpochStats(self.progress.loss_sum / updates, lr, *speed, clock.train_s)

    def _log_interval(self, epoch: int, lr: float, clock: Clock, num_images: int, before: _Mark) -> _Mark:
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
            lr=lr,
            img_per_s=img_per_s,
            wait_share=wait_share,
            memory_gb=memory_gb(parts.device),
            loading=loading,
            mfu=mfu(img_per_s, parts.train_flops, parts.peak, self.world.size) if parts.train_flops else None,
            grad_norm=None if norm is None else float(norm),
        )
        self.outputs.log_interval(epoch, parts.step.num_updates, figures, means.top1)
        self.outputs.log_spectra(self.monitor.records() if self.monitor else [])
        return now

    def _save_if_due(self, is_logged: bool) -> None:
        """Save between two validations, by --checkpoint-interval."""
        updates, seconds = self._interval_updates, self._interval_s
        # By the clock only where nothing is in the meter, since the ranks' clocks differ and its sums are common.
        is_time = bool(seconds) and is_logged and time.monotonic() - self._saved_at >= seconds
        if is_time or (updates and self.parts.step.num_updates % updates == 0):
            self._save(may_skip=True)

    def _finish_epoch(self, epoch: int, stats: EpochStats) -> None:
        """Validate where that is due, save, log."""
        config, parts = self.config, self.parts
        is_last = epoch == parts.num_epochs - 1
        scores: dict[str, Scores] = {}
        if is_last or (epoch + 1) % config.run.val_interval == 0:
            scores = self._validate()
        names, obsolete, progress = (LAST,), [], self.progress
        if scores:
            decisive: float = getattr(scores.get("ema_", scores[""]), config.run.eval_metric)
            progress, is_best, dropped = progress.after_validation(
                decisive, lower_is_better=config.run.eval_metric == "loss", num_kept=config.run.checkpoint_hist
            )
            # `last` last: it remembers the best score, and a resumed run would not write that again.
            best = (BEST,) if is_best else ()
            names = (*best, *(() if epoch in dropped else (_kept_name(epoch),)), LAST)
            obsolete = [_kept_name(one) for one in dropped if one != epoch]
        self.progress = replace(progress, epoch=epoch + 1, updates_done=0, updates_logged=0, loss_sum=0.0)
        self._save(names, tuple(obsolete))
        row = {"epoch": epoch, "update": parts.step.num_updates, "train_loss": stats.loss}
        speed = {"lr": stats.lr, "img_per_s": stats.img_per_s, "data_wait": stats.data_wait}
        self.outputs.log_epoch(row | speed, scores, stats.train_s)
        parts.scheduler.step(epoch + 1)

    def _validate(self) -> dict[str, Scores]:
        """By prefix of the metric's name."""
        parts, world = self.parts, self.world
        if parts.val_loader is None:
            return {}
        world.average_buffers(parts.model)
        loader = parts.val_loader if world.size > 1 else _UntilStopped(parts.val_loader, world)
        return {prefix: evaluate(loader, parts.val_batch, world.sum) for prefix, evaluate in parts.evaluators.items()}

    def _save(
        self, names: tuple[str, ...] = (LAST,), obsolete: tuple[str, ...] = (), *, may_skip: bool = False
    ) -> None:
        """Save the state; with `may_skip` not while the checkpoint before is still being written: that would stall."""
        content = capture(self.config, self.parts, self.progress)  # on every rank
        if may_skip and self.outputs.is_saving:
            return
        self.outputs.save(content, names, obsolete)
        self._saved_at = time.monotonic()


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


def _kept_name(epoch: int) -> str:
    return f"checkpoint-{epoch}.pth.tar"


class _UntilStopped:
    """A validation loader that gives up when the run is to end; the epoch is then validated after resuming."""

    def __init__(self, loader: Loader, world: World) -> None:
        self._loader, self._world = loader, world

    def batches(self, epoch: int) -> Iterator[Batch]:
        for batch in self._loader.batches(epoch):
            if self._world.is_asked_to_stop:
                raise _Stopped
            yield batch
