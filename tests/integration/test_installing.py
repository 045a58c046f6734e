"""What is released: wheel and sdist, what they carry, and that they install into clean environments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from lowrank_vit import __version__
from lowrank_vit.common.program import COMMANDS
from tests.hidden_packages import canonical
from tests.waiting import LONG_S

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
WITHOUT_TORCH = [one for one in PROJECT["dependencies"] if not one.startswith(("torch>", "torchvision", "timm"))]
"""What the base needs but torch and what needs it: gigabytes that a test does not install."""


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


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["pip", "uv"])
@pytest.mark.parametrize("version", PYTHONS)
def test_it_installs_into_a_clean_environment_and_its_script_runs(version, tool, built, tmp_path):
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"python{version} is not on this machine")
    subprocess.run([python, "-m", "venv", str(tmp_path / "env")], check=True, timeout=LONG_S)
    folder = tmp_path / "env" / "bin"
    install = [str(folder / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if tool == "uv":
        uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if uv is None:
            pytest.skip("uv is not installed")
        install = [uv, "pip", "install", "--quiet", "--python", str(folder / "python")]
    for words in (WITHOUT_TORCH, ["--no-deps", str(built[0])]):
        subprocess.run([*install, *words], check=True, timeout=4 * LONG_S)

    def run(*words: str) -> str:
        command = [str(folder / "lowrank-vit"), *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LONG_S, check=True).stdout

    assert run("--version") == f"lowrank-vit {__version__}\n"
    assert all(f"  {name} " in run("--help") for name in COMMANDS)
    page = run("doctor")
    assert version in page
    assert "No module named 'torch'" in " ".join(page.split())
    assert "opencv-python not installed" in " ".join(page.split())
