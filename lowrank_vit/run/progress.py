"""What a run prints while it goes: a live line in a terminal, plain lines elsewhere."""

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
"""Columns up to which the figures leave the bar only a stub."""
_BAR_NARROW, _BAR_WIDE = 7, 27
"""Columns that bar and gaps take beside epoch and figures."""
_LINE = 200
"""Columns of the figures in a line of an output that is no terminal."""
_FREE_LINES, _THEN_EVERY_S = 100, 10.0
"""Lines of a fast run's log intervals that are printed one and all, and the least distance of those that follow."""


@dataclass(frozen=True)
class Figures:
    """What there is to say of the updates since the last time."""

    loss: float
    lr: float
    img_per_s: float
    """Images a second, of all ranks."""
    wait_share: float
    """Share of the time spent waiting for data, 0-1, on the rank that waited longest."""
    memory_gb: float
    """Greatest of all ranks."""
    loading: LoaderStats
    """Of the rank that waited longest; damaged samples are those of all ranks."""
    mfu: float | None = None
    """0-1, see `peak.mfu`."""
    grad_norm: float | None = None
    wait_rank: int | None = None
    """The rank that waited longest; None with one process."""
    penalties: Mapping[str, float] = field(default_factory=dict[str, float])
    """What regularisers of the loss have to say, by name; empty without any."""


def in_words(figures: Figures, width: int) -> str:
    """The figures in at most `width` characters, as many as fit; the first ones matter most.

    `queue` is how many decoded batches wait on average, `decode` the median and the 90th percentile of a batch.
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
    """The share of the time spent waiting, 0-1, and on which of several ranks that was."""
    return f"{share:.0%}" if rank is None else f"{share:.0%} (rank {rank})"


class Display:
    """The progress of all epochs. In a terminal one live line; elsewhere a line at each log interval and each minute.

    Of a run with very short intervals not all of them have a line.
    """

    def __init__(self, total_updates: int, done_updates: int, *, is_silent: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=is_silent)
        is_wide = self.console.width > _NARROW
        self._progress = Progress(
            TextColumn("{task.fields[epoch]}"),
            BarColumn(bar_width=None if is_wide else 4),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=is_silent or not self.console.is_terminal,
            expand=is_wide,
            transient=True,
        )
        self._room = self.console.width - (_BAR_WIDE if is_wide else _BAR_NARROW)
        self._is_live, self._is_silent, self._free_lines = self.console.is_terminal, is_silent, _FREE_LINES
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
        """Print a line above the live one."""
        self.console.print(Text(printable(line)))  # a path or an error may hold [brackets], :names: and worse
        if self._is_read and is_unread():
            self._is_read = False
            print("note: nobody reads the output any more; training goes on, and its files keep all", file=sys.stderr)

    def update(self, updates: int, epoch: str, figures: Figures, *, is_interval: bool = True) -> None:
        """Show the newest figures; the ETA counts validation in, since it is taken from the whole run so far.

        `is_interval` False: the epoch ends between two log intervals, and has a line of its own.
        """
        eta = f" {self._steady.eta(updates)}"
        status = in_words(figures, self._room - len(epoch) - len(eta)) + eta
        self._progress.update(self._task, completed=updates, epoch=epoch, status=status)
        every_s = 0.0 if self._free_lines > 0 else _THEN_EVERY_S
        if is_interval and self._steady.tell(updates, _place(epoch), in_words(figures, _LINE), every_s=every_s):
            self._free_lines -= 1

    def tick(self, updates: int, epoch: str) -> None:
        """An update was made; where no line of figures came for a minute, it is said without them."""
        self._steady.tell(updates, _place(epoch))

    def within(self, total: int) -> Steady:
        """The progress of something else that may take minutes, while the updates wait."""
        return Steady(total, None if self._is_live or self._is_silent else self.say)


def _place(epoch: str) -> str:
    number, _, of = epoch.partition("/")
    return f"epoch {number:>3}/{of}  update"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
