"""A command's output outlives whoever reads it, and Ctrl-C ends a command without a traceback at any time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_vit.common import begin, terminal
from lowrank_vit.common.program import COMMANDS
from lowrank_vit.common.terminal import Steady, duration
from tests.waiting import LONG_S

ROOT = Path(__file__).parents[3]
TALK = """
import logging, os, sys, warnings
from rich.console import Console
from rich.progress import track
for n in range(3):
    print("line", n, "\\ud8ff \\udcff", flush=n == 1)
    print("x" * 100_000)
    Console().print("rich")
    warnings.warn(f"warning {n}")
    logging.getLogger().warning("logged")
    os.system("echo from another process")
for _ in track(range(3)): pass
with open(sys.argv[1], "w") as file:
    file.write(f"{file.fileno() > 2}")
"""


def command(body: str, **options: Any) -> subprocess.Popen[Any]:
    """Start a command that does `body`."""
    lines = [f"    {line}" for line in body.strip().split("\n")]
    begin = "from lowrank_vit.common.terminal import *; begin_program()\nimport os, signal, sys, time"
    begin += "\nsignal.signal(signal.SIGINT, end_at_once)"
    text = "\n".join([begin, "def main():", *lines, "from lowrank_vit.common.errors import *", "exit_cleanly(main)"])
    where = options.pop("arguments", [])
    return subprocess.Popen([sys.executable, *options.pop("flags", []), "-c", text, *where], cwd=ROOT, **options)


def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def closed_terminal() -> int:
    master, slave = os.openpty()
    os.close(master)
    return slave


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def only_readable() -> int:
    return os.open(os.devnull, os.O_RDONLY)


@pytest.mark.parametrize("flags", [[], ["-u"]])
@pytest.mark.parametrize("lost", [closed_pipe, closed_terminal, full_disk, only_readable])
def test_a_command_goes_on_when_nobody_reads_its_output(tmp_path, lost: Callable[[], int], flags):
    stream = lost()
    process = command(TALK, flags=flags, arguments=[str(tmp_path / "file")], stdout=stream, stderr=stream)
    os.close(stream)
    assert process.wait(LONG_S) == (1 if lost is full_disk else 0)
    assert (tmp_path / "file").read_text() == "True"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("print(1)", 1),
        ("print(1); sys.exit(0)", 1),
        ("print(1); sys.exit(3)", 3),
        ("print(1); output_is_in_files()", 0),
        ("pass", 0),
    ],
)
def test_output_for_which_there_is_no_space_is_an_error_where_it_is_all_there_is(body: str, code: int):
    process = command(body, stdout=full_disk(), stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=LONG_S)
    said = b"error: the output could not be written: No space left on device\n"
    assert (process.returncode, errors) == (code, said if code == 1 else b"")


def test_a_command_goes_on_without_any_stream_and_no_file_gets_the_number_of_one(tmp_path):
    process = command(TALK, arguments=[str(tmp_path / "file")], preexec_fn=lambda: os.closerange(0, 3))
    assert process.wait(LONG_S) == 0
    assert (tmp_path / "file").read_text() == "True"


def test_what_is_read_is_all_there_also_of_a_pipe_that_does_not_wait():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = command("for n in range(100_000): print(n)", stdout=writing)
    os.close(writing)
    with os.fdopen(reading) as file:
        assert list(map(int, file)) == list(range(100_000))
    assert process.wait(LONG_S) == 0


def test_a_reader_that_goes_away_is_told_to_whoever_asks():
    process = command(
        "print('a', flush=True); time.sleep(0.1)\nwhile not is_unread(): print('b')", stdout=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == b"a\n"
    process.stdout.close()
    assert process.wait(LONG_S) == 0


@pytest.mark.parametrize("module", [module for module, _ in COMMANDS.values()] + ["lowrank_vit", "benchmarks"])
def test_ctrl_c_while_a_command_is_being_imported_leaves_no_traceback(module, tmp_path):
    for name in ("torch", "numpy", "tyro", "difflib", "ast"):
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise OSError")
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    name = module.removesuffix(".__main__")
    done = subprocess.run(
        [sys.executable, "-m", name],
        cwd=tmp_path,
        env={**os.environ, **path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "line",
    [
        "-m lowrank_vit.train",
        "-mlowrank_vit.train --lr 1",
        "-um lowrank_vit.train",
        "-X dev -W error -Eum lowrank_vit.train",
        "-Xdev --check-hash-based-pycs never -bI -m data_prep",
    ],
)
def test_a_module_is_a_command_however_python_was_told_of_it(line: str, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", *line.split()])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert begin.begin()
        monkeypatch.setattr(sys, "orig_argv", ["python", "-um", "timeit", "-m", "lowrank_vit.train"])
        assert not begin.begin()
    finally:
        signal.signal(signal.SIGINT, before)


INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize(
    "body",
    [
        "import lowrank_vit.__main__; sys.path.insert(0, sys.argv[1])\nimport interrupted",
        f"{INTERRUPT}; time.sleep(60)",
        f"class A:\n    def __del__(self): {INTERRUPT}\na = A(); del a; time.sleep(60)",
        f"import atexit; atexit.register(lambda: ({INTERRUPT}, time.sleep(60)))",
        f"try: {INTERRUPT}; time.sleep(60)\nfinally: {INTERRUPT}; time.sleep(60)",
        "end_within(0.1); time.sleep(60)",
    ],
    ids=[
        "while something is imported",
        "once",
        "where Python cannot raise it",
        "at the interpreter's exit",
        "twice",
        "a clean-up that takes long",
    ],
)
def test_ctrl_c_leaves_no_traceback(body, tmp_path):
    (tmp_path / "interrupted.py").write_text(
        f"import os, signal\ntry: {INTERRUPT}\nexcept BaseException: raise ImportError"
    )

    def not_ignored() -> None:  # as it is where the tests run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = command(body, arguments=[str(tmp_path)], stderr=subprocess.PIPE, preexec_fn=not_ignored)
    _, errors = process.communicate(timeout=LONG_S)
    assert (process.returncode, errors) == (130, b"interrupted\n")


def test_a_library_leaves_the_process_as_it_is():
    text = (
        "import sys, signal; before = sys.stdout, signal.getsignal(2); import lowrank_vit.common.terminal, data_prep\n"
    )
    check = "assert (sys.stdout, signal.getsignal(2)) == before"
    for module in ([], ["-m", "timeit", "-n", "1", "-r", "1"]):
        argument = [text + check] if module else ["-c", text + check]
        subprocess.run([sys.executable, *module, *argument], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3700, "1:01:40")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_progress_is_a_line_a_minute_with_the_time_left(monkeypatch):
    now, said = [5.0], []
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    steady = Steady(1000, said.append, done=100)
    for done in range(101, 301):
        now[0] += 1.0
        steady.tell(done, "images:")
    assert said == ["images: 160/1,000  ETA 14:00", "images: 220/1,000  ETA 13:00", "images: 280/1,000  ETA 12:00"]
    now[0] += 1000.0  # nothing goes on, so nothing is said
    assert len(said) == 3


def test_progress_of_bytes_is_said_in_mebibytes(monkeypatch):
    now, said = [5.0], []
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    for say in (said.append, None):
        with terminal.bytes_shown(10 << 30, "loading a.beton", say) as advance:
            for _ in range(10):
                now[0] += 40.0
                advance(1 << 30)
    assert said[0] == "loading a.beton, MiB: 2,048/10,240  ETA 5:20"
    assert len(said) == 5
