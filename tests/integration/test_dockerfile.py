"""The Dockerfile's steps, run in a folder as far as that goes without docker: no image is built, nothing is installed.

Files are copied as it says, `make setup` runs there with an interpreter that installs nothing, and what the script asks
of the system is compared with what the image gets.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.waiting import LONG_S

STEPS = [
    step.split(maxsplit=1)
    for step in re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
    if step and not step.startswith("#")
]
PYTHON = """#!/bin/sh
case "$1 $2" in
"-c "*Python.h*) echo "$0" ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") shift 2; echo "$*" >>"{log}" ;;
"-c "*) exec {python} "$@" ;;
*) exit 3 ;;
esac
"""


def copy(sources: list[str], target: Path) -> None:
    """As COPY does: the content of folders, files by their names; without what .dockerignore names."""
    ignored = shutil.ignore_patterns(
        *(ROOT / ".dockerignore").read_text().split(), "__pycache__", ".*_cache", ".hypothesis"
    )
    for source in (ROOT / name for name in sources):
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True, symlinks=True)
        else:
            into = target / source.name if target.is_dir() or len(sources) > 1 else target
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, into)


def make(folder: Path, *words: str) -> str:
    told = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    told |= {"PATH": f"{folder.parent / 'bin'}:{os.environ['PATH']}", "PYTHON": "python-of-the-image"}
    done = subprocess.run(
        ["make", *words], cwd=folder, env=told, capture_output=True, text=True, timeout=LONG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_steps_work_in_their_order(tmp_path):
    app, log, tools = tmp_path / "app", tmp_path / "log", tmp_path / "bin"
    app.mkdir()
    tools.mkdir()
    fakes = {"g++": "", "pkg-config": "", "sudo": "exit 1", "apt-get": "exit 1"}
    for name, text in {**fakes, "python-of-the-image": PYTHON.format(log=log, python=sys.executable)}.items():
        (tools / name).write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    done = list[str]()
    for kind, rest in STEPS:
        if kind == "COPY":
            *sources, target = rest.split()
            copy(sources, app / target)
        elif kind == "RUN" and rest.startswith("make "):
            done.append(make(app, *shlex.split(rest)[1:]))
            check_installed(app, log)
    assert len(done) == 1
    for name in ("lowrank_vit/train.py", "data_prep/__main__.py", "tests/conftest.py", "configs/quickstart.yaml"):
        assert (app / name).is_file(), name
    assert not (app / ".git").exists()
    assert "pip" not in make(app, "--dry-run", "train")  # all is there: the first start installs nothing


def check_installed(app: Path, log: Path) -> None:
    """What pip was told to install can be built from what is there by then."""
    (line,) = log.read_text().splitlines()
    words = line.split()
    assert words[-2:] == ["--editable", ".[dev]"]
    assert (app / words[words.index("--constraint") + 1]).is_file()
    build = pytest.importorskip("hatchling.build", reason="hatchling is not installed: run `make setup` again")
    before = Path.cwd()
    os.chdir(app)
    try:
        assert build.build_wheel(str(app.parent)).endswith(".whl")
    finally:
        os.chdir(before)


def test_the_image_gets_what_the_script_asks_for():
    (installed,) = [rest for kind, rest in STEPS if kind == "RUN" and "apt-get install" in rest]
    script = (ROOT / "scripts" / "system_libraries.sh").read_text(encoding="utf-8")
    wanted = {*re.findall(r'(?m)^debian="(.+)"$', script)[0].split(), "python3-dev", "python3-venv", "make"}
    assert wanted <= {*installed.split()}


def test_its_system_has_a_python_that_the_project_supports():
    (image,) = [rest for kind, rest in STEPS if kind == "FROM"]
    assert image.endswith("ubuntu24.04")  # whose python3 is 3.12
