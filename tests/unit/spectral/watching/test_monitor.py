"""The monitor observes: its numbers are those of an offline computation, and it keeps up or says that it did not."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.analyze import analyze_weights
from lowrank_vit.spectral.fused import fused_qkv
from lowrank_vit.spectral.measures.metrics import reach
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.solving.solve import MatrixStack, solve, solve_stack, stack_by_shape
from lowrank_vit.spectral.watching import files
from lowrank_vit.spectral.watching import refresh as refresh_module
from lowrank_vit.spectral.watching.refresh import Memory, SpectralSettings, refresh
from lowrank_vit.spectral.watching.worker import Worker
from tests.device_path import CudaPath
from tests.monitors import SETTINGS, Gate, comparable, nudge, observe, stored, targets, watch
from tests.spectra import tiny_vit
from tests.waiting import LONG_S

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def expected_spectra(model: nn.Module, kind: str) -> dict[str, np.ndarray]:
    solved = solve(targets(model), reach(SETTINGS.topk, SETTINGS.interval))
    return {f"{kind}/{name}": one.s for name, one in solved.items()}


def test_stored_spectra_and_records_equal_an_offline_computation_bit_for_bit(tmp_path: Path) -> None:
    model, ema = tiny_vit(0), tiny_vit(1)
    expected = expected_spectra(model, "spec") | expected_spectra(ema, "spec_ema")
    with watch(model, tmp_path, ema) as monitor:
        monitor.observe(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json", "scalars_00000000.npz", "update_00000000.npz", "vectors_00000000.npz",
    ]  # fmt: skip
    update, found, _ = files.read_spectra(tmp_path / "update_00000000.npz")
    assert update == 0
    assert list(found) == list(expected)
    for key, s in expected.items():
        np.testing.assert_array_equal(found[key], s)
    (record,) = monitor.records()
    assert record.update == 0
    for kind, one in (("spec", model), ("spec_ema", ema)):
        for name, values in analyze_weights(targets(one), SETTINGS, fused=fused_qkv(one)).values.items():
            for metric, value in values.items():
                np.testing.assert_array_equal(record.values[f"{kind}/{name}/{metric}"], value)
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
    for key, s in files.read_spectra(tmp_path / "update_00000000.npz").spectra.items():
        np.testing.assert_array_equal(s, expected[key])


def train(store_dir: Path | None, steps: int = 7) -> tuple[list[float], torch.Tensor]:
    """Losses and the final state of the random generator, with a monitor if there is a place to store."""
    model = tiny_vit()
    ema = deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = watch(model, store_dir, ema, every=1, circuits="folded") if store_dir else None
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


def test_whoever_asks_is_shown_the_copies_of_whole_refreshes_whatever_becomes_of_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen, weights = tiny_vit(), dict[int, dict[str, torch.Tensor]](), dict[int, dict[str, torch.Tensor]]()

    def fails(*_: Any, **more: Any) -> None:
        raise RuntimeError("no solver")

    monkeypatch.setattr(refresh_module, "solve_stack", fails)
    settings = replace(SETTINGS, full_every=2)
    with watch(model, tmp_path, settings=settings, on_full=lambda update, of: seen.update({update: dict(of)})) as one:
        for update in range(7):
            nudge(model, update)
            one.observe(update)
            weights[update] = {name: w.detach().clone() for name, w in targets(model).items()}
            one.wait()
        assert one.own == list(weights[0])
        assert [update for update in range(7) if one.is_due(update)] == [0, 2, 4, 6]
    assert one.failed
    assert list(seen) == [0, 4]
    for update, of in seen.items():
        assert of.keys() == weights[update].keys()
        assert all(torch.equal(of[name], weights[update][name]) for name in of)


def test_only_multiples_of_every_are_taken_and_records_come_in_order(tmp_path: Path) -> None:
    model = tiny_vit()
    with watch(model, tmp_path, every=3) as monitor:
        for update in range(8):
            monitor.observe(update)
            monitor.wait()
        assert [record.update for record in monitor.records()] == [0, 3, 6]
    assert monitor.skipped == 0
    assert stored(tmp_path) == [0, 3, 6]


def test_a_refresh_due_while_one_is_running_is_skipped_and_counted(tmp_path: Path, gate: Gate) -> None:
    with watch(tiny_vit(), tmp_path) as monitor:
        monitor.observe(0)
        assert gate.asked.wait(LONG_S)
        for update in range(1, 6):
            monitor.observe(update)  # 2 and 4 are due
        assert monitor.skipped == 2
        assert monitor.records() == []
        gate.open.set()
        monitor.wait()
        monitor.observe(6)
    assert monitor.skipped == 2
    assert [record.update for record in monitor.records()] == [0, 6]


def test_update_0_waits_rather_than_be_skipped(tmp_path: Path, gate: Gate) -> None:
    monitor = watch(tiny_vit(), tmp_path)
    monitor.observe(2)
    assert gate.asked.wait(LONG_S)
    monitor._observed = -1  # as if the training began now
    observing = threading.Thread(target=monitor.observe, args=(0,))
    observing.start()
    gate.open.set()
    observing.join(LONG_S)
    monitor.close()
    assert monitor.skipped == 0
    assert [record.update for record in monitor.records()] == [2, 0]


def test_of_the_snapshots_only_the_newest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def solve(stack: MatrixStack, *args: Any, **more: Any) -> dict[str, Solved]:
        seen.append(weakref.ref(stack.matrices_NRC))
        return solve_stack(stack, *args, **more)

    monkeypatch.setattr(refresh_module, "solve_stack", solve)
    with watch(tiny_vit(), tmp_path) as monitor:
        for update in (0, 2, 4):
            monitor.observe(update)
            monitor.wait()
        assert len(seen) == 3 * 4  # shapes
        assert [ref() is None for ref in seen] == [True] * 8 + [False] * 4  # the update's norm needs the last


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
    assert monitor._worker.cancelled.wait(LONG_S)
    gate.open.set()
    closing.join(LONG_S)
    assert not closing.is_alive()
    assert monitor.records() == []
    assert stored(tmp_path) == []


def test_closing_twice_is_fine_and_observing_after_it_is_an_error(tmp_path: Path) -> None:
    monitor = watch(tiny_vit(), tmp_path)
    monitor.close()
    monitor.close(cancel=True)
    with pytest.raises(RuntimeError, match="closed"):
        monitor.observe(2)


@pytest.mark.parametrize(
    "change",
    [
        {"every": 0},
        {"limit_gb": 0},
        {"last_update": -1},
        {"circuits": "all"},
        {"targets": "attn.qvk"},
        {"targets": "mlp.fc1", "split_qkv": True},
    ],
)
def test_wrong_options_are_user_errors(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        watch(tiny_vit(), tmp_path, **change)


def test_an_ema_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="average of this model"):
        watch(tiny_vit(), tmp_path, nn.ModuleDict({"inner": tiny_vit()}))


def test_the_worker_uses_one_cpu_thread_and_leaves_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a second team of OpenMP threads, small training steps on the CPU took twice their time."""
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:

        def solve(stack: MatrixStack, *args: Any, **more: Any) -> dict[str, Solved]:
            torch.ones(1_000_000).sum()  # a parallel operation, which may reset the number
            seen.append(torch.get_num_threads())
            return solve_stack(stack, *args, **more)

        monkeypatch.setattr(refresh_module, "solve_stack", solve)
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


def test_split_qkv_watches_three_matrices(tmp_path: Path) -> None:
    model = tiny_vit()
    with watch(model, tmp_path, targets="attn.qkv,mlp.fc1", split_qkv=True) as monitor:
        monitor.observe(0)
    spectra = files.read_spectra(tmp_path / "update_00000000.npz").spectra
    names = [f"spec/blocks.{b}.{k}" for b in (0, 1) for k in ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "mlp.fc1")]
    assert list(spectra) == names
    weight = model.get_parameter("blocks.1.attn.qkv.weight").detach().double().numpy()
    for n, letter in enumerate("qkv"):
        expected = np.linalg.svd(weight[16 * n : 16 * n + 16], compute_uv=False)
        np.testing.assert_allclose(spectra[f"spec/blocks.1.attn.qkv.{letter}"], expected, rtol=1e-6)
    assert "spec/type/attn.qkv.k/stable_rank" in monitor.records()[0].values


def test_on_cpu_and_more_threads_change_no_bit(tmp_path: Path) -> None:
    model = tiny_vit()
    records = []
    for n, settings in enumerate((SpectralSettings(topk=3), SpectralSettings(topk=3, on_cpu=True, cpu_threads=3))):
        with watch(model, tmp_path / str(n), settings=settings, circuits="raw") as monitor:
            monitor.observe(0)
        records.append(comparable(monitor.records()[0].values))
    assert records[0] == records[1]


def test_a_gpus_way_gives_the_cpus_figures(tmp_path: Path, on_cuda_path: CudaPath) -> None:
    """Whole stacks on a stream of the worker's own; |dW|_2, too, of changes that are no power of two."""
    records: list[dict[str, float]] = []
    for way in (nullcontext, on_cuda_path):
        model, folder = tiny_vit(0), tmp_path / str(len(records))
        with way(), watch(model, folder, tiny_vit(1), circuits="folded") as monitor:
            for update in (0, 2):
                monitor.observe(update)
                monitor.wait()
                nudge(model, 7, size=0.0137)
            records.append(comparable(monitor.records()[-1].values))
    expected, found = records
    assert list(found) == list(expected)
    for key, value in expected.items():
        loose = "cos_" in key or "certificate" in key or "orthogonality" in key  # certificates are roundings
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-7 if loose else 1e-12), key
    assert all(v > 0 for key, v in found.items() if key.startswith("spec/") and key.endswith("update_norm2"))


def test_computed_aside_all_that_is_stored_and_recorded_has_the_same_bits(tmp_path: Path, monkeypatch: Any) -> None:
    """In another process, each refresh compared with the one before, also where the process was lost meanwhile.

    So has what is computed here since there can be no process; and folders are those that were meant at the start.
    """
    found: list[tuple[list[dict[str, float]], dict[str, bytes]]] = []
    workers: list[Worker] = []
    said: list[str] = []
    for way in ("here", "aside", "not started"):

        def make(*args: Any, is_aside: bool, now: str = way, **more: Any) -> Worker:
            workers.append(Worker(*args, is_aside=now != "here", **more))
            return workers[-1]

        monkeypatch.setattr("lowrank_vit.spectral.watching.monitor.Worker", make)
        if way == "not started":
            monkeypatch.setattr("sys.executable", "/nowhere/python")
        monkeypatch.chdir(tmp_path)
        model = tiny_vit(0)
        with watch(model, Path(way), tiny_vit(1), say=said.append, circuits="folded") as monitor:
            records = observe(monitor, model, range(0, 4, 2))
            if way == "aside":
                aside = workers[-1]._aside
                assert aside is not None
                assert aside._process is not None
                aside._process.kill()
                aside._process.wait(LONG_S)
            monkeypatch.chdir("/")
            records += observe(monitor, model, range(4, 6, 2))
            assert monitor.failed == 0
        aside = workers[-1]._aside
        assert aside is None or aside.pid is None
        found.append((records, {path.name: path.read_bytes() for path in (tmp_path / way).iterdir()}))
    assert found[0] == found[1] == found[2]
    (line,) = said
    assert "no process can be started" in line


def test_both_solvers_agree(tmp_path: Path) -> None:
    weights = {f"m{i}": 0.02 * torch.randn(96, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)}
    values = {}
    for solver in ("gram64", "svd"):
        settings, memory = SpectralSettings(topk=4, solver=solver), Memory()
        refresh(0, {"spec": stack_by_shape(weights)}, settings, memory)
        later = {"spec": stack_by_shape({n: 1.1 * w + 0.001 for n, w in weights.items()})}
        values[solver] = refresh(1, later, settings, memory).values
    for key, numbers in values["gram64"].items():
        for metric, value in numbers.items():
            if metric not in ("certificate_max", "orthogonality"):
                assert value == pytest.approx(values["svd"][key][metric], rel=1e-9, nan_ok=True), metric
