"""The options of `validate` and `inference`; nothing heavy is imported, so that a wrong one is reported at once."""

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
    """Use the EMA's weights."""
    model: Annotated[str, arg(aliases=["-m"])] = ""
    """timm model name, hf-hub:OWNER/NAME or local-dir:DIR; default: the checkpoint's. Without --checkpoint, its
    published weights are used, or those in DIR."""
    pretrained: bool = False
    """Use the weights that timm publishes for --model; a --checkpoint overrides them."""
    pretrained_path: Annotated[Path | None, PER_RANK] = None
    """A local file of weights for --model, adapted to it by timm."""
    model_kwargs: tuple[str, ...] = ()
    """Extra arguments for the model's constructor, as NAME=VALUE ...; default: the checkpoint's."""
    num_classes: Annotated[int | None, POSITIVE] = None
    """Number of classes; it must be that of the weights, which is the default."""
    img_size: Annotated[int | None, POSITIVE] = None
    """Side of the input image in pixels; default: the checkpoint's, else the model's own test size."""
    crop_pct: Annotated[float | None, Range(0, 1, open_low=True)] = None
    """Centre crop as a share of the short side; default: the checkpoint's, else the model's own."""
    mean: Annotated[tuple[float, float, float] | None, SHARE] = None
    """Mean for normalisation: red, green, blue in 0-1; default: the model's own."""
    std: Annotated[tuple[float, float, float] | None, Range(0, 1, open_low=True)] = None
    """Standard deviation for normalisation: red, green, blue in 0-1; default: the model's own."""
    interpolation: Literal["", "nearest", "bilinear", "bicubic"] = ""
    """Interpolation for resizing; default: bicubic for a run of this program, else the model's own."""

    def check(self) -> None:
        """Raise `UserError` for a number out of its range, or if no option names the weights."""
        check_ranges(self)
        if not (self.checkpoint or self.model):
            raise UserError("Give --checkpoint FILE, or --model NAME --pretrained for the weights that timm publishes.")


@dataclass(frozen=True, kw_only=True)
class ValidateOptions(ModelOptions):
    """Score a model. Model, size, crop and data default to those that the checkpoint was trained with."""

    data: Annotated[Path | None, arg(aliases=["--data-dir"]), PER_RANK] = None
    """A .beton file, or a folder of images or .beton files; default: what the checkpoint was validated on."""
    dataset: str = ""
    """Empty or folder: what --data holds. hfds/NAME, hfids/NAME, wds/, torch/cifar100, digits: as for train. Without
    --data, the default is the checkpoint's."""
    dataset_download: bool = False
    """torch/cifar100: download the archive if it is missing or damaged."""
    split: Annotated[str, arg(aliases=["--val-split"])] = ""
    """Name of the split in --data, or a synonym that timm knows; default: the checkpoint's validation split."""
    input_key: str = ""
    """hfds, wds: column or suffix of the images, as for train; default: the checkpoint's."""
    target_key: str = ""
    """hfds, wds: column or key of the labels, as for train; default: the checkpoint's."""
    class_map: Path | None = None
    """hfds, wds: text file of class names, one per line, as for train; default: the checkpoint's."""
    nested_classes: Literal["", "leaf", "merge", "top"] = ""
    """Which folders are classes, as for train; default: the checkpoint's, else leaf."""
    trust_labels: bool = False
    """If class names cannot be matched, take label N of the data as output N of the model."""
    class_order: Literal["timm", "code-point"] = "timm"
    """Class order of a model that does not name its classes: timm's order of folders, or torchvision's."""
    beton_dir: Annotated[Path | None, PER_RANK] = None
    """Where converted images are written; default: DATA/.lowrank_vit."""
    stage_dir: Annotated[Path | None, PER_RANK] = None
    """Copy the .beton file to this folder on a fast local disk once, and read the copy."""
    batch_size: Annotated[int, arg(aliases=["-b"]), POSITIVE] = 128
    """Batch size per GPU, in images."""
    loader: LoaderName = "auto"
    """Decoding backend."""
    workers: Annotated[int | None, arg(aliases=["-j"]), POSITIVE, PER_RANK] = None
    """CPU threads that decode; default: 4 on a CPU; with a GPU, all cores but 2, divided among the machine's ranks."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """If a sample is damaged: stop with an error, or leave it out and report it."""
    device: Annotated[str, PER_RANK] = "auto"
    """auto (cuda if there is one), cpu, cuda or cuda:N."""
    amp: bool = False
    """Mixed precision."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Number type of --amp."""
    tta: Literal[0, 2] = 0
    """2: average the scores of each image and its mirror image."""
    per_class: Path | None = None
    """Write scores per class to this .csv file, and a picture of the confusions beside it."""
    json: Path | None = None
    """Write all scores to this .json file."""
    results_file: Path | None = None
    """timm's flag: write the scores to this .json file, or a line with timm's columns to this .csv file."""
    results_format: Literal["csv", "json"] = "csv"
    """Format of --results-file if its name does not tell."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ModelOptions):
    """Classify images. Model, size and crop default to those that the checkpoint was trained with."""

    input: Annotated[tuple[Path, ...], arg(aliases=["--data-dir"])] = ()
    """Images, or folders to search for images; the flag itself may be left out."""
    topk: Annotated[int, POSITIVE] = 5
    """Number of predicted classes per image in --output; the console shows at most 3."""
    output: Path | None = None
    """Write all predictions to this .csv or .json file. The same command continues after a kill."""
    results_dir: Path | None = None
    """timm's flag: folder of --results-file, whose default name has model and image size."""
    results_file: Path | None = None
    """timm's flag: file name in --results-dir."""
    results_format: tuple[Literal["csv", "json"], ...] = ("csv",)
    """timm's flag: format of --results-file, one or both."""
    label_type: LabelType = "auto"
    """How classes are named: auto, none (numbers), name, description or detail (for ImageNet's classes)."""
    include_index: bool = False
    """Also write class numbers."""
    output_type: Literal["prob", "logit"] = "prob"
    """Write probabilities, or the model's raw outputs (logits)."""
    exclude_output: bool = False
    """Write classes without their scores."""
    no_console_results: Annotated[bool, FlagCreatePairsOff] = False
    """Do not print predictions."""
    batch_size: Annotated[int, arg(aliases=["-b"]), POSITIVE] = 64
    """Batch size per GPU, in images."""
    workers: Annotated[int | None, arg(aliases=["-j"]), POSITIVE, PER_RANK] = None
    """CPU threads that open images; default: 4 on a CPU; with a GPU, all cores but 2, divided among the machine's
    ranks."""
    device: Annotated[str, PER_RANK] = "auto"
    """auto (cuda if there is one), cpu, cuda or cuda:N."""
    amp: bool = False
    """Mixed precision."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Number type of --amp."""

    def check(self) -> None:
        """Raise `UserError` for the same, or for images that do not exist."""
        if not self.input:
            raise UserError("Name at least one image or folder, with --input or without a flag.")
        if missing := next((path for path in self.input if not path.exists()), None):
            raise UserError(f"--input {missing} does not exist.")
        super().check()
