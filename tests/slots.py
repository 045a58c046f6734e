"""How the batches of several ranks, or of several accumulation steps, make up one global batch."""

from __future__ import annotations

from collections.abc import Sequence


def joined(parts: Sequence[Sequence]) -> list:
    """The global batch in its own order: the slots' first halves, then their second halves from the last slot on.

    Odd parts follow one another.
    """
    if len(parts[0]) % 2:
        return [value for part in parts for value in part]
    half = len(parts[0]) // 2
    return [v for part in parts for v in part[:half]] + [v for part in reversed(parts) for v in part[half:]]
