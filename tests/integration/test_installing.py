"""What is released: wheel and sdist, what they carry, and that they install into clean environments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
import torch

from lowrank_vit import __version__
from lowrank_vit.common.program import COMMANDS
from tests.hidden_packages import canonical
from tests.spectra import tiny_vit
from tests.waiting import LONG_S

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
TORCHS = ("torch", "torchvision", "triton", "nvidia-", "cuda-")
"""How the names of the gigabytes begin that a test does not install again."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wheel and sdist, made by the build system that pyproject.toml names."""
    build = pytest.importorskip("hatchling.build", reason="hatchling is not installed: run `make setup` again")
    folder, before = tmp_path_factory.mktemp("dist"), Path.cwd()
    os.chdir(ROOT)
    try:
        return [folder / build.build_wheel(str(folder)), folder / build.build_sdist(str(folder))]
    finally:
        os.chdir(before)


def tracked(*folders: str) -> list[str]:
    """The files of folders that git knows; those on disk where it is no clone."""
    done = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout:
        return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]
    found = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return [str(path.relative_to(ROOT)) for path in found if path.is_file() and path.suffix != ".pyc"]


def test_the_wheel_carries_all_that_commands_read(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        entry_points = wheel.read(f"lowrank_vit-{__version__}.dist-info/entry_points.txt").decode()
    wanted = {*tracked("lowrank_vit", "data_prep")}
    wanted |= {name.replace("configs/", "lowrank_vit/configs/") for name in tracked("configs")}
    assert wanted <= names
    assert {name.partition("/")[0] for name in names} == {
        "lowrank_vit",
        "data_prep",
        f"lowrank_vit-{__version__}.dist-info",
    }
    assert "lowrank-vit = lowrank_vit.__main__:main" in entry_points


def test_the_sdist_carries_the_project(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {*tracked("lowrank_vit", "data_prep", "configs", "scripts", "tests", "docs", "benchmarks")} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"} <= names


def test_the_metadata_are_those_of_the_project_and_pass_twine(built):
    with zipfile.ZipFile(built[0]) as wheel:
        told = message_from_bytes(wheel.read(f"lowrank_vit-{__version__}.dist-info/METADATA"))
    assert told["Version"] == __version__
    assert {canonical(name) for name in told.get_all("Provides-Extra", [])} == {*PROJECT["optional-dependencies"]}
    base = {re.split(r"[ <>=!~;\[]", one)[0] for one in told.get_all("Requires-Dist", []) if "extra ==" not in one}
    assert not base & {"ffcv", "nvidia-dali-cuda130", "wandb", "opencv-python", "setuptools", "scikit-learn"}
    check = pytest.importorskip("twine.commands.check", reason="twine is not installed: run `make setup` again")
    assert not check.check([str(path) for path in built], strict=True)


def environment(folder: Path, python: str) -> Path:
    """A clean virtual environment, but for torch and what lies beside it, which are linked from here."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True, timeout=LONG_S)
    (packages,) = folder.glob("lib/python3*/site-packages")
    for one in metadata.distributions():
        if (
            one.metadata["Name"]
            and canonical(one.metadata["Name"]).startswith(TORCHS)
            and "dali" not in one.metadata["Name"]
        ):
            link_package(one, packages)
    return folder / "bin" / "python"


def link_package(one: metadata.Distribution, packages: Path) -> None:
    for file in one.files or []:
        top = file.parts[0]
        name = Path(*file.parts[:2]) if top == "nvidia" and len(file.parts) > 2 else Path(top)
        target, link = Path(str(one.locate_file(str(name)))), packages / name
        if ".." not in name.parts and target.exists() and not link.exists() and name.name != "__pycache__":
            link.parent.mkdir(exist_ok=True)
            if name.suffix == ".dist-info":  # uv looks at folders alone
                shutil.copytree(target, link)
            else:
                link.symlink_to(target.resolve())


def install_line(tool: str, python: Path, wheel: Path) -> list[str]:
    if tool == "pip":
        return [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)]
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        pytest.skip("uv is not installed")
    return [uv, "pip", "install", "--quiet", "--python", str(python), str(wheel)]


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["pip", "uv"])
@pytest.mark.parametrize("version", PYTHONS)
def test_the_base_installs_into_a_clean_environment(version, tool, built, tmp_path, record_property):
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"python{version} is not on this machine")
    own = environment(tmp_path / "env", python)
    begun = time.monotonic()
    done = subprocess.run(
        install_line(tool, own, built[0]), capture_output=True, text=True, timeout=4 * LONG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    record_property("install_s", round(time.monotonic() - begun, 1))
    print(f"python{version} {tool}: {time.monotonic() - begun:.1f} s")

    def run(*words: object) -> str:
        command = [str(own.with_name("lowrank-vit")), *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LONG_S, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"lowrank-vit {__version__}\n"
    assert all(f"  {name} " in run("--help") for name in COMMANDS)
    listed = subprocess.run([str(own), "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"(?m)^(ffcv|wandb|opencv-python|scikit-learn|nvidia-dali\S*) ", listed)
    if version == "{}.{}".format(*sys.version_info):  # for others there is no torch here that they could import
        torch.save(tiny_vit().state_dict(), tmp_path / "weights.pt")
        assert "blocks.0.attn.qkv" in run("analyze-spectrum", "--checkpoint", tmp_path / "weights.pt")
    else:
        assert "python" in run("doctor")
