"""Ranks end together: the first to fail reports why, and the others end silently, wherever they are.

A rank notes its failure in torch's store. A thread of each rank reads this, and writes there that its rank is alive
(see `signs.py`). A rank that is killed can note nothing, so a second thread of each rank waits for a message of its
neighbour, and gets a lost connection instead. If torchrun's agent is gone, or the store with it, nothing would end or
restart the ranks any more: they save and end.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import psutil

from lowrank_vit.common.errors import UserError, exit_cleanly, in_short
from lowrank_vit.common.terminal import printable
from lowrank_vit.ranks.agent import agent, has_ended
from lowrank_vit.ranks.agree import OfRank
from lowrank_vit.ranks.joining import environment_world
from lowrank_vit.ranks.signs import USUAL, Limits, Signs
from lowrank_vit.ranks.waiting import pause_s
from lowrank_vit.ranks.world import World, collectives_begun

_POLL_S = 0.25
_RANK_0_FAILS_TOO_S = 20.0
"""Wait of a rank that fails before the ranks have joined: by then rank 0 has failed too, or the error is its own."""
_CLOSE_FILES_S = 10.0
"""Time for the failing rank to close its files; the others end after it."""
_AFTER_THE_CAUSE_S = 1.1
"""Wait of the other ranks before they end: torchrun takes the first to end, in whole seconds, as the cause."""
_LOST_CONNECTION_S = 5.0
"""Time for the main thread to fail by itself because of a lost connection, and to close its files."""
_WHO_S = 2.0
"""Time for the neighbour of a lost rank to report its number."""
_LOST = re.compile(r"(?i)connection (closed|reset|refused|abort)|broken pipe|remote (process|peer)")
"""Matches errors of a collective that another rank has left."""
_LATE = re.compile(r"(?is)(gloo|nccl|collective).*(timed? ?out|timeout)")
"""Matches errors of a collective that another rank has not joined in time."""
_FAILED, _GONE, _WHO = "failed", "gone", "who is lost"
"""Keys in torch's store: a rank has failed; it has closed its files; the first rank to which a connection was lost."""


class Failing:
    """Handles failures of this rank and of others; see the module's docstring."""

    def __init__(self, world: World) -> None:
        """Make one on each rank before the ranks join."""
        self._world = world
        self._is_failing = False
        self._is_cause = False
        """The error is this rank's own, not the consequence of another rank's."""
        self._exit_code: int | None = None
        """Set when the failure was reported."""
        self._agent: psutil.Process | None = None
        self._is_through = False
        """Only waiting for the other ranks is left to do."""
        self._is_training = True
        self._is_alone = False
        """The launcher is gone, and this was reported."""
        self._lost: int | None = None
        """The neighbour to which the connection was lost."""
        self.save_and_end: Callable[[], None] | None = None
        """Asks the run to save and end, once it trains; called from another thread."""

    def exit_together(self, main: Callable[[], None]) -> None:
        """Call `main` as `exit_cleanly` does; of several ranks only the first to fail reports why, and all end with
        it.
        """
        if self._world.size == 1:
            exit_cleanly(main)
            return
        try:
            main()
        except BaseException as error:
            if _is_success(error):
                raise
            self._end(self._tell(error))

    @contextlib.contextmanager
    def watched(self, limits: Limits = USUAL) -> Generator[None, None, None]:
        """During the context, threads end this process if another rank has failed, was killed or is stuck.

        All ranks call it, after they have joined. It ends when all of them have reached its end. `limits`: how long the
        others wait for a rank without progress.
        """
        if self._world.size == 1:
            yield
            return
        is_over = threading.Event()
        store, world = self._world.store.clone(), self._world
        world.progress.collectives, self._is_training = collectives_begun, limits.is_training
        signs = Signs(world.progress, store, world.rank, world.size, limits, say=world.say)
        watching = threading.Thread(target=self._watch, args=(store, is_over, signs), name="ranks", daemon=True)
        self._agent = agent()
        after, before = ((self._world.rank + step) % self._world.size for step in (1, -1))
        # A thread, since the main one may wait for a device that waits for the lost rank.
        neighbour = threading.Thread(target=self._listen, args=(after,), name="neighbour", daemon=True)
        neighbour.start()
        watching.start()
        world.start_limit = timedelta.max
        try:
            yield
            self._is_through = True  # from here on rank 0, which may have the store, may end
            self._world.wait_for_all()
            world.side.signal(before)
            neighbour.join()
        except BaseException as error:
            if not _is_success(error):
                self._tell(error)  # while there are threads, of this rank or another, which note who is lost
            if _is_of_lost(error):
                time.sleep(2 * _POLL_S)  # they may hear of it later than this one
            raise
        finally:
            # It must not be inside torch's C++ code when the interpreter ends: that aborts the process.
            is_over.set()
            watching.join()
            signs.disarm()

    @contextlib.contextmanager
    def told_at_once(self) -> Generator[None, None, None]:
        """Note and print an error that leaves this context at once, before files and threads are closed.

        Only for several ranks.
        """
        try:
            yield
        except BaseException as error:
            if self._world.size > 1 and not _is_success(error):
                self._tell(error)
            raise

    @property
    def has_lost_launcher(self) -> bool:
        """Whether the process that would restart this one is gone; a signal may have come with that."""
        return self._is_alone or bool(self._agent and has_ended(self._agent))

    def _watch(self, store: Any, is_over: threading.Event, signs: Signs) -> None:
        """End this process when another rank has noted its failure in the store, or the ranks wait too long for one."""
        read_at, pause = -math.inf, pause_s(_POLL_S, self._world.size)
        try:
            while not is_over.wait(_POLL_S):
                if self._lost is not None:
                    # The first one counts: ranks that end because of it do so a second later.
                    store.compare_set(_WHO, "", str(self._lost))
                    self._lost = None
                if self._is_failing:
                    continue
                is_due = (now := time.monotonic()) - read_at >= pause
                if is_due and store.check([_FAILED]) and not self._is_failing:
                    break
                if stuck := signs.poll(now):
                    self._end(self._tell(stuck))
                if is_due:
                    read_at = now
                    self._world.common_step.poll(store, self._world.rank, self._world.size)
                if self._agent and has_ended(self._agent):
                    self._lose_launcher(
                        f"torchrun's agent on {socket.gethostname()} (process {self._agent.pid}) is gone"
                    )
            else:
                return
        except RuntimeError as error:
            self._go_on_without_store(error, is_over, signs)
            return
        with contextlib.suppress(RuntimeError):
            store.wait([_GONE], timedelta(seconds=_CLOSE_FILES_S))
        time.sleep(_AFTER_THE_CAUSE_S)
        os._exit(1)  # the main thread may sit in a collective that never ends

    def _go_on_without_store(self, error: RuntimeError, is_over: threading.Event, signs: Signs) -> None:
        """Handle the loss of the store with its process: rank 0, which is then reported as gone, or torchrun's
        agent.
        """
        self._world.common_step.give_up()
        if self._is_through or is_over.wait(_POLL_S):
            return
        if not _is_of_agent():
            time.sleep(_LOST_CONNECTION_S)
            if not self._is_failing:
                self._end(self._tell(_gone(0, error)))
            return
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        self._lose_launcher(f"torchrun's store at {where} is gone, and so may be its agent")
        while not is_over.wait(_POLL_S):
            if not self._is_failing and (stuck := signs.alone(time.monotonic())):
                self._end(self._tell(stuck))

    def _lose_launcher(self, what: str) -> None:
        """Let the run save and end, since nothing supervises it; at once if nothing is trained yet."""
        if self._is_alone or self._is_failing or self._is_through:
            return
        self._is_alone = True
        if self.save_and_end is None:
            advice = "Nothing was trained yet; start it again." if self._is_training else "Start it again."
            code = self._tell(_LauncherLost(f"{what}. {advice}"))
            time.sleep(_AFTER_THE_CAUSE_S)  # the other ranks notice it themselves, and would report this one as lost
            self._end(code)
        if self._world.local_rank == 0:
            print(f"warning: rank {self._world.rank}: {what}. The run saves and ends.", file=sys.stderr, flush=True)
        self.save_and_end()

    def _listen(self, after: int) -> None:
        """Wait for the next rank's final signal; a lost connection instead ends this process."""
        try:
            self._world.side.wait_for(after)
        except RuntimeError as error:
            self._lost = after  # reported by the other thread, which has a connection to the store
            time.sleep(_LOST_CONNECTION_S)
            if not self._is_failing:
                self._end(self._tell(_gone(after, error)))

    def _tell(self, error: BaseException) -> int:
        """Note that this rank fails and, if it is the first, report why; returns the exit code. Only the first call
        acts.
        """
        if self._exit_code is not None:
            return self._exit_code
        self._is_failing, self._exit_code, is_joined = True, 1, self._world.store is not None
        if not is_joined and not self._world.is_first and not isinstance(error, OfRank | KeyboardInterrupt):
            # Most likely a mistake on the command line, on all ranks: rank 0 reports it, and torchrun ends this rank.
            time.sleep(_RANK_0_FAILS_TOO_S)
        self._is_cause = not is_joined or self._is_first_to_fail(error)
        if self._is_cause:
            error = self._named(error) if is_joined else error
            record(error)
            self._exit_code = _speak(error)
            sys.stdout.flush()
            sys.stderr.flush()
        return self._exit_code

    def _is_first_to_fail(self, error: BaseException) -> bool:
        world, rank = self._world, str(self._world.rank)
        try:
            return world.store.compare_set(_FAILED, "", rank).decode() == rank
        except RuntimeError:  # the store is gone: one rank per host reports it, and every rank reports its own errors
            if isinstance(error, _LauncherLost):
                return world.local_rank == 0
            return not _is_of_lost(error) or world.local_rank == 0 or world.rank == 1

    def _end(self, code: int) -> NoReturn:
        if self._is_cause and self._world.store is not None:
            with contextlib.suppress(RuntimeError):
                self._world.store.set(_GONE, "")
        elif not self._is_cause:
            time.sleep(_AFTER_THE_CAUSE_S)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # other threads may sit in a collective that never ends

    def _named(self, error: BaseException) -> BaseException:
        """The error with its rank, and as a message for the user if another rank is gone."""
        if isinstance(error, RuntimeError) and _LOST.search(str(error)):
            error = _gone(self._who_is_lost(), error)
        elif isinstance(error, RuntimeError) and _LATE.search(str(error)):
            error = UserError(f"the other ranks have not come within torch's own limit ({in_short(error)}).")
        rank = error.rank if isinstance(error, OfRank) else self._world.rank
        return UserError(f"rank {rank}: {error}") if isinstance(error, UserError) else error

    def _who_is_lost(self) -> int | None:
        """The rank to which its neighbour has lost the connection, if known."""
        store, end = self._world.store, time.monotonic() + _WHO_S
        try:
            while not store.check([_WHO]):
                if time.monotonic() > end:
                    return None
                time.sleep(_POLL_S / 5)
            return int(store.get(_WHO))
        except RuntimeError:
            return None if _is_of_agent() else 0  # rank 0 has the store


def as_rank(work: Callable[[World, Failing], None]) -> None:
    """Do a command's work as the rank of the launcher's environment, and end together with the other ranks.

    The world is not joined yet. With one process, errors of `work` are raised.
    """
    world = environment_world()
    failing = Failing(world)
    if world.size > 1:
        failing.exit_together(lambda: work(world, failing))
        return
    try:
        work(world, failing)
    except BaseException as error:
        record(error)  # for a torchrun with one process
        raise


def record(error: BaseException) -> None:
    """Note an error for torchrun's own summary, which comes last: its message for the user, otherwise its traceback.

    torch's `record_exception` would note the traceback of the exception being handled, of 60 lines or more. Without
    torchrun nothing is noted.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or _is_success(error):
        return
    is_told = isinstance(error, UserError | KeyboardInterrupt | SystemExit)
    name = "error" if isinstance(error, UserError) else type(error).__name__
    notes = getattr(error, "__notes__", [])
    text = "\n".join([f"{name}: {error}", *notes]) if is_told else "".join(traceback.format_exception(error))
    more = {"py_callstack": printable(text), "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": printable(text), "extraInfo": more}}), "utf-8")


def _is_of_agent() -> bool:
    """Whether the store is in torchrun's agent, not in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_of_lost(error: BaseException) -> bool:
    return isinstance(error, Gone) or (isinstance(error, RuntimeError) and bool(_LOST.search(str(error))))


class _LauncherLost(UserError):
    """Nothing would end or restart this process any more; all ranks of the host find this out."""


class Gone(UserError):
    """Another rank's process has ended without a report."""


def _is_success(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and not error.code


def _gone(rank: int | None, error: BaseException) -> Gone:
    who = "another rank" if rank is None else f"rank {rank}"
    return Gone(
        f"{who} is gone without a word ({in_short(error)}). It may have been killed, for example for want of "
        "memory; see the system's log. Go on from the last checkpoint with --resume."
    )


def _speak(error: BaseException) -> int:
    """Print an error as `exit_cleanly` does; returns the exit code."""

    def again() -> NoReturn:
        raise error

    try:
        exit_cleanly(again)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as unexpected:
        sys.excepthook(type(unexpected), unexpected, unexpected.__traceback__)
    return 1
