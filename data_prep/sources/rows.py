"""Sources that are read by number, such as tables and shards: their rows as samples, their labels, their pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.formats.image_formats import is_of_the_system
from data_prep.formats.jpeg import (
    MAX_PIXELS,
    BadImageError,
    EncodedImage,
    ImageOptions,
    UnreadableImageError,
    encode_bytes,
    encode_image,
    store_pixels,
    upright_rgb,
)
from data_prep.sources.samples import FileList, Sample, Source, abbreviated, in_timms_order, positions
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.terminal import one_line

MOST_CLASSES = 1 << 16
"""Labels without names must be below this: a greater one is another kind of id, and would need a head of gigabytes."""
SMALL = 64
"""Pixels a side up to which decoded pictures are stored raw: a JPEG is hardly smaller, and changes pixels."""
Picture = bytes | Path | np.ndarray | Image.Image | None
"""An image file's content, an image file, or a decoded picture: uint8 (height, width), (height, width, 1, 3 or 4)."""


def _no_stat(sample: Sample) -> tuple[int, int]:
    return 0, 0


@dataclass(frozen=True)
class RowSource(Source):
    """Rows with a picture and a label each; `samples` is a `FileList` of rows."""

    read: Callable[[Sample], Picture] = field(kw_only=True)
    """Returns a row's picture; any thread may call it. Raises `BadImageError` if there is none."""
    bad: Mapping[int, str] = field(default_factory=dict[int, str], kw_only=True)
    """Rows that cannot be samples, and why; their label is -1."""
    options: Mapping[str, str] = field(default_factory=dict[str, str], kw_only=True)
    """How rows were read; goes into the manifest."""
    fingerprint: str = field(default="", kw_only=True)
    """Changes with the source; see `files_fingerprint`."""
    revision: str = field(default="", kw_only=True)
    """See `Manifest.revision`."""
    can_resume: bool = field(default=True, kw_only=True)
    """Whether `fingerprint` or `stat` changes when the rows change."""
    stat: Callable[[Sample], tuple[int, int]] = field(default=_no_stat, kw_only=True)
    """Size in bytes and modification time in ns of the file that `read` returns; zeros if it returns no path."""
    in_parts: str = field(default="", kw_only=True)
    """Why the source cannot be divided; empty where it can."""

    def _relabelled(self, labels: list[int]) -> FileList:
        assert isinstance(self.samples, FileList)
        return self.samples.relabelled(labels)

    def encode(self, sample: Sample, options: ImageOptions) -> EncodedImage:
        """The bytes to store for a row. Raises `BadImageError`."""
        if reason := self.bad.get(sample.row):
            raise BadImageError(sample.name, reason)
        image = encode_picture(self.read(sample), sample.name, options)
        if image.source_stat == (0, 0):
            return image
        return replace(image, source_stat=self.stat(sample))  # compared on resuming; not every source has it


def encode_picture(picture: Picture, name: str, options: ImageOptions) -> EncodedImage:
    """Encode a file as `encode_image` does, decoded pixels raw if they are `SMALL`. Raises `BadImageError`."""
    if isinstance(picture, Path):
        try:
            return encode_image(picture, options)
        except UnreadableImageError as error:
            if picture.exists() or not picture.parent.exists():
                raise
            raise BadImageError(name, f"there is no {picture}") from error  # the fault is the row's, not the disk's
        except BadImageError as error:
            raise BadImageError(name, error.reason) from error
    if isinstance(picture, bytes):
        if not picture:
            raise BadImageError(name, "the image has no bytes")
        return encode_bytes(picture, name, options)
    try:
        if picture is None:
            raise ValueError("there is no image")
        image = picture if isinstance(picture, Image.Image) else _from_array(picture)
        return _encode_decoded(image, options)
    except (BadImageError, UserError, MemoryError):
        raise
    except Exception as error:  # as for files: PIL raises nearly anything
        raise BadImageError(name, str(error) or type(error).__name__) from error


def _encode_decoded(image: Image.Image, options: ImageOptions) -> EncodedImage:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; 1 to {MAX_PIXELS:,} can be stored")
    reason = "16-bit" if image.mode.startswith("I") else "palette" if image.mode in ("P", "PA") else "other"
    reason = "alpha" if reason == "other" and image.has_transparency_data else reason
    pixels = np.asarray(upright_rgb(image.copy()))  # a copy, since `upright_rgb` changes its argument
    is_small = max(image.size) <= min(SMALL, options.max_side)
    if is_small and not options.raw:
        return EncodedImage(*store_pixels(pixels, "raw", replace(options, lossless=True)))
    return EncodedImage(*store_pixels(pixels, "raw" if options.raw else reason, options))


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
        raise ValueError(
            f"pixels are {pixels.dtype}, expected uint8 from 0 to 255. Leave out transforms such as ToTensor and "
            "Normalize: training normalises by itself"
        )
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise ValueError(f"pixels have the shape {pixels.shape}, expected (height, width, 3)")
    return Image.fromarray(np.ascontiguousarray(pixels))


@dataclass(frozen=True)
class Labels:
    """The labels of all rows."""

    values: np.ndarray
    """intc (N,), positions in `classes`; -1 for a row without a usable label."""
    classes: tuple[str, ...]
    bad: dict[int, str]
    """Why a row has no label, by row."""
    remarks: tuple[str, ...] = ()


def read_labels(
    values: Iterable[Any], source: str, key: str, names: Sequence[str] = (), class_map: Path | None = None
) -> Labels:
    """Labels and classes from the values of column `key`.

    `names`: the class names, in order, of labels that are numbers. Without it numbers are labels themselves, as in
    timm, with the classes "0", "1" and so on; words are names of classes, which get their labels in timm's order.
    `class_map`: a text file with one name a line, whose line number, from 0, is the label (timm's --class-map); if the
    labels are numbers without names, it gives their names. Raises `UserError` if no row has a label, or if rows have
    several.
    """
    plain = [_plain(value) for value in values]
    bad = {row: value.why for row, value in enumerate(plain) if isinstance(value, _Bad)}
    found = [None if isinstance(value, _Bad) else value for value in plain]
    _refuse_several(plain, source, key)
    words = {value for value in found if isinstance(value, str)}
    mapped = _class_map(class_map) if class_map else ()
    remarks: list[str] = []
    if words:
        classes = tuple(in_timms_order(words))
        place = {name: n for n, name in enumerate(classes)}
        labels = [place.get(value, -1) if isinstance(value, str) else -1 for value in found]
        for row, value in enumerate(found):
            if value is not None and not isinstance(value, str):
                bad[row] = f"{key} is the number {value}, while other rows have names"
    else:
        classes, remarks = _of_numbers(found, bad, key, tuple(names) or mapped)
        labels = [value if row not in bad and isinstance(value, int) else -1 for row, value in enumerate(found)]
        if mapped and not names:
            mapped = ()  # its lines are the class names already
    if not any(label >= 0 for label in labels):
        _refuse_unlabelled(source, key, bad)
    result = np.array(labels, np.intc)
    if mapped:
        result, classes = _map(result, classes, mapped, bad, key)
        if not (result >= 0).any():
            raise UserError(
                f"{source}: none of its classes ({abbreviated(sorted(set(bad.values())), 3)}) is in --class-map "
                f"{class_map} ({abbreviated(mapped)})."
            )
    return Labels(result, classes, bad, tuple(remarks))


@dataclass(frozen=True)
class _Bad:
    """A value that is no label."""

    why: str
    is_several: bool = False


def _plain(value: Any) -> int | str | _Bad:
    if hasattr(value, "tolist"):  # a number of NumPy's or torch's
        value = value.tolist()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or value != value:
        return _Bad("it has no label")
    if isinstance(value, str):
        return value if value.strip() else _Bad("its label is empty")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables turn integers with gaps into floats
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _Bad(f"its label {value} is not a whole number")
    if isinstance(value, list | tuple) and len(value) == 1:
        only: Any = value[0]
        return _plain(only)
    if isinstance(value, list | tuple | dict | set):
        several: Any = value
        if not several:
            return _Bad("it has no label")
        if len(several) == 1:
            return _Bad(f"its label is of the kind {type(several).__name__}", is_several=True)
        return _Bad(f"it has {len(several)} labels: {one_line(repr(several)[:60])}", is_several=True)
    return _Bad(f"its label is of the kind {type(value).__name__}")


def _refuse_several(plain: Sequence[int | str | _Bad], source: str, key: str) -> None:
    row = next((row for row, value in enumerate(plain) if isinstance(value, _Bad) and value.is_several), None)
    if row is not None:
        value = plain[row]
        assert isinstance(value, _Bad)
        raise UserError(
            f"{source}: {key} of row {row:,} is not a single label ({value.why}). Training needs one label for each "
            "image; name a column of such labels with --target-key."
        )


def _refuse_unlabelled(source: str, key: str, bad: Mapping[int, str]) -> None:
    if not bad:
        raise UserError(f"{source} has no rows.")
    raise UserError(
        f"{source} has no labels: in all {len(bad):,} rows {key} is unusable (row {min(bad):,}: {bad[min(bad)]}). Name "
        "another column with --target-key or another split; to predict without labels give `python -m "
        "lowrank_vit.inference` a folder of the images."
    )


def _of_numbers(
    found: Sequence[int | str | None], bad: dict[int, str], key: str, names: tuple[str, ...]
) -> tuple[tuple[str, ...], list[str]]:
    limit = len(names) or MOST_CLASSES
    greatest, seen = -1, set[int]()
    for row, value in enumerate(found):
        if not isinstance(value, int):
            continue
        if 0 <= value < limit:
            seen.add(value)
            greatest = max(greatest, value)
        elif value < 0:
            bad[row] = f"its label is {value}: it has none"
        else:
            what = f"there are {len(names):,} classes" if names else f"labels without names are below {limit:,}"
            bad[row] = f"its label {value} is too large: {what}"
    classes = names or tuple(map(str, range(greatest + 1)))
    empty = [] if names else [name for label, name in enumerate(classes) if label not in seen]
    if not empty:
        return classes, []
    return classes, [
        f"warning: {key} has no row for {len(empty):,} of its {len(classes):,} numbers ({abbreviated(empty)}); numbers "
        "are used as labels unchanged, as in timm"
    ]


def _class_map(path: Path) -> tuple[str, ...]:
    if path.suffix == ".pkl":
        raise UserError(f"--class-map {path}: give a text file with one class name a line, in label order.")
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-map {path} cannot be read: {error}. Give a text file, one name a line.") from error
    while names and not names[-1]:
        names.pop()
    if not all(names) or not names or len(set(names)) < len(names):
        raise UserError(f"--class-map {path} must name each class once, one a line, in label order.")
    return tuple(names)


def _map(
    labels: np.ndarray, classes: tuple[str, ...], mapped: tuple[str, ...], bad: dict[int, str], key: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Replace labels by line numbers of the class map; rows of classes that it does not name become bad."""
    known = set(mapped)
    table = [(positions([name], mapped) or [-1])[0] if name in known else -1 for name in classes]
    result = np.array([*table, -1], np.intc)[labels]
    for row in np.flatnonzero((result < 0) & (labels >= 0)).tolist():
        bad[row] = f"{key} is {one_line(classes[labels[row]])}, which --class-map does not name"
    return result, mapped


def read_at(path: Path, start: int, size: int, name: str) -> bytes:
    """Bytes of a file, fewer at its end. It is opened each time: a process may not have all shards open at once.

    Raises `UnreadableImageError`; `name` is the image's.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.pread(descriptor, size, start)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableImageError(name, f"{path} cannot be read: {error.strerror}") from error


def files_fingerprint(root: Path, files: Iterable[Path] | None = None) -> str:
    """Hexadecimal SHA-256 of name (relative to `root`), size and modification time of `files`, or all below `root`.

    Hidden files, and those of file servers, do not count. Raises `UserError` if a file cannot be examined.
    """
    digest = hashlib.sha256()
    for path in sorted(_walk(root)) if files is None else files:
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        name = os.path.relpath(path, root)
        digest.update(b"%s\0%d %d\0" % (os.fsencode(name), stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


def _walk(root: Path) -> Iterable[Path]:
    if root.is_file():
        yield root
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not is_of_the_system(name)]
        yield from (Path(folder, name) for name in names if not is_of_the_system(name))
