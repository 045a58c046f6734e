"""Check options: each within its range, and none beside another that excludes it."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.low_rank_options import check_low_rank
from lowrank_vit.config.option_types import leaves, parse_keywords, range_of, wrong_value
from lowrank_vit.config.options import Config
from lowrank_vit.config.tracking_options import trackers


def check(config: Config) -> None:
    """Raise `UserError` for the first option outside its range, or for options that exclude one another."""
    for group in dataclasses.fields(config):
        check_ranges(getattr(config, group.name))
    pairs = {"scale": config.data.scale, "ratio": config.data.ratio, "cutmix-minmax": config.augment.cutmix_minmax}
    for name, pair in pairs.items():
        if pair is not None and pair[0] > pair[1]:
            raise UserError(f"--{name} {pair[0]:g} {pair[1]:g}: the smaller number comes first.")
    optim = config.optim
    if optim.warmup_epochs >= optim.epochs and not optim.warmup_prefix:
        raise UserError(
            f"--warmup-epochs {optim.warmup_epochs} leaves nothing of --epochs {optim.epochs}: "
            f"the warm-up must be shorter, at most {optim.epochs - 1}."
        )
    if len(config.augment.color_jitter) not in (1, 3):
        raise UserError(
            "--color-jitter takes one number, or three: brightness, contrast, saturation. There is no hue jitter."
        )
    _check_mixing_and_loss(config)
    if config.model.initial_checkpoint and (config.model.pretrained or config.model.pretrained_path):
        raise UserError("--initial-checkpoint and --pretrained both say which weights to start from. Give one of them.")
    started_from = ("initial-checkpoint", "pretrained-path", "pretrained")
    if config.model.fix_init and (given := [n for n in started_from if getattr(config.model, n.replace("-", "_"))]):
        raise UserError(
            f"--fix-init redraws fresh weights, but --{given[0]} starts from others. Leave one of them out."
        )
    _check_lists(config)
    check_low_rank(config.lowrank, is_watched=config.spectra.spec_monitor)
    if optim.global_batch_size is not None and optim.grad_accum_steps > 1:
        raise UserError(
            f"--grad-accum-steps {optim.grad_accum_steps} and --global-batch-size {optim.global_batch_size} both say "
            "how many batches make an update. Leave --grad-accum-steps out, or at 1: it follows from the other one."
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.step.device):
        raise UserError(f"--device takes auto, cpu, cuda or cuda:N, not `{config.step.device}`.")
    parse_interval(config.run.checkpoint_interval)
    trackers(config.tracking)
    _check_seeds(config)
    name = config.run.experiment
    if name and (Path(name).name != name or name == ".."):
        raise UserError(f"--experiment takes a plain name, not `{name}`; --output is its parent folder.")


def _check_seeds(config: Config) -> None:
    """Raise `UserError` for --seeds that are not a series, and for options that only a single run can have."""
    seeds = config.run.seeds or ()
    typed = " ".join(map(str, seeds))
    if not seeds:
        return
    if len(seeds) == 1:
        raise UserError(f"--seeds {typed} is one run: write --seed {typed}, or give two seeds or more.")
    if (twice := next((seed for seed in seeds if seeds.count(seed) > 1), None)) is not None:
        raise UserError(f"--seeds {typed}: {twice} is given twice, which would repeat the run. Give each seed once.")
    if config.run.resume:
        raise UserError(
            "--resume continues one run, but --seeds is a series. The series' own command line continues it where it "
            "was interrupted: leave --resume out, and name the series with --experiment."
        )
    if config.tracking.wandb_resume_id:
        raise UserError("--wandb-resume-id names one run, but --seeds makes several. Leave it out.")


def _check_lists(config: Config) -> None:
    """Raise `UserError` for lists of the wrong length or order, and for texts that are not NAME=VALUE."""
    optim = config.optim
    for name, values in (("mean", config.data.mean), ("std", config.data.std)):
        if values is not None and len(values) not in (1, 3):
            raise UserError(f"--{name} takes one number, or three: red, green, blue. Got {len(values)}.")
    if optim.opt_betas is not None and len(optim.opt_betas) < 2:
        raise UserError(f"--opt-betas takes 2 or more numbers, got {len(optim.opt_betas)}.")
    if optim.lr_noise is not None and len(optim.lr_noise) not in (1, 2):
        raise UserError("--lr-noise takes one share of the epochs, where it begins, or two: where it begins and ends.")
    if any(a >= b for a, b in itertools.pairwise(optim.decay_milestones)):
        raise UserError("--decay-milestones must increase: give the first decay first.")
    parse_keywords(config.model.model_kwargs, "--model-kwargs", "patch_size=2")
    parse_keywords(optim.opt_kwargs, "--opt-kwargs", "nesterov=True")


def _check_mixing_and_loss(config: Config) -> None:
    augment = config.augment
    if augment.aug_repeats != int(augment.aug_repeats):
        raise UserError(
            f"--aug-repeats {augment.aug_repeats:g}: each image is repeated equally often here. Give a whole number."
        )
    mixing = {"mixup": augment.mixup, "cutmix": augment.cutmix, "cutmix-minmax": augment.cutmix_minmax}
    mixed_by = next((name for name, value in mixing.items() if value), None)
    if mixed_by and config.data.batch_size == 1:
        raise UserError(
            f"--{mixed_by} mixes each image with another one of its batch, and --batch-size 1 has no other. Use at "
            "least 2; --grad-accum-steps makes an update of more."
        )
    if mixed_by and augment.mix_block == 1:
        raise UserError(
            f"--{mixed_by} mixes each image with another one of its block, and --mix-block 1 has no other. Use at "
            "least 2, or 0 for the whole global batch."
        )
    changes = {"bce-sum": augment.bce_sum, "bce-target-thresh": augment.bce_target_thresh is not None}
    for name, is_given in changes.items():
        if is_given and not augment.bce_loss:
            raise UserError(f"--{name} needs --bce-loss, which is not given. Add --bce-loss, or leave it out.")


def parse_interval(text: str) -> tuple[int | None, float | None]:
    """--checkpoint-interval as (updates, seconds): "500" is 500 updates, "10m" ten minutes, "" neither.

    Raises `UserError` for anything else.
    """
    if not text:
        return None, None
    match = re.fullmatch(r"(?P<updates>[0-9]+)|(?P<minutes>[0-9]+(\.[0-9]+)?)m", text)
    if not match or float(text.removesuffix("m")) == 0:
        raise UserError(f"--checkpoint-interval takes updates, e.g. 500, or minutes, e.g. 10m, above 0, not `{text}`.")
    if match["updates"]:
        return int(match["updates"]), None
    return None, 60 * float(match["minutes"])


def check_ranges(options: Any) -> None:
    """Raise `UserError` for the first field of a dataclass whose number lies outside its annotated `Range`."""
    for name, hint, value in leaves(options):
        allowed, numbers = range_of(hint), value if isinstance(value, tuple) else (value,)
        if allowed and any(number is not None and number not in allowed for number in numbers):
            raise wrong_value(hint, [f"{n:g}" if isinstance(n, float) else str(n) for n in numbers], f"--{name}")
