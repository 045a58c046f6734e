"""When a run is saved and under which names, and a progress that tells of no file that is not there."""

from __future__ import annotations

import time
from dataclasses import replace

from lowrank_vit.config.check import parse_interval
from lowrank_vit.config.options import Config
from lowrank_vit.run.checkpoint_writer import BEST
from lowrank_vit.run.directory import LAST
from lowrank_vit.run.outputs import Outputs
from lowrank_vit.run.state import Progress, capture
from lowrank_vit.score.evaluate import Scores
from lowrank_vit.spectral.monitor import SpectralMonitor
from lowrank_vit.training.setup import Parts


class Keeper:
    """Saves the run's state in the background. Every rank has one, since saving takes them all; the first writes.

    Each call returns the progress to go on with: where a file could not be written, the best epoch and the kept ones
    are again those whose files are there, so that a later one may take their place.
    """

    def __init__(self, config: Config, parts: Parts, outputs: Outputs, monitor: SpectralMonitor | None = None) -> None:
        """`outputs` writes, also what `monitor` has found so far; a new interval begins now."""
        self._config, self._parts, self._outputs, self._monitor = config, parts, outputs, monitor
        self._updates, self._seconds = parse_interval(config.run.checkpoint_interval)
        self._saved_at = time.monotonic()
        self._before = Progress()
        """The one before the last validation was counted in."""

    def save_if_due(self, progress: Progress, *, is_logged: bool) -> Progress:
        """Save between two validations, by --checkpoint-interval."""
        # By the clock only where nothing is in the meter, since the ranks' clocks differ and its sums are common.
        is_time = bool(self._seconds) and is_logged and time.monotonic() - self._saved_at >= self._seconds
        if is_time or (self._updates and self._parts.step.num_updates % self._updates == 0):
            return self.save(progress, may_skip=True)
        return progress

    def save_epoch(self, progress: Progress, scores: dict[str, Scores]) -> Progress:
        """Save at an epoch's end; `scores` by prefix of the metric's name, none where it was not validated."""
        run, epoch = self._config.run, progress.epoch
        names, obsolete, progress = (LAST,), [], self._settled(progress)
        if scores:
            self._before = progress
            known, is_loss = _by_weights(scores, run.eval_metric), run.eval_metric == "loss"
            counted = progress.after_validation(known, lower_is_better=is_loss, num_kept=run.checkpoint_hist)
            progress, is_best, dropped = counted
            # `last` last: it remembers the best score, and a resumed run would not write that again.
            best = (BEST,) if is_best else ()
            names = (*best, *(() if epoch in dropped else (_kept_name(epoch),)), LAST)
            obsolete = [_kept_name(one) for one in dropped if one != epoch]
        progress = replace(progress, epoch=epoch + 1, updates_done=0, updates_logged=0, loss_sum=0.0)
        return self.save(progress, names, tuple(obsolete))

    def save(
        self,
        progress: Progress,
        names: tuple[str, ...] = (LAST,),
        obsolete: tuple[str, ...] = (),
        *,
        may_skip: bool = False,
    ) -> Progress:
        """Save the state; with `may_skip` not while the checkpoint before is still being written: that would stall."""
        is_skipped = may_skip and self._outputs.is_saving
        if not is_skipped:
            progress = self._settled(progress)
        content = capture(self._config, self._parts, progress)  # on every rank
        if not is_skipped:
            kept = None
            if self._monitor:
                kept = self._monitor.kept()
                self._outputs.log_spectra(self._monitor.records())
            self._outputs.save(content, names, obsolete, kept)
            self._saved_at = time.monotonic()
        return progress

    def _settled(self, progress: Progress) -> Progress:
        """Wait for the checkpoint before, and leave out of `progress` what could not be written."""
        lost, before = self._outputs.settle(), self._before
        if BEST in lost:
            best = {"best_metric": before.best_metric, "best_scores": before.best_scores}
            progress = replace(progress, best_epoch=before.best_epoch, **best)
        if any(name not in (BEST, LAST) for name in lost):
            progress = replace(progress, kept=before.kept)
        return progress


def _by_weights(scores: dict[str, Scores], metric: str) -> dict[str, float]:
    return {prefix.rstrip("_") or "model": getattr(score, metric) for prefix, score in scores.items()}


def _kept_name(epoch: int) -> str:
    return f"checkpoint-{epoch}.pth.tar"
