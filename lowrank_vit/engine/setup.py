"""Make all the parts of a run from its configuration; whatever can be wrong with them is found here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from data_prep.errors import UserError
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.augment.recipe import train_rules
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.choose import LoaderOptions, open_loader
from lowrank_vit.data.datasets import open_datasets
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.locate import DataOptions
from lowrank_vit.data.plan import EvalPlan, TrainPlan
from lowrank_vit.engine.checkpoint import Checkpoint, load_weights, read_checkpoint
from lowrank_vit.engine.evaluate import Evaluator
from lowrank_vit.engine.model import InputSpec, create_model, input_spec
from lowrank_vit.engine.optim import create_optimizer, create_scheduler, learning_rate
from lowrank_vit.engine.step import TrainStep
from lowrank_vit.options import Config
from lowrank_vit.spectral.select import choose_parts


@dataclass
class Parts:
    """The parts of a run, on one device and ready to go."""

    device: torch.device
    num_classes: int
    class_names: list[str] | None
    """In label order, where the data tell."""
    spec: InputSpec
    model: nn.Module
    """Raw, not compiled."""
    ema: ModelEmaV3 | None
    plan: TrainPlan
    optimizer: Optimizer
    scheduler: Scheduler
    num_epochs: int
    step: TrainStep
    evaluators: dict[str, Evaluator]
    """By prefix of the metric's name: "" for the model, "ema_" for its EMA."""
    train_loader: Loader
    val_loader: Loader
    val_batch: int
    description: list[str]
    """What was made, a line each."""


def make_parts(config: Config, resumed: Checkpoint | None) -> Parts:
    """Make all but the run directory; weights and EMA are those of `resumed` if given. Raises `UserError`."""
    device = pick_device(config.step.device)
    torch.manual_seed(config.run.seed)
    data, batch_size = config.data, config.data.batch_size
    where = DataOptions(
        *(data.dataset, data.data_dir, data.dataset_download, data.beton_dir, data.train_split, data.val_split),
        on_bad=data.on_bad_sample,
    )
    train_set, val_set, num_classes = open_datasets(where, config.model.num_classes, data.stage_dir)
    model = _make_model(config, num_classes, resumed).to(device)
    spec = input_spec(model, data.img_size, data.crop_pct)
    plan = _make_train_plan(config, train_set, spec)
    val_batch = min(data.validation_batch_size or batch_size, val_set.num_samples)
    val_plan = EvalPlan(
        val_set.heights, val_set.widths, img_size=spec.img_size, crop_pct=spec.crop_pct, batch_size=val_batch
    )
    if config.spectra.spec_monitor:
        spectra = config.spectra
        choose_parts(
            dict(model.named_parameters()), spectra.spec_targets, spectra.spec_split_qkv
        )  # names a wrong target
    smoothing, remode = config.augment.smoothing, config.augment.remode
    augment = Augment(spec.mean, spec.std, num_classes, smoothing, remode, compile=config.step.compile).to(device)
    ema = _make_ema(config, model, resumed)
    lr, lr_origin = learning_rate(config.optim, batch_size)
    optimizer = create_optimizer(config.optim, model, lr)
    scheduler, num_epochs = create_scheduler(config.optim, optimizer, plan.steps_per_epoch)
    evaluated = {"": model} | ({"ema_": ema.module} if ema else {})
    decoding = LoaderOptions(data.loader, data.workers, data.prefetch, data.hw_decoder_load, data.on_bad_sample)
    train_loader, train_line = open_loader(train_set, plan, device, decoding, prepare=augment.prepare)
    val_loader, val_line = open_loader(val_set, val_plan, device, decoding)
    parameters = sum(p.numel() for p in model.parameters())
    return Parts(
        device=device,
        num_classes=num_classes,
        class_names=train_set.classes,
        spec=spec,
        model=model,
        ema=ema,
        plan=plan,
        optimizer=optimizer,
        scheduler=scheduler,
        num_epochs=num_epochs,
        step=TrainStep(config, model, augment, optimizer, ema),
        evaluators={
            prefix: Evaluator(module, augment, amp=config.step.amp, compile=config.step.compile)
            for prefix, module in evaluated.items()
        },
        train_loader=train_loader,
        val_loader=val_loader,
        val_batch=val_batch,
        description=[
            f"{config.model.model}: {parameters / 1e6:.2f} M parameters, {spec.img_size} px, "
            f"{num_classes} classes, on {device}",
            train_line,
            val_line,
            f"peak learning rate {lr:.3g} ({lr_origin}), batch {batch_size}, "
            f"{plan.steps_per_epoch} updates an epoch, {num_epochs} epochs",
        ],
    )


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. Raises `UserError` for cuda without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Check nvidia-smi, or use --device cpu.")
    return torch.device(name)


def _make_model(config: Config, num_classes: int, resumed: Checkpoint | None) -> nn.Module:
    options = config.model
    model = create_model(
        options.model,
        num_classes,
        img_size=config.data.img_size,
        drop=options.drop,
        drop_path=options.drop_path,
        model_kwargs=options.model_kwargs,
        pretrained=options.pretrained and not resumed,
        pretrained_path=None if resumed else options.pretrained_path,
        grad_checkpointing=options.grad_checkpointing,
    )
    source = resumed or (read_checkpoint(options.initial_checkpoint) if options.initial_checkpoint else None)
    if source:
        load_weights(model, source, source.weights(use_ema=False), options.model)
    return model


def _make_ema(config: Config, model: nn.Module, resumed: Checkpoint | None) -> ModelEmaV3 | None:
    options = config.model
    if not options.model_ema:
        return None
    ema = ModelEmaV3(model, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
    if resumed:
        if not resumed.content.get("state_dict_ema"):
            raise UserError(f"{resumed.path} is of a run without an EMA. Resume it with --no-model-ema.")
        load_weights(ema.module, resumed, resumed.weights(use_ema=True), options.model)
    return ema


def _make_train_plan(config: Config, train_set: Beton, spec: InputSpec) -> TrainPlan:
    return TrainPlan(
        train_set.heights,
        train_set.widths,
        train_rules(config),
        seed=config.run.seed,
        img_size=spec.img_size,
        batch_size=config.data.batch_size,
    )
