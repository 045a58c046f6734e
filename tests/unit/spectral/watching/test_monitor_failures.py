"""What goes wrong beside the training is said once, counted, and ends nothing; no thread is left behind."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.watching import files
from lowrank_vit.spectral.watching import refresh as refresh_module
from tests.monitors import Gate, observe, stored, watch
from tests.spectra import tiny_vit
from tests.waiting import LONG_S

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


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
    told: list[tuple[int, object]] = []
    with watch(tiny_vit(), tmp_path, say=said.append, on_full=lambda *of: told.append(of)) as monitor:
        with monkeypatch.context() as patch:
            patch.setattr(
                "lowrank_vit.spectral.watching.watched.stack_by_shape", failing(torch.OutOfMemoryError("out"))
            )
            monitor.observe(0)
            monitor.wait()
        monitor.observe(2)
    assert stored(tmp_path) == [2]
    assert monitor.failed == len(said) == 1
    (_, failure), (_, copies) = told
    assert [update for update, _ in told] == [0, 2]
    assert isinstance(failure, torch.OutOfMemoryError)
    assert isinstance(copies, dict)


def test_a_full_disk_costs_the_file_and_not_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, **arrays: Any) -> None:
        file.write(b"PK")
        raise OSError(errno.ENOSPC, "No space left on device")

    said: list[str] = []
    with watch(tiny_vit(), tmp_path, say=said.append) as monitor:
        monkeypatch.setattr(files.np, "savez", full)
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


def test_a_nan_in_one_matrix_of_the_average_is_the_averages_alone(tmp_path: Path) -> None:
    model, ema = tiny_vit(0), tiny_vit(1)
    with torch.no_grad():
        ema.get_parameter("blocks.1.mlp.fc1.weight")[0, 0] = torch.nan
    with watch(model, tmp_path, ema) as monitor:
        records = [*observe(monitor, model, range(2)), *observe(monitor, model, range(2, 4, 2))]
    newest, bad = records[-1], "spec_ema/blocks.1.mlp.fc1/"
    of_pair = {key for key in newest if key.startswith("spec/blocks.1.mlp.fc1/") and "ema_cos" in key}
    constant = {key for key in newest if key.startswith(bad) and "chance" in key}
    of_bad = {key for key in newest if key.startswith(bad)} - constant
    for family in ("block_cos_u_mean", "cos_v_overlap", "block_energy", "turn_bound", "block_gap", "block_cos0_v_min"):
        assert bad + family in of_bad
    assert all(np.isnan(newest[key]) for key in of_bad | of_pair)
    rest = {k: v for k, v in newest.items() if k not in of_bad | of_pair and "mp_" not in k and "turn_bound" not in k}
    assert np.isfinite(list(rest.values())).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_reported_once_and_recovered_from(tmp_path: Path, caplog, bad: float) -> None:
    model = tiny_vit()
    weight = model.get_parameter("blocks.1.mlp.fc1.weight")
    good = weight.detach().clone()
    with watch(model, tmp_path) as monitor:
        for update, entry in ((0, 0.1), (2, bad), (4, bad), (6, 2.0)):
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
    of_good = [(k, v) for r in records for k, v in r.values.items() if "blocks.0" in k and "mp_" not in k]
    assert np.isfinite([v for k, v in of_good if "turn_bound" not in k]).all()
    assert np.isfinite(records[1].values["spec/type/mlp.fc1/sigma_max"])


def test_an_exception_in_the_training_cancels_the_refresh_in_flight(tmp_path: Path, gate: Gate) -> None:
    def train_and_fail() -> None:
        with watch(tiny_vit(), tmp_path) as monitor:
            monitor.observe(0)
            assert gate.asked.wait(LONG_S)
            cancelled = monitor._worker.cancelled
            threading.Thread(target=lambda: cancelled.wait(LONG_S) and gate.open.set()).start()
            raise KeyError("out of data")

    with pytest.raises(KeyError, match="out of data"):
        train_and_fail()
    assert stored(tmp_path) == []


def test_a_process_that_exits_with_a_refresh_in_flight_does_not_hang(tmp_path: Path) -> None:
    code = f"""
import threading
from pathlib import Path
from lowrank_vit.spectral.watching import monitor, refresh
from lowrank_vit.spectral.watching.monitor import SpectralMonitor
from tests.spectra import tiny_vit
monitor._EXIT_S = 0.1
asked = threading.Event()
refresh.solve_stack = lambda *a, **k: (asked.set(), threading.Event().wait())
watching = SpectralMonitor(tiny_vit(), None, targets="mlp.fc1", every=1, store_dir=Path({str(tmp_path)!r}))
watching.observe(0)
asked.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], timeout=LONG_S, check=False)
    assert done.returncode == 0


def test_a_failure_that_cannot_even_be_said_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(line: str) -> None:
        raise BrokenPipeError(line)

    with watch(tiny_vit(), tmp_path, say=say) as monitor:
        for update in (0, 2, 4):
            with monkeypatch.context() as patch:
                if update != 4:
                    patch.setattr(refresh_module, "solve_stack", failing(ArithmeticError("no convergence")))
                monitor.observe(update)
                monitor.wait()
    assert (monitor.failed, monitor.skipped) == (2, 0)
    assert stored(tmp_path) == [4]
