"""The pulse of long work: counted where it goes on, and looked at by whoever has to tell slow from stuck."""

from __future__ import annotations

import itertools

_counter = itertools.count(1)
_newest = 0


def beat() -> None:
    """Note that a piece of long work was done: an image converted, a block copied or written. From any thread."""
    global _newest
    _newest = next(_counter)


def beats() -> int:
    """How many pieces this process has done."""
    return _newest
