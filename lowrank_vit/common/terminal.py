"""What goes to the terminal: names from files may hold any bytes, also such as move its cursor or change its title."""

from __future__ import annotations


def printable(text: object) -> str:
    """With escapes for control characters, invisible ones and bytes that are not UTF-8; lines stay lines."""
    return "\n".join(map(one_line, str(text).split("\n")))


def one_line(name: object) -> str:
    """`printable` of a name, which is one line even if it holds a line break."""
    shown = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


def say(text: object) -> None:
    """Print lines that may hold names from files, at once."""
    print(printable(text), flush=True)
