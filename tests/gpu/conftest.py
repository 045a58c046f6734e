"""In which order the GPU tests run."""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path

import pytest

_COMPILING = ("max-autotune", "--compile", "compile_modes", "compiled", "test_augment_gpu")
"""What a test's name holds that compiles, what takes longest first."""
_VALUE = ("test_train_gpu", "test_loader_gpu", "test_augment_gpu", "test_spectral_gpu")
"""Files whose quick tests come first, since the time may end before the last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where nothing else runs, the longest first, each with a quick one, so that none is left for the end.

    xdist gives each process two tests to begin with.
    """
    if all(Path(__file__).parent in item.path.parents for item in items):
        items[:] = longest_first(items)


def longest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """The items, each of those that compile followed by one that does not, while there are both."""

    def place(item: pytest.Item) -> int:
        return next((n for n, word in enumerate(_COMPILING) if word in item.nodeid), len(_COMPILING))

    def value(item: pytest.Item) -> int:
        return next((n for n, word in enumerate(_VALUE) if word in item.nodeid), len(_VALUE))

    long = sorted((item for item in items if place(item) < len(_COMPILING)), key=place)
    quick = sorted((item for item in items if place(item) == len(_COMPILING)), key=value)
    return [item for item in chain.from_iterable(zip_longest(long, quick)) if item is not None]
