"""A command line of timm's in the flags that are here; what of it changes nothing is noted, what would is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.option_types import NUMBERS, Hints, aliases, is_number, is_path, kind_of, problem
from lowrank_vit.config.timm_flags import (
    HIDDEN,
    HOLDS,
    INSTEAD,
    NOT_NEUTRAL_AT_0,
    NUM_VALUES,
    RENAMED,
    SAME_ANYWAY,
    with_long_names,
)

FOREIGN = (INSTEAD.keys() | HOLDS.keys() | RENAMED.keys()) - HIDDEN.keys()
"""Flags that the parser does not know."""
_VALUES_INSTEAD = {
    ("sched", "plateau"): "it would follow a validation score, which a run resumed within an epoch does not have. Use "
    "--sched multistep with --decay-milestones, or --sched cosine",
}
"""Values of timm's that an option which is here does not take, and why."""


@dataclass
class Line:
    """A translated command line."""

    tokens: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    """Flags, as typed, whose effect is there without them."""


def translate(argv: Sequence[str], hints: Hints) -> Line:
    """The tokens for the parser. Raises `UserError` for a flag that is not here, or a wrong number of values.

    An empty text behind a flag for a path becomes `None`. What follows the numbers of a flag that takes any number of
    them, and is no number, comes first: it is the data directory, which the parser would take for one more value.
    """
    line, names = Line(), aliases(hints)
    tokens = with_long_names(argv)
    while tokens:
        token = tokens.pop(0)
        flag, equals, value = token.partition("=")
        name = flag.lstrip("-").replace("_", "-")
        if not flag.startswith("-") or is_number(flag):
            line.tokens.append(token)
            continue
        name = names.get(name, name)
        if flag.startswith("--") and name in FOREIGN:
            values = [value] if equals else _take(NUM_VALUES.get(name, 1), tokens)
            made = foreign(name, values, flag)
            line.tokens += made
            if not made:
                line.held.append(" ".join([flag, *values]))
        elif name in hints:
            _known(line, tokens, token, name, hints[name])
        else:
            line.tokens.append(token)
    return line


def foreign(name: str, values: list[str], shown: str) -> list[str]:
    """The tokens for a flag of timm's that the parser does not know; none if it changes nothing.

    Raises `UserError`, which names the flag as `shown`, if it would change something, with what to use instead.
    """
    if name == "torchcompile":
        if values and values[0] not in ("", "inductor"):
            raise UserError(f"{shown} {values[0]}: inductor is the only backend here. Give --compile.")
        return [] if values == [""] else ["--compile"]
    if name in ("native-amp", "no-prefetcher"):
        return ["--amp" if name == "native-amp" else "--erase-first"]
    if name == "input-size":
        return _img_size(values, shown)
    if name in ("torchcompile-mode", "drop-connect"):
        if len(values) != 1:
            raise UserError(f"{shown} needs a value.")
        return [f"--{'compile-mode' if name == 'torchcompile-mode' else 'drop-path'}={values[0]}"] if values[0] else []
    if is_neutral(name, values):
        return []
    if name not in HOLDS:
        raise UserError(f"{shown} is timm's; here: {INSTEAD[name]}.")
    if NUM_VALUES.get(name, 1) and not values:
        raise UserError(f"{shown} needs a value, or leave it out: {HOLDS[name]}.")
    if name in SAME_ANYWAY:
        raise UserError(f"{shown} {' '.join(values)} is not here: {HOLDS[name]}.")
    return []


def is_neutral(name: str, values: list[str]) -> bool:
    """Whether these values of a flag, as texts, leave everything as it is."""
    if len(values) != 1:
        return False
    if name not in NOT_NEUTRAL_AT_0 and is_number(values[0]) and float(values[0]) == 0:
        return True
    return values[0] in ("", *SAME_ANYWAY.get(name, ()))


def refuse_value(name: str, value: str, shown: str) -> None:
    """Raise `UserError` for a value of timm's that an option which is here does not take."""
    if reason := _VALUES_INSTEAD.get((name, value)):
        raise UserError(f"{shown} {value} is not here: {reason}.")


def in_words(held: Sequence[str]) -> str:
    """A note about flags that change nothing."""
    return f"nothing to do for {', '.join(held)}: so it is here without"


def _img_size(values: list[str], shown: str) -> list[str]:
    if values == [""]:
        return []
    channels, height, width = values if len(values) == 3 else ("", "", "")
    if channels != "3" or height != width or not height.isdecimal():
        raise UserError(
            f"{shown} {' '.join(values)}: images are square and RGB here, so it takes 3 N N, for example 3 224 224. "
            "Give --img-size N."
        )
    return [f"--img-size={height}"]


def _take(count: int, tokens: list[str]) -> list[str]:
    """Take up to so many values off the tokens behind a flag."""
    values: list[str] = []
    while tokens and len(values) < count and (not tokens[0].startswith("-") or is_number(tokens[0])):
        values.append(tokens.pop(0))
    return values


def _known(line: Line, tokens: list[str], token: str, name: str, hint: Any) -> None:
    """Hand on a flag of the parser's with its values, taken off `tokens`."""
    flag, equals, value = token.partition("=")
    kind = kind_of(hint)
    takes_numbers = kind.is_tuple and kind.count is None and kind.element in NUMBERS
    if equals or kind.element is bool or (kind.is_tuple and kind.count is None and not takes_numbers):
        values = [value] if equals else []
        line.tokens.append(token.replace("_", "-") if name in HIDDEN else token)
    else:
        values = _take_numbers(tokens) if takes_numbers else _take(kind.count or 1, tokens)
        line.tokens += [flag, *values] if name not in HIDDEN else ["=".join([f"--{name}", *values])]
    if values or takes_numbers:
        if message := problem(flag, hint, values or tokens[:1]):
            raise UserError(f"{message}.")
        refuse_value(name, values[0], flag)
    if values == [""] and is_path(hint):
        del line.tokens[-1 if equals else -2 :]
        line.tokens += [f"--{name}=None"] if kind.may_be_none else []
    if takes_numbers and not equals and tokens and not tokens[0].startswith("-"):
        line.tokens.insert(0, tokens.pop(0))


def _take_numbers(tokens: list[str]) -> list[str]:
    if tokens[:1] == ["None"]:
        return [tokens.pop(0)]
    values: list[str] = []
    while tokens and is_number(tokens[0]):
        values.append(tokens.pop(0))
    return values
