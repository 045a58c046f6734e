"""What `compare` says of two folders of results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_vit.spectral.watching.monitor import SpectralMonitor
from tests.golden.compare import differences
from tests.golden.train_and_wait import wait_for_each_refresh
from tests.monitors import stored, watch
from tests.spectra import tiny_vit


def _run(folder: Path) -> Path:
    (folder / "spectra").mkdir(parents=True)
    records = [
        {"kind": "spec", "update": 0, "sv1": float("nan"), "spec/refresh/seconds": 1.0},
        {"kind": "train", "update": 1, "loss": 2.0, "img_per_s": 100.0},
        {"kind": "train", "update": 2, "loss": 1.0, "img_per_s": 100.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "summary.csv").write_text("epoch,train_loss,img_per_s\n0,1.5,100\n")
    np.savez(folder / "spectra" / "update_00000000.npz", s=np.ones((2, 3)))
    torch.save({"state_dict": {"w": torch.zeros(2)}, "args": {"output": str(folder)}}, folder / "last.pth.tar")
    return folder


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    return _run(tmp_path / "a"), Path(shutil.copytree(tmp_path / "a", tmp_path / "b"))


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_the_machine_and_the_threads_order_are_no_difference(runs):
    a, b = runs
    lines = (b / "metrics.jsonl").read_text().replace("100.0", "7.0").splitlines()
    (b / "metrics.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    _replace(b / "summary.csv", ",100", ",7")
    (b / ".lock").touch()
    assert list(differences(a, b)) == []


def test_the_first_update_that_differs_is_said_with_both_values(runs):
    a, b = runs
    _replace(b / "metrics.jsonl", '"loss": 2.0', '"loss": 2.5')
    _replace(b / "metrics.jsonl", '"loss": 1.0', '"loss": 9.0')
    assert list(differences(a, b)) == ["metrics.jsonl: train: update 1: loss: 2.0 and 2.5 (2.5e-01 of the first)"]


def test_one_bit_of_a_spectrum_or_of_a_weight_is_a_difference(runs):
    a, b = runs
    values = np.ones((2, 3))
    values[1, 2] = np.nextafter(1.0, 2.0)
    np.savez(b / "spectra" / "update_00000000.npz", s=values)
    torch.save({"state_dict": {"w": torch.tensor([0.0, -0.0])}}, b / "last.pth.tar")
    assert list(differences(a, b)) == [
        "last.pth.tar: state_dict: w: [1]: 0.0 and -0.0; 1 of 2 differ",
        "spectra/update_00000000.npz: s: [1, 2]: 1.0 and 1.0000000000000002 (2.2e-16 of the first); 1 of 6 differ",
    ]


def test_what_one_of_them_lacks_is_a_difference(runs):
    a, b = runs
    (a / "spectra" / "update_00000007.npz.partial").touch()
    with (b / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "update": 2, "loss": 1.0}\n')
    np.savez(b / "spectra" / "update_00000000.npz", s=np.ones((2, 3), np.float32))
    _replace(b / "summary.csv", "train_loss", "loss")
    assert list(differences(a, b)) == [
        "metrics.jsonl: train: update 2, again: only in B",
        "spectra/update_00000000.npz: s: float64[2, 3] and float32[2, 3]",
        "spectra/update_00000007.npz.partial: only in A",
        "summary.csv: 0: train_loss: only in A",
    ]


def test_the_runs_that_are_compared_leave_no_refresh_out(tmp_path, monkeypatch):
    monkeypatch.setattr(SpectralMonitor, "observe", SpectralMonitor.observe)  # which is there again afterwards
    wait_for_each_refresh()
    with watch(tiny_vit(), tmp_path, every=1) as monitor:
        for update in range(4):
            monitor.observe(update)
            assert not monitor._worker.is_busy
    assert monitor.skipped == 0
    assert stored(tmp_path) == [0, 1, 2, 3]
