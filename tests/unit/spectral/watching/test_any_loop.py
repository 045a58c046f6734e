"""A monitor in a loop that is not the trainer's: any model, wrapped or not; what it refuses, and how it ends."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

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
    return SpectralMonitor(model, **{"store_dir": folder, "every": 1, "settings": SETTINGS} | more)


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
        ({"0.weight": 1}, {}, r"^model takes a torch\.nn\.Module, not \{'0.weight': 1\}"),
        (mlp(), {"ema_model": 3}, "^ema_model takes a torch.nn.Module, or None, not 3"),
        (mlp(), {"ema_model": nn.Linear(2, 2)}, "^ema_model: its targets differ from the model's"),
        (
            mlp(),
            {"ema_model": nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1))},
            "^ema_model: its targets differ",
        ),
        (mlp(), {"settings": {}}, "^settings takes SpectralSettings"),
        (mlp(), {"settings": SpectralSettings}, "^settings takes SpectralSettings"),
        *(
            (mlp(), {name: wrong}, f"^{name} takes ")
            for name, wrongs in {
                "every": (1.5, 0, "2", True, None),
                "limit_gb": ("2", 0, -1, float("nan")),
                "store_dir": ("", " ", None, 3),
                "targets": (3, ["a", 3]),
                "resumed_update": (-1, "4", 2.0),
                "recorded_update": (-2,),
                "last_update": (-1,),
                "split_qkv": ("no",),
                "circuits": ("all",),
                "optimizer": (3,),
                "rename": (5,),
                "on_full": (5,),
                "say": (3,),
            }.items()
            for wrong in wrongs
        ),
        (mlp().to(torch.float8_e4m3fn), {}, "0 is a tensor of float8_e4m3fn, where .* of 16 bits or more"),
        (mlp(), {"targets": "mlp.fc1"}, r"^targets: 'mlp.fc1' matches no 2-D weight"),
        (mlp(), {"split_qkv": True}, r"^split_qkv: none of the watched matrices \(0, 2\) is a qkv layer"),
        (mlp().to("meta"), {}, "0 has no values yet: it is on the device meta"),
        (mlp(), {"circuits": "raw"}, r"^circuits: Sequential has no attention of a known class"),
        (mlp(), {"circuits": "raw", "rename": {}}, "leave out rename, or circuits"),
    ],
)
def test_what_cannot_be_watched_is_told_at_once(tmp_path: Path, model: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        watch(model, tmp_path / "spectra", **options)
    assert not (tmp_path / "spectra").exists()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize(
    "shard",
    [
        lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    ],
    ids=["fully_shard", "FSDP", "FSDP with the model's parameters"],
)
def test_a_model_that_is_sharded_over_ranks_is_refused(tmp_path: Path, shard: Any) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=r"sharded over ranks \((DTensor, )?FSDP\)\. Each rank needs (the )?whole"):
            watch(shard(mlp()), tmp_path / "spectra")
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "spectra").exists()


def test_a_directory_is_one_trainings(tmp_path: Path) -> None:
    with watch(mlp(), tmp_path / "a") as first, watch(mlp(), tmp_path / "b", targets="0") as other:
        with pytest.raises(UserError, match="another monitor that is not closed writes to"):
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


@pytest.mark.parametrize(
    ("name", "wrongs"),
    [
        *((name, (0, -1, "3", 2.5, True, None)) for name in ("topk", "interval", "cpu_threads", "full_every")),
        ("solver", ("x", None)),
        ("on_cpu", ("no", 1)),
        ("updates", (None,)),
    ],
)
def test_settings_are_checked_when_they_are_made(name: str, wrongs: tuple[Any, ...]) -> None:
    for wrong in wrongs:
        with pytest.raises(UserError, match=f"^{name} takes "):
            SpectralSettings(**{name: wrong})


def test_updates_are_counted_upwards(tmp_path: Path) -> None:
    with watch(mlp(), tmp_path) as monitor:
        for update in (0, 5, 5):
            monitor.observe(update)
            monitor.wait()
        for wrong, message in ((3, "num_updates is 3, and was 5 before"), (-1, "^num_updates takes"), ("a", "not 'a'")):
            with pytest.raises(UserError, match=message):
                monitor.observe(wrong)  # type: ignore[arg-type]
    assert [record.update for record in monitor.records()] == [0, 5]


def test_a_store_that_has_nothing_to_go_on_from_is_told(tmp_path: Path) -> None:
    said = list[str]()
    with watch(mlp(), tmp_path, resumed_update=4, say=said.append) as monitor:
        with pytest.raises(UserError, match="num_updates is 2, and was 3 before"):
            monitor.observe(2)
        monitor.observe(4)
    assert len(said) == 1
    assert "has no spectra to go on from: they begin at update 4" in said[0]
    assert open_spectra(tmp_path).updates == [4]


def test_what_holds_no_spectra_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with watch(mlp(), Path()) as monitor:
        monitor.observe(0)
    (tmp_path / "mon.py").touch()
    for wrong, message in (
        ("", "^run takes a path"),
        (3, "^run takes a path"),
        ("mon.py", "is a file, but no checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            open_spectra(wrong)  # type: ignore[arg-type]
    spectra: Any = open_spectra(".")
    for ask in (lambda: spectra.values(3), lambda: spectra.vectors(None), lambda: spectra.scalars(3)):
        with pytest.raises(UserError, match=r"^(name|metrics) takes .*name"):
            ask()
