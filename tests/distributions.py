"""Statistical comparison of two ways to draw, with fixed seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats

UNLIKELY = 1e-5
"""There are some hundred comparisons, each with fixed seeds."""


def assert_same_counts(first: Sequence | np.ndarray, second: Sequence | np.ndarray, what: object = "") -> None:
    """How often each of the same outcomes came up in two samples: a chi-square test of homogeneity."""
    table = np.array([first, second])
    table = table[:, table.sum(0) >= 20]
    assert table.shape[1] > 1, "nothing to compare"
    p_value = stats.chi2_contingency(table)[1]
    assert float(p_value) > UNLIKELY, what  # type: ignore[arg-type]


def assert_same_distribution(first: Sequence[Hashable], second: Sequence[Hashable], what: object = "") -> None:
    """Two samples of outcomes, by the same test; rare outcomes count as one."""
    counts = Counter(first), Counter(second)
    total = counts[0] + counts[1]
    common = [key for key in total if total[key] >= 20]
    tables = [[c[key] for key in common] for c in counts]
    rare = [len(first) - sum(tables[0]), len(second) - sum(tables[1])]
    assert sum(rare) < 0.2 * (len(first) + len(second)), what
    if len(common) > 1 or sum(rare) >= 20:
        assert_same_counts([*tables[0], rare[0]], [*tables[1], rare[1]], what)
