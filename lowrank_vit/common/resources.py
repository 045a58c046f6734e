"""What this process may use of the machine: memory and cores of its container, not of the host.

A container limits its processes by control groups: version 2 is one tree, version 1 a tree for each controller. A limit
holds for all groups below, so every group from the process's own up to the root is asked and the smallest counts.
Source: the Linux kernel's documentation, admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst and scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import math
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
"""Where proc/ and sys/ are."""


@dataclass(frozen=True)
class Memory:
    """Memory in bytes."""

    total: int
    free: int
    """What can be taken before something is swapped out or killed; file caches count as free."""


def memory(root: Path | None = None) -> Memory:
    """Memory that this process may use; a limit that only slows a group down (`memory.high`) counts, too."""
    import psutil

    host = psutil.virtual_memory()
    totals, frees = [host.total], [host.available]
    for group in _groups("memory", root or ROOT):
        limits = ("memory.max", "memory.high", "memory.limit_in_bytes")
        found = [value for name in limits if (value := _number(group / name)) is not None]
        statistics = _table(group / "memory.stat")
        # Version 1 tells there what groups above impose that a container cannot see.
        found += [value for value in (statistics.get("hierarchical_memory_limit"),) if value is not None]
        # Version 1 says "no limit" with a number near 2^63.
        limit = min(found, default=host.total)
        if limit >= host.total:
            continue
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
        totals.append(limit)
        frees.append(max(0, limit - max(0, used - cached)))
    return Memory(min(totals), min(frees))


def bytes_read() -> int:
    """Bytes that were read from storage for this process so far; reads from the page cache do not count."""
    return 512 * resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def available_cores(root: Path | None = None) -> int:
    """How many cores this process may use: its affinity, and its group's share of time, rounded up."""
    # Only Linux says how many cores this process may use; elsewhere take all.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu", root or ROOT):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if (text := _text(group / "cpu.max")) and len(text.split()) == 2:  # "150000 100000", or "max 100000"
            quota, period = (int(word) if word.isdecimal() else None for word in text.split())
        if quota and period and quota > 0:
            cores = min(cores, max(1, math.ceil(quota / period)))
    return cores


def cpu_name() -> str:
    """The processor's model, in words; only its architecture if the system does not tell."""
    lines = (_text(ROOT / "proc/cpuinfo") or "").splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The directories of this process's groups of both versions, from its own up to the root."""
    mounts = root / "sys/fs/cgroup"
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers and path:
            tops = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            tops = [mounts / controllers, mounts / controller]
        else:
            continue
        top = next((top for top in reversed(tops) if top.is_dir()), None)
        if top is None:
            continue
        # In a container the path may be the host's, of which only the last part, or nothing, can be seen.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for start in range(len(parts) + 1):
            if (own := top.joinpath(*parts[start:])).is_dir():
                yield own
                yield from (above for above in own.parents if above.is_relative_to(top))
                break


def _text(path: Path) -> str | None:
    with suppress(OSError, ValueError):
        return path.read_text(encoding="ascii").strip()
    return None


def _number(path: Path) -> int | None:
    """The number in a file; None without the file, or where it says "max"."""
    with suppress(ValueError):
        return int(_text(path) or "")
    return None


def _table(path: Path) -> dict[str, int]:
    """A file of lines "name number"."""
    pairs = (line.split() for line in (_text(path) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
