"""What an option's type hint says about its values, so that a wrong one is named in words before the parser sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

Hints = Mapping[str, Any]
"""Type hints, with their `Range`s, by the options' names without dashes in front."""
NUMBERS: dict[Any, tuple[str, str]] = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers")}
"""Singular and plural."""


@dataclass(frozen=True)
class Kind:
    """The values that an option takes."""

    element: Any
    """Type of a value: bool, int, float, str, Path or a Literal."""
    may_be_none: bool
    is_tuple: bool = False
    count: int | None = None
    """Of a tuple's values; None: any number."""


def kind_of(hint: Any) -> Kind:
    """What a hint such as `Annotated[tuple[float, float] | None, Range(0)]` says."""
    plain = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    may_be_none = type(None) in get_args(plain)
    if may_be_none:
        plain = next(one for one in get_args(plain) if one is not type(None))
    if get_origin(plain) is not tuple:
        return Kind(plain, may_be_none)
    elements = get_args(plain)
    return Kind(elements[0], may_be_none, is_tuple=True, count=None if elements[-1] is Ellipsis else len(elements))


def aliases(hints: Hints) -> dict[str, str]:
    """The options' other names, without dashes, and what each stands for."""
    return {
        alias.lstrip("-"): name
        for name, hint in hints.items()
        for note in getattr(hint, "__metadata__", ())
        for alias in getattr(note, "aliases", None) or ()
    }


def is_path(hint: Any) -> bool:
    """Whether an empty text means that no path is given."""
    return kind_of(hint).element is Path


def is_number(text: str) -> bool:
    """Whether a text can be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def problem(name: str, hint: Any, values: Sequence[str]) -> str:
    """Why these texts cannot be the values of a numeric tuple or optional number; empty if they can, or for others.

    The parser's own messages about such types speak of unions; about all others they are plain.
    """
    kind = kind_of(hint)
    if kind.element not in NUMBERS or not (kind.is_tuple or kind.may_be_none):
        return ""
    one, several = NUMBERS[kind.element]
    if list(values) == ["None"] and kind.may_be_none:
        return ""
    wrong = next((value for value in values if not _reads_as(kind.element, value)), None)
    if wrong is not None:
        return f"{name} takes {several if kind.is_tuple else one}, got `{wrong}`"
    least = 2 if name.rstrip("`").replace("_", "-").endswith("opt-betas") else 1
    if kind.count is not None and len(values) != kind.count:
        return f"{name} takes {kind.count} {several}, got {len(values)}"
    if kind.is_tuple and len(values) < least:
        return f"{name} takes {least} or more {several}, got {len(values)}"
    if not kind.is_tuple and len(values) != 1:
        return f"{name} takes {one}"
    return ""


def _reads_as(element: Any, text: str) -> bool:
    try:
        element(text)
    except ValueError:
        return False
    return True
