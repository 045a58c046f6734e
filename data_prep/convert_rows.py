"""Convert data sets other than image folders to `.beton`: Hugging Face's, WebDataset shards, Python objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.convert import DEFAULT_IMAGE_OPTIONS, Conversion, Say, convert_sources
from data_prep.formats.jpeg import ImageOptions
from data_prep.sources.hugging_face import hugging_face, is_table, loaded, local_data, streamed
from data_prep.sources.python_dataset import python_dataset
from data_prep.sources.rows import RowSource, files_fingerprint
from data_prep.sources.spool import rows_path
from data_prep.sources.table_columns import NO_COLUMNS, Columns
from data_prep.sources.tar_shards import find_shards, is_pattern, tar_shards
from lowrank_vit.common.errors import UserError

Kind = Literal["hfds", "hfids", "wds"]
KINDS: tuple[Kind, ...] = ("hfds", "hfids", "wds")
"""timm's prefixes: Hugging Face's data sets, the same read as streams, WebDataset shards."""


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class RowData:
    """A data set by timm's name, without its split."""

    kind: Kind
    name: str
    """For hfds and hfids: a name on the hub, or a local folder or file."""
    root: Path | None = None
    """For wds the folder of the shards; else where `datasets` keeps its copy, and where local names are looked up."""
    columns: Columns = NO_COLUMNS

    @property
    def local(self) -> Path | None:
        """The data set's folder or file; None if it is on the hub."""
        return (self.root or Path()) if self.kind == "wds" else local_data(self.name, self.root)

    @property
    def title(self) -> str:
        """The data set's name in manifests; their `source` adds the split."""
        local = self.local
        return f"{self.kind}/{local.resolve() if local else self.name}"

    def fingerprint(self, split: str, flag: str) -> str:
        """The present `files_fingerprint`, without reading a row; empty for the hub. Raises `UserError`."""
        local = self.local
        if self.kind == "wds":
            return find_shards(self.root or Path(), split, flag).fingerprint
        return files_fingerprint(local) if local else ""

    def source(self, split: str, out: Path, flag: str, say: Say) -> RowSource:
        """The rows of a split; a stream is read now, to a file beside `out`. Raises `UserError`."""
        where: dict[str, Any] = {"flag": flag, "say": say}
        if self.kind == "wds":
            return tar_shards((self.root or Path()).resolve(), split, self.columns, flag)
        name, root = str(self.local.resolve()) if self.local else self.name, self.root
        if self.kind == "hfids":
            return streamed(name, split, self.columns, spool_path(out), root=root, **where)
        return hugging_face(name, split, self.columns, root=root, **where)


def parse_name(kind: Kind, given: str, root: Path | None, columns: Columns = NO_COLUMNS) -> tuple[RowData, str]:
    """Split `NAME[:SPLIT]`, or a pattern of shards, into data set and split (may be empty). Raises `UserError`."""
    if kind == "wds":
        if not is_pattern(given, Path(), *([root] if root else [])):
            folder = Path(given) if given and Path(given).is_dir() else Path("data")  # timm does not look at the name
            return RowData(kind, "", root or folder, columns), ""
        folder, name = os.path.split(given.partition("::")[0])
        if root is None and "{" not in folder and "::" not in given:
            return RowData(kind, "", Path(folder), columns), name
        return RowData(kind, "", root or Path(), columns), given
    name, _, split = (given, "", "") if local_data(given, root) else given.partition(":")
    if not name:
        raise UserError(f"{kind}/ needs a name after it: {kind}/OWNER/NAME of the hub, or {kind}/ and a local folder.")
    return RowData(kind, name, root, columns), split


def without_prefix(given: str, kinds: tuple[Kind, ...], root: Path | None) -> str:
    """A command's NAME or PATTERN without the prefix that `--dataset` has, unless the whole is an existing path.

    A local folder may itself be named wds or hfds.
    """
    prefix, _, plain = given.partition("/")
    if prefix not in kinds:
        return given
    name = os.path.split(given.partition("::")[0])[0] if is_pattern(given) else given.partition(":")[0]
    return given if local_data(given, root) or local_data(name, root) else plain


def spool_path(out: Path) -> Path:
    """Where the rows of a stream wait until they are converted."""
    return out.with_name(f".{out.name}.stream")


def convert_rows(
    data: RowData,
    splits: Mapping[Path, tuple[str, str]],
    images: Mapping[Path, ImageOptions],
    *,
    part: tuple[int, int] | None = None,
    workers: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = False,
    say: Say = _silent,
    trust_labels: bool = False,
) -> list[Conversion]:
    """Convert {out: (split, the flag that names it)}; all have the labels of the first, the training set.

    See `convert_image_folder` for the options. A stream's rows are kept until they are converted: a conversion that was
    interrupted, or ended because of bad images, reads no row again. Raises `UserError`.
    """
    if part and data.kind == "hfids":
        raise UserError("--shard: a stream is read from its beginning. Take hfds, whose rows lie on the disk.")
    sources = {out: data.source(split, out, flag, say) for out, (split, flag) in splits.items()}
    how: dict[str, Any] = {"part": part, "workers": workers, "on_bad": on_bad, "progress": progress, "say": say}
    done = convert_sources(sources, images, {}, **how, trust_labels=trust_labels)
    for out in sources if data.kind == "hfids" else ():
        for path in (rows_path(spool_path(out)), spool_path(out)):
            path.unlink(missing_ok=True)
    return done


def convert_dataset(
    dataset: Any,
    out: str | os.PathLike[str],
    *,
    name: str = "",
    fingerprint: str = "",
    image: ImageOptions = DEFAULT_IMAGE_OPTIONS,
    input_key: str = "",
    target_key: str = "",
    class_map: Path | None = None,
    part: tuple[int, int] | None = None,
    workers: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = False,
    say: Say = _silent,
) -> Conversion:
    """Write a data set that is a Python object to `out`, a `.beton` that training reads.

    `dataset` has a length and items `dataset[n]`: (picture, label, ...), as torchvision's data sets have them, or a
    dict with "image" and "label". A picture is a PIL image, a path, an image file's bytes, a NumPy array uint8 (height,
    width, 3) or a torch tensor uint8 (3, height, width). A label is a number or the name of a class. Class names are
    `dataset.classes` or `class_to_idx`.

    Where a picture is bytes or a path, files are stored as `convert_image_folder` stores them: usual JPEGs byte for
    byte. So are those of torchvision's ImageFolder, also below torch's `Subset` and `ConcatDataset`, unless a
    `transform`, a loader or a derived class's `__getitem__` may change pictures: these are stored as they come out. A
    `target_transform` is applied. Decoded pictures up to 64 pixels a side are stored as they are. A `datasets.Dataset`
    is read without decoding, unless `set_transform` was called.

    Leave out random transforms: training augments, and an item may be read twice. Items are read one at a time.

    Args:
        dataset: The object.
        out: The file to write, FILE.beton. It appears, or is replaced, in one step at the end.
        name: What the manifest calls the source; the object's class by default.
        fingerprint: Any text that changes with the data, such as a version. With it (or with files) an interrupted
            conversion is resumed and a finished one is not repeated; without, everything is written anew.
        image: How images are stored; `data_prep.formats.jpeg.LOSSLESS` keeps every pixel, for sets that are scored.
        input_key: The column, or the key of a dict, that holds the pictures; "image" by default.
        target_key: The same for the labels; "label" by default.
        class_map: Text file with the names of classes, one a line, in label order.
        part: (i, n) writes part i of n, counted from 1, to FILE-i-of-n.beton.
        workers: Threads that encode; one per core by default.
        on_bad: Items that do not decode or have no label: list all and write nothing, or leave them out.
        progress: Show a bar on stderr.
        say: Called with remarks on the data, each a line.

    Raises:
        UserError: if items are bad, which it lists, or if anything else is wrong with the data or the options.

    Example:
        >>> convert_dataset(pictures, "pictures.beton").manifest.classes
        ('cat', 'dog')
    """
    path = Path(out)
    if path.suffix != ".beton":
        raise UserError(f"{path} does not end in .beton. Give the file to write, for example {path / 'train.beton'}.")
    if hasattr(dataset, "keys") and hasattr(dataset, "values"):
        splits = ", ".join(map(str, dataset.keys()))
        raise UserError(f"this is a dict of data sets ({splits}), not one. Convert each to a file of its own.")
    columns = Columns(input_key, target_key, class_map)
    if hasattr(dataset, "cast_column") and not hasattr(dataset, "__len__"):
        raise UserError(
            "a stream has no length: use `python -m data_prep hfds --stream`, or load it without streaming."
        )
    source = (
        loaded(dataset, columns, name) if is_table(dataset) else python_dataset(dataset, name, columns, fingerprint)
    )
    how: dict[str, Any] = {"part": part, "workers": workers, "on_bad": on_bad, "progress": progress, "say": say}
    return convert_sources({path: source}, {path: image}, {}, **how)[0]
