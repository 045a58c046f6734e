"""What an option's type hint says about its values, so that a wrong one is named in words before the parser sees it.

A hint may carry a `Range`, `MAY_CHANGE` and the parser's other names of the option.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from lowrank_vit.common.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
D = TypeVar("D", bound="DataclassInstance")


@dataclass(frozen=True)
class Range:
    """The values a number may take; `low` and `high` are allowed unless marked open."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def in_words(self, *, is_whole: bool) -> str:
        """What a message says of it; `is_whole`: about an option that takes whole numbers only."""
        low = f"{'above' if self.open_low else 'at least'} {_plain(self.low)}"
        if self.low == float("-inf"):
            return "a finite number"
        if self.high == float("inf"):
            return low if is_whole else f"{low} (and finite)"
        return f"{low} and {'below' if self.open_high else 'at most'} {_plain(self.high)}"


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


POSITIVE = Range(1)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
SHARE_BELOW_1 = Range(0, 1, open_high=True)
ABOVE_0 = Range(0, open_low=True)


MAY_CHANGE = "may change on resume"
"""Beside an option's type: a resumed run may be given another value, which does not change what an update does to the
weights. (Of batch size and accumulation the global batch must stay, see `Loader.load_state_dict`.)"""


@dataclass(frozen=True)
class NotHere:
    """Beside an option's type: a value of timm's that it does not take."""

    value: str
    why: str
    """Also what to use instead, as a part of the message."""


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

    @property
    def is_numeric(self) -> bool:
        """Whether its values are numbers."""
        return self.element in NUMBERS

    @property
    def num_words(self) -> int | None:
        """How many words stand behind its flag on a command line; None: any number."""
        if self.element is bool:
            return 0
        return self.count if self.is_tuple else 1


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


def leaves(options: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield `(flag name without dashes, type hint with its Range, value)` of every option of a dataclass.

    Fields that are dataclasses are groups, whose options come one after the other.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value)
        else:
            yield option.name.replace("_", "-"), hints[option.name], value


def with_options(options: D, values: Mapping[str, Any]) -> D:
    """The same dataclass with some options, by their flags' names, at other values; lists become tuples."""
    changed: dict[str, Any] = {}
    for option in dataclasses.fields(options):
        value, name = getattr(options, option.name), option.name.replace("_", "-")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changed[option.name] = with_options(value, values)
        elif name in values:
            new = values[name]
            changed[option.name] = tuple(new) if isinstance(new, list) else new
    return dataclasses.replace(options, **changed)


def aliases(hints: Hints) -> dict[str, str]:
    """The options' other names, as typed with dashes in front, and what each stands for."""
    return {
        alias: name
        for name, hint in hints.items()
        for note in getattr(hint, "__metadata__", ())
        for alias in getattr(note, "aliases", None) or ()
    }


def without_dashes(flag: str) -> str:
    """The name of an option, as in `Hints`, that a flag or a key is: without dashes in front, with dashes inside."""
    return flag.lstrip("-").replace("_", "-")


def may_change(hint: Any) -> bool:
    """Whether a resumed run may be given another value."""
    return MAY_CHANGE in getattr(hint, "__metadata__", ())


def is_number(text: str) -> bool:
    """Whether a text can be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def tokens_of(name: str, hint: Any, texts: Sequence[str], shown: str) -> list[str]:
    """An option and its values, from a file or a command line, as tokens that the parser takes for nothing else.

    An empty text for a path means that none is given. Raises `UserError`, which calls the option `shown`, for values
    that it does not take; the parser itself judges single numbers, choices and texts.
    """
    kind = kind_of(hint)
    if list(texts) == [""] and kind.element is Path:
        return [f"--{name}=None"] if kind.may_be_none else []
    if message := _problem(shown, hint, texts):
        raise UserError(f"{message}.")
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, NotHere) and note.value == texts[0]:
            raise UserError(f"{shown}: {note.value} is not here: {note.why}.")
    if not kind.is_tuple:
        return [f"--{name}={texts[0]}"]
    flags = [text for text in texts if text.startswith("-") and not is_number(text)]
    if flags:
        raise UserError(f"{shown}: an element cannot begin with a dash, as `{flags[0]}` does.")
    return [f"--{name}", *texts]


def _problem(name: str, hint: Any, values: Sequence[str]) -> str:
    """Why these texts cannot be the values of a numeric tuple or optional number; empty if they can, or for others.

    The parser's own messages about such types speak of unions; about all others they are plain.
    """
    kind = kind_of(hint)
    if not kind.is_numeric or not (kind.is_tuple or kind.may_be_none):
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


def parse_keywords(pairs: Iterable[str], flag: str, example: str) -> dict[str, Any]:
    """`("patch_size=2", "qkv_bias=False")` as keyword arguments; values are Python literals, else texts.

    Raises `UserError`, which names `flag`, for a text of another form.
    """
    keywords: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"{flag} {pair}: expected NAME=VALUE, e.g. {example}.")
        keywords[name] = literal(text)
    return keywords


def literal(text: str) -> Any:
    """The Python literal that a text is, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def take_keyword(pairs: Iterable[str], name: str) -> tuple[tuple[str, ...], str | None]:
    """The pairs but for those of `name`, and the last value of that as a text; None where there is none."""
    kept, value = list[str](), None
    for pair in pairs:
        if pair.partition("=")[0] == name and "=" in pair:
            value = pair.partition("=")[2]
        else:
            kept.append(pair)
    return tuple(kept), value


def square_side(text: str, flag: str = "--model-kwargs img_size") -> int:
    """The side that `224` or `(224, 224)` means. Raises `UserError` for anything else."""
    size = literal(text)
    sides: list[Any] = list(size) if isinstance(size, (tuple, list)) else [size, size]
    if len(sides) != 2 or type(sides[0]) is not int or sides[0] != sides[1] or sides[0] < 1:
        raise UserError(f"{flag}={text}: images are square here, so it takes one whole number of pixels, e.g. 224.")
    return sides[0]
