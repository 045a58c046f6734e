"""Background threads: order, bounds, errors to whoever waits, and no thread or memory left behind."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Generator

import pytest

from lowrank_vit.common.threads import Ahead, Jobs
from tests.waiting import LONG_S, wait_until


def counting(log: list[object], count: int, error: BaseException | None = None) -> Generator[int, None, None]:
    try:
        for n in range(count):
            log.append(n)
            yield n
        if error:
            raise error
    except GeneratorExit:
        log.append("closed")
        raise
    finally:
        log.append(threading.current_thread().name)


def settled(log: list[object], least: int) -> int:
    """How long the log is when it has come to `least` and grows no more."""
    wait_until(lambda: len(log) >= least)
    time.sleep(0.05)
    return len(log)


def test_items_come_in_order_and_the_thread_ends():
    log: list[object] = []
    items = Ahead(counting(log, 100), 3, "maker")
    assert list(items) == list(range(100))
    assert log == [*range(100), "maker"]
    assert "maker" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(StopIteration):
        next(items)
    items.close()


@pytest.mark.parametrize("depth", [1, 4])
def test_only_so_many_are_made_ahead(depth):
    log: list[object] = []
    items = Ahead(counting(log, 100), depth, "maker")
    assert settled(log, depth + 1) == depth + 1
    assert items.waiting == depth
    assert next(items) == 0
    assert settled(log, depth + 2) == depth + 2
    items.close()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_ends_the_generator_in_its_own_thread(taken):
    log: list[object] = []
    items = Ahead(counting(log, 10**9), 2, "maker")
    assert [next(items) for _ in range(taken)] == list(range(taken))
    items.close()
    assert log[-2:] == ["closed", "maker"]
    items.close()
    assert list(items) == []


@pytest.mark.parametrize("error", [ValueError("damaged"), KeyboardInterrupt(), MemoryError()])
def test_an_error_comes_in_the_place_of_its_item(error):
    items = Ahead(counting([], 5, error), 2, "maker")
    assert [next(items) for _ in range(5)] == list(range(5))
    with pytest.raises(type(error)) as raised:
        next(items)
    assert raised.value is error
    assert list(items) == []


def test_an_item_that_was_taken_is_not_held_by_the_thread():
    class Big:
        pass

    begun = threading.Event()

    def make() -> Generator[Big, None, None]:
        yield Big()
        begun.set()
        time.sleep(0.2)
        yield Big()

    items = Ahead(make(), 1, "maker")
    taken = weakref.ref(next(items))
    assert begun.wait(LONG_S)
    gc.collect()
    assert taken() is None
    items.close()


def test_jobs_are_done_in_order_in_one_thread():
    done: list[object] = []
    jobs = Jobs[int](
        lambda n: done.append((n, threading.current_thread().name)),
        lambda *_: pytest.fail("fails"),
        "worker",
        begin=lambda: done.append(threading.current_thread().name),
        end=lambda: done.append("end"),
    )
    assert done == ["worker"]
    for n in range(5):
        jobs.put(n)
    jobs.wait()
    assert not jobs.is_busy
    assert done == ["worker", *((n, "worker") for n in range(5))]
    jobs.put(5)
    jobs.close()
    jobs.close()
    jobs.wait()
    assert done[-2:] == [(5, "worker"), "end"]
    assert "worker" not in [thread.name for thread in threading.enumerate()]


def test_a_job_that_fails_is_told_and_the_next_one_follows():
    def do(n: int) -> None:
        if n % 2:
            raise ValueError(n)
        done.append(n)

    done: list[int] = []
    failed: list[tuple[int, Exception]] = []
    jobs = Jobs[int](do, lambda n, error: failed.append((n, error)), "worker")
    for n in range(6):
        jobs.put(n)
    jobs.close()
    assert done == [0, 2, 4]
    assert [(n, type(error), error.args) for n, error in failed] == [(n, ValueError, (n,)) for n in (1, 3, 5)]


def raise_it(*_: object) -> None:
    raise RuntimeError("beyond help")


@pytest.mark.parametrize("where", ["begin", "failed", "end", "interrupt"])
def test_an_error_of_the_thread_itself_is_raised_where_it_is_waited_for(where):
    def do(_: int) -> None:
        raise KeyboardInterrupt("beyond help") if where == "interrupt" else ValueError

    extra = {where: raise_it} if where in ("begin", "end") else {}
    jobs = Jobs[int](do, raise_it if where == "failed" else lambda *_: None, "worker", **extra)
    for n in range(3):
        jobs.put(n)
    if where != "end":
        with pytest.raises((RuntimeError, KeyboardInterrupt), match="beyond help"):
            jobs.wait()
        assert not jobs.is_busy
    with pytest.raises((RuntimeError, KeyboardInterrupt), match="beyond help"):
        jobs.close()


def test_a_job_is_busy_until_it_is_forgotten():
    class Job:
        pass

    go_on, job = threading.Event(), Job()
    held = weakref.ref(job)
    jobs = Jobs[Job](lambda _: go_on.wait(LONG_S), lambda *_: None, "worker")
    jobs.put(job)
    del job
    assert jobs.is_busy
    assert held() is not None
    jobs.close(timeout_s=0.01)
    assert jobs.is_busy
    go_on.set()
    jobs.wait()
    assert held() is None
    jobs.close()


def test_closing_wakes_whoever_waits_for_an_item():
    is_asked, go_on = threading.Event(), threading.Event()

    def made() -> Generator[int]:
        is_asked.set()
        go_on.wait(LONG_S)
        yield 1

    ahead, taken = Ahead(made(), 1, "maker"), list[int]()
    waiting = threading.Thread(target=lambda: taken.extend(ahead), daemon=True)
    waiting.start()
    assert is_asked.wait(LONG_S)
    closing = threading.Thread(target=ahead.close, daemon=True)
    closing.start()
    time.sleep(0.05)
    go_on.set()
    for thread in (closing, waiting):
        thread.join(LONG_S)
        assert not thread.is_alive()


def test_an_error_of_the_thread_is_there_before_whoever_waits_is_woken():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            jobs = Jobs[int](raise_it, raise_it, "worker")
            jobs.put(1)
            with pytest.raises(RuntimeError, match="beyond help"):
                jobs.wait()
    finally:
        sys.setswitchinterval(interval)


def test_jobs_behind_an_error_that_ended_the_thread_are_dropped():
    jobs = Jobs[object](raise_it, raise_it, "worker")
    jobs.put(1)
    with pytest.raises(RuntimeError, match="beyond help"):
        jobs.wait()
    jobs._thread.join(LONG_S)
    assert not jobs._thread.is_alive()
    job = weakref.ref(late := type("Job", (), {})())
    jobs.put(late)
    del late
    assert job() is None
    assert not jobs.is_busy
