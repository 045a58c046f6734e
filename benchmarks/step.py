"""The bench `step`: one training step on synthetic images, eager and compiled, beside that of timm's train.py.

Also the compiled step of a model with factorised block layers beside that of the same model at full rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from benchmarks.harness.limits import copy_case, products_case, wait
from benchmarks.harness.measure import DEFAULT_REPEATS, Case, Result, environment, measure, nothing
from lowrank_vit.augment.mixing import mix_images
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common.devices import DTYPES, pick_device
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.resources import available_cores
from lowrank_vit.config.flags import parse
from lowrank_vit.config.options import Config
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.synthetic import SyntheticLoader
from lowrank_vit.model.patches import set_patch_embedding
from lowrank_vit.plan.plans import BatchPlan
from lowrank_vit.training.setup import Setup, set_up
from lowrank_vit.training.step import TrainStep

NUM_CLASSES = 1000
RECIPE = ("--opt", "adamw", "--lr", "5e-4", "--weight-decay", "0.05", "--warmup-epochs", "0", "--smoothing", "0.1")
LIMITS = (
    "timm's loader normalises images and smooths targets before the step. Our step does both itself, and the "
    "arithmetic of mixing.",
    "timm's train.py uses AdamW without fused by default; here it gets fused, as with --opt-kwargs fused=True.",
)


@dataclass(frozen=True)
class Workload:
    """The model and sizes on which a step is measured."""

    model: str
    img_size: int
    batch_size: int
    steps: int


WORKLOADS = {
    "cuda": Workload("vit_small_patch16_224", 224, 256, 20),
    "cpu": Workload("vit_tiny_patch16_224", 64, 64, 4),
}
"""By device: small enough for a CPU, and a usual training on ImageNet for a GPU."""

FACTORISED = {
    "cuda": Workload("vit_small_patch16_224", 128, 64, 20),
    "cpu": Workload("vit_small_patch16_224", 128, 64, 1),
}
"""For comparing full rank and factors, by device: with `OF_FACTORISED`, width 384, depth 6, 64 tokens."""
OF_FACTORISED = ("--model-kwargs", "depth=6", "class_token=False", "global_pool=avg")
KEPT_SHARE = 0.25
"""The share of the block layers' weights that the factors keep."""

WARM_UP_STEPS = 20
"""Compiled steps before the first round, for compilation, autotuning and allocation."""
FEW_WARM_UP_STEPS = 5
"""The same if a step is so long that a round has only one."""
UPDATE_BYTES = 10 * 4
"""A parameter's least memory traffic in an update, float32: AdamW reads weight, gradient and both moments and writes
weight and moments (7 numbers; Loshchilov & Hutter, Decoupled Weight Decay Regularization, algorithm 2); the EMA reads
weight and average and writes the average (3). Gradients are set to None, not to zero; the backward pass writes them."""

_BY_DEVICE = "(default: by the device)"


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_BY_DEVICE)] = None
    """timm model; vit_small_patch16_224 on cuda, vit_tiny_patch16_224 on a CPU."""
    img_size: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Side of the images, pixels; by default 224 on cuda and 64 on a CPU."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["-b"], metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Images a step; by default 256 on cuda and 64 on a CPU."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Steps a round; by default 20 on cuda and 4 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where both steps run: with bfloat16 autocast on cuda, in float32 on a CPU."""
    compile: bool = True
    """Also time the compiled steps. Compiling takes about a minute."""
    parts: bool = False
    """Also time variants of our compiled step: the patch embedding as a convolution and as a matrix product, and the
    latter with images that are normalised and mixed before the step instead of within it."""
    modes: Annotated[tuple[Literal["reduce-overhead", "max-autotune"], ...], tyro.conf.arg(metavar="MODE ...")] = ()
    """Also time our step in these modes of torch.compile."""
    low_rank: bool = True
    """With compiled steps also time that of a ViT of width 384, depth 6 and 64 tokens, batch 64, in full rank and with
    its block layers factorised to a quarter of their weights."""
    ours_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave out timm's steps, the step of a factorised model, and our eager step where the compiled one is timed."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Measured rounds, after one that warms up. Fewer than 5 are a smoke test."""

    def workload(self, device: torch.device) -> Workload:
        """The device's workload with the given options. Raises `UserError`."""
        given = {name: getattr(self, name) for name in ("model", "img_size", "batch_size", "steps")}
        for name, value in given.items():
            if isinstance(value, int) and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}, expected 1 or more.")
        return replace(WORKLOADS[device.type], **{name: value for name, value in given.items() if value is not None})


def run(options: Options, note: Callable[[str], object] = nothing) -> Result:
    """Measure all cases. The result also has the workload and FLOPs. Raises `UserError`."""
    device = pick_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(available_cores())
    load = options.workload(device)
    surroundings = environment(device.type)
    ways = ("eager", "compiled") if options.compile else ("eager",)
    if options.ours_only:
        ways = ways[-1:]
    cases: dict[str, Case] = {}
    flops, dtype, num_params = None, torch.float32, 0
    for way in ways:
        note(f"making the {way} steps")
        config = config_of(load, device, way)
        parts = set_up(config, None)
        flops, dtype = parts.train_flops, dtype_of(config)
        num_params = sum(p.numel() for p in parts.model.parameters())
        cases[f"ours_{way}"] = _our_case(parts, load, way, config)
        if not options.ours_only:
            cases[f"timm_{way}"] = Case.of_peer(partial(timm_case, load, device, way, config))
    steps = list(cases)
    ratios: dict[str, tuple[str, str]] = {}
    if not options.ours_only:
        ratios |= {f"{way}_vs_timm_{way}": (f"ours_{way}", f"timm_{way}") for way in ways}
    if options.compile:
        if not options.ours_only:
            ratios["compiled_vs_timm_eager"] = ("ours_compiled", "timm_eager")
        forms = _forms(options, load, device, note)
        cases |= forms
        ratios |= {f"{name}_vs_compiled": (name, "ours_compiled") for name in forms}
        if options.parts:
            ratios["product_vs_convolution"] = ("ours_product", "ours_convolution")
            ratios["normalized_within_vs_before"] = ("ours_product", "ours_normalized_before")
    items = load.batch_size * load.steps
    if flops:
        cases["product_limit"] = products_case(flops, items, "img/s", device, dtype)
        ratios |= {f"mfu_{name}": (name, "product_limit") for name in steps}
    cases["update_limit"] = update_case(num_params, load, device)
    ratios |= {f"update_share_{name}": (name, "update_limit") for name in steps}
    about = {"model": load.model, "img_size": load.img_size, "batch_size": load.batch_size, "steps": load.steps}
    extra = {"workload": about, "train_flops_per_image": flops, "update_bytes": UPDATE_BYTES * num_params}
    if options.compile and options.low_rank and not options.ours_only:
        pair, of_pair, extra["low_rank"] = _factorised_cases(device, note)
        cases, ratios = cases | pair, ratios | of_pair
    result = measure("step", cases, ratios, environment=surroundings, repeats=options.repeats, limits=LIMITS, note=note)
    return replace(result, extra=extra)


def _factorised_cases(
    device: torch.device, note: Callable[[str], object]
) -> tuple[dict[str, Case], dict[str, tuple[str, str]], dict[str, Any]]:
    """Our compiled step at full rank and factorised, with a product of equal FLOPs for each; ratios; sizes."""
    load = FACTORISED[device.type]
    cases: dict[str, Case] = {}
    sizes: dict[str, Any] = {"model": load.model, "img_size": load.img_size, "batch_size": load.batch_size}
    ratios = {"lowrank_vs_full": ("low_rank", "full_rank")}
    for name, flags in {"full_rank": (), "low_rank": ("--lowrank-init", str(KEPT_SHARE))}.items():
        note(f"making the step of a {'factorised model' if flags else 'model of full rank'}")
        config = config_of(load, device, "compiled", *OF_FACTORISED, *flags)
        parts = set_up(config, None)
        case = _our_case(parts, load, "compiled", config)
        cases[name] = replace(case, setting="; ".join([case.setting, " ".join((*OF_FACTORISED[1:], *flags))]))
        if parts.train_flops:
            dtype, items = dtype_of(config), load.batch_size * load.steps
            cases[f"{name}_limit"] = products_case(parts.train_flops, items, "img/s", device, dtype)
            ratios[f"mfu_{name}"] = (name, f"{name}_limit")
        num_params = sum(p.numel() for p in parts.model.parameters())
        sizes[name] = {"params": num_params, "train_flops_per_image": parts.train_flops}
    return cases, ratios, sizes


class NormalizedBefore(Augment):
    """Normalises and mixes in separate passes before the compiled step."""

    @torch.no_grad()
    def begin(
        self, images: Tensor, plan: BatchPlan, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Float images, and what the step needs for the targets."""
        images, mix, *_ = super().begin(images, plan, out)
        return mix_images(self.normalize(images), mix), mix, None, None


def _forms(options: Options, load: Workload, device: torch.device, note: Callable[[str], object]) -> dict[str, Case]:
    """Our compiled step in the requested forms, by name."""
    cases = {}
    for mode in options.modes:
        note(f"making the step in mode {mode}")
        config = config_of(load, device, "compiled", "--compile-mode", mode)
        cases[f"ours_{mode.replace('-', '_')}"] = _our_case(set_up(config, None), load, "compiled", config)
    for form in ("convolution", "product", "normalized_before") if options.parts else ():
        note(f"making the step with {form.replace('_', ' ')}")
        config = config_of(load, device, "compiled")
        parts = set_up(config, None)
        if form == "normalized_before":
            spec = parts.spec
            augment = NormalizedBefore(spec.mean, spec.std, NUM_CLASSES, config.augment.smoothing).to(device)
            parts = replace(parts, step=TrainStep(config, parts.model, augment, parts.optimizer, parts.ema))
        set_patch_embedding(parts.model, as_product=form != "convolution")  # before the first step compiles it
        cases[f"ours_{form}"] = _our_case(parts, load, "compiled", config)
    return cases


def update_case(num_params: int, load: Workload, device: torch.device) -> Case:
    """Images per second if a step only moved its update's bytes: a case's ratio to it is their share of its step."""
    # A copy reads and writes each byte, so half of the bytes are copied.
    source = torch.ones(num_params * UPDATE_BYTES // 2, dtype=torch.uint8, device=device)
    copies = copy_case(source, torch.zeros_like(source).fill_(2), load.steps)
    megabytes = num_params * UPDATE_BYTES / 1e6
    setting = (
        f"limit: {megabytes:,.0f} MB a step read and written, what AdamW and the EMA move of {num_params:,} weights"
    )
    return replace(copies, items=load.batch_size * load.steps, unit="img/s", setting=setting)


def config_of(load: Workload, device: torch.device, way: str, *more: str) -> Config:
    """A run on synthetic images. Raises `UserError`."""
    step = ["--device", device.type, "--compile" if way == "compiled" else "--no-compile"]
    step.append("--amp" if device.type == "cuda" else "--no-amp")
    sizes = ["--img-size", str(load.img_size), "--batch-size", str(load.batch_size)]
    # ImageNet's number of outputs, whatever the images of a bench are.
    of_model = ["--model", load.model, "--num-classes", str(NUM_CLASSES), "--larger-head"]
    return parse(["--synthetic", *of_model, *sizes, *step, *RECIPE, *more], prog="bench")


def dtype_of(config: Config) -> torch.dtype:
    """The dtype of the step's matrix products."""
    return DTYPES[config.step.amp_dtype] if config.step.amp else torch.float32


def endless(loader: SyntheticLoader) -> Iterator[Batch]:
    """Batches of one epoch after the other."""
    epoch = 0
    while True:
        yield from loader.batches(epoch)
        epoch += 1


def _our_case(parts: Setup, load: Workload, way: str, config: Config) -> Case:
    assert isinstance(parts.train_loader, SyntheticLoader)
    batches = endless(parts.train_loader)
    parts.model.train()

    def steps(count: int) -> None:
        for _ in range(count):
            parts.step(next(batches))
        wait(parts.device)

    kind = "torch.compile of normalising, mixing, model and loss" if way == "compiled" else "eager"
    precision = f"{config.step.amp_dtype} autocast" if config.step.amp else "float32"
    setting = f"{load.model}, {load.img_size} px, batch {load.batch_size}, {precision}, AdamW, EMA, loss meter; {kind}"
    return _case(steps, load, way, setting)


def _case(steps: Callable[[int], None], load: Workload, way: str, setting: str) -> Case:
    """A case of a function that runs a number of steps."""
    warm_up = partial(steps, WARM_UP_STEPS if load.steps > 1 else FEW_WARM_UP_STEPS) if way == "compiled" else nothing
    return Case(partial(steps, load.steps), load.batch_size * load.steps, setting=setting, first=warm_up)


def timm_case(load: Workload, device: torch.device, way: str, config: Config) -> Case:
    """The step of timm's train.py: its task with model, loss and EMA, its optimizer, and torch's autocast."""
    import timm
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.task import ClassificationTask

    model = timm.create_model(load.model, num_classes=NUM_CLASSES, img_size=load.img_size).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optim = config.optim
    groups: dict[str, Any] = {"opt": optim.opt, "lr": optim.lr, "weight_decay": optim.weight_decay, "fused": True}
    optimizer = create_optimizer_v2(model, **groups)
    task = ClassificationTask(model, SoftTargetCrossEntropy(), device=device, verbose=False)
    task.setup_ema(decay=config.model.model_ema_decay)
    if way == "compiled":
        task.compile()
    task.train()
    images, targets = _normalized_batch(load, device)
    num_updates = 0

    def steps(count: int) -> None:
        nonlocal num_updates
        for _ in range(count):
            with torch.autocast(device.type, dtype_of(config), enabled=config.step.amp):
                loss = task(images, targets)["loss"]
            loss.backward()
            optimizer.step()
            num_updates += 1
            optimizer.zero_grad()
            task.update_ema(step=num_updates)
        wait(device)

    kind = "--torchcompile" if way == "compiled" else "eager"
    setting = f"ClassificationTask as in timm's train.py, --channels-last --model-ema, fused AdamW; {kind}"
    return _case(steps, load, way, setting)


def _normalized_batch(load: Workload, device: torch.device) -> tuple[Tensor, Tensor]:
    """Float images (B, 3, H, W) and soft targets (B, classes), as from timm's loader and Mixup."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(load.batch_size, 3, load.img_size, load.img_size, generator=generator)
    targets = torch.full((load.batch_size, NUM_CLASSES), 0.1 / NUM_CLASSES)
    targets[torch.arange(load.batch_size), torch.arange(load.batch_size) % NUM_CLASSES] += 0.9
    return images.to(device).contiguous(memory_format=torch.channels_last), targets.to(device)
