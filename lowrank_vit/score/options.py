"""The options of `validate` and `inference`; nothing heavy is imported, so that a wrong one is told at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, arg

from lowrank_vit.common.arguments import POSITIVE, SHARE, Range
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.check import check_ranges
from lowrank_vit.config.data_options import LoaderName
from lowrank_vit.config.option_types import PER_RANK

LabelType = Literal["auto", "none", "name", "description", "detail", "detailed"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model and weights, and what its images look like: flags that `validate` and `inference` share."""

    checkpoint: Annotated[Path | None, PER_RANK] = None
    """A run's model_best.pth.tar or last.pth.tar, or a file of weights of timm, DeiT or MAE."""
    use_ema: bool = False
    """Use the EMA weights."""
    model: Annotated[str, arg(aliases=["-m"])] = ""
    """timm model name, hf-hub:OWNER/NAME or local-dir:DIR; default: the checkpoint's. Without --checkpoint: with the
    weights that are published for it, or lie there."""
    pretrained: bool = False
    """The weights that timm publishes for --model; a --checkpoint goes before them."""
    pretrained_path: Annotated[Path | None, PER_RANK] = None
    """A file of weights for --model, fitted to it by timm."""
    model_kwargs: tuple[str, ...] = ()
    """NAME=VALUE ...; default: the checkpoint's."""
    num_classes: Annotated[int | None, POSITIVE] = None
    """Must be that of the weights, which is the default."""
    img_size: Annotated[int | None, POSITIVE] = None
    """Pixels; default: the checkpoint's, else the model's own for tests."""
    crop_pct: Annotated[float | None, Range(0, 1, open_low=True)] = None
    """Default: as for the size."""
    mean: Annotated[tuple[float, float, float] | None, SHARE] = None
    """Of RGB in 0-1; default: the model's own."""
    std: Annotated[tuple[float, float, float] | None, Range(0, 1, open_low=True)] = None
    """Likewise."""
    interpolation: Literal["", "nearest", "bilinear", "bicubic"] = ""
    """Default: bicubic for a run of this program, else the model's own."""

    def check(self) -> None:
        """Raise `UserError` for a number out of its range, or where nothing says which weights."""
        check_ranges(self)
        if not (self.checkpoint or self.model):
            raise UserError("Give --checkpoint FILE, or --model NAME --pretrained for the weights that timm publishes.")


@dataclass(frozen=True, kw_only=True)
class ValidateOptions(ModelOptions):
    """Score a model. Model, size, crop and data default to those that the checkpoint was trained with."""

    data: Annotated[Path | None, arg(aliases=["--data-dir"]), PER_RANK] = None
    """A .beton file, or a folder of images or .beton files; default: what the checkpoint was validated on."""
    dataset: str = ""
    """folder or nothing: what --data holds; hfds/NAME, hfids/NAME, wds/, as for train; torch/cifar100; digits. Without
    --data the default is the checkpoint's."""
    dataset_download: bool = False
    """torch/cifar100: download the archive where it is missing or damaged."""
    split: Annotated[str, arg(aliases=["--val-split"])] = ""
    """Name of the set in --data; timm's synonyms count. Default: that of the checkpoint's validation."""
    input_key: str = ""
    """hfds, wds: the images' column or suffix, as for train; default: as the checkpoint's run had it."""
    target_key: str = ""
    """hfds, wds: the labels' column or key, likewise."""
    class_map: Path | None = None
    """hfds, wds: text file with the names of the classes, one a line, likewise."""
    nested_classes: Literal["", "leaf", "merge", "top"] = ""
    """Which folders of images are classes, as for training; default: as the checkpoint's run had it, else leaf."""
    trust_labels: bool = False
    """Where names cannot be matched, label N of the data is output N of the model."""
    class_order: Literal["timm", "code-point"] = "timm"
    """Of the outputs of a model that names no classes: timm's order of the class folders, or torchvision's."""
    beton_dir: Annotated[Path | None, PER_RANK] = None
    """Where images are converted to; default: DATA/.lowrank_vit."""
    stage_dir: Annotated[Path | None, PER_RANK] = None
    """Copy the .beton file to this folder on a fast local disk, once, and read the copy."""
    batch_size: Annotated[int, arg(aliases=["-b"]), POSITIVE] = 128
    """Images a step."""
    loader: LoaderName = "auto"
    """Decode backend."""
    workers: Annotated[int | None, arg(aliases=["-j"]), POSITIVE, PER_RANK] = None
    """CPU threads that decode; default: 4, with a GPU all cores but 2, shared among the machine's ranks."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """A damaged sample: stop, or leave it out and say so."""
    device: Annotated[str, PER_RANK] = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:N."""
    amp: bool = False
    """Mixed precision."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """What --amp computes in."""
    tta: Literal[0, 2] = 0
    """2: score the mean of each image and its mirror image."""
    per_class: Path | None = None
    """Write a table of the classes to this .csv file, and a picture of the confusions beside it."""
    json: Path | None = None
    """Write all scores to this .json file."""
    results_file: Path | None = None
    """The same to a .json file, or a line with timm's columns to a .csv file."""
    results_format: Literal["csv", "json"] = "csv"
    """The form of --results-file where its name does not tell."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ModelOptions):
    """Classify images. Model, size and crop default to those that the checkpoint was trained with."""

    input: Annotated[tuple[Path, ...], arg(aliases=["--data-dir"])] = ()
    """Images, and folders to search for images; also without a flag."""
    topk: Annotated[int, POSITIVE] = 5
    """Predictions for each image."""
    output: Path | None = None
    """Write all predictions to this .csv or .json file; the same command goes on where a killed one ended."""
    results_dir: Path | None = None
    """timm's way to say the same: the folder of --results-file, which is named after model and size by default."""
    results_file: Path | None = None
    """In --results-dir."""
    results_format: tuple[Literal["csv", "json"], ...] = ("csv",)
    """Of --results-file."""
    label_type: LabelType = "auto"
    """What classes are called: auto, none (numbers), name, description or detail (of ImageNet's classes)."""
    include_index: bool = False
    """Write the classes' numbers, too."""
    output_type: Literal["prob", "logit"] = "prob"
    """Write probabilities, or the model's outputs."""
    exclude_output: bool = False
    """Write classes alone."""
    no_console_results: Annotated[bool, FlagCreatePairsOff] = False
    """Print no predictions."""
    batch_size: Annotated[int, arg(aliases=["-b"]), POSITIVE] = 64
    """Images a step."""
    workers: Annotated[int | None, arg(aliases=["-j"]), POSITIVE, PER_RANK] = None
    """Threads that open images; default: 4, with a GPU all cores but 2, shared among the machine's ranks."""
    device: Annotated[str, PER_RANK] = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:N."""
    amp: bool = False
    """Mixed precision."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """What --amp computes in."""

    def check(self) -> None:
        """Raise `UserError` for the same, or for images that are not there."""
        if not self.input:
            raise UserError("Give images or folders, with --input or without a flag.")
        if missing := next((path for path in self.input if not path.exists()), None):
            raise UserError(f"--input {missing} does not exist.")
        super().check()
