"""The options of `compress`. Nothing heavy is imported, so a wrong option is reported at once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from lowrank_vit.common.arguments import POSITIVE, Range
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.check import check_ranges
from lowrank_vit.config.data_options import LoaderName
from lowrank_vit.score.options import ModelOptions

Method = Literal["svd", "asvd", "fwsvd", "svdllm", "kfac"]
METHODS: tuple[Method, ...] = ("svd", "asvd", "fwsvd", "svdllm", "kfac")
Allocation = Literal["uniform", "energy", "greedy"]
NONE = "(default: none)"
"""For options whose default is None."""
SHARE = Range(0, 1, open_low=True)
SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors")
"""Suffixes of checkpoints that can be written."""


@dataclass(frozen=True)
class Source(ModelOptions):
    """What is compressed: weights as validate takes them, the model's own unless --use-ema is given."""

    checkpoint: Positional[Annotated[Path | None, arg(metavar="[CHECKPOINT]")]] = None
    """A run's model_best.pth.tar or last.pth.tar, or a file of weights of timm, DeiT or MAE; also as --checkpoint
    FILE."""
    targets: Annotated[str, arg(metavar="NAMES")] = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
    """Comma-separated endings of the names of linear layers that may be factorised."""
    split: Literal["whole", "thirds", "heads"] = "whole"
    """Factorise a fused qkv as one matrix (whole), as Q, K and V (thirds), or as those of every head."""


@dataclass(frozen=True)
class Data:
    """Where images are: DIR has a training set, for calibration, and a validation set, for scoring."""

    data: Annotated[Path | None, arg(aliases=["--data-dir"], metavar="DIR", help_behavior_hint=NONE)] = None
    """As for train: train.beton and val.beton, or folders of images; needed, except for --method svd with --budget and
    --save or --merge."""
    dataset: str = ""
    """folder or nothing: what --data holds; hfds/NAME, hfids/NAME, wds/, as for train; torch/cifar100; digits."""
    train_split: str = "train"
    """Name of the training set in --data."""
    val_split: str = "validation"
    """Name of the validation set; timm's synonyms count."""
    nested_classes: Literal["", "leaf", "merge", "top"] = ""
    """Which folders of images are classes; default: as the checkpoint's run had it, else leaf."""
    trust_labels: Annotated[bool, FlagCreatePairsOff] = False
    """Where names cannot be matched, label N of the data is output N of the model."""
    beton_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: DATA/.lowrank_vit)")] = None
    """Where images are converted to."""
    calibration_images: Annotated[int, arg(metavar="N"), POSITIVE] = 1024
    """Number of images of the training set, drawn by --seed, for calibration."""
    seed: Annotated[int, arg(metavar="N"), Range(0)] = 0
    """Random seed of the calibration images, and of the labels sampled from the model."""


@dataclass(frozen=True)
class Curve:
    """Which points of accuracy against size are measured."""

    method: Annotated[
        tuple[Method, ...] | None,
        arg(metavar=f"[{{{','.join(METHODS)}}} ...]", help_behavior_hint="(default: all; with --budget kfac)"),
    ] = None
    """Compression methods: plain SVD (svd), weighted by the inputs (asvd, svdllm) or by the loss (fwsvd, kfac)."""
    ranks: tuple[Allocation, ...] = ("greedy",)
    """How ranks are shared out among the layers."""
    budgets: Annotated[tuple[float, ...], SHARE] = (0.5, 0.3, 0.2, 0.12, 0.08)
    """Shares of the whole model that may be left."""
    by: Literal["params", "flops"] = "params"
    """What a budget is a share of: parameters, or FLOPs of the forward pass."""
    sequential: Annotated[bool, FlagCreatePairsOff] = False
    """Calibrate each block on the outputs of the compressed blocks before it; svd needs no calibration."""
    latency: bool = True
    """Measure how long the original and the compressed models take."""
    measure_layers: Annotated[bool, FlagCreatePairsOff] = False
    """Also score the model with one layer truncated at a time, beside its predicted loss; goes into --out."""


@dataclass(frozen=True)
class Files:
    """What is written."""

    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: no files are written)")] = None
    """Where compression.json, .csv and .png go; made if missing. `report DIR` makes a page of them."""
    budget: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint=NONE), SHARE] = None
    """Make one model with this share of the size instead of measuring a curve, by --method (default kfac); needs --save
    or --merge."""
    save: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=NONE)] = None
    """Write the factorised model as a checkpoint that validate, inference, analyze_spectrum and train take."""
    merge: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=NONE)] = None
    """Write the same with the original shapes, which timm takes too."""


@dataclass(frozen=True)
class Running:
    """How it is computed."""

    batch_size: Annotated[int, arg(aliases=["-b"], metavar="N"), POSITIVE] = 128
    """Batch size."""
    loader: LoaderName = "auto"
    """Decoding backend."""
    workers: Annotated[int | None, arg(aliases=["-j"], metavar="N", help_behavior_hint="(default: by the machine)")] = (
        None
    )
    """CPU threads that decode."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:N."""


_OF_IMAGES = {one.name for one in fields(Data)} | {
    "sequential",
    "measure_layers",
    "out",
    "batch_size",
    "loader",
    "workers",
}
"""Options that need --data."""


@dataclass(frozen=True)
class CompressOptions:
    """Measure accuracy against size, or write a smaller model.

    Each budget and method is scored on the whole validation set. With --budget and --save, one model is written.
    """

    source: Source = field(default_factory=Source)
    data: Data = field(default_factory=Data)
    curve: Curve = field(default_factory=Curve)
    files: Files = field(default_factory=Files)
    running: Running = field(default_factory=Running)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The requested methods, each once."""
        default = METHODS if self.files.budget is None else METHODS[-1:]
        return tuple(dict.fromkeys(self.curve.method or default))

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """The requested allocations, each once."""
        return tuple(dict.fromkeys(self.curve.ranks))

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets of the curve, each once and the largest first; or the one of --budget."""
        given = self.curve.budgets if self.files.budget is None else (self.files.budget,)
        return tuple(sorted(set(given), reverse=True))

    def check(self) -> None:
        """Raise `UserError` for numbers out of range, flags that contradict each other, or missing data."""
        self.source.check()
        for group in (self.data, self.curve, self.files, self.running):
            check_ranges(group)
        for name in ("method", "budgets", "ranks"):
            if getattr(self.curve, name) == ():
                raise UserError(f"--{name} needs a value. Leave the flag out for the default.")
        if self.files.budget is None:
            if path := self.files.save or self.files.merge:
                raise UserError(f"The size of {path} is missing. Add --budget 0.2, say, for a fifth of the model.")
        else:
            self._check_one_model(self.files.budget)
        if self.data.data is None and (self.files.budget is None or self.methods != ("svd",)):
            raise UserError(
                "--data DIR is missing: its training set gives the moments, and its validation set is scored. "
                "(Only --method svd with --budget and --save needs no data.)"
            )
        if self.data.data is None:
            self._check_without_data()
        if self.curve.measure_layers and self.files.out is None:
            raise UserError("--measure-layers only writes to files: add --out DIR, or leave out --measure-layers.")
        for path in filter(None, (self.files.save, self.files.merge)):
            if path.suffix not in SUFFIXES:
                raise UserError(f"{path} does not end like a checkpoint ({', '.join(SUFFIXES)}). Say small.pth.tar.")
        if self.files.save and self.files.merge and self.files.save.resolve() == self.files.merge.resolve():
            raise UserError(f"--save and --merge are both {self.files.merge}. Give two different files.")

    def _check_without_data(self) -> None:
        """Raise `UserError` for a flag that needs images.

        A flag given with its default value cannot be told from one that was left out.
        """
        groups = (self.data, self.curve, self.files, self.running)
        given = [one.name for group in groups for one in fields(group) if getattr(group, one.name) != one.default]
        if wrong := next((name for name in given if name in _OF_IMAGES), None):
            raise UserError(
                f"--{wrong.replace('_', '-')} needs images: add --data DIR or leave it out. (Without "
                "--data, svd writes one model and measures nothing.)"
            )

    def _check_one_model(self, budget: float) -> None:
        """Raise `UserError` if `budget` has no file to write, or if more than one model is requested."""
        if not (self.files.save or self.files.merge):
            raise UserError(
                f"--budget {budget:g} makes one checkpoint: add --save FILE, or give --budgets for a curve."
            )
        if self.curve.budgets != Curve.budgets:
            raise UserError("--budget makes one model, --budgets a curve. Leave one of them out.")
        for flag, values in (("method", self.methods), ("ranks", self.allocations)):
            if len(values) > 1:
                raise UserError(f"--budget {budget:g} makes one model: give one --{flag}, not {', '.join(values)}.")
