"""Which process is torchrun's agent, and whether it is there still."""

from __future__ import annotations

import os
import signal
import subprocess

import psutil

from lowrank_vit.ranks.agent import agent, has_ended, launched
from tests.waiting import wait_until


def children(pid: int) -> list[int]:
    return [one.pid for one in psutil.Process(pid).children()]


def test_a_launcher_that_runs_the_command_in_a_child_is_not_torchrun(monkeypatch):
    """Each attempt has another one, but all have one agent: this process, which lacks the ranks' environment."""
    place = {"RANK": "1", "MASTER_PORT": "29999", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)  # of this process, where proc(5) does not show it
    shell = ["sh", "-c", "sleep 300; :"]
    launcher = subprocess.Popen(["sh", "-c", f"sh -c '{shell[2]}'; :"], start_new_session=True)
    of_another = subprocess.Popen(shell, env=os.environ | {"RANK": "0"}, start_new_session=True)
    try:
        # A process that has just begun its program has no environment for a moment; one that has a child has.
        (within,) = wait_until(lambda: children(launcher.pid))
        wait_until(lambda: children(within))
        wait_until(lambda: children(of_another.pid))
        for pid in (within, launcher.pid):
            assert launched(psutil.Process(pid)).pid == launcher.pid
        assert launched(psutil.Process(of_another.pid)).pid == of_another.pid
        assert (launched().pid, agent()) == (os.getpid(), psutil.Process(os.getppid()))
    finally:
        for process in (launcher, of_another):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_without_torchrun_or_out_of_a_container_there_is_none(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert agent() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(psutil.Process, "parent", lambda self: None)
    assert agent() is None


def test_words_in_a_parents_command_line_mean_nothing(monkeypatch):
    """An own launcher on torch's elastic_launch has none of torchrun's; a wrapper may have."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["python", "launcher.py"])
    assert agent() == psutil.Process(os.getppid())


def test_a_process_that_has_ended_is_seen_to_have():
    child = psutil.Popen(["sleep", "100"])
    assert not has_ended(psutil.Process(child.pid))
    process = psutil.Process(child.pid)
    child.kill()
    child.wait()
    assert has_ended(process)
