"""What can be wrong with a configuration and is cheap to find out: looked at before data are opened and converted."""

from __future__ import annotations

import torch
from torch import nn

from data_prep.errors import UserError
from lowrank_vit.augment.recipe import train_rules
from lowrank_vit.engine.checkpoint import require_file
from lowrank_vit.engine.model import check_model_name, create_model
from lowrank_vit.engine.optim import check_optimizer
from lowrank_vit.engine.pretrained import check_published, require_weights
from lowrank_vit.options import Config
from lowrank_vit.spectral.select import choose_parts


def check_before_data(config: Config, *, is_resumed: bool) -> None:
    """Raise `UserError` for names, policies, files, arguments and spectral targets that do not exist.

    With ImageNet to be converted first, a typo would else be found out after an hour.
    """
    options = config.model
    check_model_name(options.model)
    check_optimizer(config.optim)
    train_rules(config)
    if not is_resumed:
        if options.initial_checkpoint:
            require_file(options.initial_checkpoint)
        if options.pretrained_path:
            require_weights(options.pretrained_path)
        elif options.pretrained:
            check_published(options.model)
    model = _outline(config)
    if options.sync_bn:
        refuse_batch_norm(model, options.model)
    if config.spectra.spec_monitor:
        choose_parts(dict(model.named_parameters()), config.spectra.spec_targets, config.spectra.spec_split_qkv)


def refuse_batch_norm(model: nn.Module, name: str) -> None:
    """Raise `UserError` for a model whose BatchNorm --sync-bn would change."""
    if any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for module in model.modules()):
        raise UserError(
            f"--sync-bn: --model {name} has BatchNorm, whose statistics are those of each process here, averaged for "
            "validation. Leave the flag out."
        )


def _outline(config: Config) -> nn.Module:
    """The model without memory for its weights, and with a head of any size where only the data tell the classes."""
    options = config.model

    def make() -> nn.Module:
        return create_model(
            options.model,
            options.num_classes or 2,
            img_size=config.data.img_size,
            drop=options.drop,
            drop_path=options.drop_path,
            model_kwargs=options.model_kwargs,
            grad_checkpointing=options.grad_checkpointing,
        )

    try:
        with torch.device("meta"):
            return make()
    except UserError:  # the arguments are wrong, or the constructor looks at numbers that are not there: see which
        return make()
