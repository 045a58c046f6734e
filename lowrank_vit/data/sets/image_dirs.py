"""Folders of images as training data: found by timm's names of splits, converted once, and again when they change."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_prep.convert import DEFAULT_IMAGE_OPTIONS, MEND, convert_folders, file_stat
from data_prep.formats.beton import find_parts
from data_prep.formats.jpeg import LOSSLESS, ImageOptions
from data_prep.formats.sidecars import Manifest, doubt_line, emptied_line, manifest_path, read_manifest
from data_prep.sources.image_folder import SPLIT_NAMES, Nested, image_folder
from data_prep.sources.samples import TRUST
from data_prep.writing.resuming import is_current, is_cut_off, is_whole
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.common.locks import Say, one_process_in

Role = Literal["train", "val"]
FOLDER = ".lowrank_vit"
"""Converted images lie below their folder in this one."""
IMAGE_OPTIONS: dict[Role, ImageOptions] = {"train": DEFAULT_IMAGE_OPTIONS, "val": LOSSLESS}
"""How images are converted: for training small and fast to decode, for scores with their own pixels."""
_TEST = "test"
SLOW_CHECK_S = 2.0
"""A check of the images that took longer is worth a line."""


def names_of(split: str) -> tuple[str, ...]:
    """The names under which timm looks for a split: its own, then the synonyms."""
    synonyms = next((names for names in SPLIT_NAMES.values() if split in names), ())
    return tuple(dict.fromkeys((split, *synonyms)))


def split_folder(root: Path, split: str, say: Say) -> Path | None:
    """The folder of a split by timm's names; where no other validation set is there, `test` is taken, and said."""
    found = next((root / name for name in names_of(split) if (root / name).is_dir()), None)
    if found is None and split in SPLIT_NAMES["val"] and (root / _TEST).is_dir():
        say(f"{root} has no folder named {split}: validating on {_TEST}/ (--val-split chooses)")
        return root / _TEST
    return found


def converted(
    folders: Sequence[tuple[Path, Role]],
    place: Path,
    say: Say,
    *,
    is_own: bool,
    on_bad: Literal["error", "skip"],
    nested: Nested = "leaf",
    trust_labels: bool = False,
    flag: str = "--data-dir",
) -> list[Path]:
    """`place`/NAME.beton of each folder NAME of class folders, converted now unless that is done and still true.

    A role says what the folder is for, and so how it is converted: see `IMAGE_OPTIONS`. Options that a person chose,
    other than the converter's defaults, are kept, and so is an order of the classes that is not timm's. `nested`: which
    folders are classes, see `image_folder`; `trust_labels`: see `convert_folders`. `flag` names data in messages.

    Every image's name, size and time is compared with those that were converted (0.7 s for 100,000 on a local disk).
    Parts, NAME-1-of-2.beton and so on, are taken as they are. `is_own`: nothing of the user's lies in `place`;
    elsewhere only a conversion of the same folder is replaced. An interrupted conversion is gone on with; other
    processes wait. Raises `UserError`.
    """
    asked = [place / _file_name(folder, role) for folder, role in folders]
    outs = {out: folder for out, (folder, _) in zip(asked, folders, strict=True)}
    wanted = {out: IMAGE_OPTIONS[role] for out, (_, role) in zip(asked, folders, strict=True)}
    seen = {out: _identity(out) for out in outs}
    begun = time.monotonic()
    stale = {out: why for out, folder in outs.items() if (why := _why_stale(out, folder, wanted[out], nested, flag))}
    if (seconds := time.monotonic() - begun) > SLOW_CHECK_S:
        say(f"compared the images in {_names(outs.values())} with {place} in {seconds:.0f} s")
    for out in stale:
        if not is_own:
            _refuse_foreign(out, outs[out])
    if stale:
        with one_process_in(place, say, "Give a folder that can be written with --beton-dir."):
            # Where another process has converted meanwhile, that is as new as what we would do.
            stale = {out: why for out, why in stale.items() if _identity(out) == seen[out]}
            if stale:
                why = ", ".join(dict.fromkeys(stale.values()))
                _convert({out: outs[out] for out in stale}, wanted, why, say, on_bad, nested, trust_labels, flag)
    for out in outs:
        manifest = manifest_of(out)
        if manifest and manifest.skipped:
            bad = "1 bad image" if len(manifest.skipped) == 1 else f"{len(manifest.skipped):,} bad images"
            say(f"{out.name} leaves out {bad}, listed in {manifest_path(out)}")
        for line in filter(None, (emptied_line(manifest), doubt_line(manifest)) if manifest else ()):
            say(f"{out.name}: {line}")
    return asked


def _file_name(folder: Path, role: Role) -> str:
    """A training set that is also scored is converted twice, so that scoring it does not change it."""
    is_train = role == "val" and folder.name in SPLIT_NAMES["train"]
    return f"{folder.name}.lossless.beton" if is_train else f"{folder.name}.beton"


def _convert(
    outs: dict[Path, Path],
    wanted: Mapping[Path, ImageOptions],
    why: str,
    say: Say,
    on_bad: Literal["error", "skip"],
    nested: Nested,
    trust_labels: bool,
    flag: str,
) -> None:
    image = {out: _chosen_by_hand(manifest_of(out)) or wanted[out] for out in outs}
    place = next(iter(outs)).parent
    say(f"converting {_names(outs.values())} into {place} ({why})")
    begun = time.monotonic()
    try:
        # Where they really are: a manifest's relative path would mean nothing from another working directory.
        options: dict[str, Any] = {"nested": nested, "on_bad": on_bad, "trust_labels": trust_labels}
        really = {out: folder.resolve() for out, folder in outs.items()}
        done = convert_folders(really, image=image, **options, progress=True, say=say)
    except UserError as error:
        raise _in_the_trainers_words(error, outs, flag) from error
    for conversion in done:
        gone_on = f", {conversion.resumed:,} of them by an interrupted run" if conversion.resumed else ""
        manifest = conversion.manifest
        where = f"listed in {manifest_path(conversion.beton)}"
        mended = f", {len(manifest.repaired):,} JPEGs repaired without loss, {where}" if manifest.repaired else ""
        say(f"  {conversion.beton.name}: {manifest.num_samples:,} images{gone_on}{mended}")
    say(f"  converted in {time.monotonic() - begun:.1f} s")


def _chosen_by_hand(manifest: Manifest | None) -> ImageOptions | None:
    """The options by which a set was converted, unless they are the defaults: a person's choice outlives changes."""
    if manifest is None:
        return None
    known: dict[str, Any] = {
        f.name: manifest.options[f.name] for f in fields(ImageOptions) if f.name in manifest.options
    }
    options = ImageOptions(**known)
    return None if options == DEFAULT_IMAGE_OPTIONS else options


def _why_stale(out: Path, folder: Path, wanted: ImageOptions, nested: Nested, flag: str) -> str:
    """Why `out` is not what `folder` holds now, or not as it is wanted; an empty string if it is."""
    if not out.exists() and find_parts(out):
        return ""
    manifest = manifest_of(out)
    if manifest is None:
        return "once"
    if not is_whole(out, manifest):
        return "again, since the converted file was damaged"
    if manifest.options.get("classes"):  # chosen by hand, and the list of them may be gone
        return ""
    try:
        source = image_folder(folder, nested=nested)
    except UserError as error:
        raise _in_the_trainers_words(error, {out: folder}, flag) from error
    fitted = source.with_classes(manifest.classes)  # in another order than a new set's they mean the same
    if fitted is None:
        return "again, since the classes have changed"
    if not is_current(out, manifest, fitted.samples, partial(file_stat, source.name)):
        return "again, since the images have changed"
    if wanted.lossless and not _chosen_by_hand(manifest) and set(manifest.reasons) - {"passthrough", "repaired"}:
        return "again, since scores are of the images' own pixels"
    return ""


def manifest_of(out: Path) -> Manifest | None:
    """The manifest of a finished file; None where the file or a readable manifest is missing."""
    with suppress(BetonError):
        return read_manifest(out) if out.exists() else None
    return None


def _identity(out: Path) -> tuple[int, int] | None:
    """Changes with every conversion."""
    try:
        stat = manifest_path(out).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _refuse_foreign(out: Path, folder: Path) -> None:
    """Raise `UserError` if `out` is there and was not converted from `folder`."""
    if not out.exists() or is_cut_off(out):  # which the converter ends
        return
    manifest = manifest_of(out)
    if manifest is None or Path(manifest.source).resolve() != folder.resolve():
        origin = f"made from {manifest.source}" if manifest else "not a finished conversion"
        raise UserError(
            f"--beton-dir {out.parent}: {out.name} is there already, and is {origin}, not from {folder}. "
            "Give another --beton-dir, or remove that file."
        )


def _names(folders: Iterable[Path]) -> str:
    return " and ".join(map(str, folders))


def _in_the_trainers_words(error: UserError, outs: dict[Path, Path], flag: str) -> UserError:
    """The converter's message without its own flags, but with the command that has them."""
    text = str(error).replace("--src ", "").replace("another --out", "another --beton-dir")
    text = text.replace("--on-bad skip", "--on-bad-sample skip").replace(MEND, f"{MEND} {TRUST}")
    if any(one in text for one in ("--classes ", "--classes.", "--max-side", "--quality", "--workers")):
        src, place = os.path.commonpath([folder.parent for folder in outs.values()]), "OTHER"
        text += f" Those are flags of `python -m data_prep imagefolder --src {src} --out {place}`; then {flag} {place}."
    message = UserError(text)
    for note in getattr(error, "__notes__", []):
        message.add_note(note)
    return message
