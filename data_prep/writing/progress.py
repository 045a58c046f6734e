"""The bar that a conversion shows on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text


class ConversionProgress:
    """Images done, img/s, MB/s, time left and counts by reason, on stderr.

    Shows nothing unless `enabled` and stderr is a terminal.
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
        self._data_bytes = 0

    def __enter__(self) -> ConversionProgress:
        self._display.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._display.stop()

    def advance(self, data_bytes: int, reasons: Mapping[str, int], num_bad: int) -> None:
        """Count one more image, stored in `data_bytes` bytes; `reasons` and `num_bad` are the counts so far."""
        if self._display.disable:
            return
        self._data_bytes += data_bytes
        self._display.counts = {**reasons, **({"bad": num_bad} if num_bad else {})}
        self._display.update(self._task, advance=1, data_bytes=self._data_bytes)

    def describe(self, what: str) -> None:
        """Name the step under way."""
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
