"""The monitor observes, keeps up or says that it did not, and never leaves a thread or an error behind."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral import refresh as refresh_module
from lowrank_vit.spectral import store
from lowrank_vit.spectral.analyze import analyze_weights
from lowrank_vit.spectral.extremes import Solved
from lowrank_vit.spectral.monitor import SpectralMonitor
from lowrank_vit.spectral.refresh import Memory, SpectralSettings, refresh
from lowrank_vit.spectral.select import DEFAULT_TARGETS, select_targets
from lowrank_vit.spectral.solve import MatrixStack, solve, solve_stack, stack_by_shape
from tests.spectra import tiny_vit

LONG_S = 30  # for waits that end at once unless something is broken
SETTINGS = SpectralSettings(topk=3)
TIMES = ("refresh/seconds", "refresh/skipped", "refresh/failed")


def watch(model: nn.Module, store_dir: Path, ema: nn.Module | None = None, **changes: Any) -> SpectralMonitor:
    options: dict[str, Any] = {"targets": DEFAULT_TARGETS, "every": 2, "settings": SETTINGS, "store_dir": store_dir}
    return SpectralMonitor(model, ema, **options | changes)


def targets(model: nn.Module) -> dict[str, torch.Tensor]:
    return select_targets(dict(model.named_parameters()), DEFAULT_TARGETS)


def expected_spectra(model: nn.Module, kind: str) -> dict[str, np.ndarray]:
    return {f"{kind}/{name}": one.s for name, one in solve(targets(model), SETTINGS.topk).items()}


def stored(folder: Path) -> list[int]:
    return [store.read_spectra(path).update for path in store.list_spectra(folder)]


class Gate:
    """A solver that says when it is asked and answers only when let."""

    def __init__(self) -> None:
        self.asked, self.open = threading.Event(), threading.Event()

    def __call__(self, stack: MatrixStack, *args: Any, **more: Any) -> dict[str, Solved]:
        self.asked.set()
        assert self.open.wait(LONG_S)
        return solve_stack(stack, *args, **more)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(refresh_module, "solve_stack", gate)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json", "update_00000000.npz", "vectors_00000000.npz",
    ]  # fmt: skip
    update, found = store.read_spectra(tmp_path / "update_00000000.npz")
    assert update == 0
    assert list(found) == list(expected)
    for key, s in expected.items():
        np.testing.assert_array_equal(found[key], s)
    (record,) = monitor.records()
    assert record.update == 0
    for kind, one in (("spec", model), ("spec_ema", ema)):
        for name, values in analyze_weights(targets(one), SETTINGS).values.items():
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


def failing(error: Exception) -> Callable[..., dict[str, Solved]]:
    def solve(*_: Any, **__: Any) -> dict[str, Solved]:
        raise error

    return solve


@pytest.mark.parametrize("error", [ArithmeticError("no convergence"), MemoryError("no room"), UserError("no luck")])
def test_an_error_of_the_worker_is_said_once_counted_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    said: list[str] = []
    with watch(tiny_vit(), tmp_path, say=said.append) as monitor:
        for update in (0, 2, 4, 6):
            with monkeypatch.context() as patch:
                if update in (0, 2, 6):
                    patch.setattr(refresh_module, "solve_stack", failing(error))
                monitor.observe(update)
                monitor.wait()
        assert [(record.update, record.values["spec/refresh/failed"]) for record in monitor.records()] == [(4, 3)]
    assert monitor.failed == 3
    assert stored(tmp_path) == [4]
    assert len(said) == 2  # of the first, and of the first after it had gone well again
    assert all(str(error) in line and "Training goes on" in line for line in said)


def test_copies_that_find_no_memory_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with watch(tiny_vit(), tmp_path, say=said.append) as monitor:
        with monkeypatch.context() as patch:
            patch.setattr("lowrank_vit.spectral.monitor.stack_by_shape", failing(torch.OutOfMemoryError("out")))
            monitor.observe(0)
        monitor.observe(2)
    assert stored(tmp_path) == [2]
    assert monitor.failed == len(said) == 1


def test_a_full_disk_costs_the_file_and_not_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, **arrays: Any) -> None:
        file.write(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    said: list[str] = []
    with watch(tiny_vit(), tmp_path, say=said.append) as monitor:
        monkeypatch.setattr(store.np, "savez", full)
        monitor.observe(0)
    (line,) = said
    assert "spectra of update 0" in line
    assert "No space left on device. Free some space" in line
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]
    assert [record.update for record in monitor.records()] == [0]


def test_a_store_that_vanishes_is_made_anew_and_one_that_cannot_be_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    store_dir = tmp_path / "spectra"
    with watch(tiny_vit(), store_dir, say=said.append) as monitor:
        shutil.rmtree(store_dir)
        monitor.observe(0)
        monitor.wait()
        assert stored(store_dir) == [0]
        assert json.loads((store_dir / "index.json").read_text())["matrices"] == monitor.matrices
        assert said == []
        shutil.rmtree(store_dir)
        store_dir.write_text("in the way")
        monitor.observe(2)
    with watch(tiny_vit(), store_dir / "deeper", say=said.append) as other:
        other.observe(0)
    assert ["spectra" in line and "goes on" in line for line in said] == [True] * 3
    assert (monitor.failed, other.failed) == (1, 1)


def test_nan_weights_are_recorded_as_nan_beside_good_ones(tmp_path: Path) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[0, 0] = torch.nan
    with watch(model, tmp_path) as monitor:
        monitor.observe(0)
    (record,) = monitor.records()
    assert np.isnan(record.values["spec/blocks.1.mlp.fc1/sigma_max"])
    assert np.isfinite(record.values["spec/blocks.0.mlp.fc1/sigma_max"])


@pytest.mark.parametrize(
    "change",
    [
        {"every": 0},
        {"settings": SpectralSettings(topk=0)},
        {"settings": SpectralSettings(interval=-1)},
        {"settings": SpectralSettings(cpu_threads=0)},
        {"targets": "attn.qvk"},
        {"targets": "mlp.fc1", "split_qkv": True},
    ],
)
def test_wrong_options_are_user_errors(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        watch(tiny_vit(), tmp_path, **change)


def test_a_wrapped_ema_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ema\.module"):
        watch(tiny_vit(), tmp_path, nn.ModuleDict({"module": tiny_vit()}))


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


def nudge(model: nn.Module, seed: int, size: float = 0.02) -> None:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise))


def test_keys_of_the_first_and_of_later_refreshes(tmp_path: Path) -> None:
    model, ema = tiny_vit(0), tiny_vit(1)
    settings = SpectralSettings(topk=2, interval=3)
    with watch(model, tmp_path, ema, settings=settings) as monitor:
        monitor.observe(0)
        monitor.wait()
        nudge(model, 1)
        monitor.observe(2)
    first, second = (
        {k: v for k, v in r.values.items() if k.startswith("spec/blocks.0.attn.qkv/")} for r in monitor.records()
    )

    def family(prefix: str) -> set[str]:
        names = {f"{prefix}_{x}{end}{i}" for x in "uv" for end in ("", "_last") for i in (1, 2)}
        return names | {f"{prefix}_{x}_{what}" for x in "uv" for what in ("max", "mean")}

    single = set(
        "sigma_max sv1 sv2 sv_last1 sv_last2 gap_k gap_last stable_rank effective_rank rank90 rank95 rank99 "
        "nuclear_norm condition alpha alpha_ks alpha_sigma alpha_tail mp_sigma mp_edge mp_outliers "
        "certificate_max orthogonality chance_u chance_v".split()
    )
    drift = {"delta_sv_rel", "update_norm2", "update_normF"} | family("cos") | family("cos0")
    assert {k.rpartition("/")[2] for k in first} == single | family("ema_cos")
    assert {k.rpartition("/")[2] for k in second} == single | family("ema_cos") | drift
    s = store.read_spectra(tmp_path / "update_00000002.npz").spectra["spec/blocks.0.attn.qkv"]
    assert [second[f"spec/blocks.0.attn.qkv/{n}"] for n in ("sv1", "sv2", "sv_last1", "sv_last2")] == [
        s[0], s[3], s[15], s[12],
    ]  # fmt: skip
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["matrices"]["blocks.0.attn.qkv"] == {"shape": [48, 16], "top": [1, 4], "last": [16, 13]}
    assert monitor.indices_by_type()["mlp.fc2"] == {"top": [1, 4], "last": [16, 13]}


@pytest.mark.parametrize("has_files", [False, True])
def test_a_refresh_that_a_kill_cut_short_is_done_again_when_the_run_goes_on(
    tmp_path: Path, gate: Gate, has_files: bool
) -> None:
    """It was under way when the checkpoint was written; at the kill its record was missing, or even its files."""
    gate.open.set()
    model, again = tiny_vit(0), tiny_vit(0)

    def observe(monitor: SpectralMonitor, watched: nn.Module, update: int) -> None:
        monitor.wait()
        nudge(watched, update)
        monitor.observe(update)

    def numbers(monitor: SpectralMonitor) -> list[dict[str, float]]:
        monitor.close()
        return [{k: v for k, v in r.values.items() if not k.endswith(TIMES)} for r in monitor.records()]

    whole = watch(model, tmp_path / "whole", model)
    for update in (0, 2, 4, 6):
        observe(whole, model, update)
    expected = numbers(whole)

    folder = tmp_path / "cut"
    cut = watch(again, folder, again)
    for update in (0, 2):
        observe(cut, again, update)
    cut.wait()
    gate.open.clear()
    observe(cut, again, 4)
    kept = cut.kept()
    assert kept is not None
    assert kept.before is not None
    assert (kept.update, kept.before.update) == (4, 2)
    torch.save(kept.content(), folder / store.kept_name(4))
    gate.open.set()
    cut.close(cancel=not has_files)
    assert stored(folder) == ([0, 2, 4] if has_files else [0, 2])

    resumed = watch(again, folder, again, resumed_update=5, recorded_update=2)
    observe(resumed, again, 6)
    assert numbers(resumed) == expected[2:]
    for path in (tmp_path / "whole").glob("*.npz"):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    # With all records there nothing is done again, and the next one knows the weights of the last.
    another = watch(again, folder, again, resumed_update=5, recorded_update=4)
    another.observe(6)
    assert numbers(another) == expected[3:]


def test_drift_and_norms_are_those_of_plain_numpy(tmp_path: Path) -> None:
    model, ema = tiny_vit(0), tiny_vit(1)
    moments = []
    with watch(model, tmp_path, ema, settings=SpectralSettings(topk=3)) as monitor:
        for update in (0, 2, 4):
            moments.append({n: w.detach().double().numpy().copy() for n, w in targets(model).items()})
            monitor.observe(update)
            monitor.wait()
            nudge(model, update)
    record = monitor.records()[-1]
    averaged = {n: w.detach().double().numpy() for n, w in targets(ema).items()}
    svd = [{n: np.linalg.svd(w, full_matrices=False) for n, w in m.items()} for m in (*moments, averaged)]
    for name in moments[0]:
        key = f"spec/{name}"
        change = moments[2][name] - moments[1][name]
        assert record.values[f"{key}/update_norm2"] == pytest.approx(np.linalg.norm(change, 2), rel=1e-12)
        assert record.values[f"{key}/update_normF"] == pytest.approx(np.linalg.norm(change), rel=1e-12)
        old, new = svd[1][name].S[:3], svd[2][name].S[:3]
        assert record.values[f"{key}/delta_sv_rel"] == pytest.approx(np.mean(np.abs(new - old) / old), rel=1e-9)
        for prefix, then in (("cos", svd[1]), ("cos0", svd[0]), ("ema_cos", svd[3])):
            for side, before, now in (
                ("u", then[name].U, svd[2][name].U),
                ("v", then[name].Vh.T, svd[2][name].Vh.T),
            ):
                for end, columns in (("", slice(3)), ("_last", slice(-3, None))):
                    expected = np.linalg.svd(before[:, columns].T @ now[:, columns], compute_uv=False)
                    found = [record.values[f"{key}/{prefix}_{side}{end}{i}"] for i in (1, 2, 3)]
                    np.testing.assert_allclose(found, expected, atol=1e-7)
                    if not end:
                        assert record.values[f"{key}/{prefix}_{side}_mean"] == pytest.approx(expected.mean(), abs=1e-7)
                        assert record.values[f"{key}/{prefix}_{side}_max"] == found[0]


def test_aggregates_are_means_over_types_and_depths(tmp_path: Path) -> None:
    with watch(tiny_vit(), tmp_path) as monitor:
        monitor.observe(0)
    (record,) = monitor.records()
    values = record.values
    ranks = [values[f"spec/blocks.{block}.attn.qkv/stable_rank"] for block in (0, 1)]
    assert values["spec/type/attn.qkv/stable_rank"] == pytest.approx(np.mean(ranks))
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    alphas = [values[f"spec/blocks.1.{kind}/alpha"] for kind in kinds]
    assert values["spec/depth/1/alpha"] == pytest.approx(np.mean(alphas))
    assert "spec/type/attn.qkv/sv1" not in values
    assert values["spec/refresh/skipped"] == values["spec/refresh/fallbacks"] == 0
    assert values["spec/refresh/seconds"] > 0


def test_split_qkv_watches_three_matrices(tmp_path: Path) -> None:
    model = tiny_vit()
    with watch(model, tmp_path, targets="attn.qkv,mlp.fc1", split_qkv=True) as monitor:
        monitor.observe(0)
    spectra = store.read_spectra(tmp_path / "update_00000000.npz").spectra
    names = [f"spec/blocks.{b}.{k}" for b in (0, 1) for k in ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "mlp.fc1")]
    assert list(spectra) == names
    weight = model.get_parameter("blocks.1.attn.qkv.weight").detach().double().numpy()
    for n, letter in enumerate("qkv"):
        expected = np.linalg.svd(weight[16 * n : 16 * n + 16], compute_uv=False)
        np.testing.assert_allclose(spectra[f"spec/blocks.1.attn.qkv.{letter}"], expected, rtol=1e-6)
    assert "spec/type/attn.qkv.k/stable_rank" in monitor.records()[0].values


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_reported_once_and_recovered_from(tmp_path: Path, caplog, bad: float) -> None:
    model = tiny_vit()
    weight = model.get_parameter("blocks.1.mlp.fc1.weight")
    good = weight.detach().clone()
    with watch(model, tmp_path) as monitor:
        for update, entry in ((0, 1.0), (2, bad), (4, bad), (6, 2.0)):
            with torch.no_grad():
                weight.copy_(good)[0, 0] = entry
            monitor.observe(update)
            monitor.wait()
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "blocks.1.mlp.fc1: the matrix holds a NaN or an infinity" in warnings[0]
    key = "spec/blocks.1.mlp.fc1"
    records = monitor.records()
    assert [bool(np.isnan(r.values[f"{key}/sigma_max"])) for r in records] == [False, True, True, False]
    assert [r.values["spec/refresh/fallbacks"] for r in records] == [0, 1, 1, 0]
    assert np.isnan(records[3].values[f"{key}/cos_u1"])
    assert np.isfinite(records[3].values[f"{key}/cos0_u1"])
    assert np.isfinite([v for r in records for k, v in r.values.items() if "blocks.0" in k and "mp_" not in k]).all()
    assert np.isfinite(records[1].values["spec/type/mlp.fc1/sigma_max"])


def comparable(values: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if not key.endswith(TIMES)}


def observe(monitor: SpectralMonitor, model: nn.Module, updates: range) -> list[dict[str, float]]:
    """What is recorded of these updates, each of which moves the weights."""
    for update in updates:
        nudge(model, update)
        monitor.observe(update)
        monitor.wait()
    return [comparable(record.values) for record in monitor.records()]


def test_a_resumed_monitor_goes_on_as_if_there_had_been_no_break(tmp_path: Path) -> None:
    model = tiny_vit()
    with watch(model, tmp_path / "whole", model) as monitor:
        expected = observe(monitor, model, range(0, 12, 2))
    model = tiny_vit()
    with watch(model, tmp_path / "broken", model) as monitor:
        observe(monitor, model, range(0, 6, 2))
        checkpoint = deepcopy(model.state_dict())
        observe(monitor, model, range(6, 10, 2))  # lost with the process
    model.load_state_dict(checkpoint)
    with watch(model, tmp_path / "broken", model, resumed_update=5) as monitor:
        assert stored(tmp_path / "broken") == [0, 2, 4]
        resumed = observe(monitor, model, range(6, 12, 2))
    # The weights before the break are gone, so the first update after it has no norm.
    lost = {key for key in expected[3] if "update_norm" in key}
    assert resumed[0] == {key: value for key, value in expected[3].items() if key not in lost}
    assert resumed[1:] == expected[4:]
    assert stored(tmp_path / "broken") == stored(tmp_path / "whole")


@pytest.mark.parametrize(("is_cut_short", "recorded"), [(False, 4), (True, 4), (True, 6)])
def test_what_a_tight_limit_has_thinned_out_is_compared_with_all_the_same(
    tmp_path: Path, gate: Gate, is_cut_short: bool, recorded: int
) -> None:
    """At the checkpoint the refresh of update 4 was the newest, or that of 6 was under way; its record came, or not."""
    gate.open.set()
    model, whole, folder = tiny_vit(), tmp_path / "whole", tmp_path / "broken"
    with watch(model, whole, model, limit_gb=0) as monitor:
        expected = observe(monitor, model, range(0, 14, 2))
    model = tiny_vit()
    with watch(model, folder, model, limit_gb=0) as monitor:
        observe(monitor, model, range(0, 6, 2))
        if is_cut_short:
            gate.open.clear()
            nudge(model, 6)
            monitor.observe(6)
        kept, checkpoint = monitor.kept(), deepcopy(model.state_dict())
        assert kept is not None
        gate.open.set()
        monitor.wait()
        observe(monitor, model, range(6 + 2 * is_cut_short, 12, 2))  # lost with the process
        torch.save(kept.content(), folder / store.kept_name(kept.update))
    assert stored(folder) == [0, 10]
    model.load_state_dict(checkpoint)
    resumed_update = 7 if is_cut_short else 5
    with watch(model, folder, model, limit_gb=0, resumed_update=resumed_update, recorded_update=recorded) as monitor:
        assert stored(folder) == [0]
        resumed = observe(monitor, model, range(resumed_update + 1, 14, 2))
    assert resumed == expected[recorded // 2 + 1 :]
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in folder.glob("*[!h]"))
    for path in whole.glob("*.npz"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_store_that_cannot_be_read_ends_no_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: Any) -> None:
        raise OSError(116, "Stale file handle")

    said: list[str] = []
    monkeypatch.setattr(store, "_files", stale)
    watch(tiny_vit(), tmp_path, resumed_update=2, recorded_update=0, say=said.append).close()
    assert len(said) == 2
    assert "holds of before cannot be read ([Errno 116] Stale file handle). Training goes on" in said[1]


def test_what_another_monitor_recorded_is_not_compared_with(tmp_path: Path) -> None:
    with watch(tiny_vit(), tmp_path, settings=SpectralSettings(topk=2)) as monitor:
        monitor.observe(0)
    with watch(tiny_vit(), tmp_path, settings=SpectralSettings(topk=3), resumed_update=2) as monitor:
        monitor.observe(2)
    (record,) = monitor.records()
    assert not [key for key in record.values if "/cos" in key]


def test_a_checkpoint_taken_while_a_refresh_runs_is_of_the_training_alone(tmp_path: Path, gate: Gate) -> None:
    model = tiny_vit()
    before = deepcopy(model.state_dict())
    with watch(model, tmp_path) as monitor:
        monitor.observe(0)
        assert gate.asked.wait(LONG_S)
        torch.save(model.state_dict(), tmp_path / "checkpoint")
        gate.open.set()
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert all(torch.equal(saved[key], value) for key, value in before.items())
    assert stored(tmp_path) == [0]


def test_an_exception_in_the_training_cancels_the_refresh_in_flight(tmp_path: Path, gate: Gate) -> None:
    def train_and_fail() -> None:
        with watch(tiny_vit(), tmp_path) as monitor:
            monitor.observe(0)
            assert gate.asked.wait(LONG_S)
            threading.Timer(0.1, gate.open.set).start()
            raise KeyError("out of data")

    with pytest.raises(KeyError, match="out of data"):
        train_and_fail()
    assert stored(tmp_path) == []


def test_a_process_that_exits_with_a_refresh_in_flight_does_not_hang(tmp_path: Path) -> None:
    code = f"""
import threading
from pathlib import Path
from lowrank_vit.spectral import refresh
from lowrank_vit.spectral.monitor import SpectralMonitor
from tests.spectra import tiny_vit
asked = threading.Event()
refresh.solve_stack = lambda *a, **k: (asked.set(), threading.Event().wait())
monitor = SpectralMonitor(tiny_vit(), None, targets="mlp.fc1", every=1, store_dir=Path({str(tmp_path)!r}))
monitor.observe(0)
asked.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], timeout=4 * LONG_S, check=False)
    assert done.returncode == 0


def test_on_cpu_and_more_threads_change_no_bit(tmp_path: Path) -> None:
    model = tiny_vit()
    records = []
    for n, settings in enumerate((SpectralSettings(topk=3), SpectralSettings(topk=3, on_cpu=True, cpu_threads=3))):
        with watch(model, tmp_path / str(n), settings=settings) as monitor:
            monitor.observe(0)
        records.append(comparable(monitor.records()[0].values))
    assert records[0] == records[1]


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
