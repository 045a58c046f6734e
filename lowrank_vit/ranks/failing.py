"""Ranks end together: the first to fail says why, and the others end without a word, wherever they are.

A rank notes in torch's store that it fails; a thread of each rank reads that. A rank that is killed can note nothing,
so a second thread of each waits for word of its neighbour, which comes as a lost connection then.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from lowrank_vit.common.errors import UserError, exit_cleanly

if TYPE_CHECKING:
    from lowrank_vit.ranks.world import World

_POLL_S = 0.25
_ONLY_OURS_S = 20.0
"""After so long without rank 0's failing, too, an early failure is this rank's own."""
_UNWIND_S = 10.0
"""For the rank that fails to close its files; then the others end all the same."""
_NOTICE_S = 1.1
"""So much later than the rank that fails the others end: torchrun takes the first, by whole seconds, for the cause."""
_NOT_OURS_S = 5.0
"""For the main thread to fail of a lost connection by itself, and to close its files."""
_FAILED, _GONE = "failed", "gone"


@contextlib.contextmanager
def watched(world: World) -> Generator[None, None, None]:
    """While it lasts threads end this process when another rank has failed or was killed. Every rank calls it."""
    is_over = threading.Event()
    watching = threading.Thread(target=_watch, args=(world, world.store.clone(), is_over), name="ranks", daemon=True)
    neighbour = _Neighbour(world)
    watching.start()
    try:
        yield
        neighbour.close()
    finally:
        # It must not be inside torch's C++ code when the interpreter ends: that aborts the process.
        is_over.set()
        watching.join()


def _watch(world: World, store: Any, is_over: threading.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the store goes away with the run
        while not is_over.wait(_POLL_S):
            if store.check([_FAILED]) and not world.is_failing:
                break
        else:
            return
        with contextlib.suppress(RuntimeError):
            store.wait([_GONE], timedelta(seconds=_UNWIND_S))
        time.sleep(_NOTICE_S)
        os._exit(1)  # the main thread may sit in a collective that never ends


class _Neighbour:
    """Waits for the word of the next rank that all is well; a lost connection instead of it ends this process.

    Over the host's network, and in a thread: the main thread may wait for a device that waits for the lost rank.
    """

    def __init__(self, world: World) -> None:
        import torch.distributed as dist

        self._world, self._dist = world, dist
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self._next, self._before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        self._thread = threading.Thread(target=self._listen, name="neighbour", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        try:
            self._dist.recv(torch.zeros(1), src=self._next, group=self._group)
        except RuntimeError as error:
            time.sleep(_NOT_OURS_S)
            if not self._world.is_failing:
                code = _tell(_gone(self._next, error), self._world)
                _end(code, self._world)

    def close(self) -> None:
        """Give the rank before its word, and wait for that of the next."""
        self._dist.send(torch.zeros(1), dst=self._before, group=self._group)
        self._thread.join()


@contextlib.contextmanager
def told_at_once(world: World) -> Generator[None, None, None]:
    """An error that leaves it is noted and printed there and then, before files and threads are closed.

    For several ranks; alone a process has nobody to tell before it ends.
    """
    try:
        yield
    except BaseException as error:
        if world.size > 1 and not _is_success(error):
            _tell(error, world)
        raise


def exit_together(main: Callable[[], None], world: World) -> None:
    """`exit_cleanly` for one of several ranks: only the first to fail says why, and the others end with it."""
    if world.size == 1:
        exit_cleanly(main)
        return
    try:
        main()
    except BaseException as error:
        if _is_success(error):
            raise
        _end(_tell(error, world), world)


def _is_success(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and not error.code


def _tell(error: BaseException, world: World) -> int:
    """Note that this rank fails and, if it is the first, say why; the exit code. A second call does nothing."""
    if world.exit_code is not None:
        return world.exit_code
    world.is_failing, world.exit_code, is_joined = True, 1, world.store is not None
    if not is_joined and not world.is_first:
        # Most likely a mistake on the command line, which all ranks meet: rank 0 says so, and torchrun then ends us.
        time.sleep(_ONLY_OURS_S)
    world.is_root = not is_joined or _is_first_to_fail(world)
    if world.is_root:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)  # for torchrun's own summary, which comes last
        world.exit_code = _speak(_named(error, world) if is_joined else error)
        sys.stdout.flush()
        sys.stderr.flush()
    return world.exit_code


def _is_first_to_fail(world: World) -> bool:
    with contextlib.suppress(RuntimeError):
        return world.store.compare_set(_FAILED, "", str(world.rank)).decode() == str(world.rank)
    return False  # the store is gone, and with it rank 0


def _end(code: int, world: World) -> NoReturn:
    if world.is_root and world.store is not None:
        with contextlib.suppress(RuntimeError):
            world.store.set(_GONE, "")
    elif not world.is_root:
        time.sleep(_NOTICE_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # other threads may sit in a collective that never ends


def _gone(rank: int | None, error: BaseException) -> UserError:
    who = "another rank" if rank is None else f"rank {rank}"
    reason = str(error).partition("\n")[0].rstrip(".")
    return UserError(
        f"{who} is gone without a word ({reason}). It may have been killed, for example for want of memory; see the "
        "system's log. Go on from the last checkpoint with --resume."
    )


def _named(error: BaseException, world: World) -> BaseException:
    """The error with the rank it happened on, and in the user's words where another rank is gone."""
    if isinstance(error, RuntimeError) and re.search(r"(?i)connection (closed|reset|refused)|gloo|nccl", str(error)):
        error = _gone(None, error)
    return UserError(f"rank {world.rank}: {error}") if isinstance(error, UserError) else error


def _speak(error: BaseException) -> int:
    """Print as `exit_cleanly` does; the exit code."""

    def again() -> NoReturn:
        raise error

    try:
        exit_cleanly(again)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as unexpected:
        sys.excepthook(type(unexpected), unexpected, unexpected.__traceback__)
    return 1
