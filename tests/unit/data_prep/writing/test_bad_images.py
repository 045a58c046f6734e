"""Lists of bad images: what is the same for all is said once."""

from __future__ import annotations

from pathlib import Path

from data_prep.formats.sidecars import Skipped
from data_prep.writing.bad_images import bad_images_error, joined


def bad(*reasons: str) -> list[Skipped]:
    return [Skipped(f"item {n}", reason) for n, reason in enumerate(reasons)]


def test_advice_on_several_splits_is_given_once():
    train = bad_images_error(Path("train.beton"), bad("cut", "dark"), 0, 9)
    val = bad_images_error(Path("val.beton"), bad("cut"), 0, 9)
    lines = str(joined([train, val])).splitlines()
    assert [line.partition(":")[0].strip() for line in lines if line.startswith("  ")] == ["item 0", "item 1", "item 0"]
    assert str(val).splitlines()[-1].startswith("Mend or remove them")
    assert lines.count(str(val).splitlines()[-1]) == 1
    disk = bad_images_error(Path("val.beton"), bad("gone"), 1, 9)
    both = joined([train, disk])
    assert "Mend or remove them" in str(both)
    assert "Check the unreadable files" in str(both)
    assert not both.can_skip
    assert str(joined([train])) == str(train)


def test_one_reason_for_all_is_given_once():
    assert str(bad_images_error(Path("a.beton"), bad(*["too dark"] * 30), 0, 30)).splitlines()[1:] == [
        "  all, from item 0 to item 29: too dark",
        "Check the source.",
    ]
    several = str(bad_images_error(Path("a.beton"), bad(*["too dark"] * 29, "cut"), 0, 30)).splitlines()
    assert (len(several), several[-2]) == (13, "  ... and 20 more")
