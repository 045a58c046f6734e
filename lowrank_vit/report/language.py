"""The language of reports: texts are English in the code, and `zh.toml` has the Chinese of each.

The code marks what a reader sees: `tr("{n:,} epochs", n=3)` is the text in the report's language, and `msg("loss")`
marks a constant for a later `tr(name)`. Scripts have `t("...")`, the page's template has `tr("...")`. Names of metrics,
types, options and files stay as they are. The texts inside PNG files stay English: matplotlib's own font has no Chinese
glyphs, and with the fonts that a machine happens to have, equal data would not give equal files.
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
"""Full-width punctuation includes its space; a value filled in beside it may leave another space."""
_LANGUAGE: ContextVar[Language] = ContextVar("language", default="en")


@contextmanager
def in_language(language: Language) -> Generator[None]:
    """Within it, and only in this thread, `tr` gives texts of this language."""
    token = _LANGUAGE.set(language)
    try:
        yield
    finally:
        _LANGUAGE.reset(token)


def language() -> Language:
    """The current language."""
    return _LANGUAGE.get()


def msg(text: str) -> str:
    """`text` itself, marked as one to be given to `tr` later."""
    return text


def tr(text: str, /, **values: Any) -> str:
    """A text in the language of the report, with `values` filled into its fields as in `str.format`.

    A text that is missing in the language's table stays English.
    """
    found = texts().get(text, text)
    found = found.format(**values) if values else found
    return _SPACED.sub(r"\1", found) if language() == "zh" else found


def texts() -> dict[str, str]:
    """The table of the report's language, from English to translated text; empty for English."""
    return {} if language() == "en" else _table(language())


@cache
def _table(name: str) -> dict[str, str]:
    content = resources.files("lowrank_vit.report").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return {text: own for part in tomllib.loads(content).values() for text, own in part.items()}
