"""The list of images that cannot be converted: on the terminal, and if it is long in a file beside the output."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data_prep.formats.sidecars import Skipped
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import write_whole
from lowrank_vit.common.terminal import one_line

BAD_IMAGES_SHOWN, ALL_BAD_SHOWN = 40, 10
"""A longer list goes into a file beside the output. If all images are bad, a few names say as much as all."""


class BadImagesError(UserError):
    """Images that keep a file from being written; all of them are listed."""

    can_skip = True
    """Whether `on_bad="skip"` would help."""

    def __init__(self, found: str, advice: str = "") -> None:
        super().__init__("\n".join(filter(None, (found, advice))))
        self.found, self.advice = found, advice


def joined(errors: Sequence[BadImagesError]) -> BadImagesError:
    """One error with the lists of all; the same advice appears once."""
    said: list[str] = []
    for number, one in enumerate(errors):
        is_said_below = any(other.advice == one.advice for other in errors[number + 1 :])
        said.append(one.found if is_said_below else str(one))
    error = BadImagesError("\n".join(said))
    error.can_skip = all(one.can_skip for one in errors)
    for note in (note for one in errors for note in getattr(one, "__notes__", [])):
        error.add_note(note)
    return error


def bad_list_path(out: Path) -> Path:
    """The file for a long list of bad images: FILE.beton.bad.txt."""
    return out.with_name(out.name + ".bad.txt")


def bad_images_error(out: Path, bad: list[Skipped], unreadable: int, total: int) -> BadImagesError:
    """The error when `bad` of `total` images keep `out` from being written; `unreadable` of them cannot be read."""
    is_all = len(bad) == total
    lines = [
        f"  {one_line(image.name)}: {one_line(image.reason)}"
        for image in bad[: ALL_BAD_SHOWN if is_all else BAD_IMAGES_SHOWN]
    ]
    if is_all and len(bad) > 1 and len({image.reason for image in bad}) == 1:
        lines = [f"  all, from {one_line(bad[0].name)} to {one_line(bad[-1].name)}: {one_line(bad[0].reason)}"]
    elif len(bad) > len(lines):
        more = f"  ... and {len(bad) - len(lines):,} more"
        where = "" if is_all else _whole_list(out, bad)
        lines.append(more + where)
    what = f"{len(bad):,} of {total:,} images cannot be converted, so {out} was not written:"
    advice = "Mend or remove them, then give the same command again, or leave them out with --on-bad skip."
    if unreadable:
        advice = "Check the unreadable files: broken links, permissions, the disk. They cannot be skipped."
    if is_all:
        advice = "Check the source."
    error = BadImagesError("\n".join([what, *lines]), advice)
    error.can_skip = not unreadable and not is_all
    return error


def _whole_list(out: Path, bad: list[Skipped]) -> str:
    """Write them to `bad_list_path` and return words that say so; empty if it cannot be written."""
    path = bad_list_path(out)
    with suppress(OSError):
        write_whole(path, "".join(f"{one_line(image.name)}\t{one_line(image.reason)}\n" for image in bad))
        return f"; all of them, one a line with the reason after a tab: {path}"
    return ""
