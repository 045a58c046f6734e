"""Make everything that a run needs from its configuration; all errors of the configuration are found here."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from data_prep.sources.samples import TRUST, differences
from lowrank_vit.augment.ops_cpu import apply_ops
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common import terminal
from lowrank_vit.common.devices import DTYPES, cuda_path, pick_device, why_on_cpu
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say
from lowrank_vit.common.numba_code import NOTE as COMPILING
from lowrank_vit.common.numba_code import must_compile
from lowrank_vit.config.option_types import with_options
from lowrank_vit.config.options import Config
from lowrank_vit.data.decode.ffcv import decode_batch
from lowrank_vit.data.decode.resize_cpu import resize_batch
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import FINDING, DataOptions, open_datasets
from lowrank_vit.data.synthetic import SyntheticLoader
from lowrank_vit.lowrank.switching.begin import begin
from lowrank_vit.lowrank.switching.controller import LowRankTraining
from lowrank_vit.lowrank.switching.groups import decay_product
from lowrank_vit.model.class_match import Classes, Trust, match
from lowrank_vit.model.create import InputSpec, input_spec
from lowrank_vit.model.flops import Peak, peak_flops, train_flops_per_image
from lowrank_vit.model.optimizer import Constant, create_optimizer, create_scheduler, learning_rate
from lowrank_vit.model.weights import Checkpoint
from lowrank_vit.plan.order import subset
from lowrank_vit.plan.plans import TrainPlan
from lowrank_vit.ranks.agree import agree, once
from lowrank_vit.ranks.records import data_record
from lowrank_vit.ranks.world import World
from lowrank_vit.run.flows import FlowWatch
from lowrank_vit.run.state import Position
from lowrank_vit.score.evaluate import Evaluator
from lowrank_vit.spectral.flows import remark_on_attention
from lowrank_vit.spectral.layers import matrices_of, ranks_of_factors, targets_of_model
from lowrank_vit.spectral.measures.metrics import reach
from lowrank_vit.spectral.select import Target
from lowrank_vit.spectral.watching.schedule import usual_full_every
from lowrank_vit.spectral.watching.watched import remark_on_directions
from lowrank_vit.training.loading import fed_step, loaders_before, make_train_loader, make_val_loader, with_workers
from lowrank_vit.training.models import begin_low_rank, make_ema, make_model, with_ema_warmup
from lowrank_vit.training.phases import NOBODY_LISTENS, Phases
from lowrank_vit.training.preflight import check_before_data
from lowrank_vit.training.step import TrainStep

SYNTHETIC_CLASSES = 1000
"""Number of classes with --synthetic and without --num-classes: ImageNet-1k's."""


@dataclass
class Setup:
    """Everything that a run needs, on one device and ready."""

    config: Config
    """Options, with values chosen for those that were not given."""
    device: torch.device
    num_classes: int
    class_names: list[str] | None
    """Names in label order, if the data have names."""
    spec: InputSpec
    model: nn.Module
    """The raw module, not compiled."""
    ema: ModelEmaV3 | None
    plan: TrainPlan
    optimizer: Optimizer
    scheduler: Scheduler | Constant
    num_epochs: int
    step: TrainStep
    evaluators: dict[str, Evaluator]
    """Evaluators by prefix of the metric's name: "" for the model, "ema_" for its EMA. Empty without validation
    data."""
    flows: FlowWatch | None
    """Set with --spec-flows and validation data."""
    low_rank: LowRankTraining | None
    """Set with --lowrank-train."""
    train_loader: Loader | SyntheticLoader
    val_loader: Loader | None
    val_batch: int
    train_flops: float | None
    """FLOPs of training on one image; None if they cannot be counted."""
    peak: Peak
    description: list[str]
    """Lines for the log about what was made."""


@dataclass(frozen=True)
class _Sets:
    """Training and validation set."""

    train: Beton
    val: Beton

    @property
    def by_name(self) -> dict[str, Beton]:
        """Both sets, by their names in messages."""
        return {"training set": self.train, "validation set": self.val}

    @property
    def classes(self) -> Classes:
        """Classes of both sets."""
        return Classes(str(self.train.path), max(self.train.num_classes, self.val.num_classes), self.train.classes)

    def follow(self, resumed: Checkpoint, config: Config, say: Say) -> None:
        """Map the sets' labels to those of the resumed run. Raises `UserError` if its classes were others."""
        names = resumed.class_names
        model = Classes(str(resumed.path), len(names) if names else self.classes.count, names)
        advice = "Give the data that the run was trained on."
        if names and self.classes.count < len(names) and not config.model.trust_labels:
            raise UserError(
                f"{resumed.path} was trained on other classes: "
                f"{differences(self.classes.names or (), self.classes.what, names, 'there')}. {advice} {TRUST}"
            )
        of_data = self.classes
        if not names and not self.train.manifest:  # these names come from the validation set; older runs had none
            of_data = replace(of_data, names=None)
        found = match(of_data, model, trust_in(config), advice)
        for remark in found.remarks:
            say(remark)
        for beton in (self.train, self.val):
            beton.relabel(found.outputs, found.names)


def trust_in(config: Config) -> Trust:
    """The flags for classes that cannot be compared."""
    return Trust(config.model.trust_labels, config.model.class_order)


def set_up(
    config: Config,
    resumed: Checkpoint | None = None,
    world: World | None = None,
    position: Position | None = None,
    phases: Phases = NOBODY_LISTENS,
) -> Setup:
    """Make everything but the run directory; weights and EMA come from `resumed` if given. Raises `UserError`.

    All ranks make the same, except for their share of the data. `position`, `phases`: see `TrainStep`.
    """
    world = world or World()
    device = pick_device(config.step.device, world.local_rank)
    set_float32_policy(device, tf32=config.step.tf32)
    if config.step.compile:
        keep_compiled_code(config.step.compile_cache)
    say = terminal.say if world.is_first else silent
    if why := why_on_cpu(config.step.device, device):
        say(why)
    world.progress.enter("checking the options")
    check_before_data(config, is_resumed=resumed is not None, world=world)
    world.progress.enter(FINDING)
    sets, num_classes = _open_sets(config, world, say)
    if sets and resumed:
        sets.follow(resumed, config, say)
    world.progress.enter("making the model")
    torch.manual_seed(config.run.seed)
    model = make_model(config, num_classes, (sets.classes, trust_in(config)) if sets else None, resumed, say)
    by_name = sets.by_name if sets else {}
    agree(world, "data", lambda: data_record(by_name, model, resumed), "opening the data")
    model = model.to(device)
    of_low_rank = begin_low_rank(config, model, world, say, is_resumed=resumed is not None)
    data = config.data
    spec = input_spec(model, data.img_size, data.crop_pct, data.mean, data.std)
    smoothing, remode = config.augment.smoothing, config.augment.remode
    erase_first = config.augment.erase_first
    augment = Augment(spec.mean, spec.std, num_classes, smoothing, remode, erase_first=erase_first).to(device)
    prepare = phases.around("augment", augment.prepare)
    world.progress.enter("opening the training data's loader")
    train_flops = train_flops_per_image(model, spec.img_size)
    dtype = DTYPES[config.step.amp_dtype] if config.step.amp else torch.float32
    peak = peak_flops(device, dtype, tf32=config.step.tf32)
    config = _with_full_every(with_workers(config, world, device), model, device)
    fed = fed_step(config, spec, world, device, train_flops, peak)
    train = sets.train if sets else None
    before = loaders_before(resumed)
    of_train = config, train, num_classes, spec, world, device
    plan, train_loader, line = make_train_loader(*of_train, prepare, fed, before)
    if share := train_loader.engine_share:
        config = with_options(config, {"hw-decoder-load": share.share})
    lines, evaluators, flows, val_loader, val_batch = [line], dict[str, Evaluator](), None, None, 0
    lr, lr_origin = learning_rate(config.optim, plan.global_batch)
    optimizer = create_optimizer(config.optim, model, lr)
    scheduler, num_epochs = create_scheduler(config.optim, optimizer, plan.updates_per_epoch, config.run.seed)
    if config.lowrank.lowrank_decay == "product" and not resumed:  # a resumed run's groups have it already
        decay_product(optimizer, scheduler, model)
    config, ema_line = with_ema_warmup(config, num_epochs * plan.updates_per_epoch)
    ema = make_ema(config, model, resumed)
    if sets:
        world.progress.enter("opening the validation data's loader")
        val_batch = min(config.data.validation_batch_size or config.data.batch_size, sets.val.num_samples)
        val_loader, line = make_val_loader(config, sets.val, val_batch, spec, world, device, before)
        lines.append(line)
        evaluators = {"": _make_evaluator(config, model, augment)}
        if ema:
            evaluators["ema_"] = _make_evaluator(config, ema.module, augment)
        if config.spectra.spec_flows:
            watched = config.run.seed, sets.val.num_samples, config.spectra.spec_flow_images
            flows = FlowWatch(evaluators, subset(*watched, config.data.epoch_order), world, say)
            if line := remark_on_attention(model):
                lines.append(line)
    if config.spectra.spec_monitor and config.spectra.spec_updates:
        lines += filter(None, [remark_on_directions(model, optimizer, _targets(config, model))])
    world.progress.enter("making ready to train")
    parameters = sum(p.numel() for p in model.parameters())
    train_step = TrainStep(config, model, augment, optimizer, ema, world, position=position, phases=phases)
    low_rank = begin(
        *(config, model, ema, optimizer, scheduler),
        train=train,
        plan=plan,
        spec=spec,
        augment=augment,
        num_epochs=num_epochs,
        world=world,
        rebuild=train_step.rebuild,
        is_resumed=resumed is not None,
        say=say,
    )
    return Setup(
        config=config,
        device=device,
        num_classes=num_classes,
        class_names=sets.train.classes if sets else None,
        spec=spec,
        model=model,
        ema=ema,
        plan=plan,
        optimizer=optimizer,
        scheduler=scheduler,
        num_epochs=num_epochs,
        step=train_step,
        evaluators=evaluators,
        flows=flows,
        low_rank=low_rank,
        train_loader=train_loader,
        val_loader=val_loader,
        val_batch=val_batch,
        train_flops=train_flops,
        peak=peak,
        description=[
            f"{config.model.model}: {parameters / 1e6:.2f} M parameters, {spec.img_size} px, "
            f"{num_classes} classes, on {device}",
            *of_low_rank,
            *lines,
            f"peak learning rate {lr:.3g} ({lr_origin}), {_batch_in_words(plan)}, "
            f"{plan.updates_per_epoch} updates an epoch, {num_epochs} epoch{'s' if num_epochs != 1 else ''}",
            *ema_line,
            *([train_step.regulariser.in_words()] if train_step.regulariser else []),
            *([COMPILING] if sets and _must_compile(config, train_loader.name, device) else []),
            *([f"{train_flops / 1e9:.3g} GFLOP a training image; MFU is against {peak.name}"] if train_flops else []),
        ],
    )


def _open_sets(config: Config, world: World, say: Say) -> tuple[_Sets | None, int]:
    """The sets and the number of classes. Raises `UserError`."""
    data, num_classes = config.data, config.model.num_classes
    if data.synthetic:
        return None, num_classes or SYNTHETIC_CLASSES
    where = DataOptions(
        *(data.dataset, data.data_dir, data.dataset_download, data.beton_dir, data.train_split, data.val_split),
        on_bad=data.on_bad_sample,
        nested=data.nested_classes,
        trust_labels=config.model.trust_labels,
        input_key=data.input_key,
        target_key=data.target_key,
        class_map=data.class_map,
    )
    larger = config.model.larger_head
    one_of = once(world, "sets", FINDING)
    train, val, num_classes = open_datasets(where, num_classes, data.stage_dir, say, larger_head=larger, one_of=one_of)
    return _Sets(train, val), num_classes


def _make_evaluator(config: Config, model: nn.Module, augment: Augment) -> Evaluator:
    step = config.step
    dtype = DTYPES[step.amp_dtype]
    return Evaluator(model, augment, amp=step.amp, compile=step.compile, amp_dtype=dtype, tta=config.run.tta)


def _must_compile(config: Config, loader: str, device: torch.device) -> bool:
    decoding = decode_batch if loader == "ffcv" else resize_batch
    return not cuda_path(device) and must_compile(decoding, *((apply_ops,) if config.augment.aa != "none" else ()))


def silent(line: str) -> None:
    """Print nothing: for all ranks but the first."""


def _batch_in_words(plan: TrainPlan) -> str:
    factors = {"ranks": plan.world_size, "accumulation steps": plan.accum_steps}
    of = "".join(f" x {number} {name}" for name, number in factors.items() if number > 1)
    return f"batch {plan.global_batch}{f' ({plan.batch_size}{of})' if of else ''}"


def _with_full_every(config: Config, model: nn.Module, device: torch.device) -> Config:
    """Choose --spec-full-every if it was not given."""
    spec = config.spectra
    if not spec.spec_monitor or spec.spec_full_every is not None:
        return config
    targets = _targets(config, model)
    where = torch.device("cpu") if spec.spec_on_cpu else device
    m, ranks = reach(spec.spec_topk, spec.spec_interval), ranks_of_factors(model, targets)
    shapes = [tuple(w.shape) for name, w in matrices_of(model, targets).items() if ranks.get(name, m + 1) > m]
    usual = usual_full_every(where, spec.spec_solver, m, shapes)
    return with_options(config, {"spec-full-every": usual})


def _targets(config: Config, model: nn.Module) -> dict[str, Target]:
    return targets_of_model(model, config.spectra.spec_targets, config.spectra.spec_split_qkv)


def keep_compiled_code(folder: Path | None) -> Path:
    """Let torch.compile cache its code in `folder`, so that the next start need not compile; returns the folder used.

    Without `folder`: TORCHINDUCTOR_CACHE_DIR if it is set, otherwise lowrank-vit/ in the user's cache folder (torch's
    own default is in /tmp, which clusters clear). Call it before anything is compiled. Raises `UserError` if the folder
    cannot be made.
    """
    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    # torch sets the variable to its default on import; any other value is the user's.
    if folder is None and kept and not kept.startswith(f"{tempfile.gettempdir()}/torchinductor_"):
        return Path(kept)
    folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank-vit"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}, the folder for compiled code, cannot be made: {error.strerror}. Choose another folder "
            "with --compile-cache."
        ) from error
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.resolve())  # Triton's cache is inside
    return folder


def set_float32_policy(device: torch.device, *, tf32: bool) -> None:
    """Set whether float32 products and convolutions of the training step may use TF32 on CUDA (10 bits of mantissa).

    float64, in which spectra are computed, is never affected, nor is a CPU. Convolutions also choose the fastest of
    cuDNN's algorithms for their shape by trying them, as in timm.
    """
    if not cuda_path(device):
        return
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
