"""torchrun's agents and their ranks on this machine, which can be waited for and killed, see `tests/kill_ranks.py`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from tests import killed_rank
from tests.kill_runs import ROOT, forked, has_ended, spawned
from tests.killed_rank import TRACES, Place
from tests.waiting import LONG_S, free_port

RENDEZVOUS = "last_call_timeout=3,keep_alive_interval=2,keep_alive_max_attempt=3"
"""A node that is lost is known after 6 s, and another is waited for 3 s."""
Victim = Literal["rank", "node", "agent"]
EXIT_S = 10.0
"""Agents wait so long for one another in the end, in place of torch's 300 s."""


class Node:
    """One agent of torchrun and the ranks that it starts."""

    def __init__(
        self, options: list[str], argv: list[str], environment: dict[str, str], log: Path, *, is_whole: bool
    ) -> None:
        """Start it. `is_whole`: agent and ranks are processes of their own instead of forked ones."""
        if is_whole:
            line = ["-m", "torch.distributed.run", *options, "-m", killed_rank.__name__, *argv]
            self.pid = spawned(line, environment, log)
        else:
            line = [*options, "--start-method=fork", "--run-path", str(killed_rank.__file__), *argv]
            self.pid = forked(lambda: _agent(line), environment, log)
        self._code: int | None = None

    def ranks(self) -> list[int]:
        """Processes of its ranks that live."""
        return [pid for pid, parent in _processes() if parent == self.pid]

    def code(self) -> int | None:
        """The exit code, a signal's negative; None while it lives."""
        if self._code is None and has_ended(self.pid):
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def kill(self) -> None:
        """SIGKILL for all of it."""
        if self.code() is None:
            for pid in (self.pid, *self.ranks()):
                _send(pid, signal.SIGKILL)


def _agent(line: list[str]) -> None:
    os.chdir(ROOT)
    os.setsid()
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.run import main

    # Where a rank is killed in its exit, the agents of the others, which have ended well, wait so long for its agent.
    made = LocalElasticAgent.__init__
    LocalElasticAgent.__init__ = lambda *given, **named: made(*given, **{**named, "exit_barrier_timeout": EXIT_S})
    main(line)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _processes() -> Iterator[tuple[int, int]]:
    """Every process that lives, and its parent's."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                yield int(process.name), int(parent)


def _state(pid: int) -> str:
    """The process's, as /proc has it; Z or X for one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def lives(pid: int) -> bool:
    """Whether the process has not ended."""
    return _state(pid) not in "ZX"


class Fault(Exception):
    """What is wrong with a run, in words."""


class Launch:
    """One training under torchrun, from the agents' start to their end."""

    def __init__(self, argv: list[str], home: Path, *, nodes: int, is_whole: bool, restarts: int) -> None:
        """Begin the training command of `argv` on one node of two ranks or on two of one each, with logs in `home`.

        `is_whole`: see `Node`.
        """
        self._argv, self._is_whole, self._traces, self._log = argv, is_whole, home / "traces", home / "all.log"
        self._traces.mkdir(exist_ok=True)
        for trace in self._traces.iterdir():
            trace.unlink()
        self._environment = {TRACES: str(self._traces), "PYTHONPATH": str(ROOT)}
        self._options = [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
        if nodes == 1:
            self._options += ["--standalone", "--nproc-per-node=2"]
        else:
            where = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
            self._options += [*where, "--rdzv-id=kills", f"--rdzv-conf={RENDEZVOUS}", "--nnodes=1:2"]
            self._options += ["--nproc-per-node=1"]
            # Without it torch 2.14 gives a node that comes later a port at which nobody listens.
            self._environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self._lost, self.has_lost_store = list[Node](), False
        self._old = set[int]()
        """Ranks that lived when the last kill was."""
        self.began, self.nodes = time.monotonic(), list[Node]()
        for n in range(nodes):
            if n:
                time.sleep(1)  # so the first one has the agents' store
            self.add()

    def add(self) -> None:
        """Start a node."""
        line = self._options, self._argv, self._environment, self._log
        self.nodes.append(Node(*line, is_whole=self._is_whole))

    def is_over(self, meanwhile: str) -> bool:
        """Whether all nodes that were not killed have ended. Raises `Fault` if no rank has come to the end.

        torchrun ends a node with 1 that came when the others were through, and one whose rank was killed then.
        """
        codes = [node.code() for node in self.nodes]
        if None in codes:
            return False
        if 0 not in codes and not self.has_lost_store:
            raise Fault(f"the launch ended with {codes} while {meanwhile} was waited for: {self.last_words()}")
        return True

    def places(self) -> list[Place]:
        """What ranks of the attempt that is running are at, as far as they have come to tell."""
        found = list[Place]()
        for trace in self._traces.iterdir():
            pid = int(trace.name)
            if not lives(pid):
                trace.unlink(missing_ok=True)
            elif pid not in self._old and (place := Place.read(trace)):
                found.append(place)
        return found

    def wait_for(self, is_there: Callable[[list[Place]], bool], what: str) -> list[Place] | None:
        """Wait for places that fit; None if the launch ends before, which must be without a fault."""
        until = time.monotonic() + LONG_S
        while time.monotonic() < until:
            places = self.places()
            if places and is_there(places):
                return places
            if self.is_over(what):
                return None
            time.sleep(0.002)
        raise Fault(f"{what} never came: {self.last_words()}")

    def wait_for_start(self) -> list[int] | None:
        """Wait for processes of a new attempt; None if the launch ends before."""
        until = time.monotonic() + LONG_S
        while time.monotonic() < until:
            if ranks := [pid for node in self.nodes for pid in node.ranks() if pid not in self._old]:
                return ranks
            if self.is_over("a start"):
                return None
            time.sleep(0.02)
        raise Fault(f"no attempt followed: {self.last_words()}")

    def kill(self, pid: int, what: Victim) -> Place | None:
        """SIGKILL for one rank, for its node or for its agent alone; what the rank was at.

        None if it could not be killed then. Ranks of the next attempt are those that are new.
        """
        node = next((node for node in self.nodes if pid in node.ranks()), None)
        _send(pid, signal.SIGSTOP)  # so that what it is at stays the same
        while (state := _state(pid)) not in "TZX":
            time.sleep(0.001)
        place = Place.read(self._traces / str(pid)) or Place(pid, -1, 0, 0, "start")
        # A forked rank waits in its exit for its agent, by a lock that is never freed if the rank is killed there.
        if not node or state != "T" or (place.phase == "exit" and not self._is_whole):
            _send(pid, signal.SIGCONT)
            return None
        self._old = {one for node in self.nodes for one in node.ranks()}
        if what != "rank":
            self.has_lost_store |= node is self.nodes[0]
            self.nodes.remove(node)
            self._lost.append(node)
        if what == "node":
            node.kill()
        _send(node.pid if what == "agent" else pid, signal.SIGKILL)
        _send(pid, signal.SIGCONT)
        return place

    def wait_for_ranks(self) -> float:
        """Wait until the ranks that lived at the last kill have ended; seconds."""
        began = time.monotonic()
        while any(lives(pid) for pid in self._old):
            if time.monotonic() - began > LONG_S:
                raise Fault(f"ranks are left {LONG_S:.0f} s after their launcher: {self.last_words()}")
            time.sleep(0.01)
        return time.monotonic() - began

    def is_of_first_node(self, pid: int) -> bool:
        """Whether the rank is on the node that has the agents' store."""
        return pid in self.nodes[0].ranks()

    def end(self) -> None:
        """Leave no process behind."""
        for node in (*self.nodes, *self._lost):
            node.kill()
            until = time.monotonic() + 10
            while node.code() is None and time.monotonic() < until:
                time.sleep(0.01)
        for pid in self._old:
            if (self._traces / str(pid)).exists():  # no other process has that number meanwhile
                _send(pid, signal.SIGKILL)

    def last_words(self) -> str:
        """The end of the log, without torchrun's summary."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
        telling = [line for line in lines if re.match(r"error: |\w*(Error|Exception)\b", line)]
        return " | ".join(telling[-3:] or lines[-3:])
