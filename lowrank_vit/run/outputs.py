"""Everything that a run prints and logs; silent and without files on all ranks but the first."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.terminal import duration
from lowrank_vit.config.flags import to_yaml
from lowrank_vit.config.option_types import leaves
from lowrank_vit.config.options import Config
from lowrank_vit.config.tracking_options import trackers
from lowrank_vit.run.directory import RunDir, environment, environment_json
from lowrank_vit.run.metrics import Event, RunLog
from lowrank_vit.run.progress import Display, Figures, wait_in_words
from lowrank_vit.run.spectral_records import Prepared
from lowrank_vit.run.state import Position, RunState
from lowrank_vit.run.trackers.sending import Trackers
from lowrank_vit.run.trackers.tracker import About
from lowrank_vit.score.evaluate import Scores
from lowrank_vit.spectral.flows import Flows
from lowrank_vit.spectral.watching.files import forget_flows, write_flows
from lowrank_vit.spectral.watching.worker import SpectralRecord

SPECTRA = "spectra"
"""The store's folder in the run directory."""


def already_finished(num_epochs: int) -> str:
    """A line about a run that has nothing left to train."""
    return f"already finished: all {num_epochs} epochs are done. A larger --epochs would continue"


class Outputs:
    """Display, metrics and trackers of one run. Use as a context manager."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        state: RunState,
        *,
        device: torch.device,
        num_epochs: int,
        updates_per_epoch: int,
        description: list[str],
        is_first: bool,
        indices: dict[str, dict[str, list[int]]],
    ) -> None:
        """Read the run's position from `state`, and store the ids of tracker runs there.

        Args:
            config: of the run.
            run_dir: where files are written.
            state: of the run.
            device: named in environment.json.
            num_epochs: of the whole run.
            updates_per_epoch: of this run.
            description: lines to print at the start.
            is_first: whether this rank prints and writes.
            indices: the recorded singular indices by type of matrix; empty without the monitor.
        """
        self._config, self._run_dir, self._state, self._device = config, run_dir, state, device
        self._num_epochs, self._updates_per_epoch, self._description = num_epochs, updates_per_epoch, description
        self._is_first, self._indices = is_first, indices

    def __enter__(self) -> Outputs:
        config, run_dir, state, position = self._config, self._run_dir, self._state, self._state.position
        with ExitStack() as stack:
            self._stack = stack
            done, total = position.num_updates, self._num_epochs * self._updates_per_epoch
            self.display = stack.enter_context(Display(total, done, is_silent=not self._is_first))
            self._log: RunLog | None = None
            if self._is_first:
                say = self.display.say
                run_dir.write_text("environment.json", environment_json(self._device), say)
                recorded = (f"# spectra of {kind}: singular indices {found}\n" for kind, found in self._indices.items())
                run_dir.write_text("args.yaml", to_yaml(config) + "".join(recorded), say)
                if position.is_begun:
                    forget_flows(run_dir.path / SPECTRA, done)
                begin: dict[str, Any] = {"start_epoch": position.epoch, "start_update": done}
                begin |= {"spec_log": config.spectra.spec_log, "wandb_spec": config.tracking.wandb_spec}
                self._log = stack.enter_context(RunLog(run_dir.path, trackers=self._start_trackers(), **begin, say=say))
            self._stack = stack.pop_all()
        for line in (*self._description, f"run directory {run_dir.path}"):
            self.display.say(line)
        if position.epoch >= self._num_epochs:
            self.display.say(already_finished(self._num_epochs))
        elif position.is_begun:
            best = state.best.best_metric
            so_far = "" if best is None else f", best {config.run.eval_metric} so far {best:.4g}"
            self.display.say(f"resumed in epoch {position.epoch + 1}, after update {done}{so_far}")
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _start_trackers(self) -> Trackers | None:
        tracking, position = self._config.tracking, self._state.position
        if not trackers(tracking):
            return None
        flags = {name: value for name, _, value in leaves(self._config)}
        then = position.num_updates + 1
        about = About(
            tracking.wandb_project,
            self._run_dir.path.name,
            self._run_dir.path,
            {**flags, "spec-indices": self._indices, "environment": environment(self._device)},
            tracking.wandb_tags,
            {"epoch": position.epoch, "update": then, "spec_update": then} if position.is_begun else {},
        )
        given = {"wandb": tracking.wandb_resume_id} if tracking.wandb_resume_id else {}
        ids = {**self._state.tracker_ids, **given}
        found = Trackers.start(trackers(tracking), about, resume_ids=ids, say=self.display.say)
        self._state.tracker_ids = found.ids  # also of trackers that are not chosen now
        return found

    def log_interval(self, epoch: int, update: int, figures: Figures, top1: float) -> None:
        """Show and log the figures of a log interval."""
        apart = ("loading", "wait_share", "wait_rank", "penalties")
        values = {name: value for name, value in asdict(figures).items() if name not in apart}
        waiting = {"data_wait": figures.wait_share, "data_wait_rank": figures.wait_rank}
        values = {"epoch": epoch, **values, "top1": top1, **waiting, **asdict(figures.loading), **figures.penalties}
        if self._log:
            self._log.log("train", update, {name: value for name, value in values.items() if value is not None})
        is_interval = self._state.position.updates_done % self._config.run.log_interval == 0
        self.display.update(update, self._place(), figures, is_interval=is_interval)

    def tick(self) -> None:
        """Show progress if nothing else was shown for long."""
        self.display.tick(self._state.position.num_updates, self._place())

    def _place(self) -> str:
        return f"{self._state.position.epoch + 1}/{self._num_epochs}"

    def log_spectra(self, records: list[tuple[SpectralRecord, Prepared | None]]) -> None:
        """Log the finished refreshes of the spectra, see `SpectralMonitor.prepared_records`."""
        for record, prepared in records:
            if self._log:
                self._log.log_spectra(record.update, record.values, prepared)

    def log_low_rank(self, events: list[Event]) -> None:
        """Log and print events of training that becomes low-rank, with their evidence."""
        for event in events:
            if self._log:
                self._log.log("lowrank", event.update, event.values)
            for line in event.line.splitlines():
                self.display.say(line)

    def log_switch_speed(self, update: int, values: dict[str, Any], line: str) -> None:
        """Log and print the speed after a switch, separately from the records that do not depend on speed."""
        if self._log:
            self._log.log("speed", update, values)
        self.display.say(line)

    def log_flows(self, position: Position, values: dict[str, float], flows: Mapping[str, Flows]) -> None:
        """Log a validation's scalars of the models' flows, and write the full flows by kind."""
        if self._log:
            self._log.log("flow", position.num_updates, {"epoch": position.epoch, **values})
            try:
                write_flows(self._run_dir.path / SPECTRA, position.num_updates, flows)
            except UserError as error:
                self.display.say(f"warning: {error} Training goes on.")

    def log_epoch(self, row: dict[str, Any], scores: dict[str, Scores], train_s: float) -> None:
        """Show an epoch, and log it if validated; `row`: of summary.csv without the scores, which come by prefix."""
        for prefix, score in scores.items():
            row |= {f"eval_{prefix}{name}": getattr(score, name) for name in ("loss", "top1", "top5")}
        if self._log and scores:
            self._log.log_epoch(row)
        ema = f" (EMA {scores['ema_'].top1:.2f})" if "ema_" in scores else ""
        top1 = f"  top-1 {scores[''].top1:5.2f}{ema} %" if scores else ""
        speed = ""  # unknown if all updates were made before the run was resumed
        if row["img_per_s"] is not None:
            waiting = wait_in_words(row["data_wait"], row.get("data_wait_rank"))
            speed = f"  {row['img_per_s']:,.0f} img/s  wait {waiting}  {duration(train_s)}"
        self.display.say(f"epoch {row['epoch'] + 1:>3}/{self._num_epochs}  loss {row['train_loss']:.3f}{top1}{speed}")
