"""What a run says and leaves behind while it goes; silent, and without files, on all ranks but the first."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import to_yaml
from lowrank_vit.config.options import Config, leaves
from lowrank_vit.run.checkpoint_writer import Beside, Saver
from lowrank_vit.run.directory import RunDir, environment, environment_json
from lowrank_vit.run.metrics import RunLog
from lowrank_vit.run.progress import Display, Figures, duration
from lowrank_vit.run.state import Progress
from lowrank_vit.run.wandb_log import WandbLog
from lowrank_vit.score.evaluate import Scores
from lowrank_vit.spectral.store import Kept, kept_name
from lowrank_vit.spectral.worker import SpectralRecord
from lowrank_vit.training.setup import Parts

SPECTRA = "spectra"
"""The store's folder in the run directory."""


class Outputs:
    """Display, metrics, W&B and checkpoints of one run. Use as a context manager."""

    def __init__(
        self,
        config: Config,
        parts: Parts,
        run_dir: RunDir,
        progress: Progress,
        *,
        is_first: bool,
        indices: dict[str, dict[str, list[int]]],
    ) -> None:
        """`indices`: the recorded singular indices by type of matrix; none without the monitor."""
        self._config, self._parts, self._run_dir, self._progress = config, parts, run_dir, progress
        self._is_first, self._indices = is_first, indices
        self.wandb_id = ""
        """Of the W&B run, for its resuming; empty without one."""

    def __enter__(self) -> Outputs:
        config, parts, run_dir, progress = self._config, self._parts, self._run_dir, self._progress
        with ExitStack() as stack:
            self._stack = stack
            done = parts.step.num_updates
            total = parts.num_epochs * parts.plan.updates_per_epoch
            self.display = stack.enter_context(Display(total, done, is_silent=not self._is_first))
            self._log: RunLog | None = None
            self._saver: Saver | None = None
            if self._is_first:
                run_dir.write_text("environment.json", environment_json(parts.device))
                recorded = (f"# spectra of {kind}: singular indices {found}\n" for kind, found in self._indices.items())
                run_dir.write_text("args.yaml", to_yaml(config) + "".join(recorded))
                wandb = self._start_wandb() if config.run.log_wandb else None
                begin = {"start_epoch": progress.epoch, "start_update": done}
                self._log = stack.enter_context(RunLog(run_dir.path, wandb=wandb, **begin, say=self.display.say))
                self._saver = Saver(run_dir.path, parts.device, self.display.say)
                stack.callback(self._finish_quietly)
            self._stack = stack.pop_all()
        for line in (*parts.description, f"run directory {run_dir.path}"):
            self.display.say(line)
        if progress.epoch >= parts.num_epochs:
            self.display.say(
                f"all {parts.num_epochs} epochs are done: nothing is left to train. A greater --epochs would go on"
            )
        elif progress.is_begun:
            best = progress.best_metric
            so_far = "" if best is None else f", best {config.run.eval_metric} so far {best:.4g}"
            self.display.say(f"resumed in epoch {progress.epoch + 1}, after update {done}{so_far}")
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _start_wandb(self) -> WandbLog:
        run = self._config.run
        flags = {name: value for name, _, value in leaves(self._config)}
        content = {**flags, "spec-indices": self._indices, "environment": environment(self._parts.device)}
        wandb = WandbLog.start(
            run.wandb_project,
            self._run_dir.path,
            content,
            tags=run.wandb_tags,
            resume_id=run.wandb_resume_id or self._progress.wandb_id,
            say=self.display.say,
        )
        self.wandb_id = wandb.run_id
        return wandb

    def log_interval(self, epoch: int, update: int, figures: Figures, top1: float) -> None:
        """What happened since the last time, to the display and the files."""
        values = {name: value for name, value in asdict(figures).items() if name not in ("loading", "wait_share")}
        values = {"epoch": epoch, **values, "top1": top1, "data_wait": figures.wait_share, **asdict(figures.loading)}
        if self._log:
            self._log.log("train", update, {name: value for name, value in values.items() if value is not None})
        self.display.update(update, f"{epoch + 1}/{self._parts.num_epochs}", figures)

    def log_spectra(self, records: list[SpectralRecord]) -> None:
        """Refreshes that are finished."""
        for record in records:
            if self._log:
                self._log.log("spec", record.update, record.values)

    def log_epoch(self, row: dict[str, Any], scores: dict[str, Scores], train_s: float) -> None:
        """A validated epoch; `row` is the one of summary.csv without the scores, which come by prefix."""
        for prefix, score in scores.items():
            row |= {f"eval_{prefix}{name}": getattr(score, name) for name in ("loss", "top1", "top5")}
        if self._log and scores:
            self._log.log_epoch(row)
        ema = f" (EMA {scores['ema_'].top1:.2f})" if "ema_" in scores else ""
        top1 = f"  top-1 {scores[''].top1:5.2f}{ema} %" if scores else ""
        self.display.say(
            f"epoch {row['epoch'] + 1:>3}/{self._parts.num_epochs}  loss {row['train_loss']:.3f}{top1}"
            f"  {row['img_per_s']:,.0f} img/s  wait {row['data_wait']:.0%}  {duration(train_s)}"
        )

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._saver is not None and self._saver.is_busy

    def settle(self) -> list[str]:
        """Wait until no checkpoint is being written; the names that could not be, see `Saver.settle`."""
        return self._saver.settle() if self._saver else []

    def save(
        self, content: dict[str, Any], names: tuple[str, ...], obsolete: tuple[str, ...], kept: Kept | None
    ) -> None:
        """Write a checkpoint in the background, see `Saver.save`, and what the spectral monitor keeps with it."""
        if self._saver:
            beside = Beside(SPECTRA, kept_name(kept.update), kept.content()) if kept else None
            self._saver.save(content, names, obsolete, beside)

    def finish(self) -> None:
        """Wait until the last checkpoint is written. Raises `UserError` if it could not be."""
        if self._saver:
            self._saver.close()

    def _finish_quietly(self) -> None:
        """On the way out of an error, which matters more than one of ours; that was said already."""
        with suppress(UserError):
            self.finish()
