"""What a run must save to be continued, and how it is put back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from lowrank_vit.config import leaves
from lowrank_vit.engine.checkpoint import Checkpoint
from lowrank_vit.engine.setup import Parts
from lowrank_vit.options import Config

MAY_CHANGE = set(
    """
    dataset dataset-download data-dir val-split beton-dir stage-dir loader workers prefetch hw-decoder-load
    on-bad-sample validation-batch-size initial-checkpoint epochs cooldown-epochs device amp compile compile-mode
    spec-monitor spec-every spec-topk spec-interval spec-targets
    spec-split-qkv spec-solver spec-on-cpu spec-cpu-threads spec-store-gb
    output experiment resume log-interval val-interval log-wandb wandb-project
    """.split()
)
"""Options that a resumed run may be given anew: they do not change what an update does to the weights."""


@dataclass
class Progress:
    """How far a run has come; epochs are 0-based."""

    next_epoch: int = 0
    best_top1: float = -1.0
    """Percent."""
    best_epoch: int = -1


def capture(config: Config, parts: Parts, progress: Progress) -> dict[str, Any]:
    """A checkpoint's content in timm's layout, tensors and plain values only (loads with `weights_only=True`)."""
    content: dict[str, Any] = {
        "version": 2,  # of timm's layout
        "arch": config.model.model,
        "epoch": progress.next_epoch - 1,
        "state_dict": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "metric": progress.best_top1,
        "best_epoch": progress.best_epoch,
        "num_updates": parts.step.num_updates,
        "num_classes": parts.num_classes,
        "class_names": parts.class_names,
        "input": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(parts.spec).items()},
        "rng": {"cpu": torch.get_rng_state()},
        "args": {name: _plain(value) for name, _, value in leaves(config)},
    }
    if parts.device.type == "cuda":
        content["rng"]["cuda"] = torch.cuda.get_rng_state()
    if parts.ema:
        content["state_dict_ema"] = parts.ema.module.state_dict()
    return content


def restore(config: Config, parts: Parts, resumed: Checkpoint) -> Progress:
    """Put back optimizer, schedule and generators (weights and EMA are the parts' already). Raises `UserError`."""
    _check_same_run(config, resumed)
    try:
        parts.optimizer.load_state_dict(resumed.training_state("optimizer"))
    except (ValueError, KeyError) as error:
        raise UserError(f"{resumed.path} was saved with another optimizer: {error}.") from error
    progress = Progress(
        next_epoch=resumed.epoch + 1,
        best_top1=resumed.training_state("metric"),
        best_epoch=resumed.training_state("best_epoch"),
    )
    if progress.next_epoch >= parts.num_epochs:
        raise UserError(
            f"{resumed.path} has finished epoch {progress.next_epoch} of {parts.num_epochs}: nothing is left to train. "
            "Give a greater --epochs to go on."
        )
    parts.step.num_updates = resumed.training_state("num_updates")
    parts.scheduler.step(progress.next_epoch)
    parts.scheduler.step_update(parts.step.num_updates)
    rng = resumed.training_state("rng")
    torch.set_rng_state(rng["cpu"])
    if parts.device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"])
    return progress


def _check_same_run(config: Config, resumed: Checkpoint) -> None:
    """Raise `UserError` for options that would make another run of it: the optimizer's state holds the old ones."""
    changed = [
        f"--{name} was {resumed.args[name]}, now {_plain(value)}"
        for name, _, value in leaves(config)
        if name not in MAY_CHANGE and name in resumed.args and resumed.args[name] != _plain(value)
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
