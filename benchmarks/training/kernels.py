"""Where the time of a step goes: torch's profile of some steps as a table of kernels, or of operators on a CPU."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.measure import nothing
from benchmarks.training.budget import groups_of

MOST_ROWS = 30

Span = tuple[str, float]
"""Name of a kernel or operator, and microseconds of one run of it."""


def profiled(
    run: Callable[[], object],
    steps: int,
    device: torch.device,
    before: Callable[[], object] = nothing,
    after: Callable[[], object] = nothing,
) -> dict[str, Any]:
    """A table of where `run`, which takes `steps` steps and waits for the device, spends its time; see `table_of`.

    On CUDA the rows are the device's kernels and copies of all streams; on a CPU, torch's operators without the
    operators that they call. `run` is first timed once without the profiler, which slows it down; `before` and `after`
    are called around it each time.
    """
    before()
    begun = time.perf_counter()
    run()
    step_ms = 1e3 * (time.perf_counter() - begun) / steps
    after()
    before()
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as found:
        run()
    after()
    events: Any = found.events()
    return table_of(of_kernels(events) if is_cuda else of_operators(events), steps, step_ms)


def of_kernels(events: Iterable[Any]) -> list[Span]:
    """The kernels and copies on the device, without named ranges, which contain kernels."""
    on_device = (event for event in events if event.device_type == DeviceType.CUDA)
    return [(event.name, event.time_range.elapsed_us()) for event in on_device if not event.is_user_annotation]


def of_operators(events: Iterable[Any]) -> list[Span]:
    """Host time of torch's operators, each without the operators that it calls."""
    return [(event.name, event.self_cpu_time_total) for event in events if event.device_type == DeviceType.CPU]


def table_of(spans: Iterable[Span], steps: int, step_ms: float) -> dict[str, Any]:
    """The `MOST_ROWS` names that took most time: ms per step, runs per step, and share of `step_ms`, 0-1.

    The sections are `steps`, `step_ms`, `ms` (of all names, a step), `runs` (likewise), `groups` (ms a step by kind of
    work), `rows`, and `others` (how many are in no row).
    """
    spans = list(spans)
    microseconds: dict[str, float] = defaultdict(float)
    runs: dict[str, int] = defaultdict(int)
    for name, took in spans:
        microseconds[name] += took
        runs[name] += 1
    by_name = {name: total / 1e3 / steps for name, total in microseconds.items() if total}
    names = sorted(by_name, key=lambda name: -by_name[name])
    rows = [
        {"name": name, "ms": by_name[name], "runs": runs[name] / steps, "share": by_name[name] / step_ms}
        for name in names[:MOST_ROWS]
    ]
    return {
        "steps": steps,
        "step_ms": step_ms,
        "ms": sum(by_name.values()),
        "runs": len(spans) / steps,
        "groups": groups_of(spans, steps),
        "rows": rows,
        "others": max(0, len(names) - MOST_ROWS),
    }
