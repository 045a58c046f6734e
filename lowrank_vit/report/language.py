"""The language of reports: texts are English where they stand in the code, and `zh.toml` has the Chinese of each.

Code marks what a reader sees: `tr("{n:,} epochs", n=3)` is the text in the language of the report that is made, and
`msg("loss")` leaves a constant as it is, for `tr(name)` later. Scripts have `t("...")`, the page's template has
`tr("...")`. Names of metrics, types, options and files stay as they are. So do the texts inside PNG files, whose fonts
may lack Chinese.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import resources
from typing import Any, Literal

Language = Literal["en", "zh"]
_SPACED = re.compile(r"(?<=\S) *([，。：；（）]) *(?=\S)")
"""Full-width punctuation has its space in itself; a value that is put in beside it may leave another one."""
_LANGUAGE: ContextVar[Language] = ContextVar("language", default="en")


@contextmanager
def in_language(language: Language) -> Generator[None]:
    """Inside it, and in this thread alone, `tr` speaks this language."""
    token = _LANGUAGE.set(language)
    try:
        yield
    finally:
        _LANGUAGE.reset(token)


def language() -> Language:
    """The language of the report that is being made."""
    return _LANGUAGE.get()


def msg(text: str) -> str:
    """`text` itself, marked as one that `tr` gets later."""
    return text


def tr(text: str, /, **values: Any) -> str:
    """A text in the language of the report, with values put into its fields as `str.format` does it.

    A text that the language's table lacks stays English.
    """
    found = texts().get(text, text)
    found = found.format(**values) if values else found
    return _SPACED.sub(r"\1", found) if language() == "zh" else found


def texts() -> dict[str, str]:
    """The table of the report's language, English text to its own; empty for English."""
    return {} if language() == "en" else _table(language())


@cache
def _table(name: str) -> dict[str, str]:
    content = resources.files("lowrank_vit.report").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return {text: own for part in tomllib.loads(content).values() for text, own in part.items()}
