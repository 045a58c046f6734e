"""Translate timm's command lines into our flags; flags that change nothing are noted, others without a twin refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.command_line import DEFAULTS, drop_values, is_flag
from lowrank_vit.config.option_types import is_number, without_dashes
from lowrank_vit.config.other_flags import OTHERS
from lowrank_vit.config.timm_flags import FLAGS, HIDDEN, Command, Flag, Instead, Renamed, Unused


@dataclass
class Line:
    """A translated command line."""

    tokens: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    """Flags, as typed, that change nothing."""
    refused: list[UserError] = field(default_factory=list)
    """Why flags of timm's or of `OTHERS` are not taken."""


def translate(argv: Iterable[str], command: Command = "train") -> Line:
    """Translate a command line into the command's own flags; others, of timm or of `OTHERS`, are held or refused."""
    line, tokens = Line(), list(argv)
    while tokens:
        token = tokens.pop(0)
        shown, equals, value = token.partition("=")
        name = without_dashes(shown)
        if shown.startswith("--") and command == "train" and name in OTHERS:
            line.refused.append(of_other(name, shown))
            drop_values(tokens)  # the number of its values is unknown
            continue
        if not shown.startswith("--") or not is_foreign(name, command):
            line.tokens.append(token)
            continue
        values = [value] if equals else _take_foreign(FLAGS[name], tokens, command)
        try:
            made = foreign(name, values, shown, command)
        except UserError as error:
            line.refused.append(error)
            drop_values(tokens)
            continue
        line.tokens += made
        if not made:
            line.held.append(" ".join([shown, *values]))
    return line


def fit_flags(argv: Iterable[str], command: Command, say: Callable[[str], object]) -> Line:
    """The command line of validate or inference in our own flags; one note names those that change nothing."""
    line = translate(argv, command)
    if line.held and not line.refused:
        verb = "changes" if len(line.held) == 1 else "change"
        say(f"note: {', '.join(flag.partition(' ')[0] for flag in line.held)} {verb} nothing here")
    return line


def of_other(name: str, shown: str) -> UserError:
    """An error about a flag of another program, one of `OTHERS`, which names the equivalent here."""
    return UserError(f"{shown} is {OTHERS[name].whose}; here: {OTHERS[name].instead}. {DEFAULTS}")


def is_foreign(name: str, command: Command = "train") -> bool:
    """Whether a flag is timm's alone, and the command's parser does not know it."""
    is_hidden = command == "train" and name in HIDDEN
    return name in FLAGS and not is_hidden and FLAGS[name].answer(command) is not None


def foreign(name: str, values: list[str], shown: str, command: Command = "train") -> list[str]:
    """The tokens for a flag of timm's that the parser does not know; none if it changes nothing.

    Raises `UserError`, which names the flag as `shown`, if it would change something, with what to use instead.
    """
    flag = FLAGS[name]
    answer = flag.answer(command)
    if isinstance(answer, Unused):
        return []
    if isinstance(answer, Renamed):
        return _renamed(name, answer, flag, values, shown)
    if is_neutral(flag, values):
        return []
    if isinstance(answer, Instead):
        raise UserError(f"{shown} is timm's; here: {answer}.")
    if flag.values and not values:
        raise UserError(f"{shown} needs a value, or leave it out: {answer}.")
    if flag.same:
        raise UserError(f"{shown} {' '.join(values)} is not supported: {answer}.")
    return []


def is_neutral(flag: Flag, values: list[str]) -> bool:
    """Whether these values of a flag, as texts, leave everything as it is."""
    if not values:
        return False
    if len(values) == 1 and is_number(values[0]):
        number = float(values[0])
        if number == 0 and not flag.means_something_at_0:
            return True
        return any(is_number(same) and float(same) == number for same in flag.same)
    return " ".join(values) in ("", *flag.same)


def in_words(held: Sequence[str]) -> str:
    """A note about flags that change nothing."""
    return f"nothing to do for {', '.join(held)}: this is always so here"


def _renamed(name: str, answer: Renamed, flag: Flag, values: list[str], shown: str) -> list[str]:
    ours = answer.split("`")[1]
    if name == "torchcompile":
        if values and values[0] not in ("", "inductor"):
            raise UserError(f"{shown} {values[0]}: inductor is the only backend here. Give --compile.")
        return [] if values == [""] else [ours]
    if name == "input-size":
        return _img_size(values, shown)
    if not flag.values:
        return [ours]
    if len(values) != 1:
        raise UserError(f"{shown} needs a value.")
    return [f"{ours}={values[0]}"] if values[0] else []


def _img_size(values: list[str], shown: str) -> list[str]:
    if values == [""]:
        return []
    channels, height, width = values if len(values) == 3 else ("", "", "")
    if channels != "3" or height != width or not height.isdecimal():
        raise UserError(
            f"{shown} {' '.join(values)}: images are RGB and square here, so it takes 3 N N, for example 3 224 224. "
            "Give --img-size N."
        )
    return [f"--img-size={height}"]


def _take(count: int | None, tokens: list[str]) -> list[str]:
    """Take up to `count` values, or all numbers if it is None, off the tokens after a flag."""
    values: list[str] = []
    while tokens and (is_number(tokens[0]) if count is None else len(values) < count and not is_flag(tokens[0])):
        values.append(tokens.pop(0))
    return values


def _take_foreign(flag: Flag, tokens: list[str], command: Command) -> list[str]:
    """Take the values of a flag of timm's off the tokens after it."""
    may_be_left_out = flag.choices and isinstance(flag.answer(command), Unused)
    return [] if may_be_left_out and tokens[:1] and tokens[0] not in flag.choices else _take(flag.values, tokens)
