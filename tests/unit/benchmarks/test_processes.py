"""Processes that benches run in: their limits hold, and what went wrong is said. No test asserts a time."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from benchmarks.harness import processes
from benchmarks.harness.processes import SharedProcess
from lowrank_vit.common.errors import UserError
from tests.waiting import LONG_S, is_gone, wait_until


def test_a_process_tells_why_it_failed(capfd):
    processes.run_limited([sys.executable, "-c", "print('table')"], LONG_S)
    assert capfd.readouterr().out == ""
    for code, reason in (
        ("import sys; sys.exit('error: --count is 0')", "ended with code 1: error: --count is 0"),
        ("import sys; sys.exit(3)", r"ended with code 3\."),
        ("import os; os.kill(os.getpid(), 9)", r"killed by signal 9 \(out of memory\?\)"),
    ):
        with pytest.raises(UserError, match=reason):
            processes.run_limited([sys.executable, "-c", code], LONG_S)
    assert "error: --count is 0" in capfd.readouterr().err


def test_a_bench_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    child, start = tmp_path / "child", processes._started

    def start_both(*given):  # whose time is counted from then on
        started = start(*given)
        wait_until(lambda: child.exists() and child.read_text(), "the child")
        return started

    monkeypatch.setattr(processes, "_started", start_both)
    # Neither listens to Ctrl-C.
    code = f"""
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
if os.fork() == 0:
    open({str(child)!r}, "w").write(str(os.getpid()))
time.sleep(600)
"""
    with pytest.raises(UserError, match="ended after 1 s, the time it was given"):
        processes.run_limited([sys.executable, "-c", code], 1)
    wait_until(lambda: is_gone(int(child.read_text())), "the child's end")


BODY = """
import ctypes, json, os, sys
from types import SimpleNamespace
from benchmarks.harness.processes import serve
from lowrank_vit.common.errors import UserError

def fail():
    raise RuntimeError("an illegal memory access was encountered")

def run(arguments):
    kind, path = arguments[0], arguments[-1]
    print("a table")
    if kind == "wrong":
        raise UserError("--count is 0")
    if kind == "broken":
        sys.exit(1)
    if kind == "lost":
        sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=fail))
    if kind == "crash":
        os.kill(os.getpid(), 11)
    open(path, "w").write(json.dumps([os.getpid(), arguments]))
    if kind == "hang":  # outside of Python, and with the lock held: neither a signal nor a thread gets through
        ctypes.PyDLL(None).sleep(600)

serve(run)
"""


@pytest.fixture
def shared(tmp_path):
    script = tmp_path / "body.py"
    script.write_text(textwrap.dedent(BODY))
    with SharedProcess([sys.executable, str(script)], grace_s=0.2) as process:
        yield process


@pytest.fixture(autouse=True)
def _project_is_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))


def pid_of(path: Path) -> int:
    return json.loads(path.read_text())[0]


def test_benches_share_a_process_until_one_ends_it(shared, tmp_path, capfd):
    first, second, third = (tmp_path / f"{n}.json" for n in range(3))
    shared.start_bench(["good", "-b", "4"], first, LONG_S)
    assert json.loads(first.read_text())[1] == ["good", "-b", "4", "--json", str(first)]
    for kind, reason in (("wrong", "^--count is 0$"), ("broken", r"^ended with code 1\.$")):
        with pytest.raises(UserError, match=reason):
            shared.start_bench([kind], second, LONG_S)
    shared.start_bench(["good"], second, LONG_S)
    assert pid_of(second) == pid_of(first)
    with pytest.raises(UserError, match=r"killed by signal 11\."):
        shared.start_bench(["crash"], third, LONG_S)
    shared.start_bench(["lost"], third, LONG_S)  # after which a GPU does nothing more in this process
    assert pid_of(third) != pid_of(first)
    lost = pid_of(third)
    shared.start_bench(["good"], third, LONG_S)
    assert pid_of(third) != lost
    assert "a table" not in capfd.readouterr().out


def test_a_bench_that_hangs_outside_of_python_is_ended_and_keeps_what_it_has(shared, tmp_path, monkeypatch):
    first, hung, after = (tmp_path / f"{name}.json" for name in ("first", "hung", "after"))
    shared.start_bench(["good"], first, LONG_S)
    answers, get = shared._answers, shared._answers.get

    def get_when_it_hangs(timeout):  # which is counted from then on
        wait_until(lambda: hung.exists() and hung.read_text(), "its beginning")
        return get(timeout=timeout)

    monkeypatch.setattr(answers, "get", get_when_it_hangs)
    with pytest.raises(UserError, match="ended after 1 s, the time it was given"):
        shared.start_bench(["hang"], hung, 1)
    assert pid_of(hung) == pid_of(first)
    wait_until(lambda: is_gone(pid_of(hung)), "its end")
    shared.start_bench(["good"], after, LONG_S)
    assert pid_of(after) != pid_of(hung)


def test_the_process_ends_with_its_owner(shared, tmp_path):
    shared.start_bench(["good"], tmp_path / "a.json", LONG_S)
    shared.close()
    assert not psutil.pid_exists(pid_of(tmp_path / "a.json"))
    shared.close()  # a second time does nothing
