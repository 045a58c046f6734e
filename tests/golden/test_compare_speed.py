"""The interval of a median ratio."""

from __future__ import annotations

import numpy as np
import pytest

from tests.golden.compare_speed import interval


def test_the_interval_is_between_two_of_the_ratios():
    assert interval([7, 3, 1, 2, 6, 5, 4]) == (1, 7)
    assert interval([7, 3, 1, 2, 9, 6, 8, 5, 4]) == (2, 8)
    assert interval([3, 1, 2]) == (1, 3)
    assert interval([1]) == (1, 1)


@pytest.mark.parametrize("n", [7, 9, 12, 25])
def test_the_interval_holds_the_true_median_in_95_of_100_series(n):
    series = np.random.default_rng(0).lognormal(size=(4000, n))
    held = [low <= 1.0 <= high for low, high in map(interval, series.tolist())]
    assert 0.945 < np.mean(held) < 0.99
