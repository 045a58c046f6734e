"""What the ranks tell one another beside the training, and what that takes of each; ranks are threads here."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore, PrefixStore, ProcessGroupGloo

from lowrank_vit.ranks.failing import Failing
from lowrank_vit.ranks.joining import joined
from lowrank_vit.ranks.world import Channel, World
from tests.forked import Forked
from tests.waiting import LONG_S, free_port

LIMIT = timedelta(seconds=LONG_S)


@pytest.fixture(autouse=True)
def as_joined(monkeypatch):
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")


def on_ranks(size: int, call: Callable[[Channel], Any]) -> list[Any]:
    """What the call gives on each of the ranks, whose channel is connected."""
    store = HashStore()

    def on(rank: int) -> Any:
        channel = Channel(rank, size, ProcessGroupGloo(PrefixStore("group", store), rank, size, LIMIT))
        channel.connect()
        return call(channel)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(on, range(size)))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 13])
@pytest.mark.parametrize("of", [None, 1, 3, 100])
def test_parts_of_the_first_so_many_ranks_come_in_order(size, of):
    def part(rank: int) -> tuple[str, np.ndarray]:
        return "x" * rank, np.arange(1000 * (rank % 3))

    first, *others = on_ranks(size, lambda channel: channel.gather(part(channel.rank), of=of))
    assert others == [None] * (size - 1)
    assert len(first) == min(of or size, size)
    for rank, (text, numbers) in enumerate(first):
        assert text == part(rank)[0]
        np.testing.assert_array_equal(numbers, part(rank)[1])


class Counting:
    """A group that counts the bytes which a rank has sent, and the largest of its buffers."""

    def __init__(self, group: Any) -> None:
        self._group, self.sent, self.largest = group, 0, 0

    def send(self, tensors: list[torch.Tensor], *where: int) -> Any:
        self.sent += tensors[0].nbytes
        return self._of(tensors, self._group.send(tensors, *where))

    def recv(self, tensors: list[torch.Tensor], *where: int) -> Any:
        return self._of(tensors, self._group.recv(tensors, *where))

    def _of(self, tensors: list[torch.Tensor], work: Any) -> Any:
        self.largest = max(self.largest, tensors[0].nbytes)
        return work


def test_a_large_part_makes_the_others_no_larger():
    """Rank 5 has a million bytes, the others ten: nobody but those between it and rank 0 sends more than its own."""
    size, counted = 32, dict[int, Counting]()

    def gather(channel: Channel) -> None:
        counted[channel.rank] = channel._group = Counting(channel._group)
        channel.gather(bytes(1_000_000 if channel.rank == 5 else 10))

    on_ranks(size, gather)
    assert {rank for rank, one in counted.items() if one.sent > 1_000_000} == {5, 4}  # 5 = 101, 4 = 100 in binary
    assert sum(one.sent for one in counted.values()) < 2_100_000
    assert max(one.largest for one in counted.values()) < 1_001_000


def test_idle_ranks_send_nothing():
    counted = dict[int, Counting]()

    def gather(channel: Channel) -> None:
        counted[channel.rank] = channel._group = Counting(channel._group)
        channel.gather("part", of=3)

    on_ranks(8, gather)
    assert [counted[rank].sent > 0 for rank in range(8)] == [False, True, True, *[False] * 5]


def one_of_several(rank: int, size: int, port: int) -> None:
    """A rank that joins, does all that a training does, and prints how many descriptors it has then."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = World(rank, rank, size, local_size=size)
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    with joined(world, torch.device("cpu")), Failing(world).watched():
        channel = world.channel(LIMIT, agrees=True)
        torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        world.sum(torch.zeros(10))
        channel.agree(1)()
        channel.gather(b"part")
        assert world.gather(rank) == list(range(size))
        print(sum(1 for _ in Path("/proc/self/fd").iterdir()) - before, flush=True)
        world.wait_for_all()


def descriptors(size: int) -> list[int]:
    """Of each rank, those that it has because it is one of several."""
    port = free_port()
    ranks = [Forked(one_of_several, rank, size, port) for rank in range(size)]
    outputs = [rank.communicate(LONG_S) for rank in ranks]
    return [int(out.splitlines()[-1]) for out, _ in outputs]


def test_descriptors_do_not_grow_with_the_ranks_but_by_the_logarithm():
    """docs/design/ranks.md has the figures: four groups, of each two neighbours and log2(size) ranks of the tree."""
    few, many = descriptors(2), descriptors(8)
    more = 4 + 4 * 2  # from 2 ranks on a neighbour on either side; 2 = log2(8 / 2)
    assert max(many[1:]) - max(few[1:]) <= more
    assert many[0] - few[0] <= more + 2 * (8 - 2)  # it has the store, with two connections from each rank
