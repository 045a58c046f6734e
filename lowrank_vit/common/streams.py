"""The hand-over of work between CUDA streams: an event marks it, another stream waits, memory lives until it was read.

Nothing here makes the host wait but what says so. Without CUDA there are no streams: they are None, and all is done as
soon as it was asked for.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def side_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream | None:
    """A stream of one's own beside the device's default one; None without CUDA. Priority 0 is the lowest, -1 above."""
    return torch.cuda.Stream(device, priority=priority) if device.type == "cuda" else None


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that this thread's work on the device goes to; None without CUDA."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """A context in which this thread's work, and its device, are those of the stream."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


@dataclass(frozen=True)
class Mark:
    """A point in a stream: what had been asked of it when the mark was made."""

    event: torch.cuda.Event | None
    """None without CUDA, where it is always reached."""

    @classmethod
    def of(cls, stream: torch.cuda.Stream | None) -> Mark:
        """Make a mark behind all that was asked of the stream so far."""
        event: Any = None if stream is None else stream.record_event()
        return cls(event)

    def hand_over(self, stream: torch.cuda.Stream | None, *tensors: Tensor) -> None:
        """Have a stream wait for the mark before it reads `tensors`, which were made before it on another stream.

        Their memory, which is of that other stream's pool, is then not used again before this stream has read them.
        """
        if self.event is None or stream is None:
            return
        stream.wait_event(self.event)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(stream)

    def is_reached(self) -> bool:
        """Whether all before the mark is done; the host does not wait."""
        return self.event is None or self.event.query()

    def wait_on_host(self) -> None:
        """Make the host wait until all before the mark is done."""
        if self.event is not None:
            self.event.synchronize()


class KeptAlive:
    """Objects that must live until a stream has read their memory, where that is not torch's to watch over."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Mark, object]] = deque()

    def keep(self, objects: object, until: Mark, *, at_least: int = 0) -> None:
        """Keep `objects` until a mark is reached; forget older ones whose mark is, but the newest `at_least`."""
        self._kept.append((until, objects))
        while len(self._kept) > at_least and self._kept[0][0].is_reached():
            self._kept.popleft()

    def close(self) -> None:
        """Make the host wait for all marks, and forget all objects."""
        for mark, _ in self._kept:
            mark.wait_on_host()
        self._kept.clear()
