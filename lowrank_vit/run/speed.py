"""A run's speed and waiting times: each rank's clock, and the figures of all ranks together."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from lowrank_vit.common.devices import Spans, TimedMark
from lowrank_vit.common.resources import bytes_read
from lowrank_vit.data.loader import LoaderStats

T = TypeVar("T")


class Clock:
    """Splits this rank's training time in an epoch into waiting for data and the rest; stands still between epochs."""

    def __init__(self) -> None:
        self.wait_s = 0.0
        """Seconds so far in which the host or the GPU waited for data."""
        self.train_s = 0.0
        """Seconds so far, including the waiting."""
        self.images = 0
        """Images so far, of all ranks."""
        self._mark, self._pauses = time.perf_counter(), Spans()
        self._begun = self._logged = Stretch()

    def tick(self) -> None:
        """Add the time since the last tick or batch to `train_s`, without the pauses that the device has passed."""
        now = time.perf_counter()
        self.train_s += now - self._mark - self._pauses.taken()
        self._mark = now

    @contextmanager
    def paused(self, stream: torch.cuda.Stream | None) -> Generator[None]:
        """Do not count the time within, except for work queued on the stream before, if there is a stream."""
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
        """Restart the figures of the interval and of the epoch."""
        self._begun = self._logged = self._so_far()

    def stretches(self) -> tuple[Stretch, Stretch]:
        """The stretch since the last call, and the one since the epoch's start or `restart`."""
        now = self._so_far()
        interval, epoch = now.since(self._logged), now.since(self._begun)
        self._logged = now
        return interval, epoch

    def _so_far(self) -> Stretch:
        return Stretch(self.images, self.train_s, self.wait_s, bytes_read())


class Stretch(NamedTuple):
    """A series of updates on one rank; or on all ranks, with an array (W,) for each number."""

    images: float = 0
    """Images of all ranks."""
    train_s: float = 0.0
    wait_s: float = 0.0
    read_bytes: float = 0
    """Bytes that this rank's process read from storage."""

    def since(self, earlier: Stretch) -> Stretch:
        """The rest of this stretch after the earlier one, with which it begins."""
        return Stretch(*(b - a for a, b in zip(earlier, self, strict=True)))

    def and_then(self, later: Stretch) -> Stretch:
        """This stretch and a later one together."""
        return Stretch(*(a + b for a, b in zip(self, later, strict=True)))


class FirstUpdates:
    """The first updates of a process after warm-up, as one stretch for each rank."""

    def __init__(self, images: int) -> None:
        """`images`: the least number of images, of all ranks."""
        self._wanted, self._so_far = images, Stretch()

    def add(self, ranks: Stretch) -> Stretch | None:
        """Add the next stretch of all ranks; returns the total once, when there are enough images."""
        if self._wanted <= 0:
            return None
        self._so_far = self._so_far.and_then(ranks)
        if np.ravel(self._so_far.images)[0] < self._wanted:
            return None
        self._wanted = 0
        return self._so_far


@dataclass(frozen=True)
class Speed:
    """The speed of all ranks over a stretch of updates."""

    img_per_s: float
    """Images per second, of all ranks, by the clock of the slowest."""
    wait_share: float
    """Share of time that the rank that waited longest spent waiting for data, 0-1."""
    wait_rank: int
    """That rank."""

    @classmethod
    def of(cls, ranks: Stretch) -> Speed:
        """From the same stretch on all ranks; the share of a rank without any time is 0."""
        images, train_s, wait_s, _ = np.reshape(np.array(ranks, np.float64), (4, -1))
        shares = np.minimum(1.0, np.divide(wait_s, train_s, out=np.zeros_like(wait_s), where=train_s > 0))
        seconds, rank = float(train_s.max()), int(shares.argmax())
        return cls(float(images[0]) / seconds if seconds > 0 else 0.0, float(shares[rank]), rank)


class RankFigures(NamedTuple):
    """The figures that a rank shares with the others for a line of the log; or those of all, each an array (W,)."""

    interval: Stretch
    epoch: Stretch
    memory_gb: float
    loading: LoaderStats

    def numbers(self) -> list[float]:
        """As plain numbers, which are sent with the sums of the losses."""
        return [*self.interval, *self.epoch, self.memory_gb, *vars(self.loading).values()]

    @classmethod
    def of(cls, numbers: Any) -> RankFigures:
        """From the result of `numbers` on one rank, or from an array (F, W) of the results on all."""
        n = len(Stretch._fields)
        interval, epoch, (memory_gb, *loading) = numbers[:n], numbers[n : 2 * n], numbers[2 * n :]
        return cls(Stretch(*interval), Stretch(*epoch), memory_gb, LoaderStats(*loading))
