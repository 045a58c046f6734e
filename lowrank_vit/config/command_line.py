"""Read command lines by the type hints of their options, for every command, with errors in one form.

tyro draws the help and writes the scripts of TAB completion; it reads nothing else.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from lowrank_vit.common.errors import UserError, did_you_mean
from lowrank_vit.common.terminal import HELP_FLAGS, fitted_help
from lowrank_vit.config.option_types import (
    UNSET,
    Hints,
    Kind,
    aliases,
    hints_of,
    is_number,
    kind_of,
    value_of,
    without_dashes,
)

T = TypeVar("T")
_POSITIONAL = get_args(Positional[int])[1]
_WITHOUT_NO = get_args(FlagCreatePairsOff[bool])[1]
_FOR_TYRO = {*HELP_FLAGS, "--tyro-write-completion", "--tyro-print-completion"}
_LONG_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
"""Characters that text programs and web pages put in place of two hyphens."""
LIST = "--help lists all."
"""The end of a message about an unknown option."""
DEFAULTS = (
    "Options that its command line leaves out may have other defaults in timm and here: docs/from_timm.md, Flags of "
    "other programs."
)
"""The end of a message about an option of another program."""
_WIDTH = 80
_SAID_OF_SWITCHES = ("true", "false", "yes", "no", "on", "off", "0", "1")


class NoSuchOptionError(UserError):
    """An unknown flag."""


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help or a completion script, which tyro prints."""
    return any(token.partition("=")[0] in _FOR_TYRO for token in argv)


def _for_tyro(argv: Sequence[str]) -> list[str]:
    """The part of a command line for tyro: beside --help, wrong options do not matter."""
    return ["--help"] if HELP_FLAGS & set(argv) else list(argv)


def show_help(options: Callable[..., object], argv: Sequence[str], prog: str, description: str | None = None) -> None:
    """Print the help of a dataclass of options or of a function, and end the process."""
    with fitted_help(argv):
        tyro.cli(tyro.conf.OmitArgPrefixes[options], args=_for_tyro(argv), prog=prog, description=description)  # pyright: ignore


def read_options(
    target: Callable[..., T], argv: Sequence[str], prog: str, word: str = "", refused: Sequence[UserError] = ()
) -> T:
    """A dataclass of options, or what a function returns, from a command line; `--help` ends the process.

    Words that belong to no option are values of the options marked `Positional`, else of the option `word`. Raises
    `UserError` for all options that cannot be taken, those in `refused` first.
    """
    if asks_for_help(argv):
        show_help(target, argv, prog)
    hints = _parameters(target)
    places = [name for name, hint in hints.items() if _POSITIONAL in getattr(hint, "__metadata__", ())]
    values = read(argv, hints, places or [word] * bool(word), refused)
    return _made(target, values, prog)


def run_subcommand(
    commands: Mapping[str, Callable[..., object]], argv: Sequence[str], prog: str, description: str | None
) -> None:
    """Call the function whose name comes first, with the options after it. Raises `UserError`."""
    if asks_for_help(argv):
        with fitted_help(argv):
            first = [name for name in argv[:1] if name in commands]
            args = [*first, *_for_tyro(argv[len(first) :])]
            shown = dict(commands) if first else {name: _in_short(command) for name, command in commands.items()}
            more = "" if first else f"\n\n`{prog} COMMAND --help` describes a command and its options."
            tyro.extras.subcommand_cli_from_dict(shown, args=args, prog=prog, description=f"{description or ''}{more}")
        return
    names = ", ".join(commands)
    if not argv:
        raise UserError(f"{prog} needs a command: {names}. `{prog} COMMAND --help` describes it.")
    name = argv[0].replace("_", "-")
    if name not in commands:
        near = did_you_mean(name, commands)
        raise UserError(f"`{argv[0]}` is not a command of {prog}.{near} There are: {names}.")
    read_options(commands[name], argv[1:], f"{prog} {name}")


def _in_short(command: Callable[..., object]) -> Callable[..., object]:
    """A command with its options, described by the first paragraph of its description: for a list of commands."""

    @wraps(command)
    def listed(*args: object, **options: object) -> None: ...

    listed.__doc__ = (inspect.getdoc(command) or "").partition("\n\n")[0]
    return listed


def is_flag(token: str) -> bool:
    """Whether a token is a flag: it begins with a dash, and is neither a number nor a dash alone."""
    return token.startswith("-") and token != "-" and not is_number(token)


def read(
    argv: Sequence[str], hints: Hints, places: Sequence[str] = (), refused: Sequence[UserError] = ()
) -> dict[str, Any]:
    """The options that a command line names, with the last value given for each.

    Words that belong to no option are values of `places`, one each; if the first of these takes any number of values,
    it gets all words, beside those after its flag. Raises `UserError` for all flags that cannot be taken, those in
    `refused` first.
    """
    values, words, tokens, wrong = dict[str, Any](), list[str](), list(argv), [*refused]
    while tokens:
        try:
            _read_one(tokens, hints, places, values, words)
        except UserError as error:
            wrong.append(error)
            if not isinstance(error, NoSuchOptionError) and tokens and tokens[0][:2] != "--":
                tokens.pop(0)  # a value that looks like a short flag, as in --experiment -x
            drop_values(tokens)
    try:
        _place(values, words, hints, places)
    except UserError as error:
        wrong.append(error)
    refuse(wrong)
    return {name: value for name, value in values.items() if value is not UNSET}


def refuse(errors: Sequence[UserError]) -> None:
    """Raise a single error as it is, and several as one error with a line for each of them."""
    if not errors:
        return
    if len(errors) == 1:
        raise errors[0]
    texts, ends = list[str](), dict[str, None]()
    for text in dict.fromkeys(map(str, errors)):
        end = next((end for end in (DEFAULTS, LIST) if text.endswith(f" {end}")), "")
        ends |= {end: None} if end else {}
        texts.append(text.removesuffix(f" {end}"))
    lines = [line for text in texts for line in _wrapped(text, "  ", " " * 6)]
    raise UserError("\n".join([f"{len(texts)} options cannot be taken:", *lines, *_wrapped(" ".join(ends))]))


def _wrapped(text: str, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def drop_values(tokens: list[str]) -> None:
    """Remove all tokens before the next flag."""
    while tokens and not is_flag(tokens[0]):
        tokens.pop(0)


def _read_one(tokens: list[str], hints: Hints, places: Sequence[str], values: dict[str, Any], words: list[str]) -> None:
    """Take a word or a flag with its values off the tokens, into `words` or `values`. Raises `UserError`."""
    others = aliases(hints)
    names = {without_dashes(alias): name for alias, name in others.items()}
    token = tokens.pop(0)
    if not is_flag(token):
        words.append(_word(token, hints))
        return
    shown, equals, value = token.partition("=")
    if without_dashes(shown) not in {*hints, *names}:
        shown, equals, value = _glued(token, others, hints) or (shown, equals, value)
    name = without_dashes(shown)
    name = names.get(name, name)
    if switch := _switch(name, hints):
        values[switch[0]] = switch[1]
        _check_alone(switch[0], token, tokens[:1], bool(equals), hints)
        return
    if name not in hints:
        raise _unknown(shown, [*hints, *names], hints)
    texts = [value] if equals else _take(tokens, kind_of(hints[name]), name, others=bool(places))
    if _gathers(hints, places) and name == places[0]:
        words += texts
    else:
        values[name] = value_of(hints[name], texts, shown)


def _gathers(hints: Hints, places: Sequence[str]) -> bool:
    """Whether the first of the places takes any number of words."""
    return bool(places) and kind_of(hints[places[0]]).num_words is None


def _glued(token: str, names: Mapping[str, str], hints: Hints) -> tuple[str, str, str] | None:
    """Split a short flag and its value in one word, such as -b32; None if the token is no such word."""
    for short in sorted(names, key=len, reverse=True):
        value = token.removeprefix(short)
        if short.startswith("--") or value in ("", token):
            continue
        if not kind_of(hints[names[short]]).is_numeric or re.match(r"[-+.]?\d", value):
            return short, "=", value
    return None


def _word(token: str, hints: Hints) -> str:
    """The word itself. Raises `UserError` if it was meant to be a flag."""
    plain = token.lstrip(_LONG_DASHES)
    if plain.partition("=")[0] in hints and plain != token:
        raise UserError(f"{token} begins with the long dash that text programs make of two: write --{plain}.")
    if "=" in plain and plain.partition("=")[0] in hints:
        raise UserError(f"`{token}` belongs to no option. Did you mean --{token}?")
    return token


def _switch(name: str, hints: Hints) -> tuple[str, bool] | None:
    """The switch that a flag sets, and its value; None if the flag is not a switch."""
    if name in hints:
        return (name, True) if kind_of(hints[name]).element is bool else None
    plain = name.removeprefix("no-")
    if name == plain or plain not in hints or kind_of(hints[plain]).element is not bool:
        return None
    return None if _WITHOUT_NO in getattr(hints[plain], "__metadata__", ()) else (plain, False)


def _check_alone(name: str, token: str, behind: list[str], has_value: bool, hints: Hints) -> None:
    """Raise `UserError` for a switch with a value, which is written `--amp=false` or `--amp false`."""
    if has_value or (behind and behind[0].casefold() in _SAID_OF_SWITCHES):
        both = f"--{name}" if _WITHOUT_NO in getattr(hints[name], "__metadata__", ()) else f"--{name} or --no-{name}"
        typed = token if has_value else f"{token} {behind[0]}"
        raise UserError(f"--{name} takes no value: it is {both}, not `{typed}`.")


def _take(tokens: list[str], kind: Kind, name: str, *, others: bool) -> list[str]:
    """Take the values of an option off the tokens after it.

    An option with any number of values stops at the first word that it cannot take if words have another use
    (`others`).
    """
    texts: list[str] = []
    while tokens and (kind.num_words is None or len(texts) < kind.num_words):
        token = tokens[0]
        if is_flag(token):
            break
        if kind.num_words is None and others and texts and not _could_be(kind, name, token):
            break
        texts.append(tokens.pop(0))
        if kind.num_words is None and texts == ["None"]:
            break
    return texts


def _could_be(kind: Kind, name: str, token: str) -> bool:
    if kind.is_numeric:
        return is_number(token)
    if kind.choices:
        return token in map(str, kind.choices)
    return "=" in token if name.endswith("-kwargs") else True


def _place(values: dict[str, Any], words: list[str], hints: Hints, places: Sequence[str]) -> None:
    """Assign the words that belong to no flag to `places`. Raises `UserError` if there are too many."""
    if words and _gathers(hints, places):
        values[places[0]] = value_of(hints[places[0]], words, f"--{places[0]}")
        return
    for name, word in zip(places, words, strict=False):
        if kind_of(hints[name]).element is Path and is_number(word) and not os.path.lexists(word):
            several = _takes_several(word, values, hints)
            raise UserError(f"`{word}` belongs to no option, and no file or folder has that name.{several}")
        value = value_of(hints[name], [word], f"--{name}")
        if values.get(name) not in (None, value):
            raise UserError(f"{word} and --{name} {values[name]}: a word without a flag is --{name}. Give it once.")
        values[name] = value
    if extra := words[len(places) :]:
        before = next((other for other in words if without_dashes(other) in hints), "")
        near = f" Did you mean --{before} {extra[0]}?" if before and before != extra[0] else ""
        may = f" Only --{places[0]} may come without its flag, and it is {words[0]}." if places else ""
        near = near or _takes_several(extra[0], values, hints) or did_you_mean(extra[0], hints, "--")
        raise UserError(f"`{extra[0]}` belongs to no option.{may}{near or f' {LIST}'}")


def _takes_several(word: str, values: Iterable[str], hints: Hints) -> str:
    """A sentence that several values go to --budgets, if --budget was given and `word` is another value; else ""."""
    for name in values:
        kind = kind_of(hints[f"{name}s"]) if f"{name}s" in hints else None
        if kind and kind.num_words is None and _could_be(kind, name, word):
            return f" --{name} takes one; several go to --{name}s."
    return ""


def _unknown(shown: str, names: Iterable[str], hints: Hints) -> NoSuchOptionError:
    """An error about an unknown flag, with the nearest known ones."""
    first, *rest = re.split(r"[\s:]+", shown, maxsplit=1)
    if rest and without_dashes(first) in hints:
        return NoSuchOptionError(f"`{shown}` is one word. Did you mean {first}={rest[0]}?")
    if without_dashes(shown).removeprefix("no-") in hints:
        return NoSuchOptionError(
            f"{shown} is not an option: --{without_dashes(shown).removeprefix('no-')} is not a switch."
        )
    switches = [f"no-{name}" for name, hint in hints.items() if kind_of(hint).element is bool]
    near = did_you_mean(without_dashes(shown), [name for name in [*names, *switches] if len(name) > 1], "--")
    return NoSuchOptionError(f"{shown} is not an option.{near or f' {LIST}'}")


def _parameters(target: Callable[..., object]) -> dict[str, Any]:
    """The hints of a function's parameters or of a dataclass's options, by their flags' names."""
    if isinstance(target, type):
        return hints_of(target)
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(target, include_extras=True).items():
        plain = getattr(hint, "__origin__", hint)
        if name != "return":
            found |= hints_of(plain) if dataclasses.is_dataclass(plain) else {name.replace("_", "-"): hint}
    return found


def _made(target: Callable[..., T], values: Mapping[str, Any], prog: str) -> T:
    """Call a function, or make a dataclass with its groups, with the values that are given. Raises `UserError`."""
    hints = get_type_hints(target, include_extras=True)
    keywords: dict[str, Any] = {}
    for parameter in inspect.signature(target).parameters.values():
        hint, flag = hints[parameter.name], parameter.name.replace("_", "-")
        plain = getattr(hint, "__origin__", hint)
        if dataclasses.is_dataclass(plain) and isinstance(plain, type):
            keywords[parameter.name] = _made(plain, values, prog)
        elif flag in values:
            keywords[parameter.name] = values[flag]
        elif parameter.default is parameter.empty:
            metadata = getattr(hint, "__metadata__", ())
            metavar = next((note.metavar for note in metadata if getattr(note, "metavar", None)), "")
            what = metavar if _POSITIONAL in metadata else f"--{flag} {metavar}".strip()
            raise UserError(f"{prog} needs {what}. --help tells more.")
    return target(**keywords)
