"""Philox against the published vectors, and its distributions against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lowrank_vit.plan.philox import beta, philox, to_below, to_unit


# Random123 1.14, tests/kat_vectors, lines "philox4x32 10": counter, key, result.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    key_u64 = np.uint64(key[0]) | (np.uint64(key[1]) << np.uint64(32))
    assert tuple(int(word) for word in philox(key_u64, *counter)) == expected


def test_unit_interval_is_open():
    assert 0.0 < to_unit(np.uint64(0)) < to_unit(np.uint64(0xFFFFFFFF)) < 1.0


def test_to_below_reaches_both_ends_and_no_more():
    assert to_below(np.uint64(0), 7) == 0
    assert to_below(np.uint64(0xFFFFFFFF), 7) == 6
    assert to_below(np.uint64(0xFFFFFFFF), 1) == 0


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8, 1.0, 3.0, 20.0])
def test_beta_has_its_distribution(alpha):
    draws = [beta(np.uint64(11), alpha, step, 0, 3) for step in range(20_000)]
    assert all(0.0 <= draw <= 1.0 for draw in draws)
    if alpha >= 0.2:  # below, most of the mass lies closer to 0 and 1 than float64 resolves
        assert stats.kstest(draws, stats.beta(alpha, alpha).cdf).pvalue > 1e-4
    else:
        assert np.var(draws) == pytest.approx(stats.beta(alpha, alpha).var(), rel=0.03)
