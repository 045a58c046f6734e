"""Optimizer and learning-rate schedule: timm's factories, and timm's rule for a learning rate that was not given."""

from __future__ import annotations

import difflib
from typing import Any

import timm.optim
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from data_prep.errors import UserError
from lowrank_vit.options import Optim


def learning_rate(optim: Optim, global_batch: int) -> tuple[float, str]:
    """The peak learning rate and where it comes from, in words.

    `--lr` stands as given. Without it: lr_base * r, or lr_base * sqrt(r) for optimizers named ada* or lamb, with
    r = global_batch / lr_base_size (timm's train.py).
    """
    if optim.lr is not None:
        return optim.lr, "--lr"
    scale = optim.lr_base_scale
    if not scale:
        scale = "sqrt" if any(part in optim.opt.lower() for part in ("ada", "lamb")) else "linear"
    ratio = global_batch / optim.lr_base_size
    factor = ratio**0.5 if scale == "sqrt" else ratio
    return (
        optim.lr_base * factor,
        f"--lr-base {optim.lr_base:g}, {scale} scaling from batch {optim.lr_base_size} to {global_batch}",
    )


FUSED = {"adam", "adamw", "sgd", "momentum"}
"""timm's names of torch optimizers with a fused step: one kernel, or one loop, over all parameters."""


def create_optimizer(optim: Optim, model: nn.Module, lr: float) -> Optimizer:
    """Timm's optimizer with its parameter groups: layer decay, and no weight decay on vectors and embeddings."""
    names = [str(name) for name in timm.optim.list_optimizers()]
    if optim.opt.lower() not in names:
        near = difflib.get_close_matches(optim.opt.lower(), names, n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"--opt {optim.opt} is not a timm optimizer.{hint}")
    extra: dict[str, Any] = {}
    if optim.opt_eps is not None:
        extra["eps"] = optim.opt_eps
    if optim.opt_betas is not None:
        extra["betas"] = optim.opt_betas
    if optim.opt.lower() in FUSED:
        extra["fused"] = True
    if optim.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise UserError("--layer-decay needs a model with layer groups, which this one lacks. Leave it out.")
    try:
        return timm.optim.create_optimizer_v2(
            model,
            opt=optim.opt,
            lr=lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            layer_decay=optim.layer_decay,
            **extra,
        )
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"--opt {optim.opt} cannot be made: {error}. Check --opt-eps and --opt-betas.") from error


def create_scheduler(optim: Optim, optimizer: Optimizer, updates_per_epoch: int) -> tuple[Scheduler, int]:
    """Timm's schedule and the number of epochs to run, which includes the cool-down."""
    scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        sched=optim.sched,
        num_epochs=optim.epochs,
        min_lr=optim.min_lr,
        warmup_lr=optim.warmup_lr,
        warmup_epochs=optim.warmup_epochs,
        cooldown_epochs=optim.cooldown_epochs,
        step_on_epochs=not optim.sched_on_updates,
        updates_per_epoch=updates_per_epoch,
    )
    if scheduler is None:
        raise UserError(f"--sched {optim.sched} is not a schedule of timm's.")
    return scheduler, num_epochs
