"""Who it is that the ranks wait for, by what each tells of itself; all of them in one thread, with a made-up clock."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore
from torch.nn.parallel import DistributedDataParallel

from lowrank_vit.common import threads
from lowrank_vit.common.errors import UserError
from lowrank_vit.ranks.signs import Limits, Progress, Signs
from lowrank_vit.ranks.world import collectives_begun

LIMITS = Limits(rank_s=60.0, init_s=600.0)


class Ranks:
    """Several ranks on one host, each with its place in the program."""

    def __init__(self, size: int, *, is_starting: bool = False, limits: Limits = LIMITS) -> None:
        store = PrefixStore("a", HashStore())
        self.progress = [Progress(place=10, is_starting=is_starting) for _ in range(size)]
        self.said: list[tuple[int, str]] = []
        self._signs = [
            Signs(one, store, rank, size, limits, say=lambda line, rank=rank: self.said.append((rank, line)))
            for rank, one in enumerate(self.progress)
        ]
        self.now = 1000.0
        self.stopped = set[int]()
        """Those whose watching thread gets no turn."""

    def first_error_within(self, seconds: float) -> tuple[int, str] | None:
        """The first rank to end, and what it says."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            for rank, signs in enumerate(self._signs):
                if rank not in self.stopped and (error := signs.poll(self.now)):
                    assert isinstance(error, UserError)
                    return rank, str(error)
        return None

    def wait_for(self, *stuck: int) -> None:
        """All others have come to a collective."""
        for rank, one in enumerate(self.progress):
            if rank not in stuck:
                one.place, one.waits, one.what = 12, True, "backward"


@pytest.fixture(autouse=True)
def no_timer(monkeypatch):
    monkeypatch.setattr(Signs, "_arm", lambda self: None)


def test_the_rank_that_is_behind_names_itself_with_its_stack():
    ranks = Ranks(4)
    ranks.wait_for(2)
    ranks.progress[2].what, ranks.progress[2].updates = "waiting for the next batch", lambda: 7
    found = ranks.first_error_within(70)
    assert found is not None
    rank, said = found
    assert rank == 2
    assert "in waiting for the next batch, after update 7: no progress for 60 s" in said
    assert "--rank-timeout" in said
    assert "in test_the_rank_that_is_behind_names_itself_with_its_stack" in said  # this is the main thread


def test_of_a_stopped_rank_another_says_since_when():
    ranks = Ranks(3)
    assert ranks.first_error_within(5) is None
    ranks.wait_for(1)
    ranks.stopped.add(1)
    found = ranks.first_error_within(80)
    assert found is not None
    rank, said = found
    assert rank in (0, 2)
    assert re.match(r"rank 1 on \S+ \(in starting\) gives no sign of life since \d\d:\d\d:\d\d", said), said


def test_a_rank_that_was_never_heard_of_is_behind_all():
    ranks = Ranks(3)
    ranks.wait_for()
    ranks.stopped.add(2)
    found = ranks.first_error_within(1000)
    assert found is not None
    assert "rank 2 on a host that is not known" in found[1]


def test_a_rank_that_is_alive_but_does_not_speak_is_named_with_its_stack():
    """As where it is another's turn to end, which hangs in turn."""
    ranks = Ranks(2)
    ranks.wait_for(1)
    ranks.progress[1].what = "validation"
    other = ranks._signs[1]
    poll = other.poll
    other.poll = lambda now: poll(now) and None
    found = ranks.first_error_within(80)
    assert found is not None
    rank, said = found
    assert rank == 0
    assert re.match(r"rank 1 on \S+ \(in validation\) is stuck: no progress for 60 s", said), said
    assert "Main thread of rank 1:\n" in said


def test_where_none_is_behind_all_are_named():
    ranks = Ranks(3)
    ranks.wait_for()
    found = ranks.first_error_within(70)
    assert found is not None
    assert found[0] == 0
    assert [f"rank {n} on" in found[1] for n in range(3)] == [True] * 3
    assert "None of them is behind the others" in found[1]


def test_in_a_stretch_with_collectives_within_the_one_that_has_begun_the_fewest_is_behind():
    """As in the backward pass, whose collectives are torch's own."""
    ranks = Ranks(4)
    for rank, one in enumerate(ranks.progress):
        one.what, one.collectives = "the backward pass", lambda rank=rank: 7 if rank == 2 else 8
    found = ranks.first_error_within(70)
    assert found is not None
    assert found[0] == 2
    assert "in the backward pass: no progress for 60 s" in found[1]


def test_torch_counts_the_collectives_that_a_rank_has_begun():
    store = HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        before = collectives_begun()
        model = DistributedDataParallel(torch.nn.Linear(2, 2))
        made = collectives_begun()
        model(torch.zeros(1, 2)).sum().backward()  # type: ignore[no-untyped-call]
        dist.all_reduce(torch.zeros(1))
        assert before < made + 1 < collectives_begun()
    finally:
        dist.destroy_process_group()
    assert collectives_begun() == 0


def test_what_has_a_limit_of_its_own_has_the_greater_one():
    ranks = Ranks(2)
    ranks.progress[0].enter("closing the logs", least_limit_s=200.0)
    ranks.progress[1].place, ranks.progress[1].waits = 12, True
    assert ranks.first_error_within(190) is None
    found = ranks.first_error_within(20)
    assert found is not None
    assert found[0] == 0
    ranks.progress[0].enter("the next")
    assert ranks.progress[0].least_limit_s == 0.0


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_command_without_the_flags_advises_none(is_stopped):
    ranks = Ranks(2, limits=Limits(60.0, 600.0, is_training=False))
    ranks.wait_for(1)
    assert ranks.first_error_within(5) is None
    ranks.stopped |= {1} if is_stopped else set()
    found = ranks.first_error_within(80)
    assert found is not None
    assert "Start it again." in found[1]
    assert "--" not in found[1]


def test_what_is_compiled_until_it_is_all_done_may_take_long():
    progress = Progress()
    progress.tick(is_compiled=False)
    assert progress.is_starting
    progress.tick()
    assert not progress.is_starting
    progress.tick(is_compiled=False)
    assert not progress.is_starting


def test_slow_is_not_stuck():
    ranks = Ranks(3)
    ranks.wait_for(1)
    for n in range(20):
        assert ranks.first_error_within(50) is None
        if n % 2:
            ranks.progress[1].ticks += 1  # batches of its share in validation
        else:
            ranks.progress[1].enter("the next")
            ranks.progress[0].place = ranks.progress[2].place = 12 + n
    assert ranks.first_error_within(70) is not None


def test_one_of_those_that_are_behind_may_wait_for_another_as_for_a_lock():
    """Rank 0 converts images, rank 1 waits for its lock, rank 2 has come to a collective."""
    ranks = Ranks(3, is_starting=True)
    ranks.wait_for(0, 1)
    for _ in range(5):
        assert ranks.first_error_within(500) is None
        threads.beat()
    found = ranks.first_error_within(700)
    assert found is not None
    assert "--init-timeout" in found[1]


def test_work_behind_the_back_counts_only_where_it_is_waited_for():
    ranks = Ranks(2)
    ranks.wait_for(0)
    ranks.progress[0].enter("saving", is_background=True)
    ranks.progress[1].place = 20
    for _ in range(4):
        assert ranks.first_error_within(50) is None
        threads.beat()
    ranks.progress[0].enter("the forward pass")
    assert ranks.first_error_within(50) is None
    threads.beat()
    found = ranks.first_error_within(20)
    assert found is not None
    assert found[0] == 0


def test_a_job_that_was_stopped_and_continued_is_not_late():
    ranks = Ranks(2)
    ranks.wait_for(1)
    assert ranks.first_error_within(30) is None
    ranks.now += 100_000
    assert ranks.first_error_within(25) is None
    assert ranks.first_error_within(15) is not None


def test_while_they_start_one_of_those_that_wait_says_once_a_minute_whom_for():
    ranks = Ranks(3, is_starting=True)
    ranks.wait_for(0)
    ranks.progress[0].what = "opening the data"
    assert ranks.first_error_within(200) is None
    assert [rank for rank, _ in ranks.said] == [1, 1, 1]
    assert re.fullmatch(r"has waited 6\d s for rank 0 on \S+ \(in opening the data\)", ranks.said[0][1]), ranks.said
    ranks.progress[0].waits, ranks.progress[0].place = True, 12
    ranks.progress[1].waits = ranks.progress[2].waits = False
    assert ranks.first_error_within(70) is None
    assert [rank for rank, _ in ranks.said] == [1, 1, 1, 0]


def test_in_training_nothing_is_said_before_the_limit():
    ranks = Ranks(2)
    ranks.wait_for(1)
    assert ranks.first_error_within(58) is None
    assert not ranks.said


def test_a_rank_alone_judges_itself_by_its_own_clock():
    progress = Progress(is_starting=False)
    other = threading.Thread(target=lambda: None)
    other.start()
    other.join()
    signs = Signs(progress, None, 0, 2, LIMITS, say=print, main_thread=other.ident)
    errors = [signs.alone(float(now)) for now in range(70)]
    assert next(n for n, error in enumerate(errors) if error) == 60


MANY = 24
"""Ranks of which 0, 3, 6, .. read the signs of all."""


@pytest.mark.parametrize("stuck", [(0,), (5,), (10, 12), (12, 13)])
def test_of_many_ranks_those_that_are_behind_name_themselves_too(stuck):
    ranks = Ranks(MANY)
    ranks.wait_for(*stuck)
    found = ranks.first_error_within(70)
    assert found is not None
    rank, said = found
    assert rank == stuck[0]
    assert re.search("no progress for 6[0-2] s", said)
    if len(stuck) == 1:
        assert said.startswith("stuck on ")
        assert "Its main thread is here:" in said
    else:
        assert all(f"rank {one} on " in said for one in stuck)
        assert "rank 1 on" not in said


@pytest.mark.parametrize("stopped", [0, 5])
def test_of_many_ranks_a_stopped_one_is_named_by_another(stopped):
    ranks = Ranks(MANY)
    assert ranks.first_error_within(5) is None
    ranks.wait_for(stopped)
    ranks.stopped.add(stopped)
    found = ranks.first_error_within(80)
    assert found is not None
    rank, said = found
    assert rank != stopped
    assert re.match(rf"rank {stopped} on \S+ \(in starting\) gives no sign of life since", said), said


def test_what_was_said_of_a_rank_before_it_went_on_is_no_longer_so():
    ranks = Ranks(MANY)
    ranks.wait_for(5)
    ranks.stopped.add(5)  # it is told, and has no time to hear of it
    assert ranks.first_error_within(61) is None
    ranks.stopped.discard(5)
    ranks.progress[5].place, ranks.progress[5].waits = 12, True
    ranks.progress[7].place, ranks.progress[7].waits = 11, False
    found = ranks.first_error_within(70)
    assert found is not None
    assert found[0] == 7


class Asked:
    """A store that counts the keys which are read there."""

    def __init__(self, store: Any, count: list[int]) -> None:
        self._store, self._count = store, count

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            self._count[0] += len(given[0]) if isinstance(given[0], list) else 1
            return getattr(self._store, name)(*given)

        return call


def test_what_all_ranks_ask_of_the_store_grows_with_their_number_alone():
    def asked_in_a_minute(size: int) -> int:
        ranks, count = Ranks(size), [0]
        ranks.wait_for(size // 2 + 1)
        for signs in ranks._signs:
            signs._store = Asked(signs._store, count)
        assert ranks.first_error_within(55) is None
        return count[0]

    assert asked_in_a_minute(32) < 2.2 * asked_in_a_minute(16)
