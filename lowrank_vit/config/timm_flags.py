"""What is known of timm's train.py: flags that are here under another name, that change nothing, or that are not here.

`docs/from_timm.md` tells the same as tables, together with what differs about the flags that are shared. What is done
with a command line is `timm_line.py`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable

_CLASSES = (
    "`python -m data_prep imagefolder --classes FILE`, which chooses the classes; labels are in timm's order of them"
)
_COUNT = "leave it out, the data tell their number of images"
_KEYS = "leave it out, --data-dir holds folders of images or .beton files"
_RGB = "leave it out, images are RGB"
_BN = "--model-kwargs, for models that take it: {}"
_SPLITS = "leave it out, there are no augmentation splits"
_NAFLEX = "leave it out, images are square and of one size"
_DISTILL = "leave it out, there is no distillation"

INSTEAD = {
    # data
    "class-map": _CLASSES,
    "train-num-samples": _COUNT,
    "val-num-samples": _COUNT,
    "input-key": _KEYS,
    "target-key": _KEYS,
    "dataset-trust-remote-code": _KEYS,
    "input-img-mode": _RGB,
    "interpolation": "leave it out, validation is bicubic; --train-interpolation is for training",
    "save-images": "`python -m lowrank_vit.augment --preview FILE.png` with the same flags",
    # model
    "drop-block": "--model-kwargs, for models that take it: drop_block_rate=0.1",
    "bn-momentum": _BN.format("bn_momentum=0.1"),
    "bn-eps": _BN.format("bn_eps=1e-3"),
    "split-bn": _SPLITS,
    "fuser": "--compile",
    "torchscript": "--compile",
    # optimizer and schedule
    "patience-epochs": "leave it out, there is no --sched plateau; --sched multistep decays where you say",
    "epoch-repeats": "a greater --epochs",
    "start-epoch": "--resume FILE, which knows the epoch",
    "no-resume-opt": "--initial-checkpoint FILE, which takes the weights alone",
    # augmentation and loss
    "color-jitter-prob": "leave it out, --color-jitter is applied to every image",
    "grayscale-prob": "--aa 3a, of which grey images are a part",
    "gaussian-blur-prob": "--aa 3a, of which blurring is a part",
    "aug-repeats": "leave it out, every image comes once an epoch",
    "aug-splits": _SPLITS,
    "jsd-loss": _SPLITS,
    "bce-pos-weight": "leave it out, --bce-loss weighs all targets alike",
    # precision, devices, processes
    "model-dtype": "--amp and --amp-dtype; weights stay float32, and so do their spectra",
    "apex-amp": "--amp",
    "device-modules": "leave it out, --device is cpu, cuda or cuda:N",
    "model-ema-force-cpu": "leave it out, the EMA is on the model's device and always validated",
    # run
    "recovery-interval": "--checkpoint-interval, whose unit is updates (500) or minutes (10m), not batches",
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
"""Flags that would change results and are not here, without dashes, and what to use instead."""
HOLDS = {
    "pin-mem": "memory is always pinned",
    "prefetcher": "always so; --prefetch N sets how many batches may wait",
    "use-multi-epochs-loader": "workers always live on from epoch to epoch",
    "worker-seeding": "what is random depends on --seed alone, not on workers",
    "channels-last": "always so",
    "fast-norm": "--compile makes norms fast",
    "in-chans": "images are RGB: 3, any other number is an error",
    "dist-bn": "running statistics of BatchNorm are always averaged over the ranks",
    "amp-impl": "native: --amp is torch's own; apex is an error",
    "synchronize-step": "speed is read where the host waits for the device anyway (--log-interval)",
    "no-ddp-bb": "always so",
    "local-rank": "torchrun says it in the environment",
}
"""Flags whose effect is there without them, and why: they are accepted and change nothing."""
RENAMED = {
    "torchcompile": "`--compile`; `inductor` is the only backend",
    "torchcompile-mode": "`--compile-mode`",
    "native-amp": "`--amp`",
    "no-prefetcher": "`--erase-first`, as timm does without it; batches are always made ready on the device",
    "drop-connect": "`--drop-path`",
    "input-size": "`--img-size`: `3 N N` is N, images are square and RGB",
    "gp": "`--model-kwargs global_pool=`",
    "no-aug": "`--train-crop-mode whole --train-interpolation model` (bicubic for ViTs) `--hflip 0 --vflip 0 "
    "--color-jitter 0 --aa none --reprob 0`; it wins over flags beside it, and mixing stays",
}
"""Flags that are accepted for others, and what they stand for."""
HIDDEN = {"gp": str, "no-aug": bool}
"""Those of `RENAMED` that need the whole configuration: the parser knows them, `--help` does not show them."""

NUM_VALUES = dict.fromkeys(
    """
    pin-mem prefetcher no-prefetcher use-multi-epochs-loader channels-last fast-norm synchronize-step no-ddp-bb
    native-amp apex-amp no-aug split-bn torchscript no-resume-opt jsd-loss model-ema-force-cpu save-images
    naflex-loader dataset-trust-remote-code
    """.split(),
    0,
) | {"input-size": 3}
"""How many values stand behind a flag on the command line, where it is not one."""
SAME_ANYWAY = {
    "amp-impl": ("native",),
    "in-chans": ("3",),
    "input-img-mode": ("RGB",),
    "interpolation": ("bicubic",),
    "model-dtype": ("float32",),
}
"""Values, beside those that say "none", with which a flag changes nothing here."""
NOT_NEUTRAL_AT_0 = frozenset("bn-momentum bn-eps bce-pos-weight color-jitter-prob train-num-samples".split())
"""Flags whose 0 says something; that of all others says that a thing is off."""
OF_OTHERS = frozenset(
    """
    patience-epochs naflex-train-seq-lens naflex-max-seq-len naflex-patch-sizes naflex-patch-size-probs
    naflex-loss-scale kd-distill-type kd-loss-type kd-temperature kd-student-feature-dim kd-teacher-feature-dim
    kd-token-distill-type distill-loss-weight task-loss-weight
    """.split()
)
"""Settings of what has a switch of its own (--sched plateau, --naflex-loader, --kd-model-name): timm writes their
defaults into args.yaml, where they mean nothing while the switch is off."""
TIMM_WRITES = {"worker-seeding": "all", "dist-bn": "reduce"}
"""Defaults of timm's, as in its args.yaml, that are neither null, false, 0 nor empty; `OF_OTHERS` has the rest."""

SHORT = {"-c": "--config", "-d": "--dataset"}
"""timm's short forms of flags that are here under their long name only."""


def with_long_names(argv: Iterable[str]) -> list[str]:
    """The command line with `SHORT` forms written out."""
    return ["".join((SHORT.get(name, name), equals, value)) for name, equals, value in (t.partition("=") for t in argv)]
