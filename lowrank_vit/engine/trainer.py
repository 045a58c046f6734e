"""The loop that joins the rooms: epochs of steps, validation, checkpoints and the spectral monitor."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lowrank_vit import config as configuration
from lowrank_vit.engine.checkpoint import read_checkpoint, write_checkpoint
from lowrank_vit.engine.distributed import rank_and_world_size
from lowrank_vit.engine.metrics import RunLog
from lowrank_vit.engine.progress import Clock, Display, duration
from lowrank_vit.engine.run_dir import RunDir, environment_json
from lowrank_vit.engine.setup import make_parts
from lowrank_vit.engine.state import Progress, capture, restore
from lowrank_vit.options import Config
from lowrank_vit.spectral.monitor import SpectralMonitor, default_cpu_threads
from lowrank_vit.spectral.refresh import Settings


@dataclass(frozen=True)
class Result:
    """What a finished run has to say."""

    run_dir: Path
    top1: float
    """Best validation top-1, percent: of the EMA where there is one."""
    best_epoch: int
    """0-based."""
    train_s: float
    """Seconds in training steps, without validation."""


@dataclass(frozen=True)
class EpochStats:
    """One epoch of training."""

    loss: float
    lr: float
    """In the epoch's last update."""
    img_per_s: float
    data_wait: float
    """Share of the time spent waiting for data, 0-1."""
    train_s: float


class Trainer:
    """One run of one configuration. Everything that can be wrong is found before the run directory is made."""

    def __init__(self, config: Config, default_name: str) -> None:
        """`default_name` begins the run directory's name where `--experiment` is not given. Raises `UserError`."""
        self.config = config
        rank_and_world_size()
        resumed = read_checkpoint(config.run.resume) if config.run.resume else None
        self.parts = make_parts(config, resumed)
        self.progress = restore(config, self.parts, resumed) if resumed else Progress()
        self.run_dir = (
            RunDir.reopen(resumed.path.parent)
            if resumed
            else RunDir.create(config.run.output, config.run.experiment, default_name)
        )

    def run(self) -> Result:
        """Train to the last epoch. The run directory holds everything; see `docs/architecture.md`."""
        config, parts, path = self.config, self.parts, self.run_dir.path
        train_s = 0.0
        with ExitStack() as stack:
            stack.callback(self.run_dir.close)
            self.run_dir.write_text("environment.json", environment_json(parts.device))
            self.monitor = stack.enter_context(self._make_monitor()) if config.spectra.spec_monitor else None
            indices = self.monitor.indices_by_type() if self.monitor else {}
            recorded = "".join(f"# spectra of {kind}: singular indices {found}\n" for kind, found in indices.items())
            self.run_dir.write_text("args.yaml", configuration.to_yaml(config) + recorded)
            stack.callback(parts.train_loader.close)
            stack.callback(parts.val_loader.close)
            self.log = stack.enter_context(
                RunLog(
                    path,
                    wandb_project=config.run.wandb_project if config.run.log_wandb else None,
                    config={name: value for name, _, value in configuration.leaves(config)} | {"spec-indices": indices},
                    start_epoch=self.progress.next_epoch,
                )
            )
            total_updates = parts.num_epochs * parts.plan.steps_per_epoch
            self.display = stack.enter_context(Display(total_updates, parts.step.num_updates))
            self._say_what_runs()
            if self.monitor and parts.step.num_updates == 0:
                self.monitor.observe(0)
            for epoch in range(self.progress.next_epoch, parts.num_epochs):
                stats = self._train_epoch(epoch)
                train_s += stats.train_s
                self._finish_epoch(epoch, stats)
                parts.scheduler.step(epoch + 1)
            if self.monitor:
                self.monitor.close()
                self._log_spectra()
                if self.monitor.skipped:
                    self.display.say(
                        f"{self.monitor.skipped} spectral refreshes were skipped, since the one before was still "
                        "running; a greater --spec-every avoids that"
                    )
        return Result(path, self.progress.best_top1, self.progress.best_epoch, train_s)

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
            resumed_update=self.parts.step.num_updates if self.progress.next_epoch else None,
        )

    def _say_what_runs(self) -> None:
        for line in (*self.parts.description, f"run directory {self.run_dir.path}"):
            self.display.say(line)
        if self.progress.next_epoch:
            best = f"best top-1 so far {self.progress.best_top1:.2f} %"
            self.display.say(f"resumed after epoch {self.progress.next_epoch}, {best}")

    def _train_epoch(self, epoch: int) -> EpochStats:
        parts, batch_size = self.parts, self.config.data.batch_size
        parts.model.train()
        clock, steps, loss_sum, logged = Clock(), parts.plan.steps_per_epoch, 0.0, 0
        lr = parts.step.lr
        for n, batch in enumerate(clock.timed(parts.train_loader.batches(epoch)), start=1):
            lr = parts.step.lr
            parts.step(batch)
            parts.scheduler.step_update(parts.step.num_updates)
            if self.monitor:
                self.monitor.observe(parts.step.num_updates)
            if n % self.config.run.log_interval == 0 or n == steps:
                loss = parts.step.read_loss()  # waits for the device, so the clock is right
                clock.tick()
                loss_sum += loss * (n - logged)
                logged = n
                img_per_s = n * batch_size / clock.train_s
                loading = parts.train_loader.stats()
                values = {"epoch": epoch, "loss": loss, "lr": lr, "img_per_s": img_per_s, "data_wait": clock.wait_share}
                self.log.log("train", parts.step.num_updates, {**values, **asdict(loading)})
                self._log_spectra()
                name, figures = f"{epoch + 1}/{parts.num_epochs}", (img_per_s, clock.wait_share, loading)
                self.display.update(parts.step.num_updates, name, loss, *figures)
        img_per_s = steps * batch_size / clock.train_s
        return EpochStats(loss_sum / steps, lr, img_per_s, clock.wait_share, clock.train_s)

    def _finish_epoch(self, epoch: int, stats: EpochStats) -> None:
        """Validate where that is due, save, log."""
        self.progress = replace(self.progress, next_epoch=epoch + 1)
        is_last = epoch == self.parts.num_epochs - 1
        if not is_last and (epoch + 1) % self.config.run.val_interval:
            self._save(is_best=False)
            return
        scores = {
            prefix: evaluate(self.parts.val_loader, self.parts.val_batch)
            for prefix, evaluate in self.parts.evaluators.items()
        }
        decisive = scores.get("ema_", scores[""])
        is_best = decisive.top1 > self.progress.best_top1
        if is_best:
            self.progress = replace(self.progress, best_top1=decisive.top1, best_epoch=epoch)
        self._save(is_best)
        update = self.parts.step.num_updates
        values: dict[str, float] = {}
        for prefix, score in scores.items():
            values |= {f"eval_{prefix}{k}": getattr(score, k) for k in ("loss", "top1", "top5")}
        self.log.log("eval", update, {"epoch": epoch, **values})
        speed = {"lr": stats.lr, "img_per_s": stats.img_per_s, "data_wait": stats.data_wait}
        self.log.log_epoch({"epoch": epoch, "update": update, "train_loss": stats.loss, **values, **speed})
        ema = f" (EMA {scores['ema_'].top1:.2f})" if "ema_" in scores else ""
        self.display.say(
            f"epoch {epoch + 1:>3}/{self.parts.num_epochs}  loss {stats.loss:.3f}  top-1 {scores[''].top1:5.2f}{ema} %"
            f"  {stats.img_per_s:,.0f} img/s  wait {stats.data_wait:.0%}  {duration(stats.train_s)}"
        )

    def _log_spectra(self) -> None:
        for record in self.monitor.records() if self.monitor else ():
            self.log.log("spec", record.update, record.values)

    def _save(self, is_best: bool) -> None:
        content = capture(self.config, self.parts, self.progress)
        if is_best:  # first, since `last` remembers the best score and a resumed run would not write it again
            write_checkpoint(self.run_dir.path / "model_best.pth.tar", content)
        write_checkpoint(self.run_dir.path / "last.pth.tar", content)
