"""The page for a bug report: each line by itself, whatever fails, and nothing of who works there."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_vit import doctor
from lowrank_vit.common import resources
from lowrank_vit.data import choose
from lowrank_vit.data.decode import backend
from lowrank_vit.run import diagnosis as module
from lowrank_vit.run.diagnosis import diagnosis

ROOT = Path(__file__).parents[3]


@pytest.fixture
def no_mmap(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(module.mmap, "mmap", refuse)


def test_it_tells_what_is_there_and_what_auto_would_choose(digits_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    doctor.main(["--output", str(tmp_path), "--data-dir", str(digits_dir), "--json"])
    page = json.loads(capsys.readouterr().out)
    assert [*page] == ["versions", "extras", "machine", "gpu", "output", "data", "auto"]
    told = [text for lines in page.values() for text in lines.values()]
    assert [text for text in told if text.startswith(("failed", "no answer"))] == []
    assert page["auto"]["--loader"] == "resident for train.beton"
    assert page["output"]["locks"] == "flock"
    assert page["output"]["mappings"] == page["data"]["mappings"] == "shared"
    assert "pip install 'lowrank-vit[mlflow]'" in page["extras"]["mlflow"]
    assert "dali" in page["extras"]["train"]
    assert [*tmp_path.iterdir()] == []


def test_the_page_has_80_columns_and_its_help_too(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    doctor.main([])
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert "nearest folder above" in told


def test_it_asks_the_functions_that_choose_in_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "usual_workers", lambda device: 17)
    monkeypatch.setattr(choose, "memory_bytes", lambda device: 2**40)
    monkeypatch.setattr("lowrank_vit.data.decode.resident_set.free_bytes", lambda device: 2**40)
    monkeypatch.setattr("lowrank_vit.data.decode.dali.why_no_dali", lambda device: "NVIDIA DALI is not installed")
    auto = diagnosis(tmp_path, tmp_path)["auto"]
    assert auto["--workers"].startswith("17 threads")
    assert auto["--loader"] == "resident for sets of up to 256.0 GiB decoded, else ffcv (NVIDIA DALI is not installed)"


def test_of_gpus_it_tells_memory_and_which_have_a_jpeg_engine(tmp_path, monkeypatch, on_cuda_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("lowrank_vit.data.jpeg_engine.has_jpeg_engine", lambda device: device.index == 1)
    monkeypatch.setattr("lowrank_vit.data.decode.dali.why_no_dali", lambda device: "")
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30)
    with on_cuda_path(is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda device: card):
        page = diagnosis(tmp_path, tmp_path)
    assert page["versions"]["torch"].endswith(", CUDA 13.0")
    assert page["gpu"]["devices"] == (
        "0: NVIDIA H100 80GB HBM3, 80.0 GiB, no JPEG engine; 1: NVIDIA H100 80GB HBM3, 80.0 GiB, a JPEG engine"
    )
    assert page["auto"]["--loader"].endswith("decoded, else dali")


def test_a_line_that_fails_or_hangs_takes_no_other_one_away(tmp_path, monkeypatch):
    def fail() -> int:
        raise RuntimeError("the kernel's files are of another kind")

    monkeypatch.setattr(resources, "available_cores", fail)
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(module, "_driver", lambda: threading.Event().wait() and "")
    monkeypatch.setattr(module, "_requirements", fail)
    page = diagnosis(tmp_path, tmp_path)
    assert page["machine"]["cores"] == "failed: RuntimeError: the kernel's files are of another kind"
    assert page["gpu"]["driver"] == "no answer within 0.2 s"
    assert page["extras"] == {"and more": "failed: RuntimeError: the kernel's files are of another kind"}
    assert page["versions"]["python"]


@pytest.mark.usefixtures("no_mmap")
def test_a_file_system_without_locks_and_mappings_says_so(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    output = diagnosis(tmp_path, tmp_path)["output"]
    assert output["locks"].startswith("soft ones")
    assert output["mappings"].startswith("none")


def test_it_tells_nothing_of_who_works_there(tmp_path, monkeypatch):
    home, secret = tmp_path / "home" / "maria", tmp_path / "secret project"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(module.getpass, "getuser", lambda: "maria")
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node0815")
    text = (
        f"{home}/x.so and {secret}/train.beton by maria@node0815 of /opt/group/venv/lib/libfoo.so, "
        "https://maria:key@host/a, Mariana"
    )
    monkeypatch.setattr(module, "_cores", lambda: text)
    told = diagnosis(secret, secret)["machine"]["cores"]
    assert told == "~/x.so and DIR/train.beton by ...@... of .../libfoo.so, https://host/a, Mariana"


def test_without_torch_the_rest_is_told(tmp_path):
    code = "import sys; sys.modules['torch'] = sys.modules['psutil'] = None\n"
    code += f"from lowrank_vit.doctor import main; main(['--json', '--output', {str(tmp_path)!r}])"
    told = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=told, cwd=tmp_path, capture_output=True, text=True, check=True)
    page = json.loads(done.stdout)
    assert page["versions"]["torch"].startswith("failed: ModuleNotFoundError")
    assert page["auto"]["--device"].startswith("failed: ModuleNotFoundError")
    assert page["machine"]["memory"].startswith("failed")
    assert page["output"]["locks"] == "flock"
    assert page["versions"]["numpy"]
