"""What `make setup` runs with sudo: it says so first, and asks where somebody can answer."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.waiting import LONG_S

SCRIPT = Path(__file__).parents[2] / "scripts" / "system_libraries.sh"
FAKES = {
    "id": "echo ${USER_ID:-1000}",
    "python": 'case "$2" in *Python.h*) echo "$BIN/python" ;; esac',
    "sudo": 'echo "sudo $*" >>"$LOG"; test "$1" != -n || shift; test -z "$NO_SUDO" && "$@"',
    "apt-get": """echo "apt-get $*" >>"$LOG"
case "$*" in *install*)
    for name in g++ pkg-config; do printf '#!/bin/sh\n' >"$BIN/$name"; chmod +x "$BIN/$name"; done ;;
esac""",
}
RUNS_APT = ["apt-get -qq update", "apt-get -qq install -y --no-install-recommends g++ pkg-config libopencv-dev"]


class Machine:
    """A machine without g++ and pkg-config, whose apt installs them."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.log = folder / "bin", folder / "log"
        self.bin.mkdir()
        for name in ("env", "paste", "sed", "cat", "chmod", "test", "printf"):
            (self.bin / name).symlink_to(str(shutil.which(name)))
        for name, text in FAKES.items():
            self.give(name, text)

    def give(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def run(self, typed: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script; `typed` at a terminal, or without one."""
        told = {"PATH": str(self.bin), "BIN": str(self.bin), "LOG": str(self.log), **environment}
        terminal, stdin = pty.openpty() if typed is not None else (None, subprocess.DEVNULL)
        if terminal is not None:
            os.write(terminal, str(typed).encode())
        try:
            return subprocess.run(
                ["/bin/sh", str(SCRIPT), "python"],
                env=told,
                stdin=stdin,
                capture_output=True,
                text=True,
                timeout=LONG_S,
                check=False,
            )
        finally:
            for descriptor in (terminal, stdin):
                if terminal is not None and descriptor is not None:
                    os.close(descriptor)

    def ran(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_at_a_terminal_it_says_what_it_runs_and_asks(machine):
    done = machine.run("y\n")
    assert done.returncode == 0, done.stderr
    told = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert told == [line for line in machine.ran() if line.startswith("sudo")]
    assert next(line for line in machine.ran() if line.startswith("apt-get")) == RUNS_APT[0]
    assert "Run that? [y/N]" in done.stderr


@pytest.mark.parametrize("typed", ["n\n", "\n", "yes please\n", "\x04"])
def test_whoever_does_not_agree_has_nothing_run(machine, typed):
    done = machine.run(typed)
    assert done.returncode == 1
    assert machine.ran() == []
    assert "sudo apt-get install g++ pkg-config" in done.stderr
    assert "pip install '.[train,quickstart]'" in done.stderr


@pytest.mark.parametrize("given", [{"YES": "1"}, {"USER_ID": "0"}])
def test_who_agreed_before_and_root_are_not_asked(machine, given):
    done = machine.run("", **given)
    assert done.returncode == 0, done.stderr
    assert "Run that" not in done.stderr
    assert any("sudo" in line for line in machine.ran()) == ("YES" in given)
    assert any(line.startswith(RUNS_APT[1]) for line in machine.ran())


def test_without_a_terminal_nothing_is_asked_and_no_password(machine):
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert "Run that" not in done.stderr
    assert "sudo -n env DEBIAN_FRONTEND=noninteractive apt-get -qq update" in done.stdout
    assert machine.ran()[0].startswith("sudo -n ")


@pytest.mark.parametrize("lack", ["sudo", "apt-get", "rights"])
def test_what_cannot_be_installed_is_listed(machine, lack):
    if lack != "rights":
        (machine.bin / lack).unlink()
    done = machine.run(**({"NO_SUDO": "1"} if lack == "rights" else {}))
    assert done.returncode == 1
    assert "Still missing: g++, pkg-config." in done.stderr


def test_where_all_is_there_nothing_is_said(machine):
    for name in ("g++", "pkg-config"):
        machine.give(name, "")
    done = machine.run("")
    assert (done.returncode, done.stdout, done.stderr, machine.ran()) == (0, "", "", [])
