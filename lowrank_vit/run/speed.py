"""How fast a run is and what it waits for: each rank's clock, and the figures of all ranks together."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from lowrank_vit.common.devices import Spans, TimedMark
from lowrank_vit.common.resources import bytes_read
from lowrank_vit.data.loader import LoaderStats

T = TypeVar("T")


class Clock:
    """Splits an epoch's training time on this rank into waiting for data and the rest; pauses between two epochs."""

    def __init__(self) -> None:
        self.wait_s = 0.0
        """Seconds so far that the host or the GPU waited for data."""
        self.train_s = 0.0
        """Seconds so far, with that."""
        self.images = 0
        """Images so far, of all ranks."""
        self._mark, self._pauses = time.perf_counter(), Spans()
        self._begun = self._logged = Stretch()

    def tick(self) -> None:
        """Add the time since the last tick or batch to `train_s`, without pauses that the device has come past."""
        now = time.perf_counter()
        self.train_s += now - self._mark - self._pauses.taken()
        self._mark = now

    @contextmanager
    def paused(self, stream: torch.cuda.Stream | None) -> Generator[None]:
        """Leave out what others do meanwhile, but not what the stream, where there is one, was asked to do before."""
        begin = TimedMark.of(stream)
        yield
        self._pauses.add(begin, TimedMark.of(stream))

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield from `batches`, adding the time spent waiting for each to `wait_s`."""
        self._mark = time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            got = time.perf_counter()
            self.wait_s += got - asked
            if batch is None:
                self.train_s -= self._pauses.taken(waits=True)
                return
            yield batch
            self.tick()

    def restart(self) -> None:
        """Leave what was so far out of the figures of the interval and of the epoch."""
        self._begun = self._logged = self._so_far()

    def stretches(self) -> tuple[Stretch, Stretch]:
        """What came since the last call, and since the epoch began or `restart`."""
        now = self._so_far()
        interval, epoch = now.since(self._logged), now.since(self._begun)
        self._logged = now
        return interval, epoch

    def _so_far(self) -> Stretch:
        return Stretch(self.images, self.train_s, self.wait_s, bytes_read())


class Stretch(NamedTuple):
    """Updates that one rank took part in."""

    images: float = 0
    """Of all ranks."""
    train_s: float = 0.0
    wait_s: float = 0.0
    read_bytes: float = 0
    """From storage, by this rank's process."""

    def since(self, earlier: Stretch) -> Stretch:
        """The rest of this stretch, which begins with the earlier one."""
        return Stretch(*(b - a for a, b in zip(earlier, self, strict=True)))

    def and_then(self, later: Stretch) -> Stretch:
        """This stretch and a later one as one."""
        return Stretch(*(a + b for a, b in zip(self, later, strict=True)))

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for data, 0-1; 0 for no time."""
        return min(1.0, self.wait_s / self.train_s) if self.train_s > 0 else 0.0


class FirstUpdates:
    """The first updates of a process, once it is warm, as one stretch a rank."""

    def __init__(self, images: int) -> None:
        """`images`: of all ranks, so many at least."""
        self._wanted, self._so_far = images, list[Stretch]()

    def add(self, stretches: Sequence[Stretch]) -> list[Stretch] | None:
        """Add what followed on each rank; returns all of it when it is enough, once."""
        if self._wanted <= 0:
            return None
        before = self._so_far or [Stretch()] * len(stretches)
        self._so_far = [a.and_then(b) for a, b in zip(before, stretches, strict=True)]
        if self._so_far[0].images < self._wanted:
            return None
        self._wanted = 0
        return self._so_far


@dataclass(frozen=True)
class Speed:
    """A stretch of updates as all ranks saw it."""

    img_per_s: float
    """Images a second, of all ranks, by the clock of the slowest."""
    wait_share: float
    """Share of the time that the rank spent waiting for data which waited longest, 0-1."""
    wait_rank: int
    """That rank."""

    @classmethod
    def of(cls, stretches: Sequence[Stretch]) -> Speed:
        """Of the same stretch on each rank, by rank."""
        shares = [one.wait_share for one in stretches]
        seconds, longest = max(one.train_s for one in stretches), max(shares)
        img_per_s = stretches[0].images / seconds if seconds > 0 else 0.0
        return cls(img_per_s, longest, shares.index(longest))


class RankFigures(NamedTuple):
    """What one rank tells the others where a line of the log is due."""

    interval: Stretch
    epoch: Stretch
    memory_gb: float
    loading: LoaderStats

    def numbers(self) -> list[float]:
        """As plain numbers, which travel with the sums of the losses."""
        return [*self.interval, *self.epoch, self.memory_gb, *vars(self.loading).values()]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> RankFigures:
        """Of what `numbers` returned."""
        n = len(Stretch._fields)
        interval, epoch, (memory_gb, *loading) = numbers[:n], numbers[n : 2 * n], numbers[2 * n :]
        stats = LoaderStats(*loading)  # type: ignore[arg-type]
        return cls(Stretch(*interval), Stretch(*epoch), memory_gb, stats)
