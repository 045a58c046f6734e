"""The live line of `validate` and `inference`: images done, img/s and time left, on stderr if that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from lowrank_vit.data.batch import Batch
from lowrank_vit.score.evaluate import Batches


class ScoringProgress:
    """Counts images; shows nothing where stderr is no terminal. Use as a context."""

    def __init__(self, total: int) -> None:
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _Speed(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            expand=True,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> ScoringProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        """Count more images."""
        self._bar.update(self._task, advance=images)


class Counted:
    """A loader whose batches are counted when the next one is asked for, so when they were scored."""

    def __init__(self, loader: Batches, progress: ScoringProgress) -> None:
        self._loader, self._progress = loader, progress

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Give the loader's batches."""
        for batch in self._loader.batches(epoch):
            yield batch
            self._progress.advance(len(batch))


class _Speed(ProgressColumn):
    """Images a second, averaged since the start."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed / task.elapsed:,.0f} img/s" if task.elapsed else "")
