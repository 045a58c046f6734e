"""What the decode backends have in common: their interface, the report of damaged samples, and their meters."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.data.batch import Batch
from lowrank_vit.data.schedule import Schedule

_KEPT_TIMES = 256


class Backend(Protocol):
    """Decodes the batches of a schedule, in its order. One schedule at a time."""

    name: str
    decode_ms: deque[float]
    """Milliseconds that each of the last batches took to decode; see `new_meter`."""

    def decode(self, schedule: Schedule) -> Iterator[Batch]:
        """Yield the schedule's batches; closing the generator early ends all threads of it.

        Device work goes to the CUDA stream that is current when a batch is asked for. Raises `DamagedSamples` in the
        place of the first batch that holds one.
        """
        ...

    def ready(self) -> int:
        """How many decoded batches wait to be asked for."""
        ...

    def close(self) -> None:
        """Give back memory and threads."""
        ...


class DamagedSamples(Exception):
    """Samples of one batch that do not decode."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons
        """By sample id, in the decoder's words."""


def new_meter() -> deque[float]:
    """Where a backend notes its decode times, newest last. Written by its thread, read by the trainer's."""
    return deque(maxlen=_KEPT_TIMES)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on the device; the host does not wait, since the copy starts from pinned memory."""
    on_host = torch.from_numpy(values)
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host
