"""The commands of `python -m data_prep` for folders and archives: their options, and the summaries they print."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.filesize import decimal as size_in_words

from data_prep.convert import DEFAULT_IMAGE_OPTIONS as DEFAULTS
from data_prep.convert import (
    Conversion,
    convert_cifar100,
    convert_digits,
    convert_image_folder,
    convert_splits,
)
from data_prep.formats.beton import file_or_parts, parse_shard
from data_prep.formats.jpeg import LOSSLESS, ImageOptions
from data_prep.formats.sidecars import emptied_line, manifest_path
from data_prep.info import info_table, plot_info
from data_prep.sources.file_list import write_list
from data_prep.sources.image_folder import SPLIT_NAMES, Nested
from data_prep.verify import verify
from data_prep.writing.workers import counts_in_words
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.program import CLASSES, find_bundled
from lowrank_vit.common.resources import available_cores
from lowrank_vit.common.terminal import output_is_in_files, say

_ROLES = {
    **dict.fromkeys((*SPLIT_NAMES["val"], "test", "testing", "dev", "holdout", "heldout"), "val"),
    **dict.fromkeys(SPLIT_NAMES["train"], "train"),
}
"""The split that a word in a set's name stands for."""


@dataclass(frozen=True)
class Storing:
    """How images are stored."""

    max_side: Annotated[int | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="(default: 500)")] = None
    """Longest side in pixels, 16 to 65500; larger images are shrunk to it."""
    quality: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 90)")] = None
    """JPEG quality of converted images, 1 to 100."""
    raw: Annotated[int | None, tyro.conf.arg(metavar="SIZE", help_behavior_hint="(default: store JPEGs)")] = None
    """Store uncompressed pixels instead: short side resized to SIZE, centre crop to a square."""
    baseline: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Rewrite progressive JPEGs as baseline JPEGs, which hardware decoders need; pixels do not change."""
    lossless: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep the pixels and size of every image as far as the format allows: JPEGs are copied byte for byte, other
    formats stored uncompressed. Validation sets are stored like this unless --lossy-val is given."""
    lossy_val: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Convert validation sets like training sets."""
    verify: Literal["decode", "header"] = "decode"
    """decode: decode every image completely, so that damage shows now. header: only parse the JPEGs that are stored as
    they are."""

    def of_sets(self) -> tuple[ImageOptions, ImageOptions]:
        """The options for a training set and for a validation set. Raises `UserError` if they contradict each other."""
        asked = (self.max_side, self.quality, self.raw) != (None, None, None)
        if self.lossless and (asked or self.lossy_val):
            raise UserError(
                "--lossless keeps size and pixels, so leave out --max-side, --quality, --raw and --lossy-val."
            )
        kept = replace(LOSSLESS, verify=self.verify, baseline=self.baseline)
        image = ImageOptions(
            DEFAULTS.max_side if self.max_side is None else self.max_side,
            DEFAULTS.quality if self.quality is None else self.quality,
            self.verify,
            self.baseline,
            self.raw,
        )
        return kept if self.lossless else image, image if self.lossy_val else kept

    def of_one(self, role: Literal["train", "val", ""]) -> tuple[ImageOptions, bool]:
        """The options for one file, and whether it is stored as a training set although no name says that it is one."""
        image, val_image = self.of_sets()
        asked = (self.max_side, self.quality, self.raw) != (None, None, None)
        is_kept = self.lossless or (role == "val" and not asked and not self.lossy_val)
        return val_image if is_kept else image, not is_kept and role != "train" and not self.lossy_val


@dataclass(frozen=True)
class Doing:
    """How the work is done."""

    workers: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")] = None
    """Number of threads."""
    shard: Annotated[str | None, tyro.conf.arg(metavar="I/N", help_behavior_hint="(default: everything)")] = None
    """Convert only part I of N, to FILE-I-of-N.beton, so that N machines can share the work."""
    on_bad: Literal["error", "skip"] = "error"
    """What to do about damaged images. error: check all images, list the bad ones and write no file; once they are
    mended, the same command continues. skip: leave them out and list them in the manifest."""

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the converters. Raises `UserError` for a malformed --shard."""
        return {
            "part": None if self.shard is None else parse_shard(self.shard),
            "workers": self.workers,
            "on_bad": self.on_bad,
            "progress": True,
            "say": say,
        }


def digits_command(out: Annotated[Path, tyro.conf.arg(metavar="DIR")]) -> None:
    """Convert scikit-learn's 1,797 handwritten digits (8x8); no download.

    - Writes train.beton and val.beton (four to one) into DIR.
    - A manifest, FILE.beton.json, goes beside each.
    - Files that are there already are replaced, each in one step.

    Args:
        out: Directory to write into; made if it is missing.
    """
    tell(convert_digits(out))


def cifar100_command(
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    src: Annotated[Path | None, tyro.conf.arg(metavar="ARCHIVE_OR_DIR", help_behavior_hint="(default: none)")] = None,
    download: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Convert CIFAR-100 (60,000 images, 32x32) from its official archive.

    - Writes train.beton and val.beton (five to one), raw pixels with fine labels, into DIR.
    - The manifests hold the class names and the coarse classes.

    Args:
        out: Directory to write into; made if it is missing.
        src: cifar-100-python.tar.gz or cifar-100-binary.tar.gz, packed or unpacked.
        download: Fetch the archive (169 MB) into DIR first, through torchvision, and check it.
    """
    if (src is None) != download:
        raise UserError("Give one of --src ARCHIVE_OR_DIR and --download.")
    tell(convert_cifar100(src, out, progress=True))


def imagefolder_command(
    src: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.beton|DIR")],
    storing: tyro.conf.OmitArgPrefixes[Storing],
    doing: tyro.conf.OmitArgPrefixes[Doing],
    classes: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: all)")] = None,
    nested_classes: Annotated[
        Nested | None, tyro.conf.arg(metavar="{leaf,merge,top}", help_behavior_hint="(default: leaf)")
    ] = None,
    file_list: Annotated[
        Path | None, tyro.conf.arg(metavar="LIST", help_behavior_hint="(default: list the folders now)")
    ] = None,
) -> None:
    """Convert a directory with one sub-folder of images for each class.

    - With --out DIR: both splits, --src DIR/train and DIR/val (or timm's synonyms), to train.beton and val.beton.
    - An RGB JPEG, upright and within --max-side, is stored byte for byte.
    - Every other image is converted to one, once.
    - Validation sets keep every image's own pixels and size, so that scores do not depend on the conversion.
    - Validation sets are val.beton in DIR, and a FILE.beton with a word such as val, test, dev or holdout in its name.
    - If the name of FILE.beton has no such word and not train, the name of --src decides.
    - --max-side, --quality and --raw apply to the training set, or to the one FILE.beton whatever its name.
    - The output depends neither on the number of workers nor on interruptions.
    - The same command resumes an interrupted conversion, and does nothing if all is finished.
    - An existing FILE.beton is replaced in one step, at the very end.

    Args:
        src: Directory with one sub-folder for each class. Labels are timm's: names in lower case, numbers as numbers.
        out: File to write, or directory for both splits. FILE.beton.json and FILE.beton.samples go beside it.
        classes: Text file with one folder name a line: convert only these classes. imagenet100_classes.txt ships with
            the program.
        nested_classes: Which folders are classes: each one that holds images, as in timm ("leaf"); the same, those of
            one name together ("merge"); or those directly in DIR with all below them ("top").
        file_list: What `data_prep list` wrote of --src: read LIST instead of the folders.
        storing: How images are stored.
        doing: How the work is done.
    """
    options: dict[str, Any] = {
        **doing.options(),
        "classes": classes and find_bundled(classes, CLASSES),
        "nested": nested_classes,
        "file_list": file_list,
    }
    if out.suffix == ".beton":
        image, is_unclear = storing.of_one(role_by_name(src, out))
        conversions = [convert_image_folder(src, out, image=image, **options)]
    else:
        is_unclear = False
        image, val_image = storing.of_sets()
        conversions = convert_splits(src, out, image=image, val_image=val_image, **options)
    tell(conversions)
    if is_unclear:
        say_unclear(out)


def role_by_name(src: Path, out: Path) -> Literal["train", "val", ""]:
    """The split that a word in the name of a file, else of its folder, stands for: val2017, imagenet-val, cars_testset.

    An empty string if there is no such word. If words disagree (train_val) the set counts as a training set.
    """
    roles = next(filter(None, map(_roles_in, (out.stem, src.resolve().name))), set[str]())
    return "train" if "train" in roles else "val" if roles else ""


def _roles_in(name: str) -> set[str]:
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return {_ROLES[word] for word in (word.removesuffix("set") for word in words) if word in _ROLES}


def list_command(
    src: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]],
    out: Annotated[Path, tyro.conf.arg(metavar="LIST")],
    classes: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: all)")] = None,
    nested_classes: Nested = "leaf",
) -> None:
    """List a directory of class folders once, for `imagefolder --file-list` in many processes.

    - DIR holds one sub-folder of images for each class, or the folders of both splits.
    - LIST has every image's label, name and size. Images are not read.
    - Each process of `imagefolder --shard I/N --file-list LIST` reads its own part of LIST, and no folder.
    - Images added to DIR later are not converted. One that is removed or changes its size ends a conversion.

    Args:
        src: The directory. Labels are as `imagefolder` gives them.
        out: File to write, outside DIR.
        classes: As for imagefolder; stored in LIST.
        nested_classes: As for imagefolder; stored in LIST.
    """
    begun = time.monotonic()
    chosen = classes and find_bundled(classes, CLASSES)
    for folder in write_list(src, out, chosen, nested_classes, progress=True):
        for remark in folder.remarks:
            say(remark)
        say(f"listed {len(folder):,} images of {len(folder.classes):,} classes in {folder.source}")
    say(f"wrote {out}, {size_in_words(out.stat().st_size)}, in {time.monotonic() - begun:.1f} s")


def verify_command(
    beton: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE.beton")]],
    full: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    workers: Annotated[
        int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")
    ] = None,
) -> None:
    """Check a .beton against its sidecars: any changed byte is found, damaged samples are named.

    Args:
        beton: File to check, or set of parts.
        full: Decode every sample too.
        workers: Threads for --full.
    """
    for part in file_or_parts(beton):
        verified = verify(part, full=full, workers=available_cores() if workers is None else workers, progress=True)
        what = "tables, sidecars, SHA-256" + (" and every decoded sample" if verified.decoded else "")
        size = f"{verified.num_samples:,} samples, {size_in_words(verified.file_bytes)}"
        say(f"{part} is as it was written: {size} ({what})" + (f". {verified.note}" if verified.note else ""))


def info_command(
    beton: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE.beton")]],
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png", help_behavior_hint="(default: none)")] = None,
) -> None:
    """Show what a .beton holds: samples, classes, sizes, origin.

    Args:
        beton: File to describe, or set of parts.
        plot: Draw histograms and a contact sheet of random samples, too.
    """
    parts = file_or_parts(beton)
    for part in parts:
        Console().print(info_table(part))
    if plot is not None:
        for n, part in enumerate(parts, 1):
            path = plot if len(parts) == 1 else plot.with_name(f"{plot.stem}-{n}{plot.suffix}")
            plot_info(part, path)
            say(f"wrote {path}")


NAMES_SHOWN = 10
"""Most names of each kind in a summary; the manifest has all of them."""


def tell(conversions: Iterable[Conversion]) -> None:
    """Print a summary of each conversion as soon as it is finished."""
    output_is_in_files()
    for conversion in conversions:
        say(summary(conversion))


def summary(conversion: Conversion) -> str:
    """A short paragraph: what was written, how many, how long, where."""
    manifest, seconds = conversion.manifest, conversion.seconds
    if conversion.was_finished:
        lines = [f"{conversion.beton} was finished by an earlier run, and its source has not changed: nothing to do"]
    else:
        lines = [
            f"wrote {conversion.beton}",
            f"  {manifest.num_samples:,} images, {len(manifest.classes):,} classes, "
            f"{size_in_words(manifest.file_bytes)} in {seconds:.1f} s ({manifest.num_samples / seconds:,.0f} img/s)",
            f"  stored{' without loss' * (manifest.options.get('lossless') is True)} as: "
            + counts_in_words(manifest.reasons),
        ]
    if conversion.resumed:
        lines.append(f"  of these, {conversion.resumed:,} were finished by an interrupted run")
    where = manifest_path(conversion.beton)
    if manifest.repaired:
        lines.append(f"  repaired without loss: {len(manifest.repaired):,}, listed in {where}")
        lines += _shortened([f"    {image.name}: {', '.join(image.repairs)}" for image in manifest.repaired])
    if manifest.skipped:
        lines.append(f"  left out: {len(manifest.skipped):,} bad, listed in {where}")
    if emptied := emptied_line(manifest):
        lines.append(f"  {emptied}")
    return "\n".join(lines)


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - NAMES_SHOWN
    return [*lines[:NAMES_SHOWN], f"    ... and {more:,} more"] if more > 0 else lines


def say_unclear(out: Path) -> None:
    """Say that a set was stored as a training set, and which flag a validation set needs."""
    say(f"{out.name} was converted as a training set; if it is for validation, --lossless keeps every pixel")
