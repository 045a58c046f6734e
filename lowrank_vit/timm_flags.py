"""timm's flags that are not ours, and what to use instead: a command line brought along from timm gets an answer."""

from __future__ import annotations

from data_prep.errors import UserError

_ALWAYS = "leave it out: that is always so here"
_DATA = "convert the images with `python -m data_prep` instead, and give --data-dir"
_MODEL = "give it to the model's constructor with --model-kwargs NAME=VALUE"

INSTEAD = {
    # data
    "class-map": "--classes FILE of `python -m data_prep imagefolder` chooses and orders the classes",
    "dataset-trust-remote-code": _DATA,
    "input-img-mode": "leave it out: images are RGB",
    "input-key": _DATA,
    "target-key": _DATA,
    "train-num-samples": "leave it out: the number is in the .beton file",
    "val-num-samples": "leave it out: the number is in the .beton file",
    "input-size": "--img-size N, for square RGB images",
    "in-chans": "leave it out: images are RGB",
    "mean": "leave it out: mean and std are the model's own",
    "std": "leave it out: mean and std are the model's own",
    "interpolation": "leave it out: validation resizes bicubically; --train-interpolation is there for training",
    "crop-mode": "leave it out: validation cuts out the middle",
    "train-crop-mode": "leave it out: training crops are RandomResizedCrop, see --scale and --ratio",
    "use-multi-epochs-loader": _ALWAYS,
    "pin-mem": _ALWAYS,
    "no-prefetcher": "leave it out: augmentation runs on the device in any case; see --prefetch",
    "worker-seeding": "leave it out: nothing depends on workers; see --seed",
    # model
    "gp": f"{_MODEL}: global_pool=avg",
    "fast-norm": "leave it out: --compile fuses normalisation",
    "head-init-scale": _MODEL,
    "head-init-bias": _MODEL,
    "torchscript": "--compile",
    "torchcompile": "--compile, with --compile-mode",
    "torchcompile-mode": "--compile-mode",
    "fuser": "--compile",
    "channels-last": _ALWAYS,
    "model-dtype": "--amp with --amp-dtype: weights stay float32, which their spectra need",
    "device-modules": "leave it out: --device cpu or cuda",
    "bn-momentum": _MODEL,
    "bn-eps": _MODEL,
    "sync-bn": "leave it out: ViTs have no BatchNorm; running statistics are averaged before each validation",
    "dist-bn": "leave it out: running statistics are averaged before each validation, timm's `reduce`",
    "split-bn": "leave it out: there are no augmentation splits",
    "no-ddp-bb": _ALWAYS,
    "synchronize-step": "leave it out: figures are read at --log-interval, where the host waits for the device",
    "local-rank": "start with torchrun, which sets it in the environment",
    "local_rank": "start with torchrun, which sets it in the environment",
    # optimizer and schedule
    "opt-kwargs": "--opt-eps, --opt-betas and --momentum",
    "layer-decay-min-scale": "leave it out: --layer-decay alone",
    "layer-decay-no-opt-scale": "leave it out: --layer-decay alone",
    "lr-noise": "leave it out: schedules are without noise",
    "lr-noise-pct": "leave it out: schedules are without noise",
    "lr-noise-std": "leave it out: schedules are without noise",
    "lr-cycle-mul": "leave it out: schedules have one cycle",
    "lr-cycle-decay": "leave it out: schedules have one cycle",
    "lr-cycle-limit": "leave it out: schedules have one cycle",
    "lr-k-decay": "leave it out: --sched cosine is timm's plain cosine",
    "warmup-prefix": "leave it out: the warm-up is part of --epochs",
    "decay-milestones": "--sched cosine, tanh or poly",
    "decay-epochs": "--sched cosine, tanh or poly",
    "decay-rate": "--sched cosine, tanh or poly",
    "dr": "--sched cosine, tanh or poly",
    "patience-epochs": "--sched cosine: a plateau is not waited for",
    "epoch-repeats": "a greater --epochs",
    "start-epoch": "--resume, which knows the epoch",
    "no-resume-opt": "--initial-checkpoint FILE, which takes the weights alone",
    "fused-adam": "--opt adamw, which is fused",
    # augmentation and loss
    "no-aug": "--scale 1 1 --ratio 1 1 --hflip 0 --color-jitter 0",
    "color-jitter-prob": "leave it out: colour jitter is applied to every image",
    "grayscale-prob": "--aa 3a, which has grey images among its operations",
    "gaussian-blur-prob": "--aa 3a, which has blur among its operations",
    "aug-repeats": "leave it out: each image comes once an epoch",
    "aug-splits": "leave it out: there are no augmentation splits",
    "jsd-loss": "leave it out: there are no augmentation splits",
    "bce-pos-weight": "--bce-loss alone",
    "drop-connect": "--drop-path",
    "drop-block": "--drop-path",
    # precision
    "amp-impl": "--amp: torch's own",
    "native-amp": "--amp",
    "apex-amp": "--amp",
    "no-model-ema-force-cpu": "leave it out: the EMA is on the model's device",
    "model-ema-force-cpu": "leave it out: the EMA is on the model's device and validated",
    # run
    "recovery-interval": "--checkpoint-interval N, in updates, or 10m, in minutes",
    "save-images": "`python -m lowrank_vit.augment --preview FILE.png`",
    "world-size": "torchrun --nproc-per-node N -m lowrank_vit.train",
    "dist-backend": "leave it out: NCCL on CUDA, Gloo on the CPU",
    "wandb-resume": "--wandb-resume-id ID",
    "log-wandb-offline": "WANDB_MODE=offline in the environment",
    "naflex-loader": "leave it out: images are square",
    "naflex-train-seq-lens": "leave it out: images are square",
    "naflex-patch-sizes": "leave it out: images are square",
    "naflex-patch-size-probs": "leave it out: images are square",
    "naflex-max-seq-len": "leave it out: images are square",
    "naflex-loss-scale": "leave it out: images are square",
    "kd-model-name": "leave it out: there is no distillation",
    "kd-model-kwargs": "leave it out: there is no distillation",
    "kd-distill-type": "leave it out: there is no distillation",
    "kd-loss-type": "leave it out: there is no distillation",
    "kd-loss-weight": "leave it out: there is no distillation",
    "kd-distill-loss-weight": "leave it out: there is no distillation",
    "kd-task-loss-weight": "leave it out: there is no distillation",
    "kd-temperature": "leave it out: there is no distillation",
}
"""By flag, without its dashes."""
SHORT = {"-c": "--config", "-d": "--dataset", "--img_size": "--img-size"}
"""timm's other spellings of flags that are here."""


def check_flags(argv: list[str]) -> None:
    """Raise `UserError` for the first of timm's flags that is not here, naming what to use instead."""
    for token in argv:
        name = token.removeprefix("--").partition("=")[0].replace("_", "-")
        if token.startswith("--") and name in INSTEAD:
            raise UserError(f"--{name} is a flag of timm that is not here. Instead: {INSTEAD[name]}.")
