"""Text for the terminal: names from files, which may hold any bytes, and help that fits its width.

A name may move the cursor or change the terminal's title. tyro fits the tables of its help, but not what stands above
them.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
import textwrap
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

NARROW = 80
"""Columns for prose, also in a wider terminal."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: object) -> str:
    """`text` with escapes for control characters, invisible ones and bytes that are not UTF-8; lines stay lines."""
    return "\n".join(map(one_line, str(text).split("\n")))


def one_line(name: object) -> str:
    """`printable` of a name, which is one line even if it holds a line break."""
    shown = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


def say(text: object) -> None:
    """Print lines that may hold names from files, at once."""
    print(printable(text), flush=True)


class _Captured(io.StringIO):
    """Text that passes for the real output, so that colours and boxes are those that a terminal would get."""

    def __init__(self, real: TextIO) -> None:
        super().__init__()
        self._real = real

    def isatty(self) -> bool:
        return self._real.isatty()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._real.encoding


@contextmanager
def fitted_help(argv: Sequence[str] | None) -> Generator[None, None, None]:
    """Fit what is printed within to the terminal, if `argv` (None: the process's own) asks for help."""
    if not {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
        yield
        return
    captured = _Captured(sys.stdout)
    try:
        with redirect_stdout(captured):
            yield
    finally:
        print(fit(captured.getvalue(), min(NARROW, shutil.get_terminal_size().columns)), end="")


def fit(text: str, width: int) -> str:
    """Wrap the lines beyond `width` that are not part of a table, and leave of several empty lines one."""
    lines: list[str] = []
    for line in text.split("\n"):
        bare = _ANSI.sub("", line)
        is_table = bare.startswith((" ", "╭", "│", "╰"))
        if is_table:
            is_twice_empty = bool(lines) and not bare.strip("│ ") and lines[-1] == line
            lines += [] if is_twice_empty else [line]
        elif bare.startswith("usage:") and len(bare) > width:  # a list of choices has no spaces to break at
            lines += [one.replace(", ", ",") for one in _wrap(bare.replace(",", ", "), width, " " * len("usage: "))]
        elif len(bare) > width:
            lines += _wrap(bare, width, "  " if bare.startswith("- ") else "")
        else:
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
