"""A step common to all ranks, whoever asks for one and wherever the ranks are; ranks are threads here."""

from __future__ import annotations

import itertools
import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from lowrank_vit.ranks.world import CommonStep
from tests.waiting import LONG_S


@pytest.fixture
def store() -> Any:
    return HashStore()


def test_the_greatest_step_that_a_rank_ends_next_is_common(store):
    ranks = [CommonStep() for _ in range(3)]
    for one, steps in zip(ranks, (4, 5, 5), strict=True):
        assert not any(one.is_here() for _ in range(steps))
    ranks[1].is_wanted = True
    for rank in (1, 0, 2, 0, 1, 2):  # the first tells the others
        ranks[rank].poll(store, rank, 3)
    assert [one.is_here() for one in ranks] == [False, True, True]
    assert ranks[0].is_here()
    assert not any(one.is_here() for one in ranks)  # it comes once


def test_none_ends_its_step_before_all_are_known(store):
    ranks = [CommonStep(), CommonStep()]
    ranks[0].is_wanted = True
    ranks[0].poll(store, 0, 2)
    here = list[bool]()
    waiting = threading.Thread(target=lambda: here.append(ranks[0].is_here()))
    waiting.start()
    assert not any(ranks[1].is_here() for _ in range(10))
    ranks[0].poll(store, 0, 2)
    assert waiting.is_alive()
    ranks[1].poll(store, 1, 2)
    ranks[0].poll(store, 0, 2)
    waiting.join(LONG_S)
    assert here == [False]


def test_of_many_ranks_one_alone_reads_what_all_have_told(store):
    ranks, size = [CommonStep() for _ in range(64)], 64
    ranks[17].is_wanted = True
    read = list[list[str]]()
    counting = SimpleNamespace(
        set=store.set,
        multi_get=store.multi_get,
        check=lambda keys: read.append(keys) or store.check(keys),
    )
    for rank in [17, *range(size), *range(size)]:
        ranks[rank].poll(counting, rank, size)
    assert all(one.is_here() for one in ranks)
    assert sum(map(len, read)) < 10 * size


def test_without_a_store_a_rank_goes_on(store):
    step = CommonStep()
    step.is_wanted = True
    step.poll(store, 0, 2)
    step.give_up()
    assert not step.is_here()
    step.poll(None, 0, 2)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_that_go_in_step_and_ask_at_any_time_meet(store, seed):
    """Each step ends with a collective, here a barrier, so that a rank which waited for ever would hold up all."""
    size, generator = 4, random.Random(seed)
    ranks, found = [CommonStep() for _ in range(size)], dict[int, int]()
    barrier, is_over = threading.Barrier(size, timeout=LONG_S), threading.Event()
    pauses = [[generator.random() / 300 for _ in range(7)] for _ in ranks]

    def train(rank: int) -> None:
        for n in itertools.count(1):
            barrier.wait()
            time.sleep(pauses[rank][n % 7])
            if rank in (1, 3) and n >= 10 + rank:
                ranks[rank].is_wanted = True
            if ranks[rank].is_here():
                found[rank] = n
                return

    def watch(rank: int) -> None:
        while not is_over.wait(pauses[rank][0]):
            ranks[rank].poll(store, rank, size)

    watching = [threading.Thread(target=watch, args=(rank,), daemon=True) for rank in range(size)]
    training = [threading.Thread(target=train, args=(rank,), daemon=True) for rank in range(size)]
    for thread in watching + training:
        thread.start()
    for thread in training:
        thread.join(LONG_S)
    is_over.set()
    assert len(found) == size
    assert len(set(found.values())) == 1
