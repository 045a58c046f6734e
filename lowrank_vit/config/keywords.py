"""`NAME=VALUE` texts, as of --model-kwargs and --opt-kwargs."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from lowrank_vit.common.errors import UserError


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
