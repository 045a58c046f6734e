"""Ranks of one attempt find each other in a store that earlier attempts have used, too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from torch.distributed import HashStore

from lowrank_vit.ranks.world import meet


def attempt(store: HashStore, size: int, *, without: int = -1) -> set[str]:
    with ThreadPoolExecutor(size) as pool:
        names = [pool.submit(meet, store, rank, size) for rank in reversed(range(size)) if rank != without]
        return {name.result(30) for name in names}


def test_all_ranks_of_an_attempt_have_one_name_and_no_other_attempt_has_it():
    store = HashStore()
    names = [attempt(store, size) for size in (3, 3, 2, 4)]  # nodes leave and join
    assert [len(name) for name in names] == [1] * 4
    assert len(set.union(*names)) == 4


def test_what_a_rank_has_left_that_came_alone_is_no_answer():
    """It was killed before rank 0 came, or after it had asked."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(meet, store, 1, 2).exception(30) is not None
    store.set_timeout(timedelta(seconds=30))
    assert len(attempt(store, 2)) == 1
