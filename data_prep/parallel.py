"""Map a function over many items with worker processes: in order, with bounded memory, and never hanging."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from data_prep.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 16
"""Items sent to a worker at once: enough to hide the hand-over, few enough to stop quickly."""
CHUNKS_AHEAD = 4
"""Chunks under way for each worker, which bounds the results that wait in memory for their turn."""


def map_ordered(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` for every item, in order; in this process if `workers` is 0 or 1.

    `function` and the items must pickle. An exception of `function` is raised here. Close the generator (for example
    with `contextlib.closing`) when you leave it early, so that the workers end. Raises `UserError` if a worker dies.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    rest = iter(items)
    pending: deque[Future[list[Result]]] = deque()
    # Not "fork": the caller may run threads (torch, rich), and a forked lock may stay locked for ever.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        while True:
            while len(pending) < CHUNKS_AHEAD * workers and (chunk := list(islice(rest, CHUNK))):
                pending.append(pool.submit(_run_chunk, function, chunk))
            if not pending:
                return
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, most often because memory ran out. Try again with fewer --workers; "
            "with --workers 1 a crash shows where it comes from."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_chunk(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; only the parent should speak about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    # A killed parent closes no queue, so without this its workers would wait for work for ever.
    threading.Thread(target=follow_parent, daemon=True).start()
