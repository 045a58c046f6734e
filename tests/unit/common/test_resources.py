"""Memory and cores are the container's, by control groups of both versions, in made-up proc/ and sys/ trees."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from lowrank_vit.common import resources
from lowrank_vit.common.resources import available_cores, memory
from lowrank_vit.data.choose import memory_bytes

HOST = psutil.virtual_memory().total
LIMIT = HOST // 4
NONE_V1 = 9223372036854771712
Tree = Callable[[str, dict[str, object]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Writes /proc/self/cgroup and files below /sys/fs/cgroup."""

    def write(groups: str, files: dict[str, object]) -> Path:
        for name, content in {
            "proc/self/cgroup": groups,
            **{f"sys/fs/cgroup/{k}": v for k, v in files.items()},
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{content}\n")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/", {"memory.max": LIMIT}),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": LIMIT}),
        ("0::/a/b", {"a/b/memory.max": LIMIT, "a/memory.max": 2 * LIMIT}),
        ("0::/a/b", {"a/b/memory.max": 2 * LIMIT, "a/b/memory.high": LIMIT, "a/memory.high": "max"}),
        ("0::/../../pod/x", {"memory.max": LIMIT}),  # seen from inside a namespace
        ("9:memory:/\n0::/", {"memory/memory.limit_in_bytes": LIMIT, "unified/cgroup.procs": ""}),
        ("4:memory:/a/b", {"memory/a/b/memory.limit_in_bytes": NONE_V1, "memory/a/memory.limit_in_bytes": LIMIT}),
        ("4:cpu,memory:/docker/0f", {"memory/memory.limit_in_bytes": LIMIT}),  # the host's path, which is not there
        (
            "4:memory:/",
            {
                "memory/memory.limit_in_bytes": NONE_V1,
                "memory/memory.stat": f"cache 1\nhierarchical_memory_limit {LIMIT}",
            },
        ),
        ("4:memory:/slurm", {"memory/slurm/memory.limit_in_bytes": LIMIT, "memory.max": 1}),  # of no group of ours
    ],
)
def test_memory_is_the_smallest_limit_of_all_groups(tree: Tree, groups: str, files: dict[str, object]) -> None:
    assert memory(tree(groups, files)).total == LIMIT


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("", {}),
        ("0::/", {"memory.max": "max"}),
        ("0::/", {"memory.max": ""}),
        ("0::/", {"memory.max": 4 * HOST}),
        ("4:memory:/", {"memory/memory.limit_in_bytes": NONE_V1}),
        ("rubbish\n:::\n0", {"memory.max": 1}),
    ],
)
def test_without_a_limit_it_is_the_hosts(tree: Tree, groups: str, files: dict[str, object]) -> None:
    assert memory(tree(groups, files)).total == HOST
    assert available_cores(tree(groups, files)) == len(os.sched_getaffinity(0))


def test_without_control_groups_it_is_the_hosts(tmp_path: Path) -> None:
    assert memory(tmp_path).total == HOST


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_free_counts_caches_of_files(tree: Tree, version: int) -> None:
    """100 MB are used, 60 of them for files that were read."""
    if version == 2:
        stat = "anon 40000000\ninactive_file 60000000"
        root = tree("0::/", {"memory.max": 10**8 + 5, "memory.current": 10**8, "memory.stat": stat})
    else:
        stat = "inactive_file 1\ntotal_inactive_file 60000000"
        names = {"limit_in_bytes": 10**8 + 5, "usage_in_bytes": 10**8, "stat": stat}
        root = tree("4:memory:/", {f"memory/memory.{name}": content for name, content in names.items()})
    assert memory(root).free == 60_000_005


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/a", {"cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),
        ("0::/a", {"cpu.max": "100000 100000", "a/cpu.max": "max 100000"}, 1),
        ("3:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": 300000, "cpu,cpuacct/a/cpu.cfs_period_us": 100000}, 3),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": 5000, "cpu/cpu.cfs_period_us": 100000}, 1),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, 8),
        ("3:cpuacct:/", {"cpuacct/cpu.cfs_quota_us": 5000, "cpuacct/cpu.cfs_period_us": 100000}, 8),
    ],
)
def test_cores_are_the_groups_share_of_time(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, object], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    assert available_cores(tree(groups, files)) == cores


def test_the_loader_is_chosen_by_the_containers_memory(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "ROOT", tree("0::/", {"memory.max": 10**9}))
    assert memory_bytes(torch.device("cpu")) == 10**9
