"""Ranges of numbers for flags and arguments, and checks of a function's arguments.

The command line checks its flags before (`lowrank_vit.config.check`), so these messages name arguments of Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from os import PathLike
from typing import Any

from lowrank_vit.common.errors import UserError


@dataclass(frozen=True)
class Range:
    """The values a number may take; `low` and `high` are allowed unless marked open."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def in_words(self) -> str:
        """The words for a message after "a number"; empty if every finite number is allowed."""
        if self.low == float("-inf"):
            return ""
        if self.high == float("inf"):
            return f" {'above' if self.open_low else 'of at least'} {_plain(self.low)}"
        low = f"above {_plain(self.low)}, up" if self.open_low else f"from {_plain(self.low)}"
        return f" {low} to {'below ' if self.open_high else ''}{_plain(self.high)}"


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


POSITIVE = Range(1)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
SHARE_BELOW_1 = Range(0, 1, open_high=True)
ABOVE_0 = Range(0, open_low=True)


def check_whole(allowed: Range = POSITIVE, **arguments: Any) -> None:
    """Raise `UserError` for the first argument that is not a whole number in the range; numpy's integers count, too."""
    for name, value in arguments.items():
        if not _is_number(value, Integral) or value not in allowed:
            raise wrong_argument(name, f"a whole number{allowed.in_words()}", value)


def check_number(allowed: Range, **arguments: Any) -> None:
    """Raise `UserError` for the first argument that is not a finite number in the range."""
    for name, value in arguments.items():
        if not _is_number(value, Real) or value not in allowed:
            raise wrong_argument(name, f"a number{allowed.in_words()}", value)


def check_numbers(allowed: Range, count: int, **arguments: Any) -> None:
    """Raise `UserError` for the first argument that is not a tuple or list of `count` finite numbers in the range."""
    for name, value in arguments.items():
        is_list = isinstance(value, (tuple, list)) and len(value) == count  # type: ignore[arg-type]
        if not is_list or not all(_is_number(one, Real) and one in allowed for one in value):
            raise wrong_argument(name, f"{count} numbers, each{allowed.in_words() or ' finite'}", value)


def check_ascending(allowed: Range, **arguments: Any) -> None:
    """Raise `UserError` for the first argument that is not a pair of numbers in the range, the smaller one first."""
    check_numbers(allowed, 2, **arguments)
    for name, value in arguments.items():
        if list(value) != sorted(value):
            raise wrong_argument(name, "the smaller number first", value)


def check_choice(choices: Sequence[object], **arguments: Any) -> None:
    """Raise `UserError` for the first argument that is none of the choices."""
    for name, value in arguments.items():
        if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
            raise wrong_argument(name, f"one of {', '.join(map(repr, choices))}", value)


def check_type(types: type | tuple[type, ...], in_words: str, **arguments: Any) -> None:
    """Raise `UserError` for the first argument of another type; `in_words` says what it takes."""
    for name, value in arguments.items():
        if not isinstance(value, types):
            raise wrong_argument(name, in_words, value)


def check_path(**arguments: Any) -> None:
    """Raise `UserError` for the first argument that is not a path: a text that is not empty, or a `Path`."""
    for name, value in arguments.items():
        if not isinstance(value, (str, PathLike)) or not str(value).strip():  # type: ignore[reportUnknownArgumentType]
            raise wrong_argument(name, "a path", value)


def check_function(in_words: str, others: type | tuple[type, ...] = (), **arguments: Any) -> None:
    """Raise `UserError` for the first argument that is neither callable nor of a type in `others`."""
    for name, value in arguments.items():
        if not callable(value) and not isinstance(value, others):
            raise wrong_argument(name, in_words, value)


def wrong_argument(name: str, takes: str, value: object) -> UserError:
    """An error that says what an argument takes, and that `value` is not that."""
    shown = repr(value)
    return UserError(f"{name} takes {takes}, not {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'}.")


_SHOWN = 80
"""Characters of a value in a message."""


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
