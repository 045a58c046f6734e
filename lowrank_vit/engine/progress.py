"""What a run prints while it goes: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lowrank_vit.data.loader import LoaderStats

T = TypeVar("T")
_NARROW = 100
"""Columns up to which the figures leave the bar only a stub."""


class Clock:
    """Splits training time into waiting for data and the rest; leaves out what lies between two epochs."""

    def __init__(self) -> None:
        self.wait_s = 0.0
        self.train_s = 0.0
        self._mark = time.perf_counter()

    def tick(self) -> None:
        """Add the time since the last tick or batch to `train_s`."""
        now = time.perf_counter()
        self.train_s += now - self._mark
        self._mark = now

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield from `batches`, adding the time spent waiting for each to `wait_s`."""
        self._mark = time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            got = time.perf_counter()
            self.wait_s += got - asked
            if batch is None:
                return
            yield batch
            self.tick()

    @property
    def wait_share(self) -> float:
        """Share of the training time spent waiting for data, 0-1."""
        return self.wait_s / self.train_s if self.train_s > 0 else 0.0


class Display:
    """The progress of all epochs. In a terminal one live line; elsewhere nothing but what `say` prints."""

    def __init__(self, total_updates: int, done_updates: int) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.fields[epoch]}"),
            BarColumn(bar_width=None if self.console.width > _NARROW else 4),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not self.console.is_terminal,
            expand=self.console.width > _NARROW,
            transient=True,
        )
        self._total, self._first, self._began = total_updates, done_updates, time.perf_counter()
        self._task: TaskID = self._progress.add_task(
            "", total=total_updates, completed=done_updates, epoch="", status="first updates"
        )

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the live one."""
        self.console.print(line)

    def update(
        self, updates: int, epoch: str, loss: float, img_per_s: float, wait_share: float, loading: LoaderStats
    ) -> None:
        """Show the newest figures; the ETA counts validation in, since it is taken from the whole run so far.

        `queue` is how many decoded batches wait on average, `decode` the median and the 90th percentile of a batch.
        """
        done = updates - self._first
        left_s = (time.perf_counter() - self._began) / max(1, done) * (self._total - updates)
        data = f"wait {wait_share:.0%} queue {loading.queue_depth:.0f}"
        data += f" decode {_short(loading.decode_ms_p50)}/{_short(loading.decode_ms_p90)} ms"
        status = f"loss {loss:.3f} {img_per_s:,.0f} img/s {data} ETA {duration(left_s)}"
        self._progress.update(self._task, completed=updates, epoch=epoch, status=status)


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """`75` as 1:15, `3700` as 1:01:40."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
