"""The commands of `python -m data_prep` for data sets other than image folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.commands import Doing, Storing, role_by_name, say_unclear, tell
from data_prep.convert_rows import RowData, convert_dataset, convert_rows, parse_name, without_prefix
from data_prep.sources.python_dataset import made_by
from data_prep.sources.table_columns import Columns
from lowrank_vit.common.errors import UserError


@dataclass(frozen=True)
class Keys:
    """Which images and labels."""

    input_key: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: detected)")] = ""
    """The column, or the suffix of a shard's files, that holds the images; by default "image", or the only one."""
    target_key: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: detected)")] = ""
    """The column, or the key of a shard's .json, that holds the labels; by default "label" (for shards, .cls first) or
    the only column of classes."""
    class_map: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Text file with the names of classes, one a line, in label order."""

    def columns(self) -> Columns:
        """The same options as the converter takes them."""
        return Columns(self.input_key, self.target_key, self.class_map)


def hfds_command(
    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME[:SPLIT]")]],
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.beton|DIR")],
    keys: tyro.conf.OmitArgPrefixes[Keys],
    storing: tyro.conf.OmitArgPrefixes[Storing],
    doing: tyro.conf.OmitArgPrefixes[Doing],
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: its own)")] = None,
    train_split: str = "train",
    val_split: str = "validation",
    stream: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Convert a data set of Hugging Face: from the hub, or a local folder or file.

    - NAME is OWNER/NAME of the hub, a folder of Parquet files or of images, one that save_to_disk wrote, or a file.
    - With --out DIR: both splits, to train.beton and val.beton; with --out FILE.beton: SPLIT.
    - An RGB JPEG, upright and within --max-side, is stored byte for byte, as by imagefolder.
    - Labels are those of the column; names of classes are kept.
    - Validation sets keep every image's own pixels and size.
    - The same command resumes an interrupted conversion, and does nothing if all is finished.

    Args:
        name: The data set, and for a single file its split.
        out: File to write, or directory for both splits. FILE.beton.json and FILE.beton.samples go beside it.
        keys: Which images and labels.
        storing: How images are stored.
        doing: How the work is done.
        data_dir: Where the library keeps its copy of the data; local names may lie in it.
        train_split: Name of the training split, for --out DIR; timm's synonyms count.
        val_split: Name of the validation split, for --out DIR; timm's synonyms count, and test if there is no other.
        stream: Read the rows once from a stream (timm's hfids) rather than from the library's copy on the disk.
    """
    kind = "hfids" if stream else "hfds"
    data, split = parse_name(kind, without_prefix(name, ("hfds", "hfids"), data_dir), data_dir, keys.columns())
    _convert(data, split, out, train_split, val_split, storing, doing)


def wds_command(
    shards: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATTERN|DIR")]],
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.beton|DIR")],
    keys: tyro.conf.OmitArgPrefixes[Keys],
    storing: tyro.conf.OmitArgPrefixes[Storing],
    doing: tyro.conf.OmitArgPrefixes[Doing],
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: PATTERN's)")] = None,
    train_split: str = "train",
    val_split: str = "validation",
) -> None:
    """Convert shards of WebDataset: tar files with images and their labels.

    - PATTERN, such as 'imagenet-train-{000..146}.tar', needs quotes. With --out FILE.beton these shards are converted.
    - DIR holds the shards of both splits. With --out DIR they are written to train.beton and val.beton.
    - --train-split and --val-split name them: by a pattern, by timm's _info.json, or by the names of the files.
    - A sample's label is its .cls, or a key of its .json.
    - Images are stored as by imagefolder: usual JPEGs byte for byte.
    - The same command resumes an interrupted conversion, and does nothing if all is finished.

    Args:
        shards: The shards of one split, or the folder of all.
        out: File to write, or directory for both splits. FILE.beton.json and FILE.beton.samples go beside it.
        keys: Which images and labels.
        storing: How images are stored.
        doing: How the work is done.
        data_dir: Folder of the shards that a pattern names.
        train_split: The training split, for --out DIR: a name or a pattern.
        val_split: The validation split, for --out DIR: a name or a pattern.
    """
    plain = without_prefix(shards, ("wds",), data_dir)
    data, split = parse_name("wds", plain, data_dir, keys.columns())
    if not split:
        data = RowData("wds", "", (data_dir or Path()) / plain, keys.columns())
    _convert(data, split, out, train_split, val_split, storing, doing)


def torch_command(
    factory: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODULE:FUNCTION")]],
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.beton")],
    keys: tyro.conf.OmitArgPrefixes[Keys],
    storing: tyro.conf.OmitArgPrefixes[Storing],
    doing: tyro.conf.OmitArgPrefixes[Doing],
    fingerprint: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: none)")] = "",
) -> None:
    """Convert a data set that Python code makes, such as torchvision's.

    - FUNCTION of MODULE, which may lie here, returns it: with a length, and items (picture, label).
    - A picture is a PIL image, a path, bytes, or an array or a tensor of uint8.
    - Files of torchvision's ImageFolder are stored as by imagefolder, unless code of your own may change them.
    - Decoded pictures up to 64 pixels a side are stored as they are.

    Args:
        factory: Function that returns the data set; called without arguments.
        out: File to write. FILE.beton.json and FILE.beton.samples go beside it.
        keys: Which images and labels.
        storing: How images are stored.
        doing: How the work is done.
        fingerprint: Any text that changes with the data: an interrupted conversion is resumed while it is the same.
            Sets that list their files need none.
    """
    if out.suffix != ".beton":
        raise UserError(f"--out {out} does not end in .beton. Give the file to write, for example {out}/train.beton.")
    image, is_unclear = storing.of_one(role_by_name(Path(factory.partition(":")[2]), out))
    columns = keys.columns()
    given = {"input_key": columns.input_key, "target_key": columns.target_key, "class_map": columns.class_map}
    dataset = made_by(factory)
    tell(
        [convert_dataset(dataset, out, name=factory, fingerprint=fingerprint, image=image, **given, **doing.options())]
    )
    if is_unclear:
        say_unclear(out)


def _convert(
    data: RowData, split: str, out: Path, train_split: str, val_split: str, storing: Storing, doing: Doing
) -> None:
    """Write one split, or both."""
    if out.suffix == ".beton":
        if not split:
            raise UserError(f"--out {out} is one file: name its split, as NAME:SPLIT or a pattern of shards.")
        image, is_unclear = storing.of_one(role_by_name(Path(split), out))
        tell(convert_rows(data, {out: (split, "NAME:SPLIT")}, {out: image}, **doing.options()))
        if is_unclear:
            say_unclear(out)
        return
    if split:
        of_one = (
            f"{split} is not a folder, so it names the shards of one split. Give the folder of all shards"
            if data.kind == "wds"
            else f"leave out :{split}"
        )
        raise UserError(f"--out {out} is for both splits: {of_one}, or give the file to write, FILE.beton.")
    image, val_image = storing.of_sets()
    train, val = out / "train.beton", out / "val.beton"
    splits = {train: (train_split, "--train-split"), val: (val_split, "--val-split")}
    tell(convert_rows(data, splits, {train: image, val: val_image}, **doing.options()))
