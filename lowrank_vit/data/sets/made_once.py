"""Convert a set for training: once, by one process, and again when its source has changed; report it in few lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_prep.convert import DEFAULT_IMAGE_OPTIONS, MEND, Conversion
from data_prep.formats.beton import find_parts
from data_prep.formats.jpeg import ImageOptions
from data_prep.formats.sidecars import Manifest, doubt_line, emptied_line, manifest_path, read_manifest
from data_prep.writing.resuming import is_whole
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.common.locks import Say, one_process_in

SLOW_CHECK_S = 2.0
"""A check of the source that took longer is worth a line."""


def make_once(
    sources: Mapping[Path, object],
    why_stale: Callable[[Path, Manifest], str],
    refuse_foreign: Callable[[Path], None],
    convert: Callable[[Sequence[Path]], list[Conversion]],
    place: Path,
    say: Say,
) -> None:
    """Convert the files in `place` that are stale, and print remarks on all of them.

    `sources`: the source of each file, for messages. `why_stale`: returns a phrase, empty for a file that is up to
    date; it is called for files that exist and are whole. `refuse_foreign` raises `UserError` if a file of somebody
    else would be replaced. Other processes wait for the one that converts. Raises `UserError`.
    """
    seen = {out: _identity(out) for out in sources}
    begun = time.monotonic()
    stale = {out: why for out in sources if (why := _why_stale(out, why_stale))}
    if (seconds := time.monotonic() - begun) > SLOW_CHECK_S:
        say(f"compared the images in {_names(sources.values())} with {place} in {seconds:.0f} s")
    for out in stale:
        refuse_foreign(out)
    if stale:
        with one_process_in(place, say, "Give a folder that can be written with --beton-dir."):
            # If another process has converted a file meanwhile, that one is as new as ours would be.
            stale = {out: why for out, why in stale.items() if _identity(out) == seen[out]}
            if stale:
                why = ", ".join(dict.fromkeys(stale.values()))
                say(f"converting {_names(sources[out] for out in stale)} into {place} ({why})")
                begun = time.monotonic()
                _tell(convert(list(stale)), say)
                say(f"  converted in {time.monotonic() - begun:.1f} s")
    for out in sources:
        manifest = manifest_of(out)
        if manifest and manifest.skipped:
            bad = "1 bad image" if len(manifest.skipped) == 1 else f"{len(manifest.skipped):,} bad images"
            say(f"{out.name} leaves out {bad}, listed in {manifest_path(out)}")
        for line in filter(None, (emptied_line(manifest), doubt_line(manifest.reasons)) if manifest else ()):
            say(f"{out.name}: {line}")


def _why_stale(out: Path, why_stale: Callable[[Path, Manifest], str]) -> str:
    if not out.exists() and find_parts(out):
        return ""
    manifest = manifest_of(out)
    if manifest is None:
        return "once"
    return why_stale(out, manifest) if is_whole(out, manifest) else "again, since the converted file was damaged"


def _tell(conversions: Sequence[Conversion], say: Say) -> None:
    for conversion in conversions:
        gone_on = f", {conversion.resumed:,} of them by an interrupted run" if conversion.resumed else ""
        manifest = conversion.manifest
        where = f"listed in {manifest_path(conversion.beton)}"
        mended = f", {len(manifest.repaired):,} JPEGs repaired without loss, {where}" if manifest.repaired else ""
        say(f"  {conversion.beton.name}: {manifest.num_samples:,} images{gone_on}{mended}")


def manifest_of(out: Path) -> Manifest | None:
    """The manifest of a finished file; None if the file or a readable manifest is missing."""
    with suppress(BetonError):
        return read_manifest(out) if out.exists() else None
    return None


def chosen_by_hand(manifest: Manifest | None) -> ImageOptions | None:
    """The options that a set was converted with, None for the defaults: a person's choice outlives changes."""
    if manifest is None:
        return None
    known: dict[str, Any] = {
        f.name: manifest.options[f.name] for f in fields(ImageOptions) if f.name in manifest.options
    }
    options = ImageOptions(**known)
    return None if options == DEFAULT_IMAGE_OPTIONS else options


def has_own_pixels(manifest: Manifest) -> bool:
    """Whether images are stored with their own pixels, or with options that somebody chose by hand."""
    return bool(chosen_by_hand(manifest)) or not set(manifest.reasons) - {"passthrough", "repaired"}


def _identity(out: Path) -> tuple[int, int] | None:
    """A value that changes with every conversion."""
    try:
        stat = manifest_path(out).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _names(sources: Any) -> str:
    return " and ".join(map(str, sources))


def in_the_trainers_words(error: UserError, trust: str, more: Callable[[str], str] = lambda text: "") -> UserError:
    """The converter's message without its own flags; `more` returns words to append; `trust` is put after `MEND`."""
    text = str(error).replace("--src ", "").replace("another --out", "another --beton-dir")
    text = text.replace("--on-bad skip", "--on-bad-sample skip").replace(MEND, f"{MEND} {trust}")
    message = UserError(text + more(text))
    for note in getattr(error, "__notes__", []):
        message.add_note(note)
    return message
