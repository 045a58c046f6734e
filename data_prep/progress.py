"""The bar that a conversion shows on a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text


class ConversionProgress:
    """Images done, img/s, MB/s and time left, on stderr; shows nothing unless `enabled` and stderr is a terminal."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._display = Progress(
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

    def advance(self, data_bytes: int) -> None:
        """Count one more image, stored in `data_bytes` bytes."""
        self._data_bytes += data_bytes
        self._display.update(self._task, advance=1, data_bytes=self._data_bytes)

    def describe(self, what: str) -> None:
        """Name the step under way."""
        self._display.update(self._task, description=what)


class _SpeedColumn(ProgressColumn):
    """Images and megabytes per second, averaged since the start."""

    def render(self, task: Task) -> Text:
        seconds = task.elapsed
        if not seconds:
            return Text("")
        megabytes = task.fields["data_bytes"] / 1e6
        return Text(f"{task.completed / seconds:,.0f} img/s {megabytes / seconds:,.1f} MB/s")
