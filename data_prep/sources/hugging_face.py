"""Data sets of Hugging Face's `datasets`: from the hub, local files or saved ones; read from disk or as a stream."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.formats.jpeg import BadImageError
from data_prep.sources.image_folder import SPLIT_NAMES
from data_prep.sources.rows import Picture, RowSource, files_fingerprint, read_labels
from data_prep.sources.samples import FileList, Sample, abbreviated, nearest
from data_prep.sources.spool import Spool
from data_prep.sources.table_columns import Columns, column_remarks, image_column, label_column
from lowrank_vit.common.errors import UserError, in_short
from lowrank_vit.common.hub import hub_message, quick_without_network
from lowrank_vit.common.packages import needs
from lowrank_vit.common.terminal import one_line, say

EXTRA, _TO = "hfds", "Reading data sets of Hugging Face"
_BLOCK = 64
"""Rows that a thread takes out of the table at a time."""
_SAVED = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` writes: for several splits, and for a single set."""
_SLICE = re.compile(r"(-?[\d_]+%?)?:(-?[\d_]+%?)?\](\(\w+\))?")
"""The rest of a slice after a split's name and "["."""


def local_data(name: str, root: Path | None) -> Path | None:
    """The file or folder at `name`, here or below `root`; None if there is none, as for names of the hub."""
    for path in (Path(name).expanduser(), *((root / name,) if root and name else ())):
        if name and path.exists():
            return path
    return None


def hugging_face(
    name: str,
    split: str,
    columns: Columns,
    *,
    root: Path | None = None,
    flag: str = "--split",
    say: Callable[[str], object] = say,
) -> RowSource:
    """The rows of a split, read from `datasets`' copy on the disk (`root`, or its own cache).

    `name` is one of the hub, a folder that `datasets.load_dataset` reads or `save_to_disk` wrote, or a .parquet or
    .arrow file. `split` may be any of timm's synonyms; if there is no other, `test` is the validation set. Images are
    not decoded. `flag`: the flag that names the split, for messages. Raises `UserError`.
    """
    datasets = _datasets()
    with _in_one_line(name, root):
        found = _load(datasets, name, split, root, flag, say, streamed=False)
        return _of_table(found, name, columns)


def is_table(dataset: Any) -> bool:
    """Whether `dataset` is a `datasets.Dataset` whose items are its rows, unchanged by a transform or a subclass."""
    kind = getattr(sys.modules.get("datasets"), "Dataset", None)
    is_one = kind is not None and isinstance(dataset, kind) and type(dataset).__getitem__ is kind.__getitem__
    return is_one and dataset.format["type"] != "custom"


def loaded(dataset: Any, columns: Columns, name: str = "") -> RowSource:
    """The rows of a `datasets.Dataset` that is there already. Raises `UserError`."""
    name = name or f"datasets.Dataset {dataset.info.dataset_name or ''}".strip()
    with _in_one_line(name, Path()):
        return _of_table(_Found(dataset, str(dataset.split or ""), Path(), "", "", ()), name, columns, name)


def _of_table(found: _Found, name: str, columns: Columns, source: str = "") -> RowSource:
    dataset, features = found.dataset, found.dataset.features
    if len(dataset) == 0:
        raise UserError(f"{name}: split {found.split} has no rows.")
    image = image_column(name, features, columns)
    label = label_column(name, features, columns, image)
    table = _Table(dataset, image, found.base)
    values = dataset.select_columns([label]).with_format("arrow")[:].column(label).to_pylist()
    names = getattr(features[label], "names", None) or ()
    what = f"{name}, split {found.split}" if found.split else name
    labels = read_labels(values, what, label, names, columns.class_map)
    return RowSource(
        source or f"hfds/{name}:{found.split}",
        labels.classes,
        FileList.pack(zip(labels.values.tolist(), table.row_names(), strict=True), 0),
        remarks=(*found.remarks, *column_remarks(image, label, columns), *labels.remarks),
        read=table.read,
        bad=labels.bad,
        options=columns.options(),
        fingerprint=found.fingerprint or str(dataset._fingerprint),  # the only id of rows that are in no file
        revision=found.revision,
        stat=table.stat,
    )


def streamed(
    name: str,
    split: str,
    columns: Columns,
    spool_path: Path,
    *,
    root: Path | None = None,
    flag: str = "--split",
    say: Callable[[str], object] = say,
) -> RowSource:
    """The rows of a split, read once from a stream into the file `spool_path`, which the caller removes in the end.

    Labels and classes are known only when all rows have been read. An interrupted reading is resumed. See
    `hugging_face` for the rest. Raises `UserError`.
    """
    datasets = _datasets()
    with _in_one_line(name, root):
        found = _load(datasets, name, split, root, flag, say, streamed=True)
        dataset = found.dataset
        features = dataset.features or dataset._resolve_features().features
        image = image_column(name, features, columns)
        label = label_column(name, features, columns, image)
        if type(features[image]).__name__ == "Image":
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
        key = json.dumps([name, found.split, found.fingerprint, found.revision, columns.options()])
        spool = Spool(spool_path, key)
        if len(spool):
            say(f"resuming the stream of {name} after {len(spool):,} rows that an interrupted run has read")
        rows = dataset.select_columns([image, label])
        with spool:
            for item in rows.skip(len(spool)) if len(spool) else rows:
                _keep(spool, item[image], item[label], found.base)
    names = getattr(features[label], "names", None) or ()
    labels = read_labels(spool.labels, f"{name}, split {found.split}", label, names, columns.class_map)
    row_names = (_row_name(row, path) for row, path in enumerate(spool.paths))
    return RowSource(
        f"hfids/{name}:{found.split}",
        labels.classes,
        FileList.pack(zip(labels.values.tolist(), row_names, strict=True), 0),
        remarks=(*found.remarks, *column_remarks(image, label, columns), *labels.remarks),
        read=spool.read,
        bad=labels.bad | spool.errors,
        options=columns.options(),
        fingerprint=found.fingerprint or found.revision,
        revision=found.revision,
        in_parts="a stream is read from its beginning; hfds, whose rows lie on the disk, can be divided",
    )


def _keep(spool: Spool, value: Any, label: Any, base: Path | None) -> None:
    """Put a row of a stream into the spool; if its image is a file, with the file's content."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    error = ""
    if isinstance(path, bytes):
        content, path = path, None
    if content is None and path is not None:
        try:
            content = _opened(path) if path.startswith("hf://") else local_file(path, base, "").read_bytes()
        except (OSError, BadImageError) as caught:
            error = caught.reason if isinstance(caught, BadImageError) else f"cannot be read: {caught}"
    elif content is None:
        error = "there is no image"
    spool.append(content or b"", path, label, error)


def _opened(url: str) -> bytes:
    from datasets.utils.file_utils import xopen

    with xopen(url, "rb") as file:
        return file.read()


def _datasets() -> Any:
    datasets = needs("datasets", extra=EXTRA, to=_TO)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


@dataclass(frozen=True)
class _Found:
    dataset: Any
    split: str
    base: Path | None
    """The folder that paths in the table are relative to."""
    fingerprint: str
    """`files_fingerprint` of local files; else empty."""
    revision: str
    remarks: tuple[str, ...]


def _load(
    datasets: Any, name: str, split: str, root: Path | None, flag: str, say: Callable[[str], object], *, streamed: bool
) -> _Found:
    path = local_data(name, root)
    fingerprint = files_fingerprint(path) if path else ""
    base = (path if path.is_dir() else path.parent).resolve() if path else None
    if path and any((path / saved).is_file() for saved in _SAVED):
        there = datasets.load_from_disk(str(path))
        saved: dict[str, Any] = dict(there) if isinstance(there, Mapping) else {_first_word(there.split): there}
        chosen, remarks = _split(name, split, list(saved), flag)
        dataset = _of_saved(datasets, saved, chosen)
        return _Found(dataset.to_iterable_dataset() if streamed else dataset, chosen, base, fingerprint, "", remarks)
    if path is None:
        say(f"{name}: asking the Hugging Face hub")
    given: dict[str, Any] = {"path": str(path or name)}
    if path and path.is_file():
        kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix)
        if kind is None:
            raise UserError(f"{path} is a {path.suffix or 'plain'} file; give a folder, or a .parquet or .arrow file.")
        given = {"path": kind, "data_files": {_split_of(path): str(path)}}
    if root is not None and path is None:
        given["cache_dir"] = str(root)
    builder = datasets.load_dataset_builder(**given)
    splits = list(map(str, builder.info.splits or builder.config.data_files or ()))
    chosen, remarks = _split(name, split, splits, flag)
    if streamed and "[" in chosen:
        raise UserError(f"{name}: a stream has no slices ({chosen}). Take hfds, whose rows lie on the disk.")
    revision = "" if path else str(builder.hash or "")
    dataset = datasets.load_dataset(**given, split=chosen, streaming=streamed)
    return _Found(dataset, chosen, base, fingerprint, revision, remarks)


def _first_word(split: Any) -> str:
    """The split of a set that was saved alone, without its slice; "train" if it has none, as in `datasets`."""
    found = re.match(r"\w+", str(split or ""))
    return found[0] if found else "train"


def _split_of(file: Path) -> str:
    """The split of a single file, from its name as `datasets` finds it in a folder."""
    words = re.split(r"[^a-z]+", file.stem.lower())
    names = (*SPLIT_NAMES["train"], *SPLIT_NAMES["val"], "test")
    return next((name for name in names if name in words), "train")


def _of_saved(datasets: Any, splits: Mapping[str, Any], chosen: str) -> Any:
    """The rows of one split, or of slices and sums in `load_dataset`'s form ("train[:10%]+test")."""
    if chosen in splits:
        return splits[chosen]
    parts = datasets.ReadInstruction.from_spec(chosen).to_absolute({name: len(one) for name, one in splits.items()})
    return datasets.concatenate_datasets([splits[one.splitname].select(range(one.from_, one.to)) for one in parts])


def _split(name: str, split: str, there: Sequence[str], flag: str) -> tuple[str, tuple[str, ...]]:
    """The name of the split, or of the sum of splits, that `split` means, and remarks on it. Raises `UserError`."""
    found = [_one_split(name, one.strip(), there, flag) for one in split.split("+")]
    return "+".join(chosen for chosen, _ in found), tuple(remark for _, remark in found if remark)


def _one_split(name: str, split: str, there: Sequence[str], flag: str) -> tuple[str, str]:
    plain, _, rest = split.partition("[")
    synonyms = next((names for names in SPLIT_NAMES.values() if plain in names), ())
    chosen = next((one for one in (plain, *synonyms) if one in there), "")
    if rest and not _SLICE.fullmatch(rest):
        raise UserError(f"{name}: {split} is not a slice, such as {chosen or plain}[:10%] or {chosen or plain}[100:].")
    if chosen or not there:
        return (chosen or plain) + (f"[{rest}" if rest else ""), ""
    if synonyms == SPLIT_NAMES["val"] and "test" in there and not rest:
        return "test", f"{name} has no split named {split}: validating on test ({flag} chooses)"
    near = nearest(plain, there)
    raise UserError(
        f"{name} has no split {plain or '(an empty name)'}; there {'is' if len(there) == 1 else 'are'} "
        f"{abbreviated(there, 10)}.{f' Did you mean {near}?' if near else ''} Name one with {flag}."
    )


def _row_name(row: int, path: str | None) -> str:
    return f"row {row}" + (f" ({one_line(path.rpartition('/')[2])})" if path else "")


class _Table:
    """Images of a data set on the disk, by row; for any thread."""

    def __init__(self, dataset: Any, column: str, base: Path | None) -> None:
        self._rows = dataset.select_columns([column]).with_format("arrow")
        self._base, self._kept = base, threading.local()
        kind = str(self._rows.features.arrow_schema.field(0).type)
        self._kind = "struct" if kind.startswith("struct") else "binary" if "binary" in kind else "string"
        feature = self._rows.features[column]
        self._fields = set(feature) if isinstance(feature, Mapping) else {"bytes", "path"}
        self._names_files = self._kind == "string" or (
            self._kind == "struct" and any(self._is_file(row) for row in {0, len(self._rows) - 1} if len(self._rows))
        )

    def _is_file(self, row: int) -> bool:
        return self._value(row)[0] is None

    def _value(self, row: int) -> tuple[bytes | None, str | None]:
        """The bytes of an image, and its path."""
        block = row // _BLOCK
        if getattr(self._kept, "block", None) != block:
            self._kept.column = self._rows[block * _BLOCK : (block + 1) * _BLOCK].column(0)
            self._kept.block = block
        value = self._kept.column[row % _BLOCK]
        if not value.is_valid:
            return None, None
        if self._kind == "struct":
            data, path = (value[key].as_py() if key in self._fields else None for key in ("bytes", "path"))
            return data, path
        return (value.as_py(), None) if self._kind == "binary" else (None, value.as_py())

    def row_names(self) -> Iterator[str]:
        """A name for each row."""
        struct_field: Any = needs("pyarrow.compute", extra=EXTRA, to=_TO).struct_field
        for first in range(0, len(self._rows), 1000):
            column = self._rows[first : first + 1000].column(0)
            if self._kind == "struct" and "path" in self._fields:
                column = struct_field(column, "path")
            has_paths = self._kind != "binary" and "path" in self._fields
            paths = column.to_pylist() if has_paths else [None] * len(column)
            yield from (_row_name(row, path) for row, path in enumerate(paths, first))

    def read(self, sample: Sample) -> Picture:
        """See `RowSource.read`."""
        data, path = self._value(sample.row)
        if data is not None or path is None:
            return data
        return local_file(path, self._base, sample.name)

    def stat(self, sample: Sample) -> tuple[int, int]:
        """See `RowSource.stat`."""
        if not self._names_files:
            return 0, 0
        try:
            found = self.read(sample)
            stat = found.stat() if isinstance(found, Path) else None
        except (OSError, BadImageError):
            return 0, 0
        return (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)


def local_file(path: str, base: Path | None, name: str) -> Path:
    """The file `path` that a row names, relative to `base`, the table's folder. Raises `BadImageError`."""
    if re.match(r"\w+://", path):
        raise BadImageError(name, f"its image is not in the data but at {path}; download it first")
    if base is None and not os.path.isabs(path):  # noqa: PTH117  a string, no path
        raise BadImageError(name, f"its image is the file {path}, and data of the hub have no folder")
    return base / path if base else Path(path)


@contextmanager
def _in_one_line(name: str, root: Path | None) -> Generator[None]:
    """Turn errors of `datasets` and the hub into a `UserError` with the next step. Retries are not logged."""
    loggers = [logging.getLogger(one) for one in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        if local_data(name, root):
            yield
        else:
            with quick_without_network(needs("datasets.config", extra=EXTRA, to=_TO)):
                yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of several libraries, without a common kind
        raise UserError(_message(name, error)) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _message(name: str, error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"EmptyDatasetError", "DataFilesNotFoundError"}:
        return f"{name} holds no data files that datasets reads (Parquet, Arrow, a folder of images)."
    if "corresponds to no data" in str(error):
        return f"{name}: that split has no rows."
    if "Config name is missing" in str(error):
        return f"{name}: {in_short(error)}. Save the one you mean: `load_dataset(NAME, CONFIG).save_to_disk(DIR)`."
    where = "save it where there is a network (`datasets.load_dataset(NAME).save_to_disk(DIR)`) and give hfds/DIR"
    return hub_message(name, error, "dataset", where)
