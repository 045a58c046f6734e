"""The monitor observes, keeps up or says that it did not, and never leaves a thread or an error behind."""

from __future__ import annotations

import errno
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from data_prep.errors import UserError
from lowrank_vit.spectral import monitor as monitor_module
from lowrank_vit.spectral import store
from lowrank_vit.spectral.metrics import spectrum_metrics
from lowrank_vit.spectral.monitor import SpectralMonitor
from lowrank_vit.spectral.select import DEFAULT_TARGETS, select_targets
from lowrank_vit.spectral.solve import MatrixStack, singular_values, solve_stack

LONG_S = 30  # for waits that end at once unless something is broken


def tiny_vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, proj_drop_rate=0.1
    )


def watch(model: nn.Module, store_dir: Path, ema: nn.Module | None = None, **changes: Any) -> SpectralMonitor:
    options: dict[str, Any] = {"targets": DEFAULT_TARGETS, "every": 2, "topk": 3, "interval": 1, "store_dir": store_dir}
    return SpectralMonitor(model, ema, **options | changes)


def wait_until_idle(monitor: SpectralMonitor) -> None:
    assert monitor._idle.wait(LONG_S)


def expected_spectra(model: nn.Module, kind: str) -> dict[str, np.ndarray]:
    chosen = select_targets(dict(model.named_parameters()), DEFAULT_TARGETS)
    return {f"{kind}/{name}": s for name, s in singular_values(chosen).items()}


class Gate:
    """A solver that says when it is asked and answers only when let."""

    def __init__(self) -> None:
        self.asked, self.open = threading.Event(), threading.Event()

    def __call__(self, stack: MatrixStack) -> dict[str, np.ndarray]:
        self.asked.set()
        assert self.open.wait(LONG_S)
        return solve_stack(stack)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(monitor_module, "solve_stack", gate)
    yield gate
    gate.open.set()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert [t.name for t in set(threading.enumerate()) - before if t.name == "spectral-monitor"] == []


def test_stored_spectra_and_records_equal_an_offline_computation_bit_for_bit(tmp_path: Path) -> None:
    model, ema = tiny_vit(0), tiny_vit(1)
    expected = expected_spectra(model, "spec") | expected_spectra(ema, "spec_ema")
    with watch(model, tmp_path, ema) as monitor:
        monitor.observe(0)
    assert [path.name for path in tmp_path.iterdir()] == ["update_00000000.npz"]
    update, stored = store.read_spectra(tmp_path / "update_00000000.npz")
    assert update == 0
    assert list(stored) == list(expected)
    for key, s in expected.items():
        np.testing.assert_array_equal(stored[key], s)
    (record,) = monitor.records()
    assert record.update == 0
    assert record.values == {f"{k}/{m}": v for k, s in expected.items() for m, v in spectrum_metrics(s, 3, 1).items()}
    assert monitor.records() == []


def test_a_snapshot_is_of_its_moment_whatever_happens_to_the_weights_meanwhile(tmp_path: Path, gate: Gate) -> None:
    model = tiny_vit()
    expected = expected_spectra(model, "spec")
    with watch(model, tmp_path) as monitor:
        monitor.observe(0)
        assert gate.asked.wait(LONG_S)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        gate.open.set()
    for key, s in store.read_spectra(tmp_path / "update_00000000.npz").spectra.items():
        np.testing.assert_array_equal(s, expected[key])


def train(store_dir: Path | None, steps: int = 7) -> tuple[list[float], torch.Tensor]:
    """Losses and the final state of the random generator, with a monitor if there is a place to store."""
    model = tiny_vit()
    ema = deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = watch(model, store_dir, ema, every=1) if store_dir else None
    torch.manual_seed(3)
    losses: list[float] = []
    if monitor:
        monitor.observe(0)
    for step in range(1, steps + 1):
        loss = nn.functional.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.randint(3, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if monitor:
            monitor.observe(step)
    if monitor:
        monitor.close()
        assert monitor.records()
        assert all(p.grad is None for p in ema.parameters())
    return losses, torch.get_rng_state()


def test_losses_and_random_numbers_are_the_same_bits_with_and_without_the_monitor(tmp_path: Path) -> None:
    plain_losses, plain_rng = train(None)
    watched_losses, watched_rng = train(tmp_path)
    assert watched_losses == plain_losses
    assert torch.equal(watched_rng, plain_rng)


def test_only_multiples_of_every_are_taken_and_records_come_in_order(tmp_path: Path) -> None:
    model = tiny_vit()
    with watch(model, tmp_path, every=3) as monitor:
        for update in range(8):
            monitor.observe(update)
            wait_until_idle(monitor)
        assert [record.update for record in monitor.records()] == [0, 3, 6]
    assert monitor.skipped == 0
    assert [store.read_spectra(path).update for path in store.list_spectra(tmp_path)] == [0, 3, 6]


def test_a_refresh_due_while_one_is_running_is_skipped_and_counted(tmp_path: Path, gate: Gate) -> None:
    with watch(tiny_vit(), tmp_path) as monitor:
        monitor.observe(0)
        assert gate.asked.wait(LONG_S)
        for update in range(1, 6):
            monitor.observe(update)  # 2 and 4 are due
        assert monitor.skipped == 2
        assert monitor.records() == []
        gate.open.set()
        wait_until_idle(monitor)
        monitor.observe(6)
    assert monitor.skipped == 2
    assert [record.update for record in monitor.records()] == [0, 6]


def test_update_0_waits_rather_than_be_skipped(tmp_path: Path, gate: Gate) -> None:
    monitor = watch(tiny_vit(), tmp_path)
    monitor.observe(2)
    assert gate.asked.wait(LONG_S)
    observing = threading.Thread(target=monitor.observe, args=(0,))
    observing.start()
    gate.open.set()
    observing.join(LONG_S)
    monitor.close()
    assert monitor.skipped == 0
    assert [record.update for record in monitor.records()] == [2, 0]


def test_a_snapshot_is_given_back_once_it_is_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def solve(stack: MatrixStack) -> dict[str, np.ndarray]:
        seen.append(weakref.ref(stack.matrices_NRC))
        return solve_stack(stack)

    monkeypatch.setattr(monitor_module, "solve_stack", solve)
    with watch(tiny_vit(), tmp_path) as monitor:
        monitor.observe(0)
        wait_until_idle(monitor)
        assert len(seen) == 4  # shapes
        assert [ref() for ref in seen] == [None] * 4


def test_close_finishes_the_refresh_in_flight(tmp_path: Path, gate: Gate) -> None:
    monitor = watch(tiny_vit(), tmp_path)
    monitor.observe(4)
    assert gate.asked.wait(LONG_S)
    closing = threading.Thread(target=monitor.close)
    closing.start()
    gate.open.set()
    closing.join(LONG_S)
    assert not closing.is_alive()
    assert [record.update for record in monitor.records()] == [4]


def test_cancelling_abandons_the_refresh_in_flight(tmp_path: Path, gate: Gate) -> None:
    monitor = watch(tiny_vit(), tmp_path)
    monitor.observe(4)
    assert gate.asked.wait(LONG_S)
    closing = threading.Thread(target=monitor.close, kwargs={"cancel": True})
    closing.start()
    assert monitor._cancelled.wait(LONG_S)
    gate.open.set()
    closing.join(LONG_S)
    assert not closing.is_alive()
    assert monitor.records() == []
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_fine_and_observing_after_it_is_an_error(tmp_path: Path) -> None:
    monitor = watch(tiny_vit(), tmp_path)
    monitor.close()
    monitor.close(cancel=True)
    with pytest.raises(RuntimeError, match="closed"):
        monitor.observe(2)


def failing(error: Exception) -> Callable[[MatrixStack], dict[str, np.ndarray]]:
    def solve(stack: MatrixStack) -> dict[str, np.ndarray]:
        raise error

    return solve


@pytest.mark.parametrize("call", ["records", "close", "observe"])
def test_an_error_of_the_worker_is_raised_once_in_the_callers_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(monitor_module, "solve_stack", failing(ArithmeticError("no convergence")))
    monitor = watch(tiny_vit(), tmp_path)
    monitor.observe(0)
    wait_until_idle(monitor)
    with pytest.raises(RuntimeError, match=r"spectral monitor failed: ArithmeticError: no convergence") as caught:
        {"records": monitor.records, "close": monitor.close, "observe": lambda: monitor.observe(1)}[call]()
    assert isinstance(caught.value.__cause__, ArithmeticError)
    monitor.close()


def test_the_monitor_lives_on_after_a_failed_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watch(tiny_vit(), tmp_path) as monitor:
        with monkeypatch.context() as patch:
            patch.setattr(monitor_module, "solve_stack", failing(ArithmeticError("once")))
            monitor.observe(0)
            wait_until_idle(monitor)
        with pytest.raises(RuntimeError, match="once"):
            monitor.records()
        monitor.observe(2)
        wait_until_idle(monitor)
        assert [record.update for record in monitor.records()] == [2]


def test_an_error_on_its_way_out_is_not_hidden_by_one_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "solve_stack", failing(ArithmeticError("hidden")))

    def fail_while_watching() -> None:
        with watch(tiny_vit(), tmp_path) as monitor:
            monitor.observe(0)
            wait_until_idle(monitor)
            raise KeyError("the real one")

    with pytest.raises(KeyError, match="the real one"):
        fail_while_watching()


def test_a_full_disk_is_a_clear_error_and_leaves_no_torn_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, **arrays: Any) -> None:
        file.write(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.np, "savez", full)
    monitor = watch(tiny_vit(), tmp_path)
    monitor.observe(0)
    with pytest.raises(UserError, match=r"spectra of update 0 .*No space left on device.*Free some space"):
        monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_vanishes_or_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    store_dir = tmp_path / "spectra"
    monitor = watch(tiny_vit(), store_dir)
    shutil.rmtree(store_dir)
    store_dir.write_text("in the way")
    monitor.observe(0)
    with pytest.raises(UserError, match="cannot store the spectra of update 0"):
        monitor.close()
    with pytest.raises(UserError, match=r"cannot make .*spectra"):
        watch(tiny_vit(), store_dir / "deeper")


def test_nan_weights_are_recorded_as_nan_beside_good_ones(tmp_path: Path) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[0, 0] = torch.nan
    with watch(model, tmp_path) as monitor:
        monitor.observe(0)
    (record,) = monitor.records()
    assert np.isnan(record.values["spec/blocks.1.mlp.fc1/sigma_max"])
    assert np.isfinite(record.values["spec/blocks.0.mlp.fc1/sigma_max"])


@pytest.mark.parametrize("change", [{"every": 0}, {"topk": 0}, {"interval": -1}, {"targets": "attn.qvk"}])
def test_wrong_options_are_user_errors(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        watch(tiny_vit(), tmp_path, **change)


def test_a_wrapped_ema_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ema\.module"):
        watch(tiny_vit(), tmp_path, nn.ModuleDict({"module": tiny_vit()}))


def test_stores_sort_by_update_and_damaged_files_are_named(tmp_path: Path) -> None:
    for update in (100_000_000, 20, 3):
        store.write_spectra(tmp_path, update, {"spec/head": np.ones(2)})
    assert [store.read_spectra(path).update for path in store.list_spectra(tmp_path)] == [3, 20, 100_000_000]
    path = store.list_spectra(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"update_00000003\.npz"):
        store.read_spectra(path)
    assert store.list_spectra(tmp_path / "none") == []


def test_the_worker_uses_one_cpu_thread_and_leaves_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a second team of OpenMP threads, small training steps on the CPU took twice their time."""
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:

        def solve(stack: MatrixStack) -> dict[str, np.ndarray]:
            torch.ones(1_000_000).sum()  # a parallel operation, which may reset the number
            seen.append(torch.get_num_threads())
            return solve_stack(stack)

        monkeypatch.setattr(monitor_module, "solve_stack", solve)
        with watch(tiny_vit(), tmp_path) as monitor:
            monitor.observe(0)
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert torch.get_num_threads() == 2
        assert set(seen[:-1]) == {1}
        assert seen[-1] == 2
    finally:
        torch.set_num_threads(before)
