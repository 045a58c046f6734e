"""Class names: timm's order of them, ImageNet-1k's, and lists of them in messages."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache

from lowrank_vit.common.program import CLASSES, bundled_text
from lowrank_vit.common.terminal import one_line


def natural_key(name: str) -> list[int | str]:
    """What timm sorts names by: in lower case, runs of digits as numbers (`timm.utils.misc.natural_key`)."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]  # every other part is a run of digits


def in_timms_order(names: Iterable[str]) -> list[str]:
    """Names as timm gives them labels; those that are equal to it ("Dog" and "dog", "1" and "01") by code point."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def ties(names: Iterable[str]) -> list[list[str]]:
    """The names that timm's order does not tell apart."""
    alike: dict[tuple[int | str, ...], list[str]] = defaultdict(list)
    for name in in_timms_order(names):
        alike[tuple(natural_key(name))].append(name)
    return [group for group in alike.values() if len(group) > 1]


TRUST = "If label N means the same in both all the same, say --trust-labels."
"""The last sentence of messages about classes that cannot be compared."""


@cache
def imagenet1k() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1k's 1,000 classes, in the order of their labels."""
    return tuple(bundled_text(f"imagenet1k_classes{CLASSES}").split())


def abbreviated(names: Iterable[str], shown: int = 6) -> str:
    """The first names of a list, for a message."""
    listed = list(names)
    return ", ".join(map(one_line, listed[:shown])) + (", ..." if len(listed) > shown else "")


def positions(names: Sequence[str], among: Sequence[str]) -> list[int] | None:
    """Where each name stands in another list; None where one is not there, or where a list names one twice.

    Letters with accents may be written as one character or as two: file systems differ in that.
    """
    plain, plain_among = ([unicodedata.normalize("NFC", name) for name in some] for some in (names, among))
    if len(set(plain)) < len(plain) or len(set(plain_among)) < len(plain_among):
        plain, plain_among = list(names), list(among)
    place_of = {name: place for place, name in enumerate(plain_among)}
    if len(place_of) < len(plain_among) or len(set(plain)) < len(plain) or not place_of.keys() >= set(plain):
        return None
    return [place_of[name] for name in plain]


def spelt_as(names: Iterable[str], among: Iterable[str]) -> set[str]:
    """The names, each as `among` spells its accents (see `positions`) if it does so in one way only."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for name in among:
        spellings[unicodedata.normalize("NFC", name)].add(name)
    found = ((name, spellings.get(unicodedata.normalize("NFC", name), set[str]())) for name in names)
    return {next(iter(same)) if len(same) == 1 else name for name, same in found}


def nearest(name: str, among: Iterable[str]) -> str:
    """The name that may have been meant: the same but for its case, else one that looks like it; empty for none."""
    plain = {other.casefold(): other for other in among}
    close = difflib.get_close_matches(name.casefold(), plain, 1, 0.75)
    return plain[close[0]] if close else ""


def differences(names: Sequence[str], of: str, others: Sequence[str], of_others: str) -> str:
    """Two lists of classes side by side, for a message: both abbreviated, and what is in one of them alone."""
    text = f"{of}: {len(names):,} classes ({abbreviated(names)}); {of_others}: {len(others):,} ({abbreviated(others)})"
    for some, rest, which in ((names, set(others), "former"), (others, set(names), "latter")):
        if alone := [name for name in some if name not in rest]:
            text += f"; only the {which} has {abbreviated(alone)}"
    return text
