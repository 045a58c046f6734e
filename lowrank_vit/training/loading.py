"""Open the loaders of a run: their data, threads, and the step that they feed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import torch
from rich.filesize import decimal as size_in_words
from torch import Tensor

from lowrank_vit.augment.recipe import batches_of_update, train_rules
from lowrank_vit.common.devices import cuda_path
from lowrank_vit.common.errors import UserError, in_short
from lowrank_vit.config.data_options import LoaderName
from lowrank_vit.config.option_types import with_options
from lowrank_vit.config.options import Config
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import FedStep, LoaderOptions, usual_workers
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.synthetic import SyntheticLoader, synthetic_plan
from lowrank_vit.model.create import InputSpec
from lowrank_vit.model.flops import Peak
from lowrank_vit.model.weights import Checkpoint
from lowrank_vit.plan.dealing import check_global_batch, length_of_epoch
from lowrank_vit.plan.plans import BatchPlan, EvalPlan, TrainPlan
from lowrank_vit.ranks.agree import gatherer
from lowrank_vit.ranks.world import World

LOADERS = "loaders"
"""Key in a checkpoint: the name of the decode backend by split, train and val."""
MOST_MFU = 0.4
"""Upper bound of the share of peak FLOP/s that a training step reaches: ViT-B 0.35, ViT-S 0.23 on an H100."""


def with_workers(config: Config, world: World, device: torch.device) -> Config:
    """Choose --workers if it was not given."""
    if config.data.workers is not None:
        return config
    return with_options(config, {"workers": usual_workers(device, world.local_size)})


def fed_step(
    config: Config, spec: InputSpec, world: World, device: torch.device, train_flops: float | None, peak: Peak
) -> FedStep | None:
    """A description of the step for a GPU's loader; None on a CPU. `train_flops`: of one image; `peak`: the GPU's."""
    if not cuda_path(device):
        return None
    model, step, optim, augment, spectra = config.model, config.step, config.optim, config.augment, config.spectra
    batch_size, accum_steps = batches_of_update(config, world.size)
    watched = [spectra.spec_every, spectra.spec_targets, spectra.spec_solver, spectra.spec_on_cpu]
    key = {
        "step": [model.model, *model.model_kwargs],
        "gpu": torch.cuda.get_device_name(device),
        "img_size": spec.img_size,
        "batch_size": batch_size,
        "accum_steps": accum_steps,
        "ranks": world.size,
        "options": [
            *(step.amp and step.amp_dtype, step.compile and step.compile_mode, step.tf32),
            *(model.grad_checkpointing, model.model_ema),
            *(optim.opt, *optim.opt_kwargs, optim.clip_grad and optim.clip_mode),
            *(augment.aa, augment.color_jitter, augment.reprob > 0),
            spectra.spec_monitor and watched,
        ],
        "torch": torch.__version__,
    }
    return FedStep(key, MOST_MFU * peak.flops_per_s / train_flops if train_flops else None)


def loaders_before(resumed: Checkpoint | None) -> dict[str, str]:
    """The decode backend that a run has used so far, by split; empty for a new run or if the checkpoint has none."""
    found = resumed.content.get(LOADERS) if resumed else None
    known = get_args(LoaderName)
    return {split: name for split, name in found.items() if name in known} if isinstance(found, dict) else {}


def make_train_loader(
    config: Config,
    train: Beton | None,
    num_classes: int,
    spec: InputSpec,
    world: World,
    device: torch.device,
    prepare: Callable[[Tensor, BatchPlan], Tensor],
    step: FedStep | None,
    before: Mapping[str, str],
) -> tuple[TrainPlan, Loader | SyntheticLoader, str]:
    """The plan, the loader, and a line about it. `train` None: synthetic images. `before`: see `loaders_before`."""
    batch_size, accum_steps = batches_of_update(config, world.size)
    share = {"rank": world.rank, "world_size": world.size, "accum_steps": accum_steps}
    of_batch = {"img_size": spec.img_size, "batch_size": batch_size, "seed": config.run.seed}
    if train is None:
        plan = synthetic_plan(**of_batch, **share)
        loader = SyntheticLoader(plan, num_classes, device)
        return plan, loader, "synthetic images that stay on the device: no data, no augmentation, no validation"
    wanted, there = config.optim.global_batch_size, train.num_samples
    if wanted and wanted > there:
        raise UserError(
            f"--global-batch-size {wanted} is larger than the training set of {there} samples, so no update would be "
            f"complete. Use {there} or less."
        )
    rules = train_rules(config)
    of_epoch = length_of_epoch(there, rules.repeats)
    check_global_batch(of_epoch, batch_size, world.size, accum_steps, ("--batch-size ", "--grad-accum-steps"))
    plan = TrainPlan(*train.sides, rules, **of_batch, **share)
    options = replace(
        _decoding(config, world, device, "train", before),
        hw_decoder_load=config.data.hw_decoder_load,
        jpeg_fancy_upsampling=config.data.jpeg_fancy_upsampling,
        step=step,
    )
    return plan, *open_loader(train, plan, device, options, prepare=prepare, say=world.say)


def make_val_loader(
    config: Config,
    val: Beton,
    batch_size: int,
    spec: InputSpec,
    world: World,
    device: torch.device,
    before: Mapping[str, str],
) -> tuple[Loader, str]:
    """The loader of the validation set, and a line about it. `before`: `loaders_before`."""
    plan = EvalPlan(
        *val.sides,
        img_size=spec.img_size,
        crop_pct=spec.crop_pct,
        batch_size=batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    # A GPU decodes as for `validate`, so that a score does not depend on measured speeds.
    return open_loader(val, plan, device, _decoding(config, world, device, "val", before), say=world.say)


@contextmanager
def room_beside(*loaders: Loader | SyntheticLoader | None) -> Generator[None]:
    """If the GPU runs out of memory within, report how much of it the loaders' sets take.

    Raises `UserError` instead of torch's error if they take any.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if taken := sum(loader.resident_bytes for loader in loaders if loader):
            raise UserError(
                f"{in_short(error)}. Decoded images take {size_in_words(taken)} of the GPU's memory: Free "
                "that memory with --loader dali, or give a smaller --batch-size."
            ) from error
        raise


def _decoding(
    config: Config, world: World, device: torch.device, split: str, before: Mapping[str, str]
) -> LoaderOptions:
    data = config.data
    return LoaderOptions(
        data.loader,
        data.workers or usual_workers(device, world.local_size),
        data.prefetch,
        on_bad_sample=data.on_bad_sample,
        of_all_ranks=gatherer(world, f"loader/{split}", "choosing a loader"),
        before=before.get(split, ""),
    )
