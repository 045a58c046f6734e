"""Set up training that becomes low-rank: checks of its options and targets, and its calibration images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say
from lowrank_vit.config.low_rank_options import parse_schedule
from lowrank_vit.config.options import Config
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions, usual_workers
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.synthetic import SyntheticLoader
from lowrank_vit.lowrank.allocation import check_share_of
from lowrank_vit.lowrank.layers import Costs, costs_alone
from lowrank_vit.lowrank.switching.controller import LowRankTraining, Span
from lowrank_vit.lowrank.switching.planner import TARGETS_FLAG, Planner, merged_copy
from lowrank_vit.lowrank.switching.verdict import Settling, Shares
from lowrank_vit.lowrank.targets import find_targets, possible_weights
from lowrank_vit.model.create import InputSpec
from lowrank_vit.plan.order import subset
from lowrank_vit.plan.plans import EvalPlan, TrainPlan
from lowrank_vit.ranks.world import World
from lowrank_vit.spectral.fused import fused_qkv
from lowrank_vit.spectral.layers import targets_of_model

_BATCH = 128
"""Calibration images per batch; the loss before and after a switch is that of the first batch."""


def check_low_rank_training(config: Config, model: nn.Module, num_epochs: int) -> None:
    """Raise `UserError` for targets that match nothing or are not monitored, budgets too small, and epochs too late.

    The model needs no weights yet; `begin` makes the checks that need them.
    """
    options = config.lowrank
    weights = possible_weights(model, options.lowrank_targets, TARGETS_FLAG)
    _check_budgets(config, costs_alone(weights))
    schedule = parse_schedule(options.lowrank_schedule)
    if late := [epoch for epoch in schedule if epoch >= num_epochs]:
        raise UserError(
            f"--lowrank-schedule {late[0]}={schedule[late[0]]:g}: the run ends after {num_epochs} epochs, so no epoch "
            f"would follow that switch. Give {f'{num_epochs - 1} at most, or ' * (num_epochs > 1)}a larger --epochs."
        )
    watched = targets_of_model(model, config.spectra.spec_targets, config.spectra.spec_split_qkv)
    if not schedule and (unseen := [name for name in weights if name not in watched]):
        split = config.spectra.spec_split_qkv and f"{unseen[0]}.q" in watched
        advice = "Leave out --spec-split-qkv" if split else f"Add it to --spec-targets, or take it from {TARGETS_FLAG}"
        raise UserError(
            f"--lowrank-train {options.lowrank_train} needs monitored spectra, and {unseen[0]} is not monitored"
            f"{' as one matrix' if split else ''}. {advice}; or give the epochs with --lowrank-schedule."
        )


def begin(
    config: Config,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    optimizer: Optimizer,
    scheduler: Any,
    *,
    train: Beton | None,
    plan: TrainPlan,
    spec: InputSpec,
    augment: Augment,
    num_epochs: int,
    world: World,
    rebuild: Callable[[], object],
    is_resumed: bool,
    say: Say,
) -> LowRankTraining | None:
    """Make the object that factorises layers during the run; None without --lowrank-train.

    Args:
        config: of the run, fully resolved.
        model: the raw module, on its device; factorised layers of a resumed run are in place.
        ema: the model's EMA.
        optimizer: of the model.
        scheduler: of the optimizer.
        train: the training set; None: synthetic images.
        plan: of the training.
        spec: the model's input.
        augment: normalises images, on the model's device.
        num_epochs: of the whole run.
        world: the ranks; all of them call this.
        rebuild: see `LowRankTraining`.
        is_resumed: whether layers may be factorised already.
        say: prints a line about layers that stay whole.

    Raises:
        UserError: see `find_targets`; or a budget is too small for rank 1 of every target.
    """
    options, spectra = config.lowrank, config.spectra
    if options.lowrank_train == "none":
        return None
    whole = merged_copy(model) if is_resumed else model
    say = say if whole is model else lambda line: None  # the first run has printed it
    patterns, side = options.lowrank_targets, spec.img_size
    already = "; or leave out --lowrank-train to train its factors as they are"
    targets = find_targets(whole, patterns, img_size=side, flag=TARGETS_FLAG, say=say, already=already)
    costs = costs_alone({name: layer.weight for name, layer in targets.items()})
    _check_budgets(config, costs)
    if never := _never_pays(costs):
        say(f"note: {never}; these stay whole")
    # The ranks of kfac need images; logging beside a schedule must not.
    rule = "energy" if options.lowrank_train == "kfac" and options.lowrank_schedule else options.lowrank_train
    fused = fused_qkv(whole)
    of_options: dict[str, Any] = {"energy": options.lowrank_energy, "times": options.lowrank_settled}
    span = Span(spectra.spec_every * (spectra.spec_full_every or 1), num_epochs * plan.updates_per_epoch)
    first = options.lowrank_settled * span.full_every + spectra.spec_every
    if not options.lowrank_schedule and first >= span.last_update:
        say(
            f"warning: --lowrank-train {options.lowrank_train} cannot factorise any layer in this run: with "
            f"--lowrank-settled {options.lowrank_settled} and a complete refresh every {span.full_every} updates, "
            f"update {first} would be the first, and {span.last_update} is the last. Lower --spec-every, "
            "--spec-full-every or --lowrank-settled, or give the epochs with --lowrank-schedule"
        )
    return LowRankTraining(
        options=options,
        model=model,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        costs=costs,
        settling=Settling(rule, **of_options, fused=fused, gain=Shares(*options.lowrank_thresholds)),
        planner=Planner(options, TrainingImages(config, train, plan, spec, augment), spec.img_size, config.run.seed),
        span=span,
        world=world,
        rebuild=rebuild,
    )


class TrainingImages:
    """Training images drawn by the seed, preprocessed as in validation; decoded once, on first use.

    They are always decoded by the ffcv backend, so that a switch does not depend on --loader.
    """

    def __init__(self, config: Config, train: Beton | None, plan: TrainPlan, spec: InputSpec, augment: Augment) -> None:
        """With `train` None, the images are the synthetic ones of `plan`."""
        self._config, self._train, self._plan, self._spec, self._augment = config, train, plan, spec, augment

    def __call__(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Batches of normalised images and of labels, on the model's device."""
        return _Normalised(self._batches, self._augment)

    @cached_property
    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of images, uint8, and labels, on the CPU."""
        cpu, count = torch.device("cpu"), self._config.lowrank.lowrank_calibration_images
        if self._train is None:
            made = next(SyntheticLoader(self._plan, self._augment.num_classes, cpu).batches(0))
            return [(made.images[:count], made.targets[:count])]
        beton, spec = self._train, self._spec
        plan = EvalPlan(
            *beton.sides,
            img_size=spec.img_size,
            crop_pct=spec.crop_pct,
            batch_size=_BATCH,
            samples=subset(self._config.run.seed, beton.num_samples, count, self._config.data.epoch_order),
        )
        loader, _ = open_loader(beton, plan, cpu, LoaderOptions("ffcv", usual_workers(cpu)), say=lambda line: None)
        try:
            return [_kept(batch) for batch in loader.batches(0)]
        finally:
            loader.close()


class _Normalised(Sequence[tuple[Tensor, Tensor]]):
    """Batches that are normalised on access, so that at most one is on the device."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], augment: Augment) -> None:
        self._batches, self._augment = batches, augment

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, at: Any) -> Any:
        images, labels = self._batches[at]
        device = next(self._augment.buffers()).device
        return self._augment.normalize(images.to(device)), labels.to(device)


def _kept(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.images.clone(), batch.targets.clone()


def _never_pays(costs: Costs) -> str:
    """A phrase naming the targets that factors of no rank make smaller; empty if there is none."""
    never = [f"{name} ({one.rows} x {one.columns})" for name, one in costs.layers.items() if not one.pays]
    return f"factors of no rank have fewer weights than {', '.join(never)}" if never else ""


def _check_budgets(config: Config, costs: Costs) -> None:
    """Raise `UserError` for budgets too small for rank 1 of every target, and if no target can save anything."""
    options = config.lowrank
    if not any(one.pays for one in costs.layers.values()):
        raise UserError(f"{TARGETS_FLAG} {options.lowrank_targets}: {_never_pays(costs)}. Name other layers.")
    schedule = parse_schedule(options.lowrank_schedule)
    budgets = {f"--lowrank-schedule {epoch}={budget:g}": budget for epoch, budget in schedule.items()}
    if options.lowrank_train == "kfac" and not schedule:
        budgets = {f"--lowrank-budget {options.lowrank_budget:g}": options.lowrank_budget}
    for flag, budget in budgets.items():
        check_share_of(flag, budget, costs)
