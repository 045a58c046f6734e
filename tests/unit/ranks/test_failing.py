"""What a rank says of an error that it meets, and torchrun's summary of it; who says it; ranks nobody watches over."""

from __future__ import annotations

import json
import os
import signal
import threading
from datetime import timedelta
from typing import Any, NoReturn

import pytest
import torch
from torch.distributed import HashStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from lowrank_vit import train
from lowrank_vit.common.errors import UserError, in_short
from lowrank_vit.ranks import failing as module
from lowrank_vit.ranks.failing import Failing, Gone, record
from lowrank_vit.ranks.joining import joined
from lowrank_vit.ranks.signs import Limits, Signs
from lowrank_vit.ranks.world import World
from tests.forked import Forked
from tests.waiting import LONG_S, free_port


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    return tmp_path / "error.json"


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error as it comes out of a call, made of another one."""
    with pytest.raises(type(error)) as caught:
        raise error from cause
    return caught.value


def summary(file) -> str:
    """As torchrun prints it."""
    return str(ChildFailedError("train", {0: ProcessFailure(0, 1, 2, str(file))}))


def test_a_users_mistake_is_its_paragraph_and_notes(file):
    error = raised(UserError("--lr is wrong.\x1b[2J"), RuntimeError("a library's banner"))
    error.add_note("a note")
    record(error)
    assert "traceback : error: --lr is wrong.\\x1b[2J\n  a note\n" in summary(file)
    assert "banner" not in file.read_text()
    assert int(json.loads(file.read_text())["message"]["extraInfo"]["timestamp"]) > 1e9


GLOO = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:10375"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        (
            f"{GLOO}. This is typically caused by a remote worker crashing. GLHF!",
            "Connection closed by peer [127.0.0.1]:10375",
        ),
        (
            "[enforce fail at /a/pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4",
            "op.preamble.length <= op.nbytes. 8 vs 4",
        ),
        (
            "Ping failed, invalid value returned from server.\nException raised from pingServer",
            "Ping failed, invalid value returned from server",
        ),
        ("", "RuntimeError"),
    ],
)
def test_of_a_librarys_error_its_first_sentence_is_quoted(text, short):
    assert in_short(RuntimeError(text)) == short


def test_ctrl_c_is_no_traceback_and_anything_else_is_one(file):
    record(raised(KeyboardInterrupt()))
    assert "traceback : KeyboardInterrupt: \n" in summary(file)
    record(raised(ZeroDivisionError("oh")))
    assert "Traceback (most recent call last)" in summary(file)
    assert "ZeroDivisionError: oh" in summary(file)


def test_success_is_not_noted_nor_anything_without_torchrun(file, monkeypatch):
    record(SystemExit(0))
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    record(UserError("x"))
    assert not file.exists()


def test_a_torchrun_of_one_process_is_told_too(file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError):
        train.main(["--lr", "abc"])
    assert "traceback : error: --lr takes a number above 0, not `abc`" in summary(file)


LOST = (
    "[../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:238",
    "[../gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:44215: Connection reset by peer",
    "writev [127.0.0.1]:5: Broken pipe",
    "NCCL error: remote process exited or there was a network error",
)
LATE = (
    "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=8, OpType=ALLREDUCE)",
)


class Ended(BaseException):
    """In place of the end of the process."""


class GoneStore:
    """A store whose process is gone."""

    def __getattr__(self, name: str) -> Any:
        def fail(*args: Any) -> NoReturn:
            raise RuntimeError("Connection reset by peer")

        return fail


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("_WHO_S", "_LOST_CONNECTION_S", "_AFTER_THE_CAUSE_S", "_POLL_S"):
        monkeypatch.setattr(module, name, 0.01)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def end(code: int) -> NoReturn:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)


@pytest.mark.parametrize("text", LOST)
def test_a_lost_rank_is_named_by_what_its_neighbour_has_noted(text):
    world = World(1, 1, 4, HashStore())
    told = Failing(world)._named(RuntimeError(text))
    assert str(told).startswith("rank 1: another rank is gone without a word")
    world.store.set(module._WHO, "3")
    assert str(Failing(world)._named(RuntimeError(text))).startswith("rank 1: rank 3 is gone without a word")


def test_a_neighbour_names_the_lost_rank_also_where_a_collective_has_failed_of_it_before(monkeypatch):
    """The collective fails at once, in the neighbour itself or another rank; the neighbour's threads are behind."""
    monkeypatch.setattr(module, "_WHO_S", 10.0)
    world, is_over = World(1, 1, 4, HashStore()), threading.Event()
    failing = Failing(world)
    assert failing._is_first_to_fail(RuntimeError(LOST[0]))
    failing._is_failing, failing._lost = True, 2
    watching = threading.Thread(target=failing._watch, args=(world.store, is_over, alone(failing)))
    watching.start()
    try:
        assert str(failing._named(RuntimeError(LOST[0]))).startswith("rank 1: rank 2 is gone without a word")
    finally:
        is_over.set()
        watching.join()


def one_of_several(rank: int, size: int, port: int, killed: int) -> None:
    """A rank that waits for all in a sum, or in the tree of a gathering; one is killed before it comes there."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = World(rank, rank, size, local_size=size)
    failing = Failing(world)

    def main() -> None:
        with joined(world, torch.device("cpu")), failing.watched():
            channel = world.channel(timedelta(seconds=LONG_S))
            world.wait_for_all()
            if rank == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            world.greatest(1.0) if rank % 2 else channel.gather(rank)

    failing.exit_together(main)


@pytest.mark.parametrize(("size", "killed"), [(2, 1), (5, 3)])
def test_one_rank_says_which_is_gone_and_all_end(size, killed):
    port = free_port()
    ranks = [Forked(one_of_several, rank, size, port, killed) for rank in range(size)]
    said = [rank.communicate(LONG_S)[1] for rank in ranks]
    assert [rank.returncode == -signal.SIGKILL for rank in ranks] == [rank == killed for rank in range(size)]
    assert all(rank.returncode for rank in ranks)
    (error,) = [line for err in said for line in err.splitlines() if line.startswith("error: ")]
    assert f": rank {killed} is gone without a word" in error


@pytest.mark.parametrize("text", LATE)
def test_a_rank_that_is_late_is_not_gone(text):
    told = str(Failing(World(1, 1, 4, HashStore()))._named(RuntimeError(text)))
    assert "gone" not in told
    assert "have not come within torch's own limit" in told


def test_other_errors_stay_as_they_are():
    for error in (RuntimeError("NCCL error: unhandled cuda error"), KeyError("x"), RuntimeError("out of memory")):
        assert Failing(World(1, 1, 4, HashStore()))._named(error) is error


def test_without_a_store_one_rank_of_a_host_tells_of_the_lost_one_and_each_of_its_own():
    def speaks(rank: int, local_rank: int, error: BaseException) -> bool:
        return Failing(World(rank, local_rank, 8, GoneStore()))._is_first_to_fail(error)

    places = [(1, 1), (2, 2), (3, 3), (4, 0), (5, 1)]  # rank 0 is gone, and with it the store
    assert [place for place in places if speaks(*place, RuntimeError(LOST[0]))] == [(1, 1), (4, 0)]
    assert [place for place in places if speaks(*place, Gone("rank 0"))] == [(1, 1), (4, 0)]
    assert all(speaks(*place, UserError("a damaged image")) for place in places)


def test_a_store_that_went_with_rank_0_is_told_as_its_loss(capsys):
    failing = Failing(World(1, 1, 3, GoneStore()))
    with pytest.raises(Ended) as ended:
        failing._go_on_without_store(RuntimeError(LOST[0]), threading.Event(), alone(failing))
    assert ended.value.args == (2,)
    assert "rank 1: rank 0 is gone without a word" in capsys.readouterr().err


def alone(failing: Failing, limit_s: float = 60.0) -> Signs:
    return Signs(failing._world.progress, None, 1, 3, Limits(limit_s, limit_s), say=print)


def test_without_torchruns_store_the_run_saves_and_ends(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    failing, is_over = Failing(World(0, 0, 3, GoneStore())), threading.Event()
    failing.save_and_end = is_over.set
    failing._go_on_without_store(RuntimeError(LOST[0]), is_over, alone(failing))
    assert is_over.is_set()
    assert "torchrun's store at" in capsys.readouterr().err


def test_where_saving_comes_to_nothing_a_limit_ends_it(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    failing, asked = Failing(World(0, 0, 3, GoneStore())), list[bool]()
    failing.save_and_end = lambda: asked.append(True)
    with pytest.raises(Ended):
        failing._go_on_without_store(RuntimeError(LOST[0]), threading.Event(), alone(failing, 0.1))
    assert asked == [True]
    assert "stuck on" in capsys.readouterr().err


def test_before_the_first_update_there_is_nothing_to_save(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    failing = Failing(World(0, 0, 3, GoneStore()))
    with pytest.raises(Ended):
        failing._go_on_without_store(RuntimeError(LOST[0]), threading.Event(), alone(failing))
    assert "Nothing was trained yet" in capsys.readouterr().err


def test_a_launcher_that_is_lost_before_is_told_once_on_a_host_and_as_it_is(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for rank, local_rank in ((2, 0), (3, 1), (1, 1)):
        failing = Failing(World(rank, local_rank, 4, GoneStore()))
        failing._is_training = False
        with pytest.raises(Ended):
            failing._go_on_without_store(RuntimeError(LOST[0]), threading.Event(), alone(failing))
    said = capsys.readouterr().err
    assert said.count("Start it again.") == 1
    assert "trained" not in said


def test_a_store_that_goes_when_all_is_done_is_nobodys_loss():
    failing = Failing(World(1, 1, 3, GoneStore()))
    failing._is_through = True
    failing._go_on_without_store(RuntimeError(LOST[0]), threading.Event(), alone(failing))
