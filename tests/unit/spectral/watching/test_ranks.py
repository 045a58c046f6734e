"""Sharing the work: equal shares, two ranks equal to one, and ranks that are out of step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.models.vision_transformer import VisionTransformer

from lowrank_vit.ranks.world import World
from lowrank_vit.spectral.select import DEFAULT_TARGETS
from lowrank_vit.spectral.watching import files, store
from lowrank_vit.spectral.watching import refresh as refresh_module
from lowrank_vit.spectral.watching.monitor import _BUSY, _CLOSED, _IDLE, SpectralMonitor
from lowrank_vit.spectral.watching.watched import share_out
from tests.monitors import WITH_UPDATES, Gate, adamw, step
from tests.spectra import tiny_vit
from tests.waiting import LONG_S

TIMES = ("refresh/seconds", "refresh/skipped")

VIT_B = {
    f"blocks.{b}.{kind}": shape
    for b in range(12)
    for kind, shape in {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}.items()
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 100])
def test_shares_are_a_partition_in_order_and_fair(world_size: int) -> None:
    shares = share_out(VIT_B, world_size)
    assert sorted(name for share in shares for name in share) == sorted(VIT_B)
    order = list(VIT_B)
    assert all(share == sorted(share, key=order.index) for share in shares)
    costs = [sum(max(VIT_B[n]) * min(VIT_B[n]) ** 2 + 4 / 3 * min(VIT_B[n]) ** 3 for n in share) for share in shares]
    dearest = 3072 * 768**2 + 4 / 3 * 768**3
    assert max(costs) - min(costs) <= dearest


def observe_three_times(monitor: SpectralMonitor, model: torch.nn.Module) -> list[tuple[int, dict[str, float]]]:
    for update in (0, 2, 4):
        monitor.observe(update)
        monitor.wait()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01).add_(0.001)
    monitor.close()
    found = monitor.records()
    return [(r.update, {k: v for k, v in r.values.items() if not k.endswith(TIMES)}) for r in found]


def watch(model: torch.nn.Module, folder: Path, **more: Any) -> SpectralMonitor:
    optimizer = adamw(model)
    step(model, optimizer, 0)
    options: dict[str, Any] = {"settings": WITH_UPDATES, "optimizer": optimizer, "circuits": "folded", "every": 2}
    return SpectralMonitor(model, model, targets=DEFAULT_TARGETS, store_dir=folder, **options | more)


MIXED = replace(WITH_UPDATES, full_every=2)
"""The refresh at 2 is of the first values alone, where the matrices of `wide` are large enough."""


def wide() -> torch.nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=3)


def one_of_two(rank: int, folder: Path) -> None:
    """A rank that observes three times with the other one, goes on while that is slow, and once while it cancels."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, world = tiny_vit(), World(rank, size=2)

    def watched(name: str, module: torch.nn.Module, **more: Any) -> SpectralMonitor:
        ranks = world.channel(timedelta(seconds=LONG_S), agrees=True)
        return watch(module, folder / name, ranks=ranks, **more)

    observed = observe_three_times(watched("two", model), model)
    mixed = wide()
    observed += observe_three_times(watched("mixed", mixed, settings=MIXED), mixed)
    out_of_step = observe_while_the_first_is_slow(watched("slow", tiny_vit()), rank)
    monitor = watched("cancelled", tiny_vit())
    monitor.observe(0)
    monitor.close(cancel=rank == 1)
    torch.save((observed, len(monitor.records()), out_of_step), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def observe_while_the_first_is_slow(monitor: SpectralMonitor, rank: int) -> tuple[list[int], int]:
    """The first rank is still storing update 2 when 4 is due, and the second is through: what was recorded, skipped."""
    save, may_end = store.SpectraStore.save, threading.Event()

    def slow(self: store.SpectraStore, update: int, *found: Any) -> None:
        assert update != 2 or may_end.wait(LONG_S)
        save(self, update, *found)

    with monitor, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.SpectraStore, "save", slow)
        observe_all(monitor, 0)
        monitor.observe(2)
        if rank == 1:
            monitor.wait()
        monitor.observe(4)
        may_end.set()
        monitor.wait()
        observe_all(monitor, 6, 8)
    return [record.update for record in monitor.records()], monitor.skipped


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Where two ranks have stored what they observed, and what each of them found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_of_two, (folder,), nprocs=2, join=True)
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_ranks_equal_one_bit_for_bit(two_ranks: tuple[Path, list[Any]], tmp_path: Path) -> None:
    model, mixed = tiny_vit(), wide()
    expected = observe_three_times(watch(model, tmp_path / "two"), model)
    expected += observe_three_times(watch(mixed, tmp_path / "mixed", settings=MIXED), mixed)
    folder, ((first, *_), (second, *_)) = two_ranks
    assert second == []
    assert [update for update, _ in first] == [0, 2, 4] * 2
    assert [values["spec/refresh/full_share"] for _, values in first] == [1, 1, 1, 1, 0, 1]
    for (_, found), (_, wanted) in zip(first, expected, strict=True):
        assert found == wanted
    for run in ("two", "mixed"):
        names = sorted(path.name for path in (tmp_path / run).iterdir())
        assert sorted(path.name for path in (folder / run).iterdir()) == names
        for ours, theirs in zip(*(files.list_vectors(place / run) for place in (tmp_path, folder)), strict=True):
            one, two = files.read_vectors(ours).ends, files.read_vectors(theirs).ends
            assert list(one) == list(two)
            for key in one:
                np.testing.assert_array_equal(one[key][0].u, two[key][0].u)


def test_ranks_that_cancel_and_ranks_that_close_all_come_to_an_end(two_ranks: tuple[Path, list[Any]]) -> None:
    _, ((_, first, _), (_, second, _)) = two_ranks
    assert first <= 1
    assert second == 0


def test_ranks_skip_the_same_refresh_and_take_the_same_later_ones(two_ranks: tuple[Path, list[Any]]) -> None:
    _, ((*_, first), (*_, second)) = two_ranks
    assert first == ([0, 2, 6, 8], 1)
    assert second == ([], 1)


class Script:
    """The second of two ranks; what the first one says comes from a list, and is "idle" once that is empty."""

    rank, size = 1, 2

    def __init__(self, *others: int) -> None:
        self.others, self.said = list(others), list[int]()
        self.gathered = list[Any]()

    def agree(self, number: int) -> Callable[[], int]:
        self.said.append(number)
        greatest = max(self.others.pop(0) if self.others else _IDLE, number)
        return lambda: greatest

    def gather(self, part: Any, *, of: int | None = None) -> list[Any] | None:
        self.gathered.append(getattr(part, "update", part))


def observe_all(monitor: SpectralMonitor, *updates: int) -> None:
    for update in updates:
        monitor.observe(update)
        monitor.wait()


def test_a_refresh_for_which_another_rank_has_no_time_is_skipped_and_counted(tmp_path: Path) -> None:
    script = Script(_BUSY, _BUSY)
    with watch(tiny_vit(), tmp_path, ranks=script) as monitor:
        observe_all(monitor, 0, 1, 2, 4, 6)
    assert monitor.skipped == 2
    assert script.gathered == [0, 6]
    assert script.said == [_IDLE, _IDLE, _IDLE, _CLOSED]
    assert list(tmp_path.iterdir()) == []  # only rank 0 stores


def test_a_rank_that_has_no_time_says_so(tmp_path: Path, gate: Gate) -> None:
    script = Script()
    with watch(tiny_vit(), tmp_path, ranks=script) as monitor:
        monitor.observe(0)
        assert gate.asked.wait(LONG_S)
        monitor.observe(2)
        gate.open.set()
        monitor.wait()
        monitor.observe(4)
    assert script.said == [_BUSY, _IDLE, _CLOSED]
    assert (monitor.skipped, script.gathered) == (1, [0, 4])


def test_after_another_rank_has_closed_nobody_is_asked_and_nothing_waits(tmp_path: Path) -> None:
    script = Script(_CLOSED)
    with watch(tiny_vit(), tmp_path, ranks=script) as monitor:
        observe_all(monitor, 2, 4)
    assert script.gathered == []
    assert script.said == [_IDLE]
    assert monitor.skipped == 2


def test_a_rank_that_is_gone_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: int) -> Callable[[], int]:
        raise RuntimeError("Connection closed by peer")

    script = Script()
    monkeypatch.setattr(script, "agree", lost)
    with watch(tiny_vit(), tmp_path, ranks=script) as monitor:
        observe_all(monitor, 2, 4)
    assert (monitor.skipped, script.gathered) == (0, [])  # the run that goes on takes them


def test_copies_that_find_no_memory_on_one_rank_still_meet_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script()
    with watch(tiny_vit(), tmp_path, ranks=script) as monitor:
        with monkeypatch.context() as patch:
            patch.setattr("lowrank_vit.spectral.watching.watched.stack_by_shape", lambda *_: 1 / 0)
            observe_all(monitor, 0)
        observe_all(monitor, 2)
    assert script.gathered == ["ZeroDivisionError: division by zero", 2]
    assert monitor.failed == 1


@pytest.mark.parametrize(("others", "gathered"), [((4, -4), [4]), ((-1, 1), []), ((2, -2), [])])
def test_a_refresh_is_done_again_where_all_ranks_can(tmp_path: Path, others: tuple[int, ...], gathered: list) -> None:
    model = tiny_vit()
    with watch(model, tmp_path) as monitor:
        observe_all(monitor, 0, 2, 4)
        kept = monitor.kept()
    assert kept is not None
    torch.save(kept.content(), tmp_path / store.kept_name(4))
    script = Script(*others)
    watch(model, tmp_path, ranks=script, resumed_update=5, recorded_update=2).close()
    assert script.gathered == gathered


def test_a_rank_whose_refresh_fails_still_meets_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Any] = []
    script = Script()
    monkeypatch.setattr(script, "gather", lambda part, of: met.append(part))
    monkeypatch.setattr(refresh_module, "solve_stack", lambda *_, **__: 1 / 0)
    with watch(tiny_vit(), tmp_path, ranks=script) as monitor:
        monitor.observe(0)
    assert monitor.failed == 1
    assert met == ["ZeroDivisionError: division by zero"]
