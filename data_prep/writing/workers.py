"""Convert many images: threads that keep their order, with bounded memory, and the bar on the terminal.

Threads rather than processes, because all the work is done in C with Python's lock released (reading, libturbojpeg,
PIL's decoders and resize): no image is copied between processes, nothing is pickled, and no worker can die alone while
others wait for it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from lowrank_vit.common.terminal import Steady, say_beside
from lowrank_vit.common.threads import beat

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 16
"""Items given to a worker at once: enough to hide the hand-over, few enough to stop quickly."""
CHUNKS_AHEAD = 3
"""Chunks in progress for each worker, which bounds the results that wait in memory for their turn."""


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


class ConversionProgress:
    """Images done, img/s, MB/s, time left and counts by reason, on stderr; nothing unless `enabled`.

    If stderr is not a terminal, a line a minute.
    """

    def __init__(self, total: int, enabled: bool) -> None:
        self._display = _TwoLines(
            "{task.description}",
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _SpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (enabled and sys.stderr.isatty()),
            expand=True,
            transient=True,
        )
        self._task = self._display.add_task("convert", total=total, data_bytes=0)
        self._data_bytes = self._done = 0
        self._steady = Steady(total, say_beside if enabled and self._display.disable else None)

    def __enter__(self) -> ConversionProgress:
        self._display.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._display.stop()

    def advance(self, data_bytes: int, reasons: Mapping[str, int], num_bad: int) -> None:
        """Count one more image, stored in `data_bytes` bytes; `reasons` and `num_bad` are the counts so far."""
        beat()
        if self._display.disable:
            self._done += 1
            self._steady.tell(self._done, "images:")
            return
        self._data_bytes += data_bytes
        self._display.counts = {**reasons, **({"bad": num_bad} if num_bad else {})}
        self._display.update(self._task, advance=1, data_bytes=self._data_bytes)

    def describe(self, what: str) -> None:
        """Name the current step."""
        self._display.update(self._task, description=what)


def counts_in_words(counts: Mapping[str, int]) -> str:
    """{"passthrough": 1200, "gray": 3} -> "1,200 passthrough, 3 gray", the most frequent first."""
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.items(), key=lambda item: -item[1]))


class _TwoLines(Progress):
    """The bar, and under it the counts by reason."""

    counts: Mapping[str, int] = {}  # replaced, never changed

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.counts:
            yield Text("  " + counts_in_words(self.counts), style="dim", overflow="ellipsis", no_wrap=True)


class _SpeedColumn(ProgressColumn):
    """Images and megabytes per second, averaged since the start."""

    def render(self, task: Task) -> Text:
        seconds = task.elapsed
        if not seconds:
            return Text("")
        megabytes = task.fields["data_bytes"] / 1e6
        return Text(f"{task.completed / seconds:,.0f} img/s {megabytes / seconds:,.1f} MB/s")
