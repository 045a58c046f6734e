"""The plan's rules from the command line's flags, with timm's meanings."""

from __future__ import annotations

import timm

from lowrank_vit.common.filters import FILTERS
from lowrank_vit.config.options import Augment, Config
from lowrank_vit.plan.dealing import split
from lowrank_vit.plan.mixing import MixRules
from lowrank_vit.plan.operations import parse_policy
from lowrank_vit.plan.rules import TrainRules

_INTERPOLATIONS = {"random": None, **FILTERS}


def train_rules(config: Config) -> TrainRules:
    """The plan's rules for training. Raises `UserError` for an unknown policy."""
    data, augment = config.data, config.augment
    return TrainRules(
        is_cropped=data.train_crop_mode == "rrc",
        scale=data.scale,
        ratio=data.ratio,
        hflip=data.hflip,
        vflip=data.vflip,
        policy=parse_policy(augment.aa),
        color_jitter=_color_jitter(augment),
        interpolation=_INTERPOLATIONS[
            _own(config.model.model) if data.train_interpolation == "model" else data.train_interpolation
        ],
        reprob=augment.reprob,
        recount=augment.recount,
        mixing=MixRules(
            mixup=augment.mixup,
            cutmix=augment.cutmix,
            minmax=augment.cutmix_minmax,
            prob=augment.mixup_prob,
            switch_prob=augment.mixup_switch_prob,
            mode=augment.mixup_mode,
            block=augment.mix_block,
        ),
        mixup_off_epoch=augment.mixup_off_epoch,
        order=data.epoch_order,
        repeats=max(1, int(augment.aug_repeats)),
    )


def batches_of_update(config: Config, ranks: int) -> tuple[int, int]:
    """Images per batch, and batches per update on each rank. Raises `UserError` if the flags do not fit `ranks`.

    With --global-batch-size the second is the smallest for which no batch is larger than --batch-size.
    """
    optim, batch_size = config.optim, config.data.batch_size
    if optim.global_batch_size is None:
        return batch_size, optim.grad_accum_steps
    mixing = train_rules(config).mixing
    return split(optim.global_batch_size, batch_size, ranks, mixing.block if mixing.is_on else None)


def _own(model: str) -> str:
    """The interpolation with which timm's weights of a model were trained; bicubic if timm does not say."""
    config = timm.get_pretrained_cfg(model)
    return config.interpolation if config else "bicubic"


def _color_jitter(augment: Augment) -> tuple[float, ...] | None:
    """Strengths of brightness, contrast and saturation; None for none. As in timm any policy but 3a switches it off."""
    has_policy = augment.aa not in ("", "none")
    if (has_policy and "3a" not in augment.aa) or not any(augment.color_jitter):
        return None
    return augment.color_jitter * 3 if len(augment.color_jitter) == 1 else augment.color_jitter
