"""Read an option's values by its type hint: texts become values, or one sentence about what is wrong.

A hint may carry a `Range`, `MAY_CHANGE`, a `NotHere` and other names of the option.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

from lowrank_vit.common.arguments import Range
from lowrank_vit.common.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
D = TypeVar("D", bound="DataclassInstance")


MAY_CHANGE = "may change on resume"
"""Beside an option's type: a resumed run may be given another value, which does not change what an update does to the
weights. (Batch size and accumulation may change, but the global batch must stay, see `Loader.load_state_dict`.)"""


PER_RANK = "may differ between ranks"
"""Beside an option's type: each rank may have its own value, such as a path on its node's disk, since none of them
changes what an update does to the weights. The data at such a path are compared instead."""


@dataclass(frozen=True)
class NotHere:
    """Beside an option's type: a value of timm's that it does not take."""

    value: str
    why: str
    """Also what to use instead, as a part of the message."""


@dataclass(frozen=True)
class WordForNone:
    """Beside an option's type: the word that lets the program choose, which is None and the default.

    A resumed run keeps what was chosen for it.
    """

    word: str


AUTO = WordForNone("auto")


@dataclass(frozen=True)
class Alone:
    """Beside the type of an option with choices: the choice that its flag means without a value."""

    choice: str


Hints = Mapping[str, Any]
"""Type hints, with their `Range`s, by the options' names without dashes in front."""
_NAMES: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    Path: ("a path", "paths"),
    bool: ("true or false", ""),
}
"""Names of types, singular and plural."""
UNSET: Final = object()
"""The value of an option that is named, but left at its default."""


@dataclass(frozen=True)
class Kind:
    """The values that an option takes."""

    element: Any
    """Type of a value: bool, int, float, str, Path or a Literal."""
    may_be_none: bool
    is_tuple: bool = False
    count: int | None = None
    """Number of a tuple's values; None: any number."""

    @property
    def is_numeric(self) -> bool:
        """Whether its values are numbers."""
        return self.element in (int, float)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that there are, if they can be listed."""
        return get_args(self.element) if get_origin(self.element) is Literal else ()

    @property
    def num_words(self) -> int | None:
        """How many words follow its flag on a command line; None: any number."""
        if self.element is bool:
            return 0
        return self.count if self.is_tuple else 1


def kind_of(hint: Any) -> Kind:
    """The `Kind` that a hint such as `Annotated[tuple[float, float] | None, Range(0)]` describes."""
    plain = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    may_be_none = type(None) in get_args(plain)
    if may_be_none:
        plain = next(one for one in get_args(plain) if one is not type(None))
    if get_origin(plain) is not tuple:
        return Kind(plain, may_be_none)
    elements = get_args(plain)
    return Kind(elements[0], may_be_none, is_tuple=True, count=None if elements[-1] is Ellipsis else len(elements))


@cache
def _hints(options: type) -> dict[str, Any]:
    """Hints of a dataclass's fields; cached, since evaluating them takes longer than all that is done with them."""
    return get_type_hints(options, include_extras=True)


def hints_of(options: Any) -> dict[str, Any]:
    """The hints of all options of a dataclass, those of its groups among them, by their flags' names."""
    found: dict[str, Any] = {}
    for name, hint in _hints(options).items():
        found |= hints_of(hint) if dataclasses.is_dataclass(hint) else {name.replace("_", "-"): hint}
    return found


def leaves(options: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield `(flag name without dashes, type hint with its Range, value)` of every option of a dataclass.

    Fields that are dataclasses are groups, whose options come one after the other.
    """
    hints = _hints(type(options))
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
    """The option name, as in `Hints`, of a flag or a key: without dashes in front, with dashes inside."""
    return flag.lstrip("-").replace("_", "-")


def is_per_rank(hint: Any) -> bool:
    """Whether each rank may have a value of its own."""
    return PER_RANK in getattr(hint, "__metadata__", ())


def may_change(hint: Any) -> bool:
    """Whether a resumed run may be given another value."""
    return MAY_CHANGE in getattr(hint, "__metadata__", ())


def word_for_none(hint: Any) -> str:
    """The word that stands for None, if the hint carries one."""
    return next((note.word for note in getattr(hint, "__metadata__", ()) if isinstance(note, WordForNone)), "")


def is_number(text: str) -> bool:
    """Whether a text can be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def value_of(hint: Any, texts: Sequence[str], shown: str) -> Any:
    """The value of an option from its `texts`, on a command line or in a file.

    The text `None` is None if the option may be None. Empty texts for a path are dropped; if none is left, the value is
    None, or `UNSET` if the option may not be None. Raises `UserError`, which calls the option `shown`, for values that
    it does not take.
    """
    kind = kind_of(hint)
    texts = texts or [note.choice for note in getattr(hint, "__metadata__", ()) if isinstance(note, Alone)]
    if list(texts) == ["None"] and "none" in kind.choices:  # timm's --sched None
        texts = ["none"]
    if kind.may_be_none and list(texts) in (["None"], [word_for_none(hint) or "None"]):
        return None
    if kind.element is Path and "" in texts:
        texts = [text for text in texts if text]
        if not texts:
            return None if kind.may_be_none else UNSET
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, NotHere) and texts and note.value == texts[0]:
            raise UserError(f"{shown}: {note.value} is not supported: {note.why}.")
    try:
        values = tuple(_element(hint, text, shown) for text in texts)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise wrong_value(hint, texts, shown) from None
    least = 0 if kind.is_tuple and kind.count is None and not kind.is_numeric else kind.num_words or _least(shown)
    if len(values) < least or len(values) > (kind.num_words or len(values)):
        raise wrong_value(hint, texts, shown)
    return values if kind.is_tuple else values[0]


def wrong_value(hint: Any, texts: Sequence[str], shown: str) -> UserError:
    """An error that says what an option takes, and that `texts` are not that."""
    kind = kind_of(hint)
    if not texts:
        return UserError(f"{shown} takes {_takes(hint, shown)}, and none is given.")
    shown_texts = [text for text in texts if not _is_element(hint, text)] if kind.is_tuple else texts
    what = " ".join(shown_texts or texts)
    near = did_you_mean(what, [str(choice) for choice in kind.choices])
    only = "only " if kind.is_tuple and not shown_texts and len(texts) < (kind.count or _least(shown)) else ""
    given = f"{only}`{what}`" if what else "an empty text"
    return UserError(f"{shown} takes {_takes(hint, shown)}, not {given}.{near}")


def range_of(hint: Any) -> Range | None:
    """The range that a hint carries."""
    return next((note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Range)), None)


def _takes(hint: Any, shown: str) -> str:
    """What an option takes, in words."""
    kind, limits = kind_of(hint), range_of(hint)
    if kind.choices:
        return f"one of {', '.join(str(choice) for choice in kind.choices if choice != '')}"
    one, several = _NAMES[kind.element]
    within = limits.in_words() if limits else ""
    if not kind.is_tuple:
        return f"{one}{within}" + (f", or {word}" if (word := word_for_none(hint)) else "")
    count = kind.count or (f"{_least(shown)} or more" if _least(shown) > 1 else "")
    shapes = [n.metavar for n in getattr(hint, "__metadata__", ()) if kind.element is str and getattr(n, "metavar", "")]
    return shapes[0] if kind.count and shapes else f"{count} {several}{within}".strip()


def _least(shown: str) -> int:
    """The least number of values of an option that takes any number of them."""
    return 2 if shown.rstrip("`").replace("_", "-").endswith("opt-betas") else 1


def _is_element(hint: Any, text: str) -> bool:
    try:
        _element(hint, text, "")
    except ValueError:
        return False
    return True


def _element(hint: Any, text: str, shown: str) -> Any:
    """One value of an option. Raises `ValueError` for a wrong text, `UserError` for a path that does not expand."""
    kind, limits = kind_of(hint), range_of(hint)
    if kind.choices:
        by_text = {str(choice): choice for choice in kind.choices}
        if text not in by_text:
            raise ValueError
        return by_text[text]
    if kind.element is Path:
        return expanded(text, shown)
    value = kind.element(text)
    if kind.is_numeric and value not in (limits or Range()):
        raise ValueError
    return value


_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)\})", re.ASCII)


def expanded(text: str, shown: str) -> Path:
    """A path with `~` and environment variables filled in, unless a file has that very name; `$$` is a plain `$`.

    Raises `UserError`, which calls the option `shown`, for a variable or a user that does not exist.
    """
    if (not text.startswith("~") and "$" not in text) or os.path.lexists(text):
        return Path(text)

    def filled(match: re.Match[str]) -> str:
        name = match[2] or match[3]
        if name and name not in os.environ:
            raise UserError(f"{shown} {text}: there is no environment variable {name}. For a plain $ write $$.")
        return os.environ[name] if name else "$"

    try:
        return Path(_VARIABLE.sub(filled, text)).expanduser()
    except RuntimeError:
        raise UserError(f"{shown} {text}: there is no such user. For that very name write ./{text}.") from None


def in_flags(name: str, value: Any) -> str:
    """An option at a value, as it is typed."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value))}" if isinstance(value, tuple) else f"--{name}={value}"


def parse_keywords(pairs: Iterable[str], flag: str, example: str) -> dict[str, Any]:
    """`("patch_size=2", "qkv_bias=False")` as keyword arguments; values are Python literals, else texts.

    Raises `UserError`, which names `flag`, for a text of another form.
    """
    keywords: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"{flag} takes NAME=VALUE, e.g. {example}, not `{pair}`.")
        keywords[name] = literal(text)
    return keywords


def literal(text: str) -> Any:
    """A text as a Python literal; the text itself if it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def take_keyword(pairs: Iterable[str], name: str) -> tuple[tuple[str, ...], str | None]:
    """The pairs without those of `name`, and the last value of `name` as a text; None if there is none."""
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
