"""The conversions themselves, for the command line and for other code: a source in, `.beton` and sidecars out."""

from __future__ import annotations

import hashlib
import importlib
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL

from data_prep.formats import turbojpeg
from data_prep.formats.beton import MIN_PAGE_SIZE, PAGE_SIZE, part_path
from data_prep.formats.jpeg import (
    JPEG_MAX_SIDE,
    LOSSLESS,
    EncodedImage,
    ImageOptions,
    encode_pixels,
)
from data_prep.formats.sidecars import CONVERTER_VERSION, Manifest
from data_prep.sources.cifar100 import cifar100, download
from data_prep.sources.file_list import encode_listed, file_stat, listed_source, read_list, refuse_other_options
from data_prep.sources.image_folder import Nested, image_folder, split_folders
from data_prep.sources.rows import RowSource
from data_prep.sources.samples import (
    DIGITS_SPLIT_SEED,
    Sample,
    Source,
    abbreviated,
    differences,
    digits,
    file_list_sha256,
    positions,
    shard,
)
from data_prep.writing.bad_images import BadImagesError, joined
from data_prep.writing.beton import Resume, Written, write_beton
from data_prep.writing.resuming import find_finished, remove_left_of, rename_pending, write_pending
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.packages import why_missing
from lowrank_vit.common.resources import available_cores

DEFAULT_IMAGE_OPTIONS = ImageOptions()
Options = dict[str, str | int | bool | None]
Say = Callable[[str], object]
MEND = "Mend the folders, or choose classes that both have with --classes."
RAW_MAX_SIDE = 1672
"""Pixels; a square of raw pixels must fit one page of 8 MiB."""


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Conversion:
    """One finished `.beton`."""

    beton: Path
    manifest: Manifest
    seconds: float
    """Wall-clock time from listing the source to the finished manifest."""
    resumed: int = 0
    """How many images an interrupted run had finished already."""
    was_finished: bool = False
    """An earlier run had finished all of it; nothing was written."""


def convert_digits(out_dir: Path) -> tuple[Conversion, Conversion]:
    """Write `out_dir`/train.beton and val.beton: 1,437 and 360 raw 8x8 digits. Raises `UserError`."""
    options: Options = {"split_seed": DIGITS_SPLIT_SEED}
    # The smallest page FFCV allows: all digits fill a seventh of one, so larger pages would only be empty.
    write = partial(_convert, encode=encode_pixels, options=options, page_size=MIN_PAGE_SIZE)
    return (
        write(digits("train"), out_dir / "train.beton"),
        write(digits("val"), out_dir / "val.beton"),
    )


def convert_cifar100(archive: Path | None, out_dir: Path, *, progress: bool = False) -> tuple[Conversion, Conversion]:
    """Write `out_dir`/train.beton and val.beton: 50,000 and 10,000 raw 32x32 images with their fine labels.

    `archive` is one of the official archives, packed or unpacked; None downloads it into `out_dir`.
    Raises `UserError`.
    """
    if archive is None:
        archive = download(out_dir)
    sources = cifar100(archive, "train"), cifar100(archive, "val")
    if sources[0].classes != sources[1].classes or sources[0].superclasses != sources[1].superclasses:
        raise UserError(f"--src {archive}: its training and test files have different classes. Download it again.")
    write = partial(_convert, encode=encode_pixels, options={}, progress=progress)
    return write(sources[0], out_dir / "train.beton"), write(sources[1], out_dir / "val.beton")


def convert_image_folder(
    src: Path,
    out: Path,
    *,
    image: ImageOptions = DEFAULT_IMAGE_OPTIONS,
    classes: Path | None = None,
    nested: Nested | None = None,
    file_list: Path | None = None,
    part: tuple[int, int] | None = None,
    workers: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = False,
    say: Say = _silent,
) -> Conversion:
    """Convert `src`/class/**/image to `out`, resuming where an interrupted conversion stopped.

    See `list_folder` for `classes` and `nested` (None is "leaf"), `encode_image` for `image`, `write_beton` for the
    rest. `file_list` is a list that `write_list` made of `src`: the folder is not listed again, and classes and rule
    come from the list. `workers` None means one thread per core. `part` (i, n) converts only part i of n, counted from
    1, to `part_path(out, i, n)`. `say` is called with remarks on the folder. Raises `UserError`.
    """
    if out.suffix != ".beton":
        raise UserError(
            f"--out {out} does not end in .beton. Give the file to write, for example --out {out / 'train.beton'}."
        )
    listed: dict[str, Any] = {"classes": classes, "nested": nested, "file_list": file_list}
    how: dict[str, Any] = {"part": part, "workers": workers, "on_bad": on_bad, "progress": progress, "say": say}
    return convert_folders({out: src}, image=image, **listed, **how)[0]


def convert_splits(
    src: Path,
    out_dir: Path,
    *,
    image: ImageOptions = DEFAULT_IMAGE_OPTIONS,
    val_image: ImageOptions = LOSSLESS,
    classes: Path | None = None,
    nested: Nested | None = None,
    file_list: Path | None = None,
    part: tuple[int, int] | None = None,
    workers: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = False,
    say: Say = _silent,
) -> list[Conversion]:
    """`convert_image_folder` of `src`/train and `src`/val (or timm's synonyms) to train.beton and val.beton.

    The validation set has options of its own, so that scores do not depend on how the training set is stored.
    Raises `UserError` also if neither is there, or if one has classes that the training set does not have.
    """
    folders = split_folders(src)
    if not folders:
        raise UserError(
            f"--src {src} holds no split such as train or val. Give the directory that holds both, or, to convert "
            f"one folder of classes, the file to write: --out {out_dir / 'train.beton'}."
        )
    outs = {out_dir / f"{split}.beton": folder for split, folder in folders.items()}
    images = {out: val_image if out.stem == "val" else image for out in outs}
    listed: dict[str, Any] = {"classes": classes, "nested": nested, "file_list": file_list}
    how: dict[str, Any] = {"part": part, "workers": workers, "on_bad": on_bad, "progress": progress, "say": say}
    return convert_folders(outs, image=images, **listed, **how)


def _check(image: ImageOptions, workers: int | None, part: tuple[int, int] | None) -> None:
    if not 16 <= image.max_side <= JPEG_MAX_SIDE:
        raise UserError(f"--max-side is {image.max_side}, expected 16 to {JPEG_MAX_SIDE} pixels.")
    if not 1 <= image.quality <= 100:
        raise UserError(f"--quality is {image.quality}, expected 1 (smallest file) to 100 (best image).")
    if image.raw is not None and not 1 <= image.raw <= RAW_MAX_SIDE:
        raise UserError(f"--raw is {image.raw}, expected 1 to {RAW_MAX_SIDE} pixels.")
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}, expected 1 or more. Leave it out for one per core.")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise UserError(f"--shard is {part[0]}/{part[1]}, expected i/n with i from 1 to n.")


def convert_folders(
    folders: dict[Path, Path],
    *,
    image: ImageOptions | Mapping[Path, ImageOptions] = DEFAULT_IMAGE_OPTIONS,
    classes: Path | None = None,
    nested: Nested | None = None,
    file_list: Path | None = None,
    part: tuple[int, int] | None = None,
    workers: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = False,
    say: Say = _silent,
    trust_labels: bool = False,
) -> list[Conversion]:
    """Convert {out: folder}; every error in the folders is found before the first conversion begins.

    See `convert_image_folder`; `image` may hold options for each out. All use the labels of the first folder, the
    training set. A folder with classes that the first does not have is a `UserError`, or keeps its own labels with
    `trust_labels`. Raises `UserError`.
    """
    images = dict.fromkeys(folders, image) if isinstance(image, ImageOptions) else image
    for one in images.values():
        _check(one, workers, part)
    listed = None if file_list is None else read_list(file_list)
    if listed:
        refuse_other_options(listed, classes, nested)
        sources: dict[Path, Source] = {out: listed_source(listed, folder) for out, folder in folders.items()}
        about: Options = {"classes": listed.classes_file}
    else:
        sources = {out: image_folder(folder, classes, nested or "leaf") for out, folder in folders.items()}
        about = {"classes": None if classes is None else str(classes)}
    nested = listed.nested if listed else nested or "leaf"
    if nested != "leaf":  # the key came later than others
        about["nested_classes"] = nested
    how: dict[str, Any] = {"part": part, "workers": workers, "on_bad": on_bad, "progress": progress, "say": say}
    return convert_sources(sources, images, about, **how, trust_labels=trust_labels)


def convert_sources(
    sources: Mapping[Path, Source],
    images: Mapping[Path, ImageOptions],
    about: Options,
    *,
    part: tuple[int, int] | None,
    workers: int | None,
    on_bad: Literal["error", "skip"],
    progress: bool,
    say: Say,
    trust_labels: bool = False,
) -> list[Conversion]:
    """`convert_folders` for sources that are listed already; `about` holds more options for their manifests.

    Raises `UserError`.
    """
    for one in images.values():
        _check(one, workers, part)
    for source in sources.values():
        for remark in source.remarks:
            say(remark)
    conversions, bad = [], []
    for out, source in _with_labels_of_the_first(sources, say, trust_labels=trust_labels).items():
        image = images[out]
        options: Options = {**about, **asdict(image), "on_bad": on_bad}
        if part is not None:
            if isinstance(source, RowSource) and source.in_parts:
                raise UserError(f"--shard {part[0]}/{part[1]}: {source.in_parts}.")
            if len(source.samples) < part[1]:
                raise UserError(
                    f"--shard {part[0]}/{part[1]}: there are only {len(source.samples):,} images in {source.name}."
                )
            whole_list = file_list_sha256(source.samples)
            source, out = replace(source, samples=shard(source.samples, *part)), part_path(out, *part)
        else:
            whole_list = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of odd metadata; only decoding counts
            convert = partial(
                _convert,
                part=part,
                whole_list=whole_list,
                workers=available_cores() if workers is None else workers,
                on_bad=on_bad,
                progress=progress,
                libraries=library_versions(),
            )
            try:
                if isinstance(source, RowSource):
                    options = {**source.options, **options}
                    encode, stat = partial(source.encode, options=image), source.stat if source.can_resume else None
                else:
                    encode = partial(encode_listed, root=Path(source.name), options=image)
                    stat = partial(file_stat, source.name)
                conversions.append(convert(source, out, encode, options, source_stat=stat))
            except BadImagesError as error:  # bad images of the next split go into the same list
                bad.append(error)
    if bad:
        raise joined(bad)
    return conversions


def _with_labels_of_the_first(sources: Mapping[Path, Source], say: Say, *, trust_labels: bool) -> dict[Path, Source]:
    first = next(iter(sources.values()))
    fitting: dict[Path, Source] = {}
    for out, source in sources.items():
        fitted = source.with_classes(first.classes)
        if fitted is None and trust_labels:  # the names are compared again where the sets are opened
            fitting[out] = source
            continue
        if fitted is None:
            lists = differences(first.classes, first.name, source.classes, source.name)
            what = "sets" if isinstance(source, RowSource) else "folders"
            raise UserError(f"The {what} have different classes, so their labels would not agree. {lists}. {MEND}")
        there = set(positions(source.classes, first.classes) or ())
        if missing := [name for label, name in enumerate(first.classes) if label not in there]:
            count = f"{len(missing):,} of the {len(first.classes):,} classes of {first.name}"
            say(f"{source.name} has no image of {count} ({abbreviated(missing)}); its labels are those of {first.name}")
        fitting[out] = fitted
    return fitting


def _convert(
    source: Source,
    out: Path,
    encode: Callable[[Sample], EncodedImage],
    options: Options,
    *,
    part: tuple[int, int] | None = None,
    whole_list: str = "",
    workers: int = 1,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = False,
    page_size: int = PAGE_SIZE,
    source_stat: Callable[[Sample], tuple[int, int]] | None = None,
    libraries: Mapping[str, str] | None = None,
) -> Conversion:
    start = time.perf_counter()
    libraries = dict(libraries or {"numpy": np.__version__})
    # Everything that decides the bytes of finished images. `on_bad` does not; the files are compared one by one.
    deciding = {key: value for key, value in options.items() if key not in ("on_bad", "classes", "nested_classes")}
    rows = source if isinstance(source, RowSource) else None
    origin = [source.name, rows.fingerprint, rows.revision] if rows else [str(Path(source.name).resolve())]
    key = json.dumps([CONVERTER_VERSION, libraries, *origin, page_size, deciding])
    key = hashlib.sha256(key.encode()).hexdigest()
    files = file_list_sha256(source.samples)
    remove_left_of(out)
    if source_stat and (finished := find_finished(out, key, files, source.samples, source_stat, on_bad)):
        return Conversion(out, finished, time.perf_counter() - start, was_finished=True)
    manifest: list[Manifest] = []

    def write_sidecars(written: Written) -> None:
        table = written.table.to_bytes()
        manifest.append(
            Manifest(
                num_samples=written.num_samples,
                classes=source.classes,
                reasons=written.reasons,
                skipped=written.skipped,
                source=source.name,
                options=options,
                libraries=libraries,
                file_bytes=written.file_bytes,
                sha256=written.sha256,
                index_xxh3=written.index_xxh3,
                sample_bytes=written.sample_bytes,
                page_size=page_size,
                file_list_sha256=files,
                whole_list_sha256=whole_list or files,
                source_stat_sha256=written.source_stat_sha256 if source_stat else "",
                resume_key=key if source_stat else "",
                sample_table_sha256=hashlib.sha256(table).hexdigest(),
                shard=part,
                superclasses=source.superclasses,
                repaired=written.repaired,
                empty_classes=tuple(source.classes[label] for label in written.emptied),
                revision=rows.revision if rows else "",
                fingerprint=rows.fingerprint if rows else "",
            )
        )
        write_pending(out, table, manifest[0])

    written = write_beton(
        out,
        source.samples,
        encode,
        workers=workers,
        on_bad=on_bad,
        progress=progress,
        page_size=page_size,
        resume=Resume(key, source_stat) if source_stat else None,
        before_rename=write_sidecars,
    )
    rename_pending(out)
    return Conversion(out, manifest[0], time.perf_counter() - start, written.resumed)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that read, resize and write images; OpenCV, if installed: only resizing needs it.

    Raises `UserError` if libturbojpeg is missing.
    """
    turbojpeg.load()
    opencv = {} if why_missing("cv2") else {"opencv": str(importlib.import_module("cv2").__version__)}
    return {"numpy": np.__version__, "pillow": PIL.__version__, **opencv, "turbojpeg": turbojpeg.identity()}
