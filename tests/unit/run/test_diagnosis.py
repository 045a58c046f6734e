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
from typing import Any

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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("by bo on n1.lab.org, not bob or n10", "by ... on ....lab.org, not bob or n10"),
        ("n1 is up; bo@n1:/a", "... is up; ...@...:/a"),
        ("cannot read /home/Jane Doe/my set/x.so: no such file", "cannot read .../x.so: no such file"),
        ("'/home/Jane, (old): 2/set/train.beton' and '/b/c'", "'.../train.beton' and '.../c'"),
        ('"/home/J\'s set/train.beton" is cut', '".../train.beton" is cut'),
        ("/opt/a.so and /b/c.so, /data/Ünï+(x)/z", ".../a.so and .../c.so, .../z"),
        ("see https://host/a/b and 1/2", "see https://host/a/b and 1/2"),
    ],
)
def test_short_names_and_odd_folders_are_left_out_too(text, told, tmp_path, monkeypatch):
    monkeypatch.setattr(module.getpass, "getuser", lambda: "bo")
    monkeypatch.setattr(module.socket, "gethostname", lambda: "n1")
    monkeypatch.setattr(module, "_cores", lambda: text)
    monkeypatch.setattr(module, "_gpu", lambda: iter([]))
    monkeypatch.setattr(module, "_auto", lambda data_dir: iter([]))
    assert diagnosis(tmp_path, tmp_path)["machine"]["cores"] == told


def test_without_a_working_directory_and_a_home_the_rest_is_told(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("PWD", str(gone))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", dict[int, str]().__getitem__)  # a container's user without an entry
    page = diagnosis(Path("output"), tmp_path)
    told = [text for lines in page.values() for text in lines.values()]
    assert [text for text in told if text.startswith("failed") or str(tmp_path) in text] == []
    assert page["output"]["file system"].endswith(", of the nearest folder above")
    assert page["machine"]["working directory"] == "it does not exist any more"


def test_file_systems_that_do_not_answer_end_no_page(tmp_path, monkeypatch):
    dead = tmp_path / "dead"
    for name in ("is_dir", "resolve"):
        usual = getattr(Path, name)

        def ask(self: Path, *args: object, usual: Any = usual, **keywords: object) -> object:
            return threading.Event().wait() if dead in (self, *self.parents) else usual(self, *args, **keywords)

        monkeypatch.setattr(Path, name, ask)
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(module, "_gpu", lambda: iter([]))
    monkeypatch.setattr(module, "_auto", lambda data_dir: iter([]))
    monkeypatch.setattr(module, "_cores", lambda: f"{dead}/a/x.so")
    page = diagnosis(tmp_path, dead / "a")
    assert set(page["data"].values()) == {"no answer within 0.2 s"}
    assert page["machine"]["cores"] == "DIR/x.so"
    assert page["output"]["file system"]


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
