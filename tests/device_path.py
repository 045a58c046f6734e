"""CUDA's way through the code on a CPU, and a test's proof that it went there.

`lowrank_vit.common.devices.cuda_path` is where every branch on a device's type asks which way to go. Here its answer is
CUDA's for everything, though all tensors lie on the CPU. CUDA's streams and events, which a CPU does not have, are
stand-ins: work is done as soon as it was asked for. Pinned memory is a copy, and the GPU's memory is the host's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from lowrank_vit.common import devices, resources
from tests.device_branches import ROOT, branches, covered


class Event:
    """Of `torch.cuda.Event` what is used."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._at - self._at)


class Stream:
    """Of `torch.cuda.Stream` what is used."""

    cuda_stream = 0

    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        self.device, self.priority = torch.device("cpu"), priority

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _stand_ins(of_torch_cuda: dict[str, Any]) -> list[Any]:
    """What of torch does not work without a GPU, replaced."""
    empty, current = torch.empty, Stream()
    replaced = {
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: current,
        "default_stream": lambda device=None: current,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=resources.memory().total),
        "mem_get_info": lambda device: (resources.memory().free, resources.memory().total),
    }
    return [
        mock.patch.multiple(torch.cuda, **replaced | of_torch_cuda),
        mock.patch.object(torch, "empty", lambda *sizes, pin_memory=False, **more: empty(*sizes, **more)),
        mock.patch.object(torch.Tensor, "pin_memory", torch.Tensor.clone),
        mock.patch.object(torch.Tensor, "record_stream", mock.Mock(return_value=None)),
    ]


class CudaPath:
    """Makes contexts in which all work goes CUDA's way: `with on_cuda_path():`."""

    def __init__(self) -> None:
        self.is_taken = False
        """Whether a context was ever entered."""
        self.asked = set[tuple[str, int]]()
        """Lines, as (file, number), that asked which way to go and were sent CUDA's."""

    @contextmanager
    def __call__(self, **of_torch_cuda: Any) -> Generator[None]:
        """Go that way, with these in `torch.cuda` (which `monkeypatch` would put back too late)."""
        self.is_taken = True
        patches = [*_stand_ins(of_torch_cuda), mock.patch.object(devices, "_type_of", self._type_of)]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()

    def saw(self, asked: list[tuple[str, int]]) -> None:
        """Count what another process was asked, whose Triton interprets kernels, as asked here."""
        self.is_taken = True
        self.asked |= {(file, line) for file, line in asked}

    def _type_of(self, where: object) -> str:
        if not torch.compiler.is_compiling():
            asking = sys._getframe(2)  # behind `cuda_path`
            self.asked.add((asking.f_code.co_filename, asking.f_lineno))
        return "cuda"

    def missed(self, test: str) -> list[str]:
        """The branches that `tests/device_branches.toml` says a test takes, but that it did not."""
        mine = {key for key, covering in covered().items() if covering == test}
        return [
            branch.key
            for branch in branches()
            if branch.key in mine
            and branch.asks_the_path
            and not any(
                path == str(ROOT / branch.file) and branch.first <= line <= branch.last for path, line in self.asked
            )
        ]


@pytest.fixture
def on_cuda_path(request: pytest.FixtureRequest) -> Generator[CudaPath]:
    """CUDA's way; a test that `tests/device_branches.toml` names for a branch fails if it did not take it.

    Of a test with parameters those cases may stay on the CPU's way that enter no context.
    """
    path = CudaPath()
    yield path
    may_stay = not path.is_taken and "[" in request.node.nodeid
    if not may_stay and (missed := path.missed(request.node.nodeid.partition("[")[0])):
        pytest.fail(f"tests/device_branches.toml says that this test takes these branches, but it does not: {missed}")
