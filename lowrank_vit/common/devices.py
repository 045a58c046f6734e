"""Devices: choosing one, its code path, copies to it, its streams, and waiting for it.

Work passes between CUDA streams like this: a mark records it, the other stream waits for the mark, and memory lives
until it was read. Nothing here makes the host wait unless it says so. Without CUDA, streams are None, and work is done
when the call returns.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections import deque
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.common.errors import UserError, in_short

T = TypeVar("T")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes by --amp-dtype."""
FIRST = -1
"""Priority of a stream whose kernels run before those of others, as the training step's before the spectra's."""


def pick_device(wanted: str | torch.device, local_rank: int = 0, shown: str = "--device ") -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device; under torchrun the GPU is that of the rank, whatever N.

    A `torch.device` is returned as it is. Raises `UserError` if there is no such device. `shown`: the text before the
    name in the message, a flag or an argument.
    """
    name = str(wanted)
    if name == "auto":
        name = "cuda" if has_cuda() else "cpu"
    kind, _, number = name.partition(":")
    is_typed = isinstance(wanted, str)
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (is_typed and name.startswith("cpu:")):
        raise UserError(f"{shown.rstrip(' =')} takes auto, cpu, cuda or cuda:N, not `{name}`.")
    if kind == "cuda" and not has_cuda():
        why, advice = why_no_cuda() or ("", "Check nvidia-smi")
        raise UserError(
            f"{shown}{name}: torch sees no CUDA device{why and f', since {why}'}. {advice}, or use {shown}cpu."
        )
    if kind == "cpu":
        return torch.device(name)
    is_one_of_many = is_typed and "LOCAL_RANK" in os.environ
    index = int(number) if number and not is_one_of_many else local_rank
    if index >= torch.cuda.device_count():
        what = f"process {local_rank + 1} of this machine has" if is_one_of_many or not number else "there is"
        advice = "Start at most that many with torchrun --nproc-per-node" if what[0] == "p" else "Give a smaller number"
        raise UserError(f"{shown}{name}: {what} no GPU left, torch sees {torch.cuda.device_count()}. {advice}.")
    if not isinstance(wanted, str):
        return wanted
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def has_cuda() -> bool:
    """Whether torch can use a GPU. Torch's own warning is not shown: `why_on_cpu` says why it cannot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="CUDA initialization")
        return torch.cuda.is_available()


def why_on_cpu(name: str, device: torch.device) -> str:
    """A note on what keeps `--device auto` from a GPU; empty if nothing does, or if there is no driver."""
    if name != "auto" or cuda_path(device) or (found := why_no_cuda()) is None:
        return ""
    why, advice = found
    return f"note: on the CPU, since {why}. {advice} to use a GPU."


def why_no_cuda() -> tuple[str, str] | None:
    """Why torch cannot use a GPU, and what to do, in words; None without a driver, which needs no explanation."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return f'CUDA_VISIBLE_DEVICES is "{visible}", which hides every GPU', "Unset it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter if torch is built without CUDA
        text, needed = str(error), torch.version.cuda
        if found := re.search(r"driver on your system is too old \(found version (\d+)\)", text):
            major, minor = divmod(int(found[1]) // 10, 100)
            why = f"the NVIDIA driver is too old for this torch: it knows CUDA {major}.{minor}, torch needs {needed}"
            return why, "Update the driver, or install a torch that is built for it,"
        if "Found no NVIDIA driver" in text or "not compiled with CUDA" in text:
            return None
        if visible is not None and "No CUDA GPUs" in text:
            return f"CUDA_VISIBLE_DEVICES={visible} names no GPU that is there", "Unset it, or name one,"
        return f"{in_short(error)}", "Check nvidia-smi"
    return None


def cuda_path(where: Tensor | torch.device) -> bool:
    """Whether work on a tensor or device takes the GPU's path: kernels for whole batches, streams, pinned copies.

    Every branch on a device's type asks this at the branch. So tests can send a CPU's work down the GPU's path and
    compare its numbers with the CPU's own (`tests/device_path.py`).
    """
    return _type_of(where) == "cuda"


def _type_of(where: Tensor | torch.device) -> str:
    return where.type if isinstance(where, torch.device) else where.device.type


def to_device(values: np.ndarray, where: Tensor | torch.device) -> Tensor:
    """An array as a tensor on a device, or on that of a tensor; from pinned memory, so that the host does not wait.

    On a CPU it shares the array's memory if that is contiguous.
    """
    on_host = torch.from_numpy(np.ascontiguousarray(values))
    if not cuda_path(where):
        return on_host
    device = where if isinstance(where, torch.device) else where.device
    return on_host.pin_memory().to(device, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Make the host wait until the device has done all queued work; no effect on a CPU."""
    if cuda_path(device):
        torch.cuda.synchronize(device)


def side_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream | None:
    """A new stream beside the device's default one; None without CUDA.

    `priority` 0 is the lowest, and the default stream's; kernels at `FIRST` run before those that wait there.
    """
    return torch.cuda.Stream(device, priority=priority) if cuda_path(device) else None


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that this thread's work on the device goes to; None without CUDA."""
    return torch.cuda.current_stream(device) if cuda_path(device) else None


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """A context in which this thread's work goes to the stream, on the stream's device."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


@contextmanager
def in_turn(stream: torch.cuda.Stream | None) -> Generator[None]:
    """As `on_stream`, in order with the surrounding stream: after its earlier work, and before its later work."""
    if stream is None:
        yield
        return
    around = torch.cuda.current_stream(stream.device)
    stream.wait_stream(around)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        around.wait_stream(stream)


def each_in_turn(stream: torch.cuda.Stream | None, items: Generator[T]) -> Generator[T]:
    """Run a generator `in_turn` on a stream; whoever takes its items stays on their own stream."""
    try:
        while True:
            with in_turn(stream):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
    finally:
        with in_turn(stream):
            items.close()


@dataclass(frozen=True)
class Mark:
    """A point in a stream, after all work that was queued when the mark was made."""

    event: torch.cuda.Event | None
    """None without CUDA: then the mark is always reached."""

    @classmethod
    def of(cls, stream: torch.cuda.Stream | None) -> Mark:
        """Make a mark after all work queued on the stream so far."""
        event: Any = None if stream is None else stream.record_event()
        return cls(event)

    def hand_over(self, stream: torch.cuda.Stream | None, *tensors: Tensor) -> None:
        """Make a stream wait for the mark before it reads `tensors`, which were made before the mark on another stream.

        Their memory, from that other stream's pool, is not reused before this stream has read them.
        """
        if self.event is None or stream is None:
            return
        stream.wait_event(self.event)
        for tensor in tensors:
            if cuda_path(tensor):
                tensor.record_stream(stream)

    def is_reached(self) -> bool:
        """Whether all work before the mark is done; the host does not wait."""
        return self.event is None or self.event.query()

    def wait_on_host(self) -> None:
        """Make the host wait until all work before the mark is done."""
        if self.event is not None:
            self.event.synchronize()


@dataclass(frozen=True)
class TimedMark(Mark):
    """A mark that tells when it was reached."""

    at: float
    """Seconds of the host's clock when it was made."""

    @classmethod
    def of(cls, stream: torch.cuda.Stream | None) -> TimedMark:
        """As `Mark.of`."""
        event = None
        if stream is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(stream)
        return cls(event, time.perf_counter())

    def seconds_until(self, later: TimedMark) -> float:
        """Seconds from here to a later mark, both reached, by the device's clock; without CUDA by the host's."""
        if self.event is None or later.event is None:
            return later.at - self.at
        return self.event.elapsed_time(later.event) / 1e3


class Spans:
    """Adds up a stream's time between pairs of marks, once they are reached."""

    def __init__(self) -> None:
        self._open, self._seconds = deque[tuple[TimedMark, TimedMark]](), 0.0

    def add(self, begin: TimedMark, end: TimedMark) -> None:
        """Add a span that follows those before."""
        self._open.append((begin, end))
        self._count()

    def taken(self, *, waits: bool = False) -> float:
        """Seconds of the spans that have ended, each counted once; with `waits` the host waits until all have."""
        if waits and self._open:
            self._open[-1][1].wait_on_host()
        self._count()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _count(self) -> None:
        while self._open and self._open[0][1].is_reached():
            begin, end = self._open.popleft()
            self._seconds += begin.seconds_until(end)


class KeptAlive:
    """Objects that must live until a stream has read their memory, if torch does not take care of that."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Mark, object]] = deque()

    def keep(self, objects: object, until: Mark, *, at_least: int = 0) -> None:
        """Keep `objects` until a mark is reached; drop older ones whose mark is reached, except `at_least` of them."""
        self._kept.append((until, objects))
        while len(self._kept) > at_least and self._kept[0][0].is_reached():
            self._kept.popleft()

    def close(self) -> None:
        """Make the host wait for all marks, and forget all objects."""
        for mark, _ in self._kept:
            mark.wait_on_host()
        self._kept.clear()
