"""Cheap checks of a configuration, made before data are opened and converted."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from lowrank_vit.augment.recipe import batches_of_update, train_rules
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.options import Config
from lowrank_vit.config.tracking_options import trackers
from lowrank_vit.lowrank.switching.begin import check_low_rank_training
from lowrank_vit.lowrank.switching.moments import check_can_switch
from lowrank_vit.lowrank.switching.start import check_adapters, check_share
from lowrank_vit.model.create import check_model_name, check_published, create_model, input_spec, outline
from lowrank_vit.model.hub import find_kept
from lowrank_vit.model.optimizer import (
    check_optimizer,
    create_optimizer,
    create_scheduler,
    epochs_in_all,
    learning_rate,
)
from lowrank_vit.model.weights import require_file
from lowrank_vit.ranks.world import World
from lowrank_vit.run.trackers.sending import check as check_trackers
from lowrank_vit.spectral.flows import check_flows
from lowrank_vit.spectral.heads import attention_blocks
from lowrank_vit.spectral.layers import targets_of_model

_WITHOUT_MIN_LR = ("none", "constant", "step", "multistep")
"""timm's schedules that do not use --min-lr."""


def check_before_data(config: Config, *, is_resumed: bool, world: World | None = None) -> None:
    """Raise `UserError` for names, policies, files, arguments and spectral targets that do not exist.

    Also for a global batch size that does not fit the ranks, a model that cannot take the images, an impossible
    schedule, a tracker that is not installed, and W&B without a login or with a refused project. Otherwise a typo would
    only be found after ImageNet is converted, an hour later.
    """
    world = world or World()
    options = config.model
    check_model_name(options.model)
    check_optimizer(config.optim)
    train_rules(config)
    if not is_resumed:
        if options.initial_checkpoint:
            require_file(options.initial_checkpoint, "--initial-checkpoint")
        if options.pretrained_path:
            require_file(options.pretrained_path, "--pretrained-path")
        elif options.pretrained and options.model_from:
            find_kept(options.model_from, options.model).weight_file()
        elif options.pretrained:
            check_published(options.model)
    _check_schedule(config, world.size, is_resumed=is_resumed)
    model = outline(lambda: _made(config))
    _check_forward(config, model)
    if options.sync_bn:
        refuse_batch_norm(model, options.model)
    if config.lowrank.lowrank_init is not None and not is_resumed:
        check_share(model, config.lowrank.lowrank_init, config.lowrank.lowrank_targets)
    if config.lowrank.lora is not None and not is_resumed:
        check_adapters(model, config.lowrank.lora, config.lowrank.lowrank_targets)
    if config.spectra.spec_monitor:
        targets_of_model(model, config.spectra.spec_targets, config.spectra.spec_split_qkv)
        attention_blocks(model, config.spectra.spec_circuits)
    if config.lowrank.lowrank_train != "none":
        _check_low_rank(config, model)
    if config.spectra.spec_flows:
        side = input_spec(model, config.data.img_size, None).img_size
        check_flows(model, lambda: _logits(model, side))
    if world.is_first:
        check_trackers(trackers(config.tracking), config.tracking.wandb_project)


def _check_schedule(config: Config, world_size: int, *, is_resumed: bool) -> None:
    optim = config.optim
    batch_size, accum_steps = batches_of_update(config, world_size)
    lr, origin = learning_rate(optim, batch_size * accum_steps * world_size)
    create_scheduler(optim, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr), updates_per_epoch=1000)
    # A run of a version without this check may continue.
    if optim.min_lr > lr and optim.sched not in _WITHOUT_MIN_LR and not is_resumed:
        raise UserError(
            f"--min-lr {optim.min_lr:g}, at which the schedule ends, is above the peak learning rate {lr:.3g} "
            f"({origin}): it would rise towards the end. Give a smaller --min-lr or a larger --lr."
        )


def _check_low_rank(config: Config, model: nn.Module) -> None:
    optim = config.optim
    optimizer = create_optimizer(replace(optim, layer_decay=None), nn.Linear(2, 2), optim.lr or optim.lr_base)
    if not config.lowrank.lowrank_dry_run:
        check_can_switch(optimizer)
    check_low_rank_training(config, model, epochs_in_all(optim, 1000))


def _check_forward(config: Config, model: nn.Module) -> None:
    """Raise `UserError` for a model that cannot take an image of this size, or is not a classifier."""
    side = input_spec(model, config.data.img_size, None).img_size
    try:
        logits = _logits(model, side)
    except Exception as on_meta:  # some models read values, which meta tensors lack
        try:
            logits = _logits(_made(config), side)
        except Exception as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            own = input_spec(model, None, None).img_size
            raise UserError(
                f"--model {config.model.model} cannot take an RGB image of {side} x {side} pixels: "
                f"{reason}. Check --img-size (the model's own is {own}) and --model-kwargs."
            ) from on_meta
    if not isinstance(logits, torch.Tensor):
        raise UserError(
            f"--model {config.model.model} returns a {type(logits).__name__} for one image; a tensor of logits, one "
            "for each class, is expected. Check --model-kwargs, or choose a classifier."
        )
    if logits.ndim != 2 or (config.model.num_classes and logits.shape[1] != config.model.num_classes):
        raise UserError(
            f"--model {config.model.model} returns the shape {tuple(logits.shape)} for one image; one logit for each "
            "class is expected. Check --model-kwargs, or choose a classifier."
        )


@torch.no_grad()
def _logits(model: nn.Module, side: int) -> object:
    image = torch.zeros(1, 3, side, side, device=next(model.parameters()).device)
    return model.eval()(image)


def refuse_batch_norm(model: nn.Module, name: str) -> None:
    """Raise `UserError` for a model with BatchNorm, which --sync-bn would change in timm."""
    if any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for module in model.modules()):
        raise UserError(
            f"--sync-bn: --model {name} has BatchNorm. Here each process has its own statistics, which are averaged "
            "for validation. Leave the flag out."
        )


def _made(config: Config) -> nn.Module:
    """The model; its head has 2 outputs if only the data tell the number of classes."""
    options = config.model
    return create_model(
        options.model,
        options.num_classes or 2,
        img_size=config.data.img_size,
        drop=options.drop,
        drop_path=options.drop_path,
        model_kwargs=options.model_kwargs,
        grad_checkpointing=options.grad_checkpointing,
        say=lambda line: None,
    )
