"""A run's counts and scores, which are saved in its checkpoints."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


@dataclass
class Position:
    """How far a run has come, between two updates. Epochs are 0-based."""

    epoch: int = 0
    """The current epoch, or the next one."""
    updates_done: int = 0
    """Updates made in this epoch."""
    num_updates: int = 0
    """Updates made in the run."""

    @property
    def is_begun(self) -> bool:
        """Whether anything was trained."""
        return self.epoch > 0 or self.updates_done > 0

    def count_update(self) -> None:
        """Count an update."""
        self.updates_done += 1
        self.num_updates += 1

    def end_epoch(self) -> None:
        """Start the next epoch."""
        self.epoch, self.updates_done = self.epoch + 1, 0


@dataclass
class EpochSums:
    """Sums over the logged updates of the current epoch; later updates are in the step's meter."""

    updates_logged: int = 0
    loss_sum: float = 0.0
    """Sum of the losses of the logged updates."""
    lr: float = 0.0
    """Learning rate of the last update, logged or not."""


@dataclass(frozen=True)
class BestEpochs:
    """The best scores of the validated epochs, and the epochs whose checkpoints are kept."""

    best_metric: float | None = None
    """Best value of --eval-metric."""
    best_epoch: int = -1
    best_scores: dict[str, float] = field(default_factory=dict[str, float])
    """Scores in the best epoch, by weights: "model", and "ema" if there is one."""
    better: str = ""
    """The weights that scored better in the last validated epoch, "model" or "ema"; empty before the first."""
    is_chosen_by_ema: bool = False
    """Epochs are compared only by the EMA's score, even if it is lower, as in runs of `meaning` 1."""
    kept: tuple[tuple[float, int], ...] = ()
    """Metric and epoch of each checkpoint-EPOCH.pth.tar, best first."""

    def after_validation(
        self, epoch: int, scores: dict[str, float], *, lower_is_better: bool, num_kept: int
    ) -> tuple[BestEpochs, bool, list[int]]:
        """Add a validated epoch; returns the new state, whether it is the best, and the epochs no longer to be kept.

        `scores` by weights, as `best_scores`; the better of the two counts, the EMA's if they are equal. This epoch
        itself is no longer kept if `num_kept` others are better. In a tie the older epoch is kept, as in timm.
        """
        sign = 1 if lower_is_better else -1
        known = ["ema"] if self.is_chosen_by_ema and "ema" in scores else [k for k in ("ema", "model") if k in scores]
        better = min(known, key=lambda weights: (math.isnan(scores[weights]), sign * scores[weights]))
        metric = scores[better]
        ranked = sorted([*self.kept, (metric, epoch)], key=lambda one: sign * one[0])
        is_best = self.best_metric is None or sign * metric < sign * self.best_metric
        best = {"best_metric": metric, "best_epoch": epoch, "best_scores": scores} if is_best else {}
        counted = replace(self, kept=tuple(ranked[:num_kept]), better=better, **best)
        return counted, is_best, [dropped for _, dropped in ranked[num_kept:]]


@dataclass
class RunState:
    """A run's state besides weights, optimizer and the step's own state."""

    position: Position = field(default_factory=Position)
    sums: EpochSums = field(default_factory=EpochSums)
    best: BestEpochs = field(default_factory=BestEpochs)
    tracker_ids: dict[str, str] = field(default_factory=dict[str, str])
    """The identifier with which the run continues at each tracker."""

    def end_epoch(self) -> None:
        """Start the next epoch; all updates of this one must be logged."""
        self.position.end_epoch()
        self.sums = EpochSums(lr=self.sums.lr)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint, without `position.num_updates`, which is saved with the step's state."""
        place = {"epoch": self.position.epoch, "updates_done": self.position.updates_done}
        best = {**asdict(self.best), "kept": [list(one) for one in self.best.kept]}
        return {**place, **asdict(self.sums), **best, "tracker_ids": dict(self.tracker_ids)}

    def load_state_dict(self, state: dict[str, Any], num_updates: int) -> None:
        """Continue from a saved state."""
        saved: dict[str, Any] = {"is_chosen_by_ema": "better" not in state, **state}
        saved["kept"] = tuple((metric, epoch) for metric, epoch in saved["kept"])
        self.position.epoch, self.position.updates_done = saved["epoch"], saved["updates_done"]
        self.position.num_updates = num_updates
        self.sums, self.best = EpochSums(**_fields_in(saved, EpochSums)), BestEpochs(**_fields_in(saved, BestEpochs))
        of_wandb = saved.get("wandb_id")  # older files have only this
        self.tracker_ids = dict(saved.get("tracker_ids", {"wandb": of_wandb} if of_wandb else {}))


def _fields_in(saved: dict[str, Any], kind: type[EpochSums | BestEpochs]) -> dict[str, Any]:
    """The saved fields of a dataclass; an older file may lack some."""
    return {one.name: saved[one.name] for one in fields(kind) if one.name in saved}
