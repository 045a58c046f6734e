"""A monitor in a loop that is not the trainer's: any model, wrapped or not; what it refuses, and how it ends."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.report.read import read_run
from lowrank_vit.spectral.watching import monitor as monitor_module
from lowrank_vit.spectral.watching.monitor import SpectralMonitor
from lowrank_vit.spectral.watching.refresh import SpectralSettings
from lowrank_vit.spectral.watching.stored import open_spectra
from tests.monitors import Gate
from tests.waiting import LONG_S, wait_until

SETTINGS = SpectralSettings(topk=2)
pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))


def watch(model: nn.Module, folder: Path, **more: Any) -> SpectralMonitor:
    return SpectralMonitor(model, store_dir=folder, **{"every": 1, "settings": SETTINGS} | more)


def of_monitors() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "spectral-monitor"]


def test_spectra_of_a_plain_network_in_two_types(tmp_path: Path) -> None:
    model = mlp()
    with watch(model, tmp_path / "spectra") as monitor:
        for update, dtype in enumerate((torch.float32, torch.bfloat16)):
            model.to(dtype)  # a loop that casts its model in the midst of it
            monitor.observe(update)
            monitor.wait()
    assert (monitor.failed, len(monitor.records())) == (0, 2)
    spectra = open_spectra(tmp_path / "spectra")
    assert spectra.names == ["0", "2"]
    weights = {name: model.get_parameter(f"{name}.weight").detach().double().numpy() for name in spectra.names}
    for name, weight in weights.items():
        np.testing.assert_allclose(spectra.values(name), np.linalg.svd(weight)[1], rtol=1e-9)


def test_wrapped_models_are_watched_under_their_own_names(tmp_path: Path) -> None:
    model = mlp()
    with watch(torch.compile(model), tmp_path, ema_model=ModelEmaV3(model)) as monitor:  # type: ignore[arg-type]
        monitor.observe(0)
    spectra = open_spectra(tmp_path)
    assert spectra.names == ["0", "2"]
    np.testing.assert_array_equal(spectra.values("0"), spectra.values("0", ema=True))


def test_own_names_are_those_of_everything_that_is_stored(tmp_path: Path) -> None:
    with watch(mlp(), tmp_path, rename={"0": "blocks.0.mlp.fc1", "2": "blocks.1.mlp.fc1"}) as monitor:
        monitor.observe(0)
    assert open_spectra(tmp_path).names == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    (record,) = monitor.records()
    assert {"spec/type/mlp.fc1/sigma_max", "spec/depth/1/sigma_max"} <= {*record.values}


def test_a_layer_in_place_of_another_fails_refreshes_and_not_the_loop(tmp_path: Path) -> None:
    model, said = mlp(), list[str]()
    with watch(model, tmp_path, say=said.append) as monitor:
        for update, layer in enumerate((model[0], nn.Identity(), nn.Linear(8, 6))):
            model[0] = layer
            monitor.observe(update)
            monitor.wait()
    assert (monitor.failed, len(said), open_spectra(tmp_path).updates) == (1, 1, [0, 2])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"0.weight": 1}, {}, "model is of type dict; expected a torch.nn.Module"),
        (mlp(), {"every": 1.5}, "every is 1.5; expected a whole number"),
        (mlp(), {"targets": "mlp.fc1"}, r"^targets: 'mlp.fc1' matches no 2-D weight"),
        (mlp(), {"split_qkv": True}, r"^split_qkv: none of targets None is a qkv module"),
        (mlp().to("meta"), {}, "0 has no values yet: it is on the device meta"),
        (mlp(), {"circuits": "raw"}, r"^circuits: Sequential has no attention that is known"),
        (mlp(), {"circuits": "raw", "rename": {}}, "leave out rename, or circuits"),
    ],
)
def test_what_cannot_be_watched_is_told_at_once(tmp_path: Path, model: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        watch(model, tmp_path / "spectra", **options)
    assert not (tmp_path / "spectra").exists()


def test_a_directory_is_one_trainings(tmp_path: Path) -> None:
    with watch(mlp(), tmp_path / "a") as first, watch(mlp(), tmp_path / "b", targets="0") as other:
        with pytest.raises(UserError, match="written to by another monitor, which is not closed"):
            watch(mlp(), tmp_path / "a")
        first.observe(0)
        other.observe(3)
    with pytest.raises(UserError, match=r"spectra of another training, of updates 3 to 3.*resumed_update=N"):
        watch(mlp(), tmp_path / "b")
    with watch(mlp(), tmp_path / "b", targets="0", resumed_update=3) as again:
        again.observe(4)
    assert open_spectra(tmp_path / "b").updates == [3, 4]


def test_one_that_nobody_closes_ends_with_its_process_or_when_it_is_forgotten(tmp_path: Path, gate: Gate) -> None:
    monitor = watch(mlp(), tmp_path / "a")
    monitor.observe(0)
    assert gate.asked.wait(LONG_S)
    threading.Timer(0.1, gate.open.set).start()  # a matrix that was begun is finished
    monitor_module._close_all()  # as the interpreter does at its end
    assert of_monitors() == []
    with pytest.raises(RuntimeError, match="is closed"):
        monitor.observe(1)
    forgotten = watch(mlp(), tmp_path / "b")
    assert len(of_monitors()) == 1
    del forgotten
    gc.collect()
    wait_until(lambda: not of_monitors())


def test_a_report_is_drawn_of_a_monitors_directory_alone(tmp_path: Path) -> None:
    with watch(mlp(), tmp_path) as monitor:
        monitor.observe(0)
    run = read_run(tmp_path)
    assert ([one.update for one in run.spectra], run.shapes["0"], run.notes) == ([0], (6, 8), [])
