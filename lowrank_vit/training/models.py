"""A run's model and EMA at its start: randomly initialised, from weight files, or from the run's checkpoint."""

from __future__ import annotations

from timm.utils import ModelEmaV3
from torch import nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say
from lowrank_vit.config.option_types import with_options
from lowrank_vit.config.options import Config
from lowrank_vit.lowrank.switching.start import adapters_in_words, start_in_factors, start_with_adapters
from lowrank_vit.model.class_match import Classes, Trust
from lowrank_vit.model.create import create_model, set_head
from lowrank_vit.model.fit import fit_kept_head, load_initial, load_weights, tell_of_published_head
from lowrank_vit.model.hub import find_kept
from lowrank_vit.model.lora import add_adapters
from lowrank_vit.model.weights import Checkpoint, read_checkpoint
from lowrank_vit.ranks.world import World
from lowrank_vit.spectral.measures.initial import in_words, redraw_far_entries


def make_model(
    config: Config, num_classes: int, of_data: tuple[Classes, Trust] | None, resumed: Checkpoint | None, say: Say
) -> nn.Module:
    """The model on the CPU with the weights that a run starts or continues from. Raises `UserError`.

    `of_data`: the data's classes, and the flags for classes that cannot be compared.
    """
    options, file = config.model, None
    if options.pretrained_path and not resumed:
        file = read_checkpoint(options.pretrained_path, "--pretrained-path")
    elif options.pretrained and options.model_from and not resumed:
        file = find_kept(options.model_from, options.model).weights()
    model = create_model(
        options.model,
        num_classes,
        img_size=config.data.img_size,
        drop=options.drop,
        drop_path=options.drop_path,
        model_kwargs=options.model_kwargs,
        pretrained=options.pretrained and not resumed,
        pretrained_file=file,
        grad_checkpointing=options.grad_checkpointing,
        say=say,
    )
    if resumed:
        if resumed.lora:
            add_adapters(model, resumed.lora, config.lowrank.lora_dropout)
        load_weights(model, resumed, resumed.weights(use_ema=False, with_adapters=True), options.model)
        return model
    if options.initial_checkpoint:
        load_initial(model, options.initial_checkpoint, options.model, say, of_data)
    elif file and of_data:
        fit_kept_head(model, file, options.model, say, *of_data)
    elif options.pretrained and of_data:
        tell_of_published_head(options.model, of_data[0], say)
    if options.fix_init and (redrawn := redraw_far_entries(model, config.run.seed)):
        say(f"--fix-init has redrawn {in_words(redrawn)}")
    set_head(model, options.head_init_scale, options.head_init_bias)
    return model


def begin_low_rank(config: Config, model: nn.Module, world: World, say: Say, *, is_resumed: bool) -> list[str]:
    """Factorise the targets or add adapters to them, in place, as the flags say. Returns lines for the log.

    A resumed model has them already. Raises `UserError`.
    """
    options = config.lowrank
    if options.lora is not None and not is_resumed:
        start = config.model
        if not (start.pretrained or start.pretrained_path or start.initial_checkpoint):
            say(
                "warning: --lora trains adapters beside frozen weights, and these are randomly initialised. Give "
                "weights to start from with --pretrained, --pretrained-path or --initial-checkpoint."
            )
        adapters = options.lora, options.lora_alpha, options.lora_dropout
        start_with_adapters(model, *adapters, options.lowrank_targets, img_size=config.data.img_size, say=say)
    if options.lowrank_init is None or is_resumed:
        return adapters_in_words(model)
    world.progress.enter("decomposing the initial weights")
    line = start_in_factors(
        model,
        options.lowrank_init,
        options.lowrank_targets,
        img_size=config.data.img_size,
        is_first=world.is_first,
        from_first=world.from_first if world.is_joined else None,
        say=say,
    )
    return [line]


def with_ema_warmup(config: Config, num_updates: int) -> tuple[Config, list[str]]:
    """Choose --model-ema-warmup if it was not given. Returns the configuration and lines for the log.

    Without warm-up the initial weights have the share decay^updates in the average: 5e-5 at 10 / (1 - decay) updates,
    when the average spans a tenth of the run. In a shorter run the average would mostly be of weights that are too old.
    """
    options = config.model
    if not options.model_ema or options.model_ema_warmup is not None:
        return config, []
    enough = round(10 / (1 - options.model_ema_decay))
    is_short = num_updates < enough
    config = with_options(config, {"model-ema-warmup": is_short})
    line = (
        f"EMA with warm-up, since {num_updates:,} updates are fewer than {enough:,} = 10 / (1 - "
        f"{options.model_ema_decay:g}); --no-model-ema-warmup turns it off"
    )
    return config, [line] if is_short else []


def make_ema(config: Config, model: nn.Module, resumed: Checkpoint | None) -> ModelEmaV3 | None:
    """The EMA of the model, or that of the checkpoint; None without one. Raises `UserError`."""
    options = config.model
    if not options.model_ema:
        return None
    ema = ModelEmaV3(model, decay=options.model_ema_decay, use_warmup=bool(options.model_ema_warmup))
    if resumed:
        if not resumed.has_ema:
            raise UserError(f"{resumed.path} is from a run without an EMA. Resume it with --no-model-ema.")
        load_weights(ema.module, resumed, resumed.weights(use_ema=True, with_adapters=True), options.model)
    return ema
