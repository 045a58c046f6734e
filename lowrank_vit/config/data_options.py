"""The options of a run's data: where they come from, how they are read and cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from lowrank_vit.common.arguments import ABOVE_0, NOT_NEGATIVE, POSITIVE, SHARE, Range
from lowrank_vit.config.option_types import AUTO, MAY_CHANGE, PER_RANK

LoaderName = Literal["auto", "resident", "dali", "ffcv"]
"""auto, or a module of `data/decode/` with an `open_backend`."""
_AUTO_OR_SHARE = arg(metavar="auto|FLOAT", help_behavior_hint="(default: auto)")


@dataclass(frozen=True)
class Data:
    """Where the images come from and how they are cut."""

    dataset: Annotated[str, MAY_CHANGE] = ""
    """Empty or folder: what --data-dir holds. hfds/NAME, hfids/NAME: a data set of Hugging Face. wds/: WebDataset
    shards in --data-dir. torch/cifar100. digits: scikit-learn's, written to --data-dir."""
    dataset_download: Annotated[bool, MAY_CHANGE] = False
    """torch/cifar100: download the archive if it is missing or damaged."""
    data_dir: Annotated[Path | None, arg(aliases=["--data"]), MAY_CHANGE, PER_RANK] = None
    """Folder with train.beton and val.beton, or with train/CLASS/ and val/CLASS/, which are converted once; default:
    data. hfds: where the library keeps its copy. wds: where the shards are."""
    train_split: str = "train"
    """Name of the training split in --data-dir, or a synonym that timm knows. wds: also a pattern,
    'x-{000..146}.tar'."""
    val_split: Annotated[str, MAY_CHANGE] = "validation"
    """Name of the validation split in --data-dir, or a synonym that timm knows. Falls back to test."""
    beton_dir: Annotated[Path | None, MAY_CHANGE, PER_RANK] = None
    """Where converted images are written; default: DATA_DIR/.lowrank_vit, for CIFAR-100
    DATA_DIR/cifar100.lowrank_vit."""
    input_key: str = ""
    """hfds: column of the images. wds: suffix of their files. Default: image, or the only one there is."""
    target_key: str = ""
    """hfds: column of the labels, default label. wds: their key in the .json; default: the .cls file, else label."""
    class_map: Path | None = None
    """hfds, wds: text file of class names, one per line, in label order; default: the data's own order."""
    nested_classes: Literal["leaf", "merge", "top"] = "leaf"
    """Which folders are classes. leaf: each folder that holds images, as in timm. merge: the same, with folders of one
    name together. top: only the folders directly in the split."""
    stage_dir: Annotated[Path | None, MAY_CHANGE, PER_RANK] = None
    """Copy the .beton files to this folder on a fast local disk once, and read the copies."""
    synthetic: bool = False
    """Use no data: one made-up batch stays on the device, 100 updates per epoch. This shows the speed of the model
    alone."""
    loader: Annotated[LoaderName, MAY_CHANGE] = "auto"
    """Decoding backend. auto: resident if the decoded set fits in a quarter of the device's memory and half of what is
    free, else dali with a GPU, else the faster one on this machine. resident: may use all free memory."""
    workers: Annotated[int | None, arg(aliases=["-j"]), NOT_NEGATIVE, MAY_CHANGE, PER_RANK] = None
    """CPU threads that decode (0 means 1); default: 4 on a CPU; with a GPU, all cores but 2, divided
    among the machine's ranks."""
    prefetch: Annotated[int, POSITIVE, MAY_CHANGE, PER_RANK] = 2
    """Decoded batches to keep ready."""
    hw_decoder_load: Annotated[float | None, SHARE, AUTO, _AUTO_OR_SHARE, MAY_CHANGE, PER_RANK] = None
    """dali on a GPU, in training: share of a batch that the JPEG engine decodes. auto: the largest share that does not
    slow the step down, measured when the set is first used."""
    jpeg_fancy_upsampling: Annotated[bool, MAY_CHANGE] = True
    """dali on a GPU: interpolate subsampled colours, as the other backends do, instead of repeating them."""
    on_bad_sample: Annotated[Literal["error", "skip"], MAY_CHANGE] = "error"
    """If a sample is damaged: stop with an error, or replace it by the next one and report it."""
    batch_size: Annotated[int, arg(aliases=["-b"]), POSITIVE, MAY_CHANGE] = 128
    """Batch size per GPU, in images."""
    validation_batch_size: Annotated[int | None, arg(aliases=["-vb"]), POSITIVE, MAY_CHANGE] = None
    """Validation batch size per GPU; default: --batch-size."""
    img_size: Annotated[int | None, POSITIVE] = None
    """Side of the square input image in pixels; default: the model's own."""
    crop_pct: Annotated[float | None, Range(0, 1, open_low=True)] = None
    """Validation: centre crop as a share of the short side; default: the model's own."""
    mean: Annotated[tuple[float, ...] | None, SHARE] = None
    """Mean for normalisation, in 0-1: one number, or red, green, blue; default: the model's own."""
    std: Annotated[tuple[float, ...] | None, Range(0, 1, open_low=True)] = None
    """Standard deviation for normalisation, in 0-1: one number, or red, green, blue; default: the model's own."""
    train_crop_mode: Literal["rrc", "whole"] = "rrc"
    """Training: rrc, random resized crops by --scale and --ratio; whole, the whole image stretched to a square."""
    scale: Annotated[tuple[float, float], Range(0, 1, open_low=True)] = (0.08, 1.0)
    """Random resized crop: smallest and largest share of the image's area."""
    ratio: Annotated[tuple[float, float], ABOVE_0] = (0.75, 1.3333333333333333)
    """Random resized crop: smallest and largest aspect ratio, width / height."""
    hflip: Annotated[float, SHARE] = 0.5
    """Probability of a horizontal flip in training."""
    vflip: Annotated[float, SHARE] = 0.0
    """Probability of a vertical flip in training."""
    epoch_order: Literal["keyed", "sorted"] = "keyed"
    """How sets above 65,536 images are shuffled. keyed: each position is computed when it is needed. sorted: the whole
    order at once, as in earlier versions. Smaller sets always use sorted."""
    train_interpolation: Literal["random", "nearest", "bilinear", "bicubic", "model"] = "random"
    """Interpolation of crops and geometric operations. random: bilinear or bicubic, drawn for each. model: the model's
    own."""
