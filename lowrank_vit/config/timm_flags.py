"""The one table of timm's flags that train, validate and inference do not have, and how each command treats them.

`docs/from_timm.md` tells the same as tables, which the tests compare with these, together with what differs about the
flags that are shared. `timm_line.py` applies the table to a command line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Command = Literal["train", "validate", "inference"]


class Instead(str):
    """Refused, since it would change results: what to use instead, as a part of the message."""

    __slots__ = ()


class Holds(str):
    """Taken, since the program always does this: why."""

    __slots__ = ()


class Renamed(str):
    """Translated into flags of ours; the first in backquotes is the one that takes the same value, if there is one."""

    __slots__ = ()


class Unused(str):
    """Taken, and without effect on any score."""

    __slots__ = ()


Answer = Instead | Holds | Renamed | Unused
A = TypeVar("A", Instead, Holds, Renamed, Unused)


@dataclass(frozen=True)
class Flag:
    """A flag of timm's and its answers."""

    train: Answer | None = None
    scores: Answer | None = None
    """The answer of validate and inference, if both give the same."""
    validate: Answer | None = None
    inference: Answer | None = None
    values: int | None = 1
    """How many values follow it on a command line; None: any number of numbers."""
    choices: tuple[str, ...] = ()
    """The values that it can have, if its value may be left out."""
    same: tuple[str, ...] = ()
    """Values, beside those that mean "off", that change nothing here: timm's default, and the behaviour here."""
    means_something_at_0: bool = False
    """Its 0 is a value like others; for all other flags 0 means off."""
    has_switch: bool = False
    """It belongs to a feature with its own switch (--sched plateau, --naflex-loader, --kd-model-name): timm writes its
    default into args.yaml, where it means nothing while the switch is off."""
    written: str = ""
    """timm's default in its args.yaml, if that is not null, false, 0 or empty."""
    hint: Any = None
    """Its type, if it needs the whole configuration: train's parser knows it, `--help` does not show it."""

    def answer(self, command: Command) -> Answer | None:
        """A command's answer to the flag; None if the command has it, or timm's command does not."""
        return getattr(self, command) or (None if command == "train" else self.scores)


_COUNT = Instead("leave it out, the data tell their number of images")
_CODE = Instead("leave it out, no code that comes with a data set is run; `datasets` 4 took that out")
_CHANNELS = Holds("images are RGB: 3, any other number is an error")
_RGB = Instead("leave it out, images are RGB")
_CROP = Instead("leave it out, the crop is the centre; --crop-pct sets its size")
_SPLITS = Instead("leave it out, there are no augmentation splits")
_NAFLEX = Instead("leave it out, images are square and of one size")
_SIZES = Instead("leave it out, training images are of one size, --img-size, and so are batches")
_EPOCH = Instead("leave it out, an epoch takes every image once; --epochs says how many there are")
_OWN = Instead("leave it out, the model knows it")
_DISTILL = Instead("leave it out, there is no distillation")
_COLUMNS = Instead("leave it out, the columns are file, class_1, probability_1, class_2, ...")
_UNUSED = Unused("it changes no score")
_ONE_SIZE = Renamed("`--img-size`: `3 N N` is N, images are square and RGB")
_ONE_GPU = Holds("one GPU scores; CUDA_VISIBLE_DEVICES chooses which. Leave it out")

FLAGS: dict[str, Flag] = {
    # data
    "class-map": Flag(inference=Instead("leave it out, labels are timm's order of the class folders")),
    "train-num-samples": Flag(_COUNT, means_something_at_0=True),
    "val-num-samples": Flag(_COUNT),
    "task": Flag(Instead("leave it out, each image has one label")),
    "dataset-trust-remote-code": Flag(_CODE, validate=_CODE, values=0),
    "input-img-mode": Flag(_RGB, validate=_RGB, same=("RGB",)),
    "interpolation": Flag(
        Instead("leave it out, validation is bicubic; --train-interpolation is for training"), same=("bicubic",)
    ),
    "crop-mode": Flag(_CROP, scores=_CROP, same=("center",)),
    **dict.fromkeys("test-input-size test-crop-pct".split(), Flag(_OWN)),
    "save-images": Flag(Instead("`python -m lowrank_vit.augment --preview FILE.png` with the same flags"), values=0),
    # model
    "drop-block": Flag(Instead("--model-kwargs, for models that take it: drop_block_rate=0.1")),
    "bn-momentum": Flag(Instead("--model-kwargs, for models that take it: bn_momentum=0.1"), means_something_at_0=True),
    "bn-eps": Flag(Instead("--model-kwargs, for models that take it: bn_eps=1e-3"), means_something_at_0=True),
    "split-bn": Flag(_SPLITS, values=0),
    "fuser": Flag(Instead("--compile"), scores=_UNUSED),
    "torchscript": Flag(Instead("--compile"), scores=_UNUSED, values=0),
    # optimizer and schedule
    "patience-epochs": Flag(
        Instead("leave it out, since there is no --sched plateau; --sched multistep is the nearest"),
        same=("10",),
        has_switch=True,
    ),
    "epoch-repeats": Flag(Instead("a greater --epochs")),
    "start-epoch": Flag(Instead("--resume FILE, which knows the epoch")),
    "no-resume-opt": Flag(Instead("--initial-checkpoint FILE, which takes the weights alone"), values=0),
    # augmentation and loss
    "color-jitter-prob": Flag(
        Instead("leave it out, --color-jitter is applied to every image"), means_something_at_0=True
    ),
    "grayscale-prob": Flag(Instead("--aa 3a, of which grey images are a part")),
    "gaussian-blur-prob": Flag(Instead("--aa 3a, of which blurring is a part")),
    "aug-splits": Flag(_SPLITS),
    "jsd-loss": Flag(_SPLITS, values=0),
    "bce-pos-weight": Flag(Instead("leave it out, --bce-loss weighs all targets alike"), means_something_at_0=True),
    # precision, devices, processes
    "model-dtype": Flag(
        Instead("--amp and --amp-dtype; weights stay float32, and so do their spectra"),
        scores=Instead("--amp and --amp-dtype"),
        same=("float32",),
    ),
    "apex-amp": Flag(Instead("--amp"), values=0),
    "device-modules": Flag(
        Instead("leave it out, --device is cpu, cuda or cuda:N"),
        scores=Instead("leave it out, --device is cpu or cuda"),
    ),
    "model-ema-force-cpu": Flag(
        Instead("leave it out, the EMA is on the model's device and always validated"), values=0
    ),
    # run
    "recovery-interval": Flag(
        Instead("--checkpoint-interval, whose unit is updates (500) or minutes (10m), not batches")
    ),
    **dict.fromkeys("train-batches-per-epoch train-steps-per-epoch".split(), Flag(_EPOCH)),
    "naflex-loader": Flag(_NAFLEX, validate=_NAFLEX, values=0),
    "naflex-patchify-channels-first": Flag(_NAFLEX, values=0, has_switch=True),
    "naflex-train-seq-lens": Flag(_NAFLEX, same=("128 256 576 784 1024",), values=None, has_switch=True),
    **dict.fromkeys("naflex-patch-sizes naflex-patch-size-probs".split(), Flag(_NAFLEX, values=None, has_switch=True)),
    "naflex-loss-scale": Flag(_NAFLEX, same=("linear",), has_switch=True),
    "naflex-max-seq-len": Flag(_NAFLEX, validate=_NAFLEX, same=("576",), has_switch=True),
    "train-img-sizes": Flag(_SIZES, values=None),
    **dict.fromkeys("train-batch-sizes train-size-probs".split(), Flag(_SIZES, values=None, has_switch=True)),
    "train-size-schedule": Flag(_SIZES, same=("constant",), has_switch=True),
    "train-size-schedule-spread": Flag(_SIZES, same=("0.65",), has_switch=True),
    "train-size-random-mix": Flag(_SIZES, same=("0.1",), has_switch=True),
    "variable-batch-loss-scale": Flag(_SIZES, same=("none",), has_switch=True),
    "kd-model-name": Flag(_DISTILL),
    "kd-distill-type": Flag(_DISTILL, same=("logit",), has_switch=True),
    "kd-loss-type": Flag(_DISTILL, same=("kl",), has_switch=True),
    "kd-temperature": Flag(_DISTILL, same=("4",), has_switch=True),
    "kd-token-distill-type": Flag(_DISTILL, same=("soft",), has_switch=True),
    **dict.fromkeys(
        "kd-student-feature-dim kd-teacher-feature-dim distill-loss-weight task-loss-weight".split(),
        Flag(_DISTILL, has_switch=True),
    ),
    # whose effect is there without them
    "pin-mem": Flag(Holds("memory is always pinned"), validate=_UNUSED, values=0),
    "prefetcher": Flag(Holds("always so; --prefetch N sets how many batches may wait"), values=0),
    "use-multi-epochs-loader": Flag(Holds("workers always live on from epoch to epoch"), values=0),
    "worker-seeding": Flag(Holds("what is random depends on --seed alone, not on workers"), written="all"),
    "channels-last": Flag(Holds("always so"), scores=_UNUSED, values=0),
    "fast-norm": Flag(Holds("--compile makes norms fast"), validate=_UNUSED, values=0),
    "in-chans": Flag(_CHANNELS, scores=_RGB, same=("3",)),
    "chans": Flag(_CHANNELS, same=("3",)),
    "dist-bn": Flag(Holds("running statistics of BatchNorm are always averaged over the ranks"), written="reduce"),
    "amp-impl": Flag(Holds("native: --amp is torch's own; apex is an error"), same=("native",)),
    "synchronize-step": Flag(
        Holds("speed is read where the host waits for the device anyway (--log-interval)"), values=0
    ),
    "no-ddp-bb": Flag(Holds("always so"), values=0),
    "local-rank": Flag(Holds("torchrun says it in the environment")),
    # under another name
    "torchcompile": Flag(
        Renamed("`--compile`; `inductor` is the only backend"),
        scores=_UNUSED,
        choices=("inductor", "eager", "aot_eager", "cudagraphs", "openxla", "tvm", "onnxrt"),
    ),
    "torchcompile-mode": Flag(Renamed("`--compile-mode`"), scores=_UNUSED),
    "native-amp": Flag(Renamed("`--amp`"), values=0),
    "no-prefetcher": Flag(
        Renamed("`--erase-first`, as timm does without it; batches are always made ready on the device"),
        validate=_UNUSED,
        values=0,
    ),
    "drop-connect": Flag(Renamed("`--drop-path`")),
    "input-size": Flag(_ONE_SIZE, scores=_ONE_SIZE, values=3),
    "gp": Flag(Renamed("`--model-kwargs global_pool=`"), validate=Instead("--model-kwargs global_pool=avg"), hint=str),
    "no-aug": Flag(
        Renamed(
            "`--train-crop-mode whole --train-interpolation model` (bicubic for ViTs) `--hflip 0 --vflip 0 "
            "--color-jitter 0 --aa none --reprob 0`; it wins over flags beside it, and mixing stays"
        ),
        values=0,
        hint=bool,
    ),
    # of validate.py and inference.py alone
    "use-train-size": Flag(scores=Instead("--img-size N")),
    "test-pool": Flag(scores=Instead("leave it out, there is no test-time pooling")),
    "num-samples": Flag(validate=_COUNT),
    "crop-border-pixels": Flag(validate=_CROP),
    "tf-preprocessing": Flag(validate=Instead("leave it out, images are resized as Pillow does it")),
    "reparam": Flag(validate=Instead("leave it out, the model is scored as it was trained")),
    "real-labels": Flag(
        validate=Instead("leave it out, labels are those of the class folders; sort the images by the other labels")
    ),
    "valid-labels": Flag(validate=Instead("--per-class FILE.csv, which has the scores of each class")),
    "metrics-avg": Flag(validate=Instead("--per-class FILE.csv, from which precision and recall follow")),
    "retry": Flag(validate=Instead("a smaller --batch-size")),
    "dataset": Flag(inference=Instead("--input FOLDER, which is searched for images")),
    "split": Flag(inference=Instead("--input FOLDER/SPLIT")),
    "results-separate-col": Flag(inference=Instead("leave it out, it is always so")),
    **dict.fromkeys("filename-col index-col label-col output-col".split(), Flag(inference=_COLUMNS)),
    "log-freq": Flag(scores=_UNUSED),
    "aot-autograd": Flag(scores=_UNUSED, values=0),
    "num-gpu": Flag(scores=_ONE_GPU, same=("1",), means_something_at_0=True),
    "seed": Flag(validate=_UNUSED),
    "fullname": Flag(inference=_UNUSED, values=0),
}
"""By name, without dashes in front."""
HIDDEN = {name: flag.hint for name, flag in FLAGS.items() if flag.hint}
"""Flags that train's parser knows but --help does not show, and their types."""
SHORT = {"-c": "--config", "-d": "--dataset"}
"""timm's short forms of flags that have only a long name here."""


def answers(command: Command, kind: type[A]) -> dict[str, A]:
    """The flags that a command answers in one way, with their answers."""
    found = {name: flag.answer(command) for name, flag in FLAGS.items()}
    return {name: answer for name, answer in found.items() if isinstance(answer, kind)}


def with_long_names(argv: Iterable[str]) -> list[str]:
    """The command line with `SHORT` forms written out."""
    return ["".join((SHORT.get(name, name), equals, value)) for name, equals, value in (t.partition("=") for t in argv)]
