"""Folders of images as training data: found by timm's split names, converted once, and again when they change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_prep.convert import DEFAULT_IMAGE_OPTIONS, Conversion, convert_folders
from data_prep.formats.jpeg import LOSSLESS, ImageOptions
from data_prep.formats.sidecars import Manifest
from data_prep.sources.file_list import file_stat
from data_prep.sources.image_folder import SPLIT_NAMES, Nested, image_folder
from data_prep.sources.samples import TRUST
from data_prep.writing.resuming import is_current, is_cut_off
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say
from lowrank_vit.data.sets.made_once import (
    chosen_by_hand,
    has_own_pixels,
    in_the_trainers_words,
    make_once,
    manifest_of,
)

Role = Literal["train", "val"]
FOLDER = ".lowrank_vit"
"""The folder of converted images, inside the folder of images."""
IMAGE_OPTIONS: dict[Role, ImageOptions] = {"train": DEFAULT_IMAGE_OPTIONS, "val": LOSSLESS}
"""How images are converted: for training, small and fast to decode; for validation, with their own pixels."""
_TEST = "test"


def names_of(split: str) -> tuple[str, ...]:
    """The names under which timm looks for a split: its own, then the synonyms."""
    synonyms = next((names for names in SPLIT_NAMES.values() if split in names), ())
    return tuple(dict.fromkeys((split, *synonyms)))


def split_folder(root: Path, split: str, say: Say) -> Path | None:
    """The folder of a split by timm's names; if there is no other validation set, `test` is used, and reported."""
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
    """`place`/NAME.beton of each folder NAME of class folders, converted now unless that is done and up to date.

    A folder's role decides how it is converted: see `IMAGE_OPTIONS`. Options that a person chose, other than the
    converter's defaults, are kept, and so is an order of the classes that is not timm's. `nested`: which folders are
    classes, see `image_folder`; `trust_labels`: see `convert_folders`. `flag` names the data in messages.

    Every image's name, size and time is compared with those that were converted (0.7 s for 100,000 on a local disk).
    Parts, NAME-1-of-2.beton and so on, are used as they are. `is_own`: `place` holds nothing of the user's; elsewhere
    only a conversion of the same folder is replaced. An interrupted conversion is resumed; other processes wait. Raises
    `UserError`.
    """
    asked = [place / _file_name(folder, role) for folder, role in folders]
    outs = {out: folder for out, (folder, _) in zip(asked, folders, strict=True)}
    wanted = {out: IMAGE_OPTIONS[role] for out, (_, role) in zip(asked, folders, strict=True)}

    def convert(stale: Sequence[Path]) -> list[Conversion]:
        images = {out: chosen_by_hand(manifest_of(out)) or wanted[out] for out in stale}
        # Resolved: a relative path in a manifest would mean nothing from another working directory.
        really = {out: outs[out].resolve() for out in stale}
        how: dict[str, Any] = {"nested": nested, "on_bad": on_bad, "trust_labels": trust_labels, "say": say}
        try:
            return convert_folders(really, image=images, progress=True, **how)
        except UserError as error:
            raise _in_the_trainers_words(error, {out: outs[out] for out in stale}, flag) from error

    make_once(
        outs,
        lambda out, manifest: _why_stale(out, manifest, outs[out], wanted[out], nested, flag),
        lambda out: None if is_own else _refuse_foreign(out, outs[out]),
        convert,
        place,
        say,
    )
    return asked


def _file_name(folder: Path, role: Role) -> str:
    """The file's name; a training set that is also scored has a second one, so that scoring does not change it."""
    is_train = role == "val" and folder.name in SPLIT_NAMES["train"]
    return f"{folder.name}.lossless.beton" if is_train else f"{folder.name}.beton"


def _why_stale(out: Path, manifest: Manifest, folder: Path, wanted: ImageOptions, nested: Nested, flag: str) -> str:
    """Why `out` does not match `folder` or the options now; an empty string if it does."""
    if manifest.options.get("classes"):  # chosen by hand, and the file that lists them may be gone
        return ""
    try:
        source = image_folder(folder, nested=nested)
    except UserError as error:
        raise _in_the_trainers_words(error, {out: folder}, flag) from error
    fitted = source.with_classes(manifest.classes)  # another order of the classes is fine
    if fitted is None:
        return "again, since the classes have changed"
    if not is_current(out, manifest, fitted.samples, partial(file_stat, source.name)):
        return "again, since the images have changed"
    if wanted.lossless and not has_own_pixels(manifest):
        return "again, since scores are of the images' own pixels"
    return ""


def _refuse_foreign(out: Path, folder: Path) -> None:
    """Raise `UserError` if `out` exists and was not converted from `folder`."""
    if not out.exists() or is_cut_off(out):  # the converter finishes it
        return
    manifest = manifest_of(out)
    if manifest is None or Path(manifest.source).resolve() != folder.resolve():
        origin = f"made from {manifest.source}" if manifest else "not a finished conversion"
        raise UserError(
            f"--beton-dir {out.parent}: {out.name} exists already, and is {origin}, not from {folder}. "
            "Give another --beton-dir, or remove that file."
        )


def _in_the_trainers_words(error: UserError, outs: dict[Path, Path], flag: str) -> UserError:
    """The converter's message without its own flags, and with the command that has them."""

    def command(text: str) -> str:
        if not any(one in text for one in ("--classes ", "--classes.", "--max-side", "--quality", "--workers")):
            return ""
        src, place = os.path.commonpath([folder.parent for folder in outs.values()]), "OTHER"
        return f" Those are flags of `python -m data_prep imagefolder --src {src} --out {place}`; then {flag} {place}."

    return in_the_trainers_words(error, TRUST, command)
