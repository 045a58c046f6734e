"""Who gets which samples of an update, and how many ranks it can be dealt out to."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_vit.common.errors import UserError
from lowrank_vit.plan.dealing import deal, split

FIELDS = ("positions", "blocks", "is_alone")


@settings(max_examples=200)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 200))
def test_dealing_is_a_permutation_whose_mirror_images_are_partners(batch, slots, block):
    dealing = deal(batch * slots, batch, block)
    assert Counter(dealing.positions.ravel().tolist()) == Counter(range(batch * slots))
    size = min(block or batch * slots, batch * slots)
    assert np.array_equal(dealing.blocks, dealing.positions // size)
    low = dealing.blocks * size
    partners = low + np.minimum(low + size, batch * slots) - 1 - dealing.positions
    if batch % 2 and np.count_nonzero(partners == dealing.positions) < slots:
        assert np.array_equal(dealing.positions, np.arange(batch * slots).reshape(slots, batch))
        assert not dealing.is_alone.any()
    else:
        mirrored = np.where(dealing.is_alone, dealing.positions, dealing.positions[:, ::-1])
        assert np.array_equal(mirrored, partners)


@settings(max_examples=200)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 3), st.integers(0, 60))
def test_a_rank_deals_its_own_batches_alone(batch, ranks, steps, block):
    global_batch = batch * ranks * steps
    of_all = deal(global_batch, batch, block)
    for rank in range(ranks):
        own = slice(rank, None, ranks)
        dealing = deal(global_batch, batch, block, own)
        assert dealing.num_blocks == of_all.num_blocks
        for found, expected in ((getattr(one, name) for one in (dealing, of_all)) for name in FIELDS):
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected[own])


@pytest.mark.parametrize(
    ("global_batch", "largest", "ranks", "block", "expected"),
    [
        (64, 16, 8, 128, (8, 1)),
        (64, 16, 4, 128, (16, 1)),
        (64, 16, 2, 128, (16, 2)),
        (64, 16, 1, 128, (16, 4)),
        (48, 16, 3, 128, (16, 1)),
        (48, 20, 1, 0, (16, 3)),  # 20 does not divide it
        (48, 1000, 2, 0, (24, 1)),
        (30, 15, 1, 128, (10, 3)),  # of two batches of 15 one pair would be torn
        (30, 15, 1, None, (15, 2)),
        (15, 5, 1, 5, (5, 3)),  # each batch has a middle of its own
        (7, 1, 7, None, (1, 1)),
    ],
)
def test_the_fewest_steps_that_fit(global_batch, largest, ranks, block, expected):
    assert split(global_batch, largest, ranks, block) == expected


@settings(max_examples=200)
@given(st.integers(1, 96), st.integers(1, 40), st.integers(1, 6), st.sampled_from([None, 0, 5, 8, 128]))
def test_whatever_fits_is_whole_and_pairs_the_same_samples(global_batch, largest, ranks, block):
    def partners(batch_size: int) -> set[frozenset[int]]:
        dealing = deal(global_batch, batch_size, block or 0)
        pairs = np.stack([dealing.positions, dealing.positions[:, ::-1]], -1)[~dealing.is_alone]
        return {frozenset(pair) for pair in pairs.tolist() if pair[0] != pair[1]}

    try:
        batch_size, steps = split(global_batch, largest, ranks, block)
    except UserError:
        assert global_batch % ranks or block is not None
        return
    assert batch_size * steps * ranks == global_batch
    assert batch_size <= largest
    if block is not None:
        assert partners(batch_size) == partners(global_batch)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ((64, 16, 3, 128), r"64 does not fit 3 ranks: .*at most --batch-size 16 images\. It fits 1, 2, 4, 8 ranks"),
        ((60, 16, 8, None), r"fits 1, 2, 3, 4, 5, 6, 10, 12, 15 ranks \(of 1 to 16\)"),
        ((6, 4, 2, 128), r"of whole pairs.* It fits 1, 3 ranks"),
        ((7, 1, 1, 128), r"does not fit 1 rank: .* It fits no number of ranks"),
    ],
)
def test_an_error_names_the_numbers_of_ranks_that_fit(sizes, told):
    with pytest.raises(UserError, match=told):
        split(*sizes)
