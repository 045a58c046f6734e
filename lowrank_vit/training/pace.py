"""How far the host may run ahead of the device."""

from __future__ import annotations

from collections import deque

import torch

RUN_AHEAD = 3
"""Batches whose steps may be under way on the device when the host begins the next one."""


class Pace:
    """Holds the host back where it is `RUN_AHEAD` steps ahead of a GPU.

    A step that is one CUDA graph takes the host no time, so it could ask for all updates up to the next look at the
    device at once, and each of their batches would have to be in memory. The device still has the last steps to do
    while the host waits, so it is never idle for it. On a CPU nothing runs ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._under_way: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """All of a step has been asked for."""
        if not self._is_cuda:
            return
        done = torch.cuda.Event(blocking=True)  # waits without taking a core from the decoder
        done.record()
        self._under_way.append(done)
        if len(self._under_way) > RUN_AHEAD:
            self._under_way.popleft().synchronize()
