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
    """folder or nothing: what --data-dir holds; hfds/NAME, hfids/NAME: Hugging Face's; wds/: shards of WebDataset in
    --data-dir; torch/cifar100; digits: scikit-learn's, written to --data-dir."""
    dataset_download: Annotated[bool, MAY_CHANGE] = False
    """torch/cifar100: download the archive where it is missing or damaged."""
    data_dir: Annotated[Path | None, arg(aliases=["--data"]), MAY_CHANGE, PER_RANK] = None
    """Folder with train.beton and val.beton, or with train/CLASS/ and val/CLASS/, converted once; default: data. Of
    hfds: where the library keeps its copy. Of wds: where the shards are."""
    train_split: str = "train"
    """Name of the training set in --data-dir; timm's synonyms count. Of wds also a pattern: 'x-{000..146}.tar'."""
    val_split: Annotated[str, MAY_CHANGE] = "validation"
    """Name of the validation set in --data-dir; timm's synonyms count, and test where there is no other."""
    beton_dir: Annotated[Path | None, MAY_CHANGE, PER_RANK] = None
    """Where images are converted to; default: DATA_DIR/.lowrank_vit, DATA_DIR/cifar100.lowrank_vit."""
    input_key: str = ""
    """hfds: the column of the images; wds: the suffix of their files; default: image, or the only one."""
    target_key: str = ""
    """hfds: the column of the labels, default label; wds: their key in the .json, default: the .cls, else label."""
    class_map: Path | None = None
    """hfds, wds: text file with the names of the classes, one a line, in label order; default: the data's own."""
    nested_classes: Literal["leaf", "merge", "top"] = "leaf"
    """Class folders: each one that holds images, as in timm; so, but those of one name together; those in the split."""
    stage_dir: Annotated[Path | None, MAY_CHANGE, PER_RANK] = None
    """Copy the .beton files to this folder on a fast local disk, once, and read the copies."""
    synthetic: bool = False
    """No data: one made-up batch that stays on the device, 100 updates an epoch. The speed of the model alone."""
    loader: Annotated[LoaderName, MAY_CHANGE] = "auto"
    """Decode backend; auto: resident if a quarter of the device's memory, half of what is free, holds the set decoded,
    else dali with a GPU, else the faster one here. resident: the set may take all that is free."""
    workers: Annotated[int | None, arg(aliases=["-j"]), NOT_NEGATIVE, MAY_CHANGE, PER_RANK] = None
    """CPU threads that decode; 0 is 1; default: 4, with a GPU all cores but 2, shared among the machine's ranks."""
    prefetch: Annotated[int, POSITIVE, MAY_CHANGE, PER_RANK] = 2
    """Decoded batches that may wait for the trainer."""
    hw_decoder_load: Annotated[float | None, SHARE, AUTO, _AUTO_OR_SHARE, MAY_CHANGE, PER_RANK] = None
    """dali on a GPU, in training: share of a batch for its JPEG engine; auto: the largest that lets no step wait, as
    was measured on the set when it was first trained on."""
    jpeg_fancy_upsampling: Annotated[bool, MAY_CHANGE] = True
    """dali on a GPU: interpolate colours as all else that decodes JPEG here does; else repeat them."""
    on_bad_sample: Annotated[Literal["error", "skip"], MAY_CHANGE] = "error"
    """A damaged sample: stop, or train on the next one in its stead and say so."""
    batch_size: Annotated[int, arg(aliases=["-b"]), POSITIVE, MAY_CHANGE] = 128
    """Training images a step on each device."""
    validation_batch_size: Annotated[int | None, arg(aliases=["-vb"]), POSITIVE, MAY_CHANGE] = None
    """Validation images a step; default: --batch-size."""
    img_size: Annotated[int | None, POSITIVE] = None
    """Side of the square image that the model sees, pixels; default: the model's own."""
    crop_pct: Annotated[float | None, Range(0, 1, open_low=True)] = None
    """Validation centre crop as a share of the short side; default: the model's own."""
    mean: Annotated[tuple[float, ...] | None, SHARE] = None
    """Pixel value that the model sees as 0, in 0-1: one number, or red, green, blue; default: the model's own."""
    std: Annotated[tuple[float, ...] | None, Range(0, 1, open_low=True)] = None
    """Standard deviation that pixels are divided by, in the same form; default: the model's own."""
    train_crop_mode: Literal["rrc", "whole"] = "rrc"
    """In training: rrc, random resized crops by --scale and --ratio; whole: the whole image, stretched to a square."""
    scale: Annotated[tuple[float, float], Range(0, 1, open_low=True)] = (0.08, 1.0)
    """Random resized crop: least and greatest share of the image's area."""
    ratio: Annotated[tuple[float, float], ABOVE_0] = (0.75, 1.3333333333333333)
    """Random resized crop: least and greatest aspect ratio, width / height."""
    hflip: Annotated[float, SHARE] = 0.5
    """Probability of a horizontal flip in training."""
    vflip: Annotated[float, SHARE] = 0.0
    """Probability of a vertical flip in training."""
    epoch_order: Literal["keyed", "sorted"] = "keyed"
    """Shuffling of sets above 65,536 images: any part of an epoch's order at once; sorted: all of it, as in earlier
    versions. Smaller sets are always sorted."""
    train_interpolation: Literal["random", "nearest", "bilinear", "bicubic", "model"] = "random"
    """Of the crop and of geometric operations; random: bilinear or bicubic, drawn for each; model: the model's own."""
