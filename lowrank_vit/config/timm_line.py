"""A command line of timm's in the flags that are here; what of it changes nothing is noted, what would is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.option_types import Hints, aliases, is_number, kind_of, tokens_of, without_dashes
from lowrank_vit.config.timm_flags import FLAGS, HIDDEN, Command, Flag, Instead, Renamed, Unused


@dataclass
class Line:
    """A translated command line."""

    tokens: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    """Flags, as typed, that change nothing."""


def translate(argv: Sequence[str], hints: Hints, command: Command = "train") -> Line:
    """The tokens for a command's parser. Raises `UserError` for a flag that is not here, or a wrong number of values.

    `hints` are the options whose values are judged here; those of others are the parser's business. An empty text
    behind a flag for a path becomes `None`. What follows the numbers of a flag that takes any number of them, and is no
    number, comes first: it is the data directory, which the parser would take for one more value.
    """
    line, tokens = Line(), list(argv)
    names = {without_dashes(alias): name for alias, name in aliases(hints).items()}
    while tokens:
        token = tokens.pop(0)
        shown, equals, value = token.partition("=")
        name = without_dashes(shown)
        if not shown.startswith("-") or is_number(shown):
            line.tokens.append(token)
            continue
        name = names.get(name, name)
        if shown.startswith("--") and is_foreign(name, command):
            values = [value] if equals else _take_foreign(FLAGS[name], tokens, command)
            made = foreign(name, values, shown, command)
            line.tokens += made
            if not made:
                line.held.append(" ".join([shown, *values]))
        elif name in hints:
            _known(line, tokens, token, name, hints[name])
        else:
            line.tokens.append(token)
    return line


def fit_flags(argv: Iterable[str], command: Command, say: Callable[[str], object]) -> list[str]:
    """The command line of validate or inference in our own flags; one note is said of those that change nothing."""
    line = translate(list(argv), {}, command)
    if line.held:
        verb = "changes" if len(line.held) == 1 else "change"
        say(f"note: {', '.join(flag.partition(' ')[0] for flag in line.held)} {verb} nothing here")
    return line.tokens


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
    if is_neutral(flag, values) and not (isinstance(answer, Instead) and command != "train"):
        return []
    if isinstance(answer, Instead):
        raise UserError(f"{shown} is timm's; here: {answer}.")
    if flag.values and not values:
        raise UserError(f"{shown} needs a value, or leave it out: {answer}.")
    if flag.same:
        raise UserError(f"{shown} {' '.join(values)} is not here: {answer}.")
    return []


def is_neutral(flag: Flag, values: list[str]) -> bool:
    """Whether these values of a flag, as texts, leave everything as it is."""
    if len(values) != 1:
        return False
    if not flag.means_something_at_0 and is_number(values[0]) and float(values[0]) == 0:
        return True
    return values[0] in ("", *flag.same)


def in_words(held: Sequence[str]) -> str:
    """A note about flags that change nothing."""
    return f"nothing to do for {', '.join(held)}: so it is here without"


def with_images_first(argv: Iterable[str], options: type) -> list[str]:
    """The command line with words that belong to no flag behind --input: images may stand before flags or after them.

    `options` is the dataclass of the flags, which tells how many values each takes.
    """
    takes: dict[str, int | None] = {"-h": 0, "--help": 0, "--tyro-write-completion": 2}
    hints = get_type_hints(options, include_extras=True)
    for name, hint in hints.items():
        flag = name.replace("_", "-")
        takes |= dict.fromkeys((f"--{flag}", f"--no-{flag}"), kind_of(hint).num_words)
    takes |= {alias: kind_of(hints[name]).num_words for alias, name in aliases(hints).items()}
    images, flags = list[str](), list[str]()
    open_flag, left = "", 0  # a flag that takes any number of words; how many the last one still takes
    for token in argv:
        if token.startswith("-") and token != "-":
            name, equals, value = token.partition("=")
            name = name.replace("_", "-")
            count = takes.get(name, 1)
            open_flag, left = (name, 0) if count is None else ("", 0 if equals else count)
            if name not in _INPUT:
                flags.append(token)
            elif equals:
                images.append(value)
        elif (open_flag and open_flag not in _INPUT and not _cannot_be_of(open_flag, token)) or left:
            flags.append(token)
            left = max(0, left - 1)
        else:
            images.append(token)
    return flags + (["--input", *images] if images else [])


_INPUT = ("--input", "--data-dir")


def _cannot_be_of(flag: str, token: str) -> bool:
    """Whether a word cannot be a value of a flag that takes any number of them."""
    return flag == "--model-kwargs" and "=" not in token


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


def _take(count: int, tokens: list[str]) -> list[str]:
    """Take up to so many values off the tokens behind a flag."""
    values: list[str] = []
    while tokens and len(values) < count and (not tokens[0].startswith("-") or is_number(tokens[0])):
        values.append(tokens.pop(0))
    return values


def _take_foreign(flag: Flag, tokens: list[str], command: Command) -> list[str]:
    """Take the values of a flag of timm's off the tokens behind it."""
    may_be_left_out = flag.choices and isinstance(flag.answer(command), Unused)
    return [] if may_be_left_out and tokens[:1] and tokens[0] not in flag.choices else _take(flag.values, tokens)


def _known(line: Line, tokens: list[str], token: str, name: str, hint: Any) -> None:
    """Hand on a flag of the parser's with its values, taken off `tokens`."""
    shown, equals, value = token.partition("=")
    kind = kind_of(hint)
    if kind.element is bool or (kind.num_words is None and not kind.is_numeric):
        line.tokens.append(token.replace("_", "-") if name in HIDDEN else token)
        return
    takes_numbers = kind.num_words is None
    values = [value] if equals else _take_numbers(tokens) if takes_numbers else _take(kind.num_words or 1, tokens)
    if values or takes_numbers:
        line.tokens += tokens_of(name, hint, values or tokens[:1], shown)
    else:
        line.tokens.append(token)
    if takes_numbers and tokens and not tokens[0].startswith("-"):
        line.tokens.insert(0, tokens.pop(0))


def _take_numbers(tokens: list[str]) -> list[str]:
    if tokens[:1] == ["None"]:
        return [tokens.pop(0)]
    values: list[str] = []
    while tokens and is_number(tokens[0]):
        values.append(tokens.pop(0))
    return values
