"""Sharing the work: equal shares, two ranks equal to one, and ranks that are out of step."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lowrank_vit.ranks.world import World
from lowrank_vit.spectral import refresh as refresh_module
from lowrank_vit.spectral import store
from lowrank_vit.spectral.monitor import SpectralMonitor
from lowrank_vit.spectral.refresh import SpectralSettings
from lowrank_vit.spectral.select import DEFAULT_TARGETS
from lowrank_vit.spectral.worker import STOP, share_out
from tests.spectra import tiny_vit

LONG_S = 60
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
    return SpectralMonitor(
        model, model, targets=DEFAULT_TARGETS, every=2, store_dir=folder, settings=SpectralSettings(topk=3), **more
    )


def one_of_two(rank: int, folder: Path) -> None:
    """A rank that observes three times with the other one, and then once while the second of them cancels."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = tiny_vit()
    world = World(rank, size=2)
    observed = observe_three_times(watch(model, folder / "two", ranks=world.channel(timedelta(seconds=LONG_S))), model)
    monitor = watch(tiny_vit(), folder / "cancelled", ranks=world.channel(timedelta(seconds=LONG_S)))
    monitor.observe(0)
    monitor.close(cancel=rank == 1)
    torch.save((observed, len(monitor.records())), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Where two ranks have stored what they observed, and what each of them found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_of_two, (folder,), nprocs=2, join=True)
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_ranks_equal_one_bit_for_bit(two_ranks: tuple[Path, list[Any]], tmp_path: Path) -> None:
    model = tiny_vit()
    expected = observe_three_times(watch(model, tmp_path), model)
    folder, ((first, _), (second, _)) = two_ranks
    assert second == []
    assert [update for update, _ in first] == [0, 2, 4]
    for (_, found), (_, wanted) in zip(first, expected, strict=True):
        assert found == wanted
    names = sorted(path.name for path in tmp_path.iterdir())
    assert sorted(path.name for path in (folder / "two").iterdir()) == names
    for ours, theirs in zip(*(store.list_vectors(place) for place in (tmp_path, folder / "two")), strict=True):
        one, two = store.read_vectors(ours).ends, store.read_vectors(theirs).ends
        assert list(one) == list(two)
        for key in one:
            np.testing.assert_array_equal(one[key][0].u, two[key][0].u)


def test_ranks_that_cancel_and_ranks_that_close_all_come_to_an_end(two_ranks: tuple[Path, list[Any]]) -> None:
    _, ((_, first), (_, second)) = two_ranks
    assert first <= 1
    assert second == 0


class Script:
    """The second of two ranks; the first one's answers come from a list, and are as wanted once it is empty."""

    rank, size = 1, 2

    def __init__(self, *others: int) -> None:
        self.others = list(others)
        self.gathered: list[int] = []

    def exchange(self, held: int) -> list[int]:
        return [self.others.pop(0) if self.others else held, held]

    def gather(self, part: Any) -> list[Any] | None:
        self.gathered.append(part.update)


def observe_all(monitor: SpectralMonitor, *updates: int) -> None:
    for update in updates:
        monitor.observe(update)
        monitor.wait()


def test_a_refresh_that_another_rank_has_skipped_is_given_up_and_counted(tmp_path: Path) -> None:
    script = Script(2, 4)
    with watch(tiny_vit(), tmp_path, ranks=script) as monitor:
        observe_all(monitor, 0, 2, 4)
    assert monitor.skipped == 2
    assert script.gathered == [4]
    assert list(tmp_path.iterdir()) == []  # only rank 0 stores


def test_a_rank_that_is_ahead_waits_for_the_others_to_give_theirs_up(tmp_path: Path) -> None:
    script = Script(0, 2, 4)
    with watch(tiny_vit(), tmp_path, ranks=script) as monitor:
        observe_all(monitor, 4, 6)
    assert monitor.skipped == 0
    assert script.gathered == [4, 6]


def test_after_another_rank_has_stopped_nothing_waits_for_it(tmp_path: Path) -> None:
    script = Script(STOP)
    with watch(tiny_vit(), tmp_path, ranks=script) as monitor:
        observe_all(monitor, 0, 2)
    assert script.gathered == []
    assert monitor.skipped == 2


def test_a_rank_whose_refresh_fails_still_meets_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Any] = []
    script = Script()
    monkeypatch.setattr(script, "gather", met.append)
    monkeypatch.setattr(refresh_module, "solve_stack", lambda *_, **__: 1 / 0)
    with watch(tiny_vit(), tmp_path, ranks=script) as monitor:
        monitor.observe(0)
    assert monitor.failed == 1
    assert met == ["ZeroDivisionError: division by zero"]
