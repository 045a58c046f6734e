"""What a run must save to be continued, and how it is put back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_vit.common.errors import UserError
from lowrank_vit.config import meaning
from lowrank_vit.config.option_types import kind_of, may_change
from lowrank_vit.config.options import Config, leaves, with_options
from lowrank_vit.model.weights import BETTER, Checkpoint
from lowrank_vit.run.checkpoint_writer import IS_FINITE
from lowrank_vit.run.meter import NEVER
from lowrank_vit.training.setup import Parts


@dataclass(frozen=True)
class Progress:
    """How far a run has come; epochs are 0-based."""

    epoch: int = 0
    """The one that is trained or comes next."""
    updates_done: int = 0
    """Of this epoch."""
    updates_logged: int = 0
    """Of this epoch; the others are in the step's meter."""
    loss_sum: float = 0.0
    """Of the logged updates of this epoch."""
    lr: float = 0.0
    """In the last update."""
    best_metric: float | None = None
    """Of --eval-metric."""
    best_epoch: int = -1
    best_scores: dict[str, float] = field(default_factory=dict[str, float])
    """In the best epoch, by weights: "model", and "ema" where there is one."""
    better: str = ""
    """Which of them scored higher in the last validated epoch."""
    is_chosen_by_ema: bool = False
    """Epochs are compared by the EMA's score alone, even if it is lower: so it was in runs of `meaning` 1."""
    kept: tuple[tuple[float, int], ...] = field(default=())
    """Metric and epoch of each checkpoint-EPOCH.pth.tar, best first."""
    wandb_id: str = ""

    @property
    def is_begun(self) -> bool:
        """Whether anything was trained."""
        return self.epoch > 0 or self.updates_done > 0

    def after_validation(
        self, scores: dict[str, float], *, lower_is_better: bool, num_kept: int
    ) -> tuple[Progress, bool, list[int]]:
        """Count a validated epoch in: the new progress, whether it is the best, the epochs no longer to be kept.

        `scores` by weights, as `best_scores`. The better of the two counts, the EMA's where they are equal.

        This epoch is among those if `num_kept` others are better. Ties keep the older, as timm does.
        """
        sign = 1 if lower_is_better else -1
        known = ["ema"] if self.is_chosen_by_ema and "ema" in scores else [k for k in ("ema", "model") if k in scores]
        better = min(known, key=lambda weights: (math.isnan(scores[weights]), sign * scores[weights]))
        metric = scores[better]
        ranked = sorted([*self.kept, (metric, self.epoch)], key=lambda one: sign * one[0])
        is_best = self.best_metric is None or sign * metric < sign * self.best_metric
        best = {"best_metric": metric, "best_epoch": self.epoch, "best_scores": scores} if is_best else {}
        progress = replace(self, kept=tuple(ranked[:num_kept]), better=better, **best)
        return progress, is_best, [epoch for _, epoch in ranked[num_kept:]]


def capture(config: Config, parts: Parts, progress: Progress) -> dict[str, Any]:
    """A checkpoint's content in timm's layout, tensors and plain values only (loads with `weights_only=True`).

    Between two updates. Every rank calls it together; all get the same but for statistics of normalisation.
    """
    step = parts.step.state_dict()
    content: dict[str, Any] = {
        "version": 2,  # of timm's layout
        meaning.KEY: meaning.now(),
        "arch": config.model.model,
        "epoch": progress.epoch - 1,  # the last that is finished
        "state_dict": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "metric": progress.best_metric,
        BETTER: progress.better,
        "progress": {**asdict(progress), "kept": [list(one) for one in progress.kept]},
        "step": step,
        IS_FINITE: _is_finite(parts) & (step["meter"]["bad_update"] == NEVER),
        # Where the loader stands, or will stand when it is asked: an epoch that is at its end is not yet finished.
        "data": {**parts.train_loader.state_dict(), "epoch": progress.epoch, "update": progress.updates_done},
        "num_classes": parts.num_classes,
        "class_names": parts.class_names,
        "input": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(parts.spec).items()},
        "args": {name: _plain(value) for name, _, value in leaves(config)},
    }
    if parts.ema:
        content["state_dict_ema"] = parts.ema.module.state_dict()
    return content


@torch.no_grad()
def _is_finite(parts: Parts) -> Tensor:
    """() bool on the device, known once the device has come so far: whether weights, EMA and optimizer hold numbers."""
    tensors = [*parts.model.parameters(), *(parts.ema.module.parameters() if parts.ema else ())]
    states = (value for state in parts.optimizer.state.values() for value in state.values())
    tensors += [value for value in states if isinstance(value, Tensor) and value.is_floating_point() and value.ndim]
    return torch.nn.utils.get_total_norm(tensors).isfinite()


def as_resumed(config: Config, resumed: Checkpoint, say: Callable[[str], object]) -> Config:
    """`config`, where options that the run knew nothing of have the values that give its own meaning.

    Only those that stand at their defaults. `say` is told of each. Raises `UserError` for options of another run, and
    where this program cannot go on as the run began.
    """
    number, args = resumed.meaning, resumed.args
    if not args:  # of another program, or weights alone
        resumed.training_state("args")
        return config
    meaning.check_can_go_on(number, args, str(resumed.path))
    before, usual = meaning.values_before(number, args), {name: value for name, _, value in leaves()}
    given = {name: value for name, _, value in leaves(config)}
    for change in meaning.changes_since(number, args):
        old = {name: before[name] for name in change.before if name not in args and given[name] == usual[name]}
        config = with_options(config, old)
        if old:
            values = ", ".join(f"--{name} {_plain(value)}" for name, value in old.items())
            say(f"note: {resumed.path} is of an older run: {change.what}. It goes on as it began: {values}")
    left_open = [name for name, hint, value in leaves(config) if value is None and kind_of(hint).element is bool]
    config = with_options(config, {name: args[name] for name in left_open if name in args})  # what the run has chosen
    _check_same_run(config, resumed)
    return config


def restore(config: Config, parts: Parts, resumed: Checkpoint) -> Progress:
    """Put back all but weights and EMA, which are the parts' already. Raises `UserError`."""
    try:
        parts.optimizer.load_state_dict(resumed.training_state("optimizer"))
    except (ValueError, KeyError) as error:
        raise UserError(f"{resumed.path} was saved with another optimizer: {error}.") from error
    saved = resumed.training_state("progress")
    older = {"is_chosen_by_ema": "better" not in saved}
    fields: dict[str, Any] = {**older, **saved, "kept": tuple((metric, epoch) for metric, epoch in saved["kept"])}
    progress = Progress(**fields)
    parts.step.load_state_dict(resumed.training_state("step"))
    try:
        parts.train_loader.load_state_dict(resumed.training_state("data"))
    except UserError as error:
        raise UserError(f"{resumed.path}: {error}") from error
    # Within an epoch the optimizer's own learning rates are those of the interrupted run, to the bit.
    if progress.updates_done == 0:
        parts.scheduler.step(progress.epoch)
    parts.scheduler.step_update(parts.step.num_updates)
    return progress


def _check_same_run(config: Config, resumed: Checkpoint) -> None:
    """Raise `UserError` for options that would make another run of it: the optimizer's state holds the old ones."""
    usual = {name: _plain(value) for name, _, value in leaves()}  # what is meant by an option that it knew nothing of
    args = {**usual, **meaning.values_before(resumed.meaning, resumed.args), **resumed.args}
    changed = [
        f"--{name} was {args[name]}, now {_plain(value)}"
        for name, hint, value in leaves(config)
        if not may_change(hint) and args[name] != _plain(value)
    ]
    if changed:
        raise UserError(
            f"{resumed.path} belongs to a run with other options: {'; '.join(changed)}. Resume with the run's own "
            f"(--config {resumed.path.parent / 'args.yaml'}), or start anew from its weights with --initial-checkpoint."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
