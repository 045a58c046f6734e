"""The progress that a run prints: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from lowrank_vit.common.terminal import Steady, is_unread, printable
from lowrank_vit.data.loader import LoaderStats

_NARROW = 100
"""Up to this width the bar is short, to leave room for the figures."""
_BAR_NARROW, _BAR_WIDE = 7, 27
"""Columns of bar and gaps, besides epoch and figures."""
_LINE = 200
"""Columns of the figures in a line of output that is not a terminal."""
_FREE_LINES, _THEN_EVERY_S = 100, 10.0
"""The first log intervals all have a line; after this many lines, at most one in so many seconds is printed."""


@dataclass(frozen=True)
class Figures:
    """Figures of the updates of a log interval."""

    loss: float
    lr: float
    img_per_s: float
    """Images per second, of all ranks."""
    wait_share: float
    """Share of time spent waiting for data, 0-1, on the rank that waited longest."""
    memory_gb: float
    """Largest of all ranks, GB (10^9 bytes)."""
    loading: LoaderStats
    """Of the rank that waited longest; damaged samples are those of all ranks."""
    mfu: float | None = None
    """0-1, see `model.flops.mfu`."""
    grad_norm: float | None = None
    wait_rank: int | None = None
    """The rank that waited longest; None with one process."""
    penalties: Mapping[str, float] = field(default_factory=dict[str, float])
    """Values of the regularisers, by name; empty without any."""


def in_words(figures: Figures, width: int) -> str:
    """As many figures as fit into `width` characters, the most important first.

    `queue` is the mean number of decoded batches waiting, `decode` the median and 90th percentile for a batch.
    """
    loading = figures.loading
    parts = [
        f"loss {figures.loss:.3f}",
        f"{figures.img_per_s:,.0f} img/s",
        f"wait {wait_in_words(figures.wait_share, figures.wait_rank)}",
        *([] if figures.mfu is None else [f"MFU {figures.mfu:.0%}"]),
        f"{figures.memory_gb:.1f} GB",
        f"lr {figures.lr:.1e}",
        *([] if figures.grad_norm is None else [f"|g| {figures.grad_norm:.2g}"]),
        f"queue {loading.queue_depth:.0f}",
        f"decode {_short(loading.decode_ms_p50)}/{_short(loading.decode_ms_p90)} ms",
    ]
    text = parts[0]
    for part in parts[1:]:
        if len(text) + 1 + len(part) > width:
            break
        text += f" {part}"
    return text


def wait_in_words(share: float, rank: int | None) -> str:
    """The share of time spent waiting, 0-1, in percent, and on which of several ranks."""
    return f"{share:.0%}" if rank is None else f"{share:.0%} (rank {rank})"


class Display:
    """The progress of all epochs. In a terminal one live line; elsewhere a line at each log interval and each minute.

    With very short intervals, not all of them have a line.
    """

    def __init__(self, total_updates: int, done_updates: int, *, is_silent: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=is_silent)
        # Not `is_terminal`, which is also true of a pipe where FORCE_COLOR is set, as in a notebook's %%bash.
        self._is_live = self.console.is_interactive and self.console.file.isatty()
        is_wide = self.console.width > _NARROW
        self._progress = Progress(
            TextColumn("{task.fields[epoch]}"),
            BarColumn(bar_width=None if is_wide else 4),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=is_silent or not self._is_live,
            expand=is_wide,
            transient=True,
        )
        self._room = self.console.width - (_BAR_WIDE if is_wide else _BAR_NARROW)
        self._is_silent, self._free_lines = is_silent, _FREE_LINES
        self._is_read = True
        self._steady = Steady(total_updates, None if self._is_live or is_silent else self.say, done_updates)
        self._task: TaskID = self._progress.add_task(
            "", total=total_updates, completed=done_updates, epoch="", status="first updates"
        )

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the live line."""
        self.console.print(Text(printable(line)))  # a path or an error may contain [brackets], :names: and worse
        if self._is_read and is_unread():
            self._is_read = False
            print(
                "note: nobody reads the output any more; training goes on, and its files have all",
                file=sys.stderr,
            )

    def update(self, updates: int, epoch: str, figures: Figures, *, is_interval: bool = True) -> None:
        """Show the latest figures. The ETA includes validation, since it uses the whole run so far.

        `is_interval` False: the epoch ends between two log intervals, and has its own line.
        """
        eta = f" {self._steady.eta(updates)}"
        status = in_words(figures, self._room - len(epoch) - len(eta)) + eta
        self._progress.update(self._task, completed=updates, epoch=epoch, status=status)
        every_s = 0.0 if self._free_lines > 0 else _THEN_EVERY_S
        if is_interval and self._steady.tell(updates, _place(epoch), in_words(figures, _LINE), every_s=every_s):
            self._free_lines -= 1

    def tick(self, updates: int, epoch: str) -> None:
        """Count an update; print a line without figures if there was none for a minute."""
        self._steady.tell(updates, _place(epoch))

    def within(self, total: int) -> Steady:
        """The progress of something else that may take minutes while training waits."""
        return Steady(total, None if self._is_live or self._is_silent else self.say)


def _place(epoch: str) -> str:
    number, _, of = epoch.partition("/")
    return f"epoch {number:>3}/{of}  update"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
