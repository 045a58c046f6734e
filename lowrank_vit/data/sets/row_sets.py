"""Hugging Face data sets and WebDataset shards as training data: converted once, and again when they change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import xxhash

from data_prep.convert import Conversion
from data_prep.convert_rows import RowData, convert_rows
from data_prep.formats.sidecars import Manifest
from data_prep.sources.image_folder import SPLIT_NAMES
from data_prep.sources.samples import TRUST
from data_prep.writing.resuming import is_cut_off
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say
from lowrank_vit.data.sets.image_dirs import FOLDER, IMAGE_OPTIONS, Role
from lowrank_vit.data.sets.made_once import (
    chosen_by_hand,
    has_own_pixels,
    in_the_trainers_words,
    make_once,
    manifest_of,
)

_LONGEST = 120


def converted_rows(
    data: RowData,
    splits: Sequence[tuple[str, Role, str]],
    beton_dir: Path | None,
    default_dir: Path,
    say: Say,
    *,
    on_bad: Literal["error", "skip"],
    trust_labels: bool = False,
) -> list[Path]:
    """The `.beton` of each of `splits` (name, role, flag that names it), converted now if need be.

    They are in `beton_dir`, else in the folder of the data (`RowData.local`), else below `default_dir`. They are
    converted again if names, sizes or times of the data's files have changed, or if other columns or classes are asked
    for. The hub is not asked for a newer revision. Raises `UserError`.
    """
    place = beton_dir or _place(data, default_dir)
    asked: dict[Path, tuple[str, Role, str]] = {
        place / _file_name(split, role): (split, role, flag) for split, role, flag in splits
    }

    def convert(stale: Sequence[Path]) -> list[Conversion]:
        images = {out: chosen_by_hand(manifest_of(out)) or IMAGE_OPTIONS[asked[out][1]] for out in stale}
        wanted = {out: (asked[out][0], asked[out][2]) for out in stale}
        try:
            return convert_rows(data, wanted, images, on_bad=on_bad, progress=True, say=say, trust_labels=trust_labels)
        except UserError as error:
            raise in_the_trainers_words(error, TRUST) from error

    make_once(
        {out: f"{data.title}:{split}" for out, (split, _, _) in asked.items()},
        lambda out, manifest: _why_stale(out, manifest, data, *asked[out], say),
        lambda out: _refuse_foreign(out, data) if beton_dir else None,
        convert,
        place,
        say,
    )
    return [place / _file_name(split, role) for split, role, _ in splits]


def _place(data: RowData, default_dir: Path) -> Path:
    local = data.local
    if data.kind == "wds" or (local and local.is_dir()):
        assert local
        return local / FOLDER
    folder = local.parent if local else data.root or default_dir
    return folder / FOLDER / _plain(local.stem if local else data.name)


def _file_name(split: str, role: Role) -> str:
    """A training set that is also scored is converted twice, so that scoring it does not change it."""
    is_train = role == "val" and split.partition("[")[0] in SPLIT_NAMES["train"]
    return f"{_plain(split)}.lossless.beton" if is_train else f"{_plain(split)}.beton"


def _plain(name: str) -> str:
    """A file name; if characters have to be replaced, a hash tells it from similar names."""
    name = name.partition("|")[0]
    short = re.sub(r"[^\w.,-]+", "-", re.sub(r"\.tar\b", "", name)).strip("-.")[:_LONGEST]
    return short if short == name else f"{short}-{xxhash.xxh3_64_hexdigest(name.encode())[:6]}"


def _why_stale(out: Path, manifest: Manifest, data: RowData, split: str, role: Role, flag: str, say: Say) -> str:
    """Why `out` does not match the data or the options now; an empty string if it does."""
    if not _is_of(manifest.source, data):
        return "again, since it was made from other data"
    options = data.columns.options()
    if {name: manifest.options.get(name) for name in ("input_key", "target_key", "class_map")} != {
        name: options.get(name) for name in ("input_key", "target_key", "class_map")
    }:
        return "again, since other columns or classes are asked for"
    try:
        now = data.fingerprint(split, flag)
    except UserError as error:
        say(f"{out} is used as it is: {error}")
        return ""
    if now and now != manifest.fingerprint:
        return "again, since the data have changed"
    if not now:
        revision = f"revision {manifest.revision[:12]} of " if manifest.revision else ""
        say(f"using {out}: {revision}{data.title}, as it was converted; remove that file to convert it again")
    is_lossy = IMAGE_OPTIONS[role].lossless and not has_own_pixels(manifest)
    return "again, since scores are of the images' own pixels" if is_lossy else ""


def _is_of(source: str, data: RowData) -> bool:
    """Whether a manifest's source is a split of the data."""
    names = {data.title, data.title.replace("hfids/", "hfds/"), data.title.replace("hfds/", "hfids/")}
    return any(source.startswith((f"{name}:", f"{name}/")) for name in names)


def _refuse_foreign(out: Path, data: RowData) -> None:
    """Raise `UserError` if `out` is there and was not converted from the data."""
    if not out.exists() or is_cut_off(out):  # the converter finishes it
        return
    manifest = manifest_of(out)
    if manifest is None or not _is_of(manifest.source, data):
        origin = f"made from {manifest.source}" if manifest else "not a finished conversion"
        raise UserError(
            f"--beton-dir {out.parent}: {out.name} exists already, and is {origin}, not from {data.title}. "
            "Give another --beton-dir, or remove that file."
        )
