"""Map a function over many items with threads: in order, with bounded memory.

Threads rather than processes, because all the work is done in C with Python's lock released (reading, libturbojpeg,
PIL's decoders and resize): no image is copied between processes, nothing needs to pickle, and there is no worker that
could die alone and be waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 16
"""Items given to a worker at once: enough to hide the hand-over, few enough to stop quickly."""
CHUNKS_AHEAD = 3
"""Chunks under way for each worker, which bounds the results that wait in memory for their turn."""


def map_ordered(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` for every item, in order; in this thread if `workers` is 0 or 1.

    At most `CHUNKS_AHEAD * workers * CHUNK` results exist at a time. An exception of `function` is raised here. Close
    the generator (for example with `contextlib.closing`) when you leave it early, so that the threads end.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    rest = iter(items)
    pending: deque[Future[list[Result]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="map_ordered")
    try:
        while True:
            while len(pending) < CHUNKS_AHEAD * workers and (chunk := list(islice(rest, CHUNK))):
                pending.append(pool.submit(_run_chunk, function, chunk))
            if not pending:
                return
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_chunk(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]
