"""Optimizer and learning-rate schedule from timm's factories, and timm's rule for the default learning rate."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import timm.optim
import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from lowrank_vit.common.errors import UserError, did_you_mean
from lowrank_vit.config.option_types import parse_keywords
from lowrank_vit.config.options import Optim


def learning_rate(optim: Optim, global_batch: int) -> tuple[float, str]:
    """The peak learning rate, and a phrase that tells where it comes from.

    `--lr` is used as given. Without it: lr_base * r, or lr_base * sqrt(r) for optimizers named ada* or lamb, with
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
"""timm's names of torch optimizers with a fused step: one kernel or loop over all parameters."""
_LOOKAHEAD = "lookahead_"
"""timm's prefix for Lookahead around any optimizer."""
_FLAG_OF = {
    "lr": "lr",
    "weight_decay": "weight-decay",
    "momentum": "momentum",
    "eps": "opt-eps",
    "betas": "opt-betas",
    "opt": "opt",
    "layer_decay": "layer-decay",
    "layer_decay_min_scale": "layer-decay-min-scale",
    "layer_decay_no_opt_scale": "layer-decay-no-opt-scale",
}
"""Arguments of timm's factory that have their own flag."""


def check_optimizer(optim: Optim) -> None:
    """Raise `UserError` if these options do not make an optimizer, for any model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its warnings appear when it is made for the model
        model = nn.Linear(2, 2)
        optimizer = create_optimizer(replace(optim, layer_decay=None), model, optim.lr or optim.lr_base)
        if optim.opt_betas is None:
            return
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        try:
            optimizer.step()  # the number of betas is only checked here
        except (ValueError, TypeError, IndexError) as error:
            betas = " ".join(f"{beta:g}" for beta in optim.opt_betas)
            raise UserError(f"--opt-betas {betas}: --opt {optim.opt} takes another number of betas.") from error


def create_optimizer(optim: Optim, model: nn.Module, lr: float) -> Optimizer:
    """Timm's optimizer with its parameter groups: layer decay, and no weight decay on vectors and embeddings.

    Raises `UserError` for an unknown optimizer, or options that it does not take.
    """
    names = [str(name) for name in timm.optim.list_optimizers()]
    name = optim.opt.lower()
    if name.removeprefix(_LOOKAHEAD) not in names:
        raise UserError(f"--opt {optim.opt} is not a timm optimizer.{did_you_mean(name, names)}")
    extra: dict[str, Any] = {}
    if optim.opt_eps is not None:
        extra["eps"] = optim.opt_eps
    if optim.opt_betas is not None:
        extra["betas"] = optim.opt_betas
    if name in FUSED:
        extra["fused"] = True
    if optim.muon_fallback and "muon" in name:
        extra |= {"fallback_list": not_for_muon(model), "fallback_no_weight_decay": True}
    extra |= _own_arguments(optim)
    if optim.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise UserError("--layer-decay needs a model with layer groups, and this one has none. Leave it out.")
    try:
        return timm.optim.create_optimizer_v2(
            model,
            opt=optim.opt,
            lr=lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            layer_decay=optim.layer_decay,
            layer_decay_min_scale=optim.layer_decay_min_scale,
            layer_decay_no_opt_scale=optim.layer_decay_no_opt_scale,
            **extra,
        )
    except (TypeError, ValueError, ImportError, RuntimeError, AssertionError, LookupError) as error:
        raise UserError(
            f"--opt {optim.opt} cannot be made: {' '.join(str(error).split())}. Check --opt-eps, --opt-betas and "
            "--opt-kwargs. An optimizer from another package needs that package installed."
        ) from error


def not_for_muon(model: nn.Module) -> list[str]:
    """Timm's name patterns for the parameters of the patch embedding, or first layer, and of the classifier.

    Muon is for the matrices between: "embeddings and classifier heads ... should be optimized by a standard method such
    as AdamW" (Jordan, kellerjordan.github.io/posts/muon; likewise for the first convolution of a network). Position
    embeddings and tokens are among timm's `no_weight_decay`.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    named = [cfg.get(key) or () for key in ("first_conv", "classifier")]
    layers = [name for one in named for name in ((one,) if isinstance(one, str) else one)]
    layers += [name for name in ("patch_embed", "head", "head_dist", "fc") if hasattr(model, name)]
    return [f"{name}.*" for name in dict.fromkeys(layers)]


def _own_arguments(optim: Optim) -> dict[str, Any]:
    """Read --opt-kwargs. Raises `UserError` for an argument that has its own flag."""
    arguments = parse_keywords(optim.opt_kwargs, "--opt-kwargs", "nesterov=True")
    for name, value in arguments.items():
        if name in _FLAG_OF:
            raise UserError(f"--opt-kwargs {name}={value}: give it as --{_FLAG_OF[name]}.")
    return arguments


class Constant:
    """timm's schedule "none", for which its factory returns None: learning rates stay constant."""

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Do nothing."""

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Do nothing."""


def epochs_in_all(optim: Optim, updates_per_epoch: int) -> int:
    """The number of epochs to run, as from `create_scheduler`, but without a model. Raises the same `UserError`."""
    return create_scheduler(optim, torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0), max(1, updates_per_epoch))[1]


def create_scheduler(
    optim: Optim, optimizer: Optimizer, updates_per_epoch: int, seed: int = 42
) -> tuple[Scheduler | Constant, int]:
    """Timm's schedule and the number of epochs to run, including those that warm-up, cycles and cool-down add.

    `seed`: for --lr-noise, whose draws depend only on it and on the epoch (or update). Raises `UserError` for phases
    that do not fit into the epochs.
    """
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            sched=optim.sched,
            num_epochs=optim.epochs,
            min_lr=optim.min_lr,
            warmup_lr=optim.warmup_lr,
            warmup_epochs=optim.warmup_epochs,
            warmup_prefix=optim.warmup_prefix,
            cooldown_epochs=optim.cooldown_epochs,
            decay_epochs=optim.decay_epochs,  # type: ignore[arg-type]
            decay_rate=optim.decay_rate,
            decay_milestones=list(optim.decay_milestones),
            decay_fn=optim.lr_decay_fn or None,
            stable_timescale=optim.lr_stable_timescale,
            cycle_mul=optim.lr_cycle_mul,
            cycle_decay=optim.lr_cycle_decay,
            cycle_limit=optim.lr_cycle_limit,
            k_decay=optim.lr_k_decay,
            noise=None if optim.lr_noise is None else list(optim.lr_noise),  # type: ignore[arg-type]
            noise_pct=optim.lr_noise_pct,
            noise_std=optim.lr_noise_std,
            noise_seed=seed,
            step_on_epochs=not optim.sched_on_updates,
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(
            f"--sched {optim.sched} cannot be made: {' '.join(str(error).split())} Check --epochs, --warmup-epochs "
            "and --decay-epochs."
        ) from error
    return scheduler or Constant(), int(num_epochs)
