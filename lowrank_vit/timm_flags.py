"""Flags of timm's train.py that are not here, and what to use instead: a command line of timm's always gets an answer.

`docs/from_timm.md` tells the same as a table, together with what differs about the flags that are shared.
"""

from __future__ import annotations

from collections.abc import Iterable

from data_prep.errors import UserError

_CLASSES = "`python -m data_prep imagefolder --classes FILE`, which chooses the classes; labels are their sorted order"
_COUNT = "leave it out, the data tell their number of images"
_KEYS = "leave it out, --data-dir holds folders of images or .beton files"
_RGB = "leave it out, images are RGB"
_SPEC = "leave it out, mean and std are those of the model's own data configuration"
_HEAD = "leave it out, the head starts as timm makes it"
_BN = "--model-kwargs, for models that take it: {}"
_SPLITS = "leave it out, there are no augmentation splits"
_NOISE = "leave it out, schedules have no noise"
_CYCLE = "leave it out, schedules have one cycle"
_STEPS = "leave it out, --sched step and multistep decay by 0.1 at every 90 epochs (timm's defaults); or --sched cosine"
_WSD = "leave it out, there is no --sched wsd or rsqrt"
_NAFLEX = "leave it out, images are square and of one size"
_DISTILL = "leave it out, there is no distillation"
_LAUNCH = "leave it out, start with torchrun, which says so in the environment"

INSTEAD = {
    # data
    "class-map": _CLASSES,
    "train-num-samples": _COUNT,
    "val-num-samples": _COUNT,
    "input-key": _KEYS,
    "target-key": _KEYS,
    "dataset-trust-remote-code": _KEYS,
    "input-img-mode": _RGB,
    "in-chans": _RGB,
    "input-size": "--img-size N, images are square and RGB",
    "mean": _SPEC,
    "std": _SPEC,
    "interpolation": "leave it out, validation is bicubic; --train-interpolation is for training",
    "worker-seeding": "leave it out, what is random depends on --seed alone, not on workers",
    "pin-mem": "leave it out, it is always so",
    "prefetcher": "leave it out, it is always so; --prefetch N sets how many batches may wait",
    "no-prefetcher": "leave it out, batches are always made ready on the device; --prefetch N sets how many may wait",
    "use-multi-epochs-loader": "leave it out, workers always live on from epoch to epoch",
    "save-images": "`python -m lowrank_vit.augment --preview FILE.png` with the same flags",
    # model
    "gp": "--model-kwargs global_pool=avg",
    "head-init-scale": _HEAD,
    "head-init-bias": _HEAD,
    "drop-connect": "--drop-path",
    "drop-block": "--model-kwargs, for models that take it: drop_block_rate=0.1",
    "bn-momentum": _BN.format("bn_momentum=0.1"),
    "bn-eps": _BN.format("bn_eps=1e-3"),
    "sync-bn": "leave it out, ViTs have no BatchNorm",
    "dist-bn": "leave it out, running statistics of BatchNorm are always averaged over the ranks",
    "split-bn": _SPLITS,
    "channels-last": "leave it out, it is always so",
    "fast-norm": "leave it out, --compile makes norms fast",
    "fuser": "--compile",
    "torchscript": "--compile",
    "torchcompile": "--compile (and --compile-mode)",
    "torchcompile-mode": "--compile-mode",
    # optimizer and schedule
    "opt-kwargs": "--opt-eps, --opt-betas, --momentum",
    "layer-decay-min-scale": "leave it out, --layer-decay has no lower bound",
    "layer-decay-no-opt-scale": "leave it out, --layer-decay trains every layer",
    "lr-noise": _NOISE,
    "lr-noise-pct": _NOISE,
    "lr-noise-std": _NOISE,
    "lr-cycle-mul": _CYCLE,
    "lr-cycle-decay": _CYCLE,
    "lr-cycle-limit": _CYCLE,
    "lr-k-decay": "leave it out, --sched cosine and poly have no k-decay",
    "lr-decay-fn": _WSD,
    "lr-stable-timescale": _WSD,
    "warmup-prefix": "leave it out, the warm-up is part of --epochs",
    "decay-milestones": _STEPS,
    "decay-epochs": _STEPS,
    "decay-rate": _STEPS,
    "dr": _STEPS,
    "patience-epochs": "leave it out, there is no --sched plateau",
    "epoch-repeats": "a greater --epochs",
    "start-epoch": "--resume FILE, which knows the epoch",
    "no-resume-opt": "--initial-checkpoint FILE, which takes the weights alone",
    # augmentation and loss
    "no-aug": "--scale 1 1 --ratio 1 1 --hflip 0 --color-jitter 0",
    "train-crop-mode": "leave it out, crops in training are RandomResizedCrop's (--scale, --ratio)",
    "color-jitter-prob": "leave it out, --color-jitter is applied to every image",
    "grayscale-prob": "--aa 3a, of which grey images are a part",
    "gaussian-blur-prob": "--aa 3a, of which blurring is a part",
    "aug-repeats": "leave it out, every image comes once an epoch",
    "aug-splits": _SPLITS,
    "jsd-loss": _SPLITS,
    "bce-pos-weight": "leave it out, --bce-loss weighs all targets alike",
    # precision, devices, processes
    "model-dtype": "--amp and --amp-dtype; weights stay float32, and so do their spectra",
    "amp-impl": "--amp, which is torch's own",
    "native-amp": "--amp",
    "apex-amp": "--amp",
    "device-modules": "leave it out, --device is cpu or cuda",
    "synchronize-step": "leave it out, speed is read where the host waits for the device anyway (--log-interval)",
    "no-ddp-bb": "leave it out, it is always so",
    "local-rank": _LAUNCH,
    "model-ema-force-cpu": "leave it out, the EMA is on the model's device and always validated",
    # run
    "recovery-interval": "--checkpoint-interval 500 (updates) or 10m (minutes)",
    "naflex-loader": _NAFLEX,
    "naflex-train-seq-lens": _NAFLEX,
    "naflex-max-seq-len": _NAFLEX,
    "naflex-patch-sizes": _NAFLEX,
    "naflex-patch-size-probs": _NAFLEX,
    "naflex-loss-scale": _NAFLEX,
    "kd-model-name": _DISTILL,
    "kd-distill-type": _DISTILL,
    "kd-loss-type": _DISTILL,
    "kd-temperature": _DISTILL,
    "kd-student-feature-dim": _DISTILL,
    "kd-teacher-feature-dim": _DISTILL,
    "kd-token-distill-type": _DISTILL,
    "distill-loss-weight": _DISTILL,
    "task-loss-weight": _DISTILL,
}
"""By flag, without its dashes."""
SHORT = {"-c": "--config", "-d": "--dataset"}
"""timm's short forms of flags that are here under their long name only."""


def with_long_names(argv: Iterable[str]) -> list[str]:
    """The command line with `SHORT` forms written out."""
    return ["".join((SHORT.get(name, name), equals, value)) for name, equals, value in (t.partition("=") for t in argv)]


def check_flags(argv: Iterable[str]) -> None:
    """Raise `UserError` for the first of timm's flags on a command line that is not here, with what to use instead."""
    for token in argv:
        if token.startswith("--"):
            check_name(token[2:].partition("=")[0], token.partition("=")[0])


def check_name(name: str, shown: str) -> None:
    """Raise `UserError`, naming it as `shown`, for a flag of timm's (without dashes) that is not here."""
    instead = INSTEAD.get(name.replace("_", "-"))
    if instead:
        raise UserError(f"{shown} is timm's; here: {instead}.")
