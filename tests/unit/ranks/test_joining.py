"""The ranks of one attempt find each other, by the environment and in a store that earlier attempts have used, too."""

from __future__ import annotations

import math
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from lowrank_vit.common.errors import UserError
from lowrank_vit.ranks import joining, waiting
from lowrank_vit.ranks.agree import OfRank
from lowrank_vit.ranks.joining import JOB_IDS, environment_world, job_record, joined, launch_name, meet
from lowrank_vit.ranks.signs import Limits
from lowrank_vit.ranks.waiting import saying
from lowrank_vit.ranks.world import World
from tests.waiting import LONG_S, free_port, wait_until


class Once(timedelta):
    """A limit that is reached when something is so, however long that takes."""

    is_so: Callable[[], bool]

    def total_seconds(self) -> float:
        return 0.0 if self.is_so() else math.inf


def once(is_so: Callable[[], bool]) -> Once:
    limit = Once()
    limit.is_so = is_so
    return limit


def attempt(store: HashStore, size: int, *, without: int = -1) -> set[str]:
    with ThreadPoolExecutor(size) as pool:
        names = [pool.submit(meet, store, rank, size) for rank in reversed(range(size)) if rank != without]
        return {name.result(LONG_S) for name in names}


def test_all_ranks_of_an_attempt_have_one_name_and_no_other_attempt_has_it():
    store = HashStore()
    names = [attempt(store, size) for size in (3, 3, 2, 4)]  # nodes leave and join
    assert [len(name) for name in names] == [1] * 4
    assert len(set.union(*names)) == 4


def test_what_a_rank_has_left_that_came_alone_is_no_answer():
    """It was killed before rank 0 came, or after it had asked."""
    store = HashStore()
    with pytest.raises(RuntimeError, match=r"rank 1 on .* has waited \d+ s for rank 0 of 2"):
        meet(store, 1, 2, timedelta(seconds=0.2))
    first = joining._Meeting(0, 4, job_record(4), "here:1")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(meet, store, 1, 4)
        with pytest.raises(RuntimeError, match=r"rank 0 on .* has waited \d+ s for ranks 2, 3 of 4"):
            first.meet(store, once(lambda: first._missing == {2, 3}))
    assert len(attempt(store, 2)) == 1


def meeting(job: dict[str, str], rank: int) -> joining._Meeting:
    return joining._Meeting(rank, 2, {name: (text, text) for name, text in job.items()}, "here:1")


def meet_as(job: dict[str, str], store: HashStore, rank: int, limit: timedelta = timedelta(seconds=LONG_S)) -> str:
    return meeting(job, rank).meet(store, limit)


def test_a_rank_of_another_job_is_turned_away_and_the_right_one_is_let_in():
    """Both jobs have one port. Whoever waits for its rank says who came instead."""
    store, ours, theirs = HashStore(), {"SLURM_JOB_ID": "11"}, {"SLURM_JOB_ID": "12"}
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet_as, ours, store, 0)
        with pytest.raises(
            OfRank, match=r"Rank 1 on .* has met rank 0 of another job at here:1: SLURM_JOB_ID is 12, there"
        ):
            meet_as(theirs, store, 1)
        assert meet_as(ours, store, 1) == first.result(LONG_S)
        store.set("asks/1", "what an earlier version asks with")
        with pytest.raises(RuntimeError, match=r"for rank 1 of 2 .* came as rank 1 runs another version"):
            meet_as(ours, store, 0, timedelta(seconds=0.2))
        pool.submit(meet_as, theirs, store, 1)
        waits = meeting(ours, 0)
        with pytest.raises(RuntimeError, match=r"for rank 1 of 2 .* came as rank 1, on .*, is of another job: SLURM"):
            waits.meet(store, once(lambda: "is of another job" in waits.waits_for()))


def job(**ids: str) -> dict[str, tuple[str, str]]:
    told = {"the number of ranks": "2", **ids}
    return {name: (text, text) for name, text in told.items()}


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        ({}, {"SLURM_JOB_ID": "7"}, ""),  # by hand on its node: started through ssh out of a job's shell
        ({"SLURM_JOB_ID": "7"}, {}, ""),
        ({"PBS_JOBID": "7"}, {"SLURM_JOB_ID": "8"}, ""),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8"}, "SLURM_JOB_ID is 7, there 8"),
        ({"--rdzv-id": "vit", "SLURM_JOB_ID": "7"}, {"--rdzv-id": "vit", "SLURM_JOB_ID": "8"}, ""),
        ({"--rdzv-id": "vit"}, {"--rdzv-id": "other"}, "--rdzv-id is vit, there other"),
        ({"SLURM_HET_JOB_ID": "6", "SLURM_JOB_ID": "6"}, {"SLURM_HET_JOB_ID": "6", "SLURM_JOB_ID": "7"}, ""),
        ({"the number of ranks": "3"}, {}, "the number of ranks is 3, there 2"),
    ],
)
def test_a_number_that_one_lacks_tells_no_job_from_another(theirs, ours, told):
    assert joining.another_job({**job(), **job(**theirs)}, job(**ours)) == told


def test_a_question_that_nobody_asks_any_more_is_no_rank(environment):
    """Of an attempt of another size, whose rank was killed: nothing is said of it."""
    environment()
    store = HashStore()
    with pytest.raises(RuntimeError):
        meet(store, 1, 3, timedelta(seconds=0.2))
    first = joining._Meeting(0, 2, job_record(2), "here:1")
    with pytest.raises(RuntimeError, match=r"for rank 1 of 2 at here:1\. Unset"):
        first.meet(store, timedelta(seconds=0.5))
    assert len(attempt(store, 2)) == 1


def test_nothing_is_said_of_who_was_turned_away_once_the_right_rank_is_there(environment):
    environment()
    store, first = HashStore(), joining._Meeting(0, 3, job_record(3), "here:1")
    with ThreadPoolExecutor(2) as pool:
        name = pool.submit(first.meet, store, timedelta(seconds=LONG_S))
        with pytest.raises(OfRank, match="the number of ranks is 4, there 3"):
            meet(store, 1, 4)
        assert "of another job: the number of ranks is 4, there 3" in first.waits_for()
        second = pool.submit(meet, store, 1, 3)
        wait_until(lambda: first._missing == {2})
        assert "another job" not in first.waits_for()
        assert meet(store, 2, 3) == second.result(LONG_S) == name.result(LONG_S)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_agent_has_ended_takes_no_place_in_the_next_attempt(environment, monkeypatch, rank):
    """It was waiting for the others when its agent was killed, as rank 0 and as another."""
    environment()
    over = threading.Event()
    monkeypatch.setattr(joining, "has_ended", lambda process: over.is_set())
    store, orphan = HashStore(), joining._Meeting(rank, 2, job_record(2), "here:1")
    orphan._agent = SimpleNamespace(pid=77)  # type: ignore[assignment]
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(orphan.meet, store, timedelta(seconds=LONG_S))
        over.set()
        with pytest.raises(OfRank, match=rf"agent on .* \(process 77\) is gone, while rank {rank} was waiting"):
            waits.result(LONG_S)
    assert len(attempt(store, 2)) == 1


def test_two_processes_with_one_rank_are_told():
    store = HashStore()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(meet, store, 0, 3)
        twins = [pool.submit(meet, store, 1, 3, once(first.done)) for _ in range(2)]
        wait_until(lambda: any(twin.done() for twin in twins))
        third = pool.submit(meet, store, 2, 3)
        assert third.result(LONG_S) == first.result(LONG_S)
        errors = [error for twin in twins if (error := twin.exception(LONG_S))]
    assert len(errors) == 1
    assert re.search("Two processes have come to .* as rank 1|rank 1 on .* has waited", str(errors[0]))


def test_a_launch_has_one_name_whoever_asks_first():
    store = HashStore()
    names = {launch_name(store) for _ in range(3)}
    assert len(names | {launch_name(HashStore())}) == 2


def test_what_tells_one_job_from_another(environment):
    size = {"the number of ranks": ("4", "4")}
    environment()
    assert job_record(4) == size
    environment(SLURM_JOB_ID="7", TORCHELASTIC_RUN_ID="none")
    assert job_record(4) == size | {"SLURM_JOB_ID": ("7", "7")}
    environment(SLURM_JOB_ID="7", SLURM_HET_JOB_ID="6")
    assert job_record(4) == size | {"SLURM_HET_JOB_ID": ("6", "6"), "SLURM_JOB_ID": ("7", "7")}
    environment(SLURM_JOB_ID="7", TORCHELASTIC_RUN_ID="vit")  # one run over several jobs
    assert job_record(4) == size | {"--rdzv-id": ("vit", "vit"), "SLURM_JOB_ID": ("7", "7")}


CPU = torch.device("cpu")
PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Sets the environment to one with these variables of a launcher, and no others."""

    def set_to(**place: str) -> None:
        for name in (*PLACE, "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", *JOB_IDS):
            monkeypatch.delenv(name, raising=False)
        for name, value in place.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2 .* at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 .* at least 1"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0 .* no number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "1", "RANK": "3"}, "RANK=3 .* with WORLD_SIZE=1 it must be at least 0 and at most 0"),
        ({**PLACE, "RANK": "2"}, "RANK=2 .* with WORLD_SIZE=2 it must be at least 0 and at most 1"),
        ({**PLACE, "RANK": "-1"}, "RANK=-1 .* at least 0"),
        ({**PLACE, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 .* with WORLD_SIZE=2"),
        ({**PLACE, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 .* with LOCAL_WORLD_SIZE=1"),
        ({**PLACE, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8 .* at most 2"),
        ({**PLACE, "MASTER_PORT": "0"}, "MASTER_PORT=0 .* at least 1"),
        ({**PLACE, "MASTER_PORT": "99999"}, "MASTER_PORT=99999 .* at most 65535"),
        ({**PLACE, "MASTER_PORT": "http"}, "MASTER_PORT=http .* no number"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_told_at_once(environment, place, told):
    environment(**place)
    with pytest.raises(UserError, match=rf"(?i){told}.*unset WORLD_SIZE"):
        environment_world()


def test_other_environments_are_taken_as_they_are(environment):
    environment(RANK="7", LOCAL_RANK="7", MASTER_PORT="x")  # what is left of a launcher says nothing without WORLD_SIZE
    assert environment_world() == World()
    environment(**{**PLACE, "WORLD_SIZE": "1"})
    assert environment_world() == World()
    environment(**{**PLACE, "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"})
    assert environment_world() == World(9, 1, 16, local_size=8)


@pytest.mark.parametrize("name", ["nowhere.invalid", "[::1]", "a" * 70])
def test_a_name_that_does_not_resolve_is_told_at_once(environment, monkeypatch, name):
    monkeypatch.setattr(joining, "_RESOLVE_S", 0.0)
    environment(**{**PLACE, "MASTER_ADDR": name})
    told = r"(?i)MASTER_ADDR=.* is no address that .* can find .*unset WORLD_SIZE"
    with pytest.raises(UserError, match=told), joined(environment_world(), CPU):
        pass


def test_who_waits_for_others_says_so(environment, monkeypatch, capsys):
    """Alone with what another launch has left in the environment, as rank 0 and as another."""
    monkeypatch.setattr(waiting, "_FIRST_LINE_S", 0.05)
    monkeypatch.setattr(waiting, "_NEXT_LINE_S", 0.1)
    for rank in ("0", "1"):
        port = str(free_port())
        environment(**{**PLACE, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port})
        told = rf"Rank {rank} cannot meet the others .*: (rank 0 on|nobody answers)"
        with pytest.raises(UserError, match=told), joined(environment_world(), CPU, limits=Limits(init_s=1.0)):
            pass
        out = capsys.readouterr().out
        others = "rank 1 of 2" if rank == "0" else "rank 0 of 2"
        assert re.search(rf"has waited \d+ s for {others} at 127.0.0.1:{port}. Unset WORLD_SIZE, which may be", out)
        assert len(out.splitlines()) > 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_agent_that_has_ended_is_not_waited_for(environment, monkeypatch, rank):
    """Its ranks are still starting when it is killed."""
    monkeypatch.setattr(joining, "_AGENT_S", 0.0)
    port = str(free_port())
    environment(**{**PLACE, "RANK": rank, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    told = f"torchrun's store at 127.0.0.1:{port} does not answer rank {rank} on .* agent that has it is gone"
    with pytest.raises(UserError, match=told), joined(environment_world(), CPU):
        pass


def test_nothing_is_said_of_a_short_wait(capsys):
    with saying(lambda: "waiting"):
        pass
    assert capsys.readouterr().out == ""


def test_a_port_in_use_is_told(environment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment(**{**PLACE, "MASTER_PORT": port})
        told = rf"cannot meet the others at 127.0.0.1:{port}: .*--master-port"
        with pytest.raises(UserError, match=told), joined(environment_world(), CPU):
            pass


@pytest.mark.parametrize(
    ("limits", "after"),
    [((1024, 4096), (2560, 4096)), ((1024, -1), (2560, -1)), ((3000, 4096), None), ((-1, -1), None), ((256, 2000), ())],
)
def test_the_process_that_has_the_store_may_open_a_connection_with_every_rank(monkeypatch, limits, after):
    set_to = list[tuple[int, int]]()
    monkeypatch.setattr(joining.resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(joining.resource, "setrlimit", lambda kind, given: set_to.append(given))
    if after == ():
        with pytest.raises(OfRank, match=r"1024 ranks need 2560 open files .* limit is 2000\. .*ulimit -Hn 2560"):
            joining._allow_connections(1024)
    else:
        joining._allow_connections(1024)
        assert set_to == ([after] if after else [])
