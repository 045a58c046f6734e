"""Flags of programs that are built on timm or look like it: DeiT, MAE, BEiT, Swin, torchvision, models' own copies.

Their command lines are refused with the equivalent for each such flag. They are not translated, since options that such
a line leaves out have other defaults there than in timm: DeiT's optimizer is adamw, timm's is sgd.
`docs/from_timm.md` has the same table.
"""

from __future__ import annotations

from typing import NamedTuple


class Elsewhere(NamedTuple):
    """A flag that timm does not have."""

    whose: str
    """The programs that have it, in the genitive."""
    instead: str
    """The equivalent here, as a part of the message."""


_DEIT, _MAE, _BEIT, _SWIN, _TORCHVISION = "DeiT's", "MAE's", "BEiT's", "Swin's", "torchvision's"
_DATA = Elsewhere(
    "DeiT's, MAE's and BEiT's", "--data-dir, which holds both splits, named by --train-split, --val-split"
)
_DISTILL = Elsewhere(_DEIT, "leave it out, there is no distillation")
_TOKENS = Elsewhere("token labelling's", "leave it out, there are no labels of tokens")
_WEIGHTS = "--pretrained-path FILE, or --initial-checkpoint FILE where the head is to stay as it is"
_OUTPUT = "--output, the parent of the run directories"
_ACCUMULATE = "--grad-accum-steps"
_LAUNCHER = "leave it out, torchrun or srun says it"
_SCORED_ONCE = "leave it out, all ranks score every image once"
_REPEATING = "DeiT's and torchvision's"
_SHARED = "DeiT's and MAE's"

OTHERS: dict[str, Elsewhere] = {
    # data
    **dict.fromkeys("data-path eval-data-path".split(), _DATA),
    "data-set": Elsewhere("DeiT's and BEiT's", "--dataset, or leave it out for a folder of images"),
    "nb-classes": Elsewhere("DeiT's, MAE's and BEiT's", "--num-classes"),
    "eval-crop-ratio": Elsewhere(_DEIT, "--crop-pct"),
    "num-workers": Elsewhere(_SHARED, "--workers"),
    # augmentation
    **dict.fromkeys("repeated-aug ra-sampler ra-reps".split(), Elsewhere(_REPEATING, "--aug-repeats 3")),
    "no-repeated-aug": Elsewhere(_REPEATING, "leave it out, every image comes once an epoch without --aug-repeats"),
    "ThreeAugment": Elsewhere(_DEIT, "--aa 3a"),
    "src": Elsewhere(_DEIT, "--train-crop-mode; its simple random crop is not here"),
    "simple-aug": Elsewhere("SSF's and HST's", "--aa none --color-jitter 0 --reprob 0, which leaves crop and flip"),
    "auto-augment": Elsewhere(_TORCHVISION, "--aa"),
    "random-erase": Elsewhere(_TORCHVISION, "--reprob"),
    "mixup-alpha": Elsewhere(_TORCHVISION, "--mixup"),
    "cutmix-alpha": Elsewhere(_TORCHVISION, "--cutmix"),
    "label-smoothing": Elsewhere(_TORCHVISION, "--smoothing"),
    # optimizer and schedule
    "blr": Elsewhere(_MAE, "--lr-base, at a global batch of --lr-base-size 256, with --lr-base-scale linear"),
    "scale-lr": Elsewhere(
        "RobustCNN's", "--lr-base, at a global batch of --lr-base-size 512, with --lr-base-scale linear"
    ),
    "unscale-lr": Elsewhere(_DEIT, "leave it out, --lr is taken as it is"),
    "accum-iter": Elsewhere(_MAE, _ACCUMULATE),
    "update-freq": Elsewhere("BEiT's and ConvNeXt's", _ACCUMULATE),
    "accumulation-steps": Elsewhere(_SWIN, _ACCUMULATE),
    "lr-scheduler": Elsewhere(_TORCHVISION, "--sched"),
    "lr-warmup-epochs": Elsewhere(_TORCHVISION, "--warmup-epochs"),
    "lr-warmup-method": Elsewhere(_TORCHVISION, "leave it out, the warm-up is linear"),
    "lr-warmup-decay": Elsewhere(_TORCHVISION, "--warmup-lr, which is a learning rate and no share"),
    "clip-grad-norm": Elsewhere(_TORCHVISION, "--clip-grad"),
    "norm-weight-decay": Elsewhere(_TORCHVISION, "leave it out, norms and biases have no weight decay"),
    # model
    "finetune": Elsewhere("DeiT's, MAE's and BEiT's", _WEIGHTS),
    "model-ema-eval": Elsewhere("BEiT's and ConvNeXt's", "leave it out, an EMA is always validated"),
    "global-pool": Elsewhere(_MAE, "--gp avg"),
    "cls-token": Elsewhere(_MAE, "--gp token"),
    "use-checkpoint": Elsewhere(_SWIN, "--grad-checkpointing"),
    "head-dropout": Elsewhere("MetaFormer's", "--drop"),
    "width": Elsewhere("GhostNet's", "--model-kwargs, for models that take it: width=1.0"),
    "tuning-mode": Elsewhere("SSF's", "leave it out, all weights are trained"),
    "partial-freeze": Elsewhere("EVA's", "leave it out, all weights are trained"),
    "use-ml-decoder-head": Elsewhere("ML-Decoder's", "leave it out, the head is the model's"),
    "mesa": Elsewhere("MambaVision's", "leave it out, there is no loss against the EMA"),
    **dict.fromkeys("augsub augsub-ratio".split(), Elsewhere("AugSub's", "leave it out, there are no sub-models")),
    **dict.fromkeys("distillation-type distillation-alpha teacher-model teacher-path".split(), _DISTILL),
    **dict.fromkeys("token-label token-label-size token-label-data ground-truth".split(), _TOKENS),
    # run
    "output-dir": Elsewhere("DeiT's, MAE's and BEiT's", _OUTPUT),
    "log-dir": Elsewhere("MAE's and BEiT's", _OUTPUT),
    "job-dir": Elsewhere("submitit's", _OUTPUT),
    "tag": Elsewhere("Swin's and MambaVision's", "--experiment, the run's name"),
    "task-name": Elsewhere("DFFormer's", "--experiment, the run's name"),
    "val-freq": Elsewhere("TransXNet's", "--val-interval, in epochs"),
    "val-start-epoch": Elsewhere("TransXNet's", "leave it out, --val-interval says which epochs are validated"),
    "cfg": Elsewhere(_SWIN, "--config FILE, a flat YAML with names of flags as keys"),
    "dist-eval": Elsewhere("DeiT's, MAE's and BEiT's", _SCORED_ONCE),
    **dict.fromkeys(
        "nodes node ngpus gpu use-volta32 partition world-size dist-url".split(),
        Elsewhere("DeiT's and MAE's", _LAUNCHER),
    ),
    **dict.fromkeys(
        "enable-deepspeed zero-stage".split(), Elsewhere("BEiT's and EVA's", "--amp; there is no DeepSpeed")
    ),
    "use-amp": Elsewhere("ConvNeXt's", "--amp"),
}
"""By name, without dashes in front."""
