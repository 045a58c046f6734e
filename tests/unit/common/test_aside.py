"""A process aside gives what a call here gives, is lost with one call at most, and leaves with whoever started it."""

from __future__ import annotations

import gc
import operator
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from lowrank_vit.common.aside import Aside, NotStarted
from lowrank_vit.common.errors import UserError
from tests.waiting import LONG_S, is_gone, wait_until


@pytest.fixture
def aside() -> Generator[Aside]:
    made = Aside()
    yield made
    made.close()


def raise_in_words(words: str) -> None:
    raise UserError(words)


def count(tell, until: int) -> int:
    for number in range(until):
        tell(number)
    return until


def open_files() -> set[Path]:
    gc.collect()  # what earlier tests have left open would be closed at any time
    return set(Path("/proc/self/fd").iterdir())


def test_arrays_come_back_bit_for_bit_whatever_their_number_and_layout(aside):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((3, size)) for size in range(700)]
    arrays += [arrays[9].T, arrays[9][:, ::2], np.array([np.nan, -0.0]), np.arange(5, dtype=np.int16)]
    found = aside.call(list, arrays)
    assert [(a.dtype, a.shape, a.tobytes()) for a in found] == [(a.dtype, a.shape, a.tobytes()) for a in arrays]
    assert all(a.flags.aligned for a in found)
    assert aside.call(operator.add, 1, 2) == 3  # nothing of the call before is left


def test_what_it_raises_is_raised_here_and_it_goes_on(aside):
    with pytest.raises(UserError, match="a full disk"):
        aside.call(raise_in_words, "a full disk")
    pid = aside.pid
    assert aside.call(os.getpid) == pid


def test_it_tells_while_it_goes_on_and_ends_where_nobody_wants_to_hear(aside):
    heard: list[int] = []
    assert aside.call(count, 3, hear=heard.append) == 3
    assert heard == [0, 1, 2]

    def stop(number: int) -> None:
        raise OSError(f"no room for {number}")

    pid = aside.pid
    with pytest.raises(OSError, match="no room for 0"):  # as it is, not as one of the process's
        aside.call(count, 10**9, hear=stop)
    assert aside.pid is None
    assert is_gone(pid)


def test_a_process_that_is_lost_fails_its_call_and_the_next_has_another(aside):
    with pytest.raises(RuntimeError, match="exit status 3"):
        aside.call(os._exit, 3)
    pid = aside.call(os.getpid)
    os.kill(pid, signal.SIGKILL)
    assert aside._process is not None
    aside._process.wait(LONG_S)
    assert aside.call(os.getpid) != pid


def test_it_starts_whatever_lies_where_the_run_was_started_or_in_the_search_path(aside, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    assert aside.call(operator.add, 1, 2) == 3


@pytest.mark.parametrize("program", ["/nowhere/python", "/bin/false"])
def test_one_that_cannot_be_started_is_told_and_leaves_nothing_open(aside, monkeypatch, program):
    monkeypatch.setattr(sys, "executable", program)
    before = open_files()
    for _ in range(2):
        with pytest.raises(NotStarted, match=r"exit status 1|No such file"):
            aside.call(os.getpid)
    assert open_files() <= before
    assert aside.pid is None


def test_signals_for_the_run_are_not_for_it_and_it_sees_no_gpu(aside):
    """Neither a terminal's, which may also stop it, nor those that a batch system sends to all processes of a job."""
    assert aside.call(os.getpgrp) != os.getpgrp()
    pid = aside.pid
    of_job = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    for number in (*of_job, signal.SIGTTOU, signal.SIGTSTP):
        os.kill(pid, number)
    assert aside.call(os.getpid) == pid
    assert aside.call(os.getenv, "CUDA_VISIBLE_DEVICES") == ""


@pytest.mark.parametrize("is_busy", [False, True])
def test_it_ends_with_a_process_that_is_killed(is_busy):
    """Also out of a computation."""
    code = "import os, time; from lowrank_vit.common.aside import Aside; a = Aside(); "
    code += "print(a.call(os.getpid), flush=True)"
    code += "; a.call(time.sleep, 3600)" if is_busy else "; time.sleep(3600)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert not is_gone(pid)
        process.kill()
    wait_until(lambda: is_gone(pid), "its end")
