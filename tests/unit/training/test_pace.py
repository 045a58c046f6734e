"""How far the host runs ahead, with stand-ins for CUDA's events."""

from __future__ import annotations

import pytest
import torch

from lowrank_vit.training.pace import RUN_AHEAD, Pace


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What is asked of CUDA's events, in order."""
    log: list[str] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self) -> None:
            self.step = sum(line.startswith("step") for line in log)
            log.append(f"step {self.step}")

        def synchronize(self) -> None:
            log.append(f"host waits for {self.step}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return log


def test_the_host_waits_for_a_step_that_leaves_the_device_others_to_do(log):
    pace = Pace(torch.device("cuda"))
    for _ in range(RUN_AHEAD):
        pace.step()
    assert log == [f"step {n}" for n in range(RUN_AHEAD)]
    log.clear()
    pace.step()
    assert log[-1] == "host waits for 0"
    pace.step()
    assert log[-1] == "host waits for 1"


def test_a_cpu_is_not_paced(log):
    pace = Pace(torch.device("cpu"))
    for _ in range(9):
        pace.step()
    assert log == []
