"""Help at 80 columns: nothing is wider, nothing is broken in the middle, defaults are said once."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_vit.common import program
from lowrank_vit.common.terminal import fit
from lowrank_vit.config.command_line import run_subcommand

ROOT = Path(__file__).parents[3]
COMMANDS = "digits cifar100 imagefolder list hfds wds torch verify info".split()
PREP = [("data_prep.__main__", [command]) for command in COMMANDS]
OURS = [*((module, []) for module, *_ in program.COMMANDS.values()), *PREP]


def help_of(module: str, arguments: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*arguments, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(("module", "arguments"), OURS, ids=lambda one: str(one))
def test_help_fits(module, arguments, monkeypatch, capsys):
    text = help_of(module, arguments, monkeypatch, capsys)
    assert "usage: " in text
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert not re.search(r"\d,\s*\n\W*\d{3}", text), "a number is broken"
    assert "\n\n\n" not in text


@pytest.mark.parametrize(("module", "arguments"), OURS, ids=lambda one: str(one))
def test_help_says_defaults_in_words(module, arguments, monkeypatch, capsys):
    text = help_of(module, arguments, monkeypatch, capsys)
    described = re.findall(r"(?m)^│ {7}\S.*│$", text)
    assert all(len(line) == 80 for line in described), "a paragraph does not fit its frame"
    assert "{None}" not in text
    assert "None)" not in text
    assert "(default: '')" not in text


def test_usage_names_the_script_where_that_was_called(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lowrank-vit", "analyze-spectrum"])
    text = help_of("lowrank_vit.analyze_spectrum", [], monkeypatch, capsys)
    assert text.startswith("usage: lowrank-vit analyze-spectrum ")


def test_the_previews_help_lists_flags_and_defaults(monkeypatch, capsys):
    text = help_of("lowrank_vit.augment.__main__", [], monkeypatch, capsys)
    for flag, default in (("--reprob", "0.0"), ("--mixup", "0.0"), ("--hflip", "0.5"), ("--preview", "")):
        assert flag in text
        assert f"(default: {default}" in text or not default


def test_prose_is_wrapped_and_tables_are_left_alone():
    table = "│ " + "x" * 90
    assert fit(f"{table}\n- {'word ' * 20}\n\n\n\nend\n", 40).splitlines() == [
        table,
        "- word word word word word word word",
        "  word word word word word word word",
        "  word word word word word word",
        "",
        "end",
    ]


def test_empty_lines_and_lists_of_a_framed_description_stay():
    table = [
        "╭─ subcommands ────────────────────────╮",
        "│   • torch     Convert a data set.    │",
        "│                                      │",
        "│               - Items are pictures,  │",
        "│               or paths.              │",
        "│               - Labels are numbers.  │",
        "╰──────────────────────────────────────╯",
    ]
    assert fit("\n".join(table), 40).splitlines() == table


@pytest.mark.parametrize("module", ["benchmarks", "data_prep"])
def test_help_fits_also_in_frames(module):
    command = [sys.executable, "-m", module, "--help"]
    told = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, encoding="utf-8", env=told)
    assert done.returncode == 0, done.stderr
    assert "│   • " in done.stdout
    assert {len(line) for line in done.stdout.splitlines() if line.startswith("│")} == {80}


def test_a_list_of_commands_has_the_first_sentence_of_each_and_its_own_help_all(capsys):
    def first() -> None:
        """Do one thing.

        - Before the other.
        """

    def help_of(*argv: str) -> str:
        with pytest.raises(SystemExit) as caught:
            run_subcommand({"first": first}, [*argv, "--help"], "prog", "Things.")
        assert caught.value.code == 0
        return capsys.readouterr().out

    assert "Do one thing." in help_of()
    assert "Before the other" not in help_of()
    assert "`prog COMMAND --help`" in help_of()
    assert "Before the other" in help_of("first")


def test_makes_help_fits_and_names_the_benches():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert {"growth", "limits"} <= set(re.findall(r"\w+", text))


def test_help_loads_no_library_that_takes_seconds(tmp_path):
    """Of all commands, in one process; numpy's place in --help is where images are converted, which comes last."""
    code = """
import contextlib, importlib, io, sys
from lowrank_vit.common.program import COMMANDS
HEAVY = ["torch", "timm", "numba", "cv2", "ffcv", "matplotlib", "wandb", "numpy"]
for name in sorted(COMMANDS, key="prep".__eq__):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
        importlib.import_module(COMMANDS[name][0]).main(["--help"])
    assert "usage: " in shown.getvalue(), name
    print(name, *(library for library in HEAVY if library in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    *others, prep_line = done.stdout.splitlines()
    assert (set(others), prep_line, done.stderr) == ({*program.COMMANDS} - {"prep"}, "prep numpy", "")


def test_the_list_of_benches_loads_no_library_that_takes_seconds():
    code = """
import contextlib, sys
import benchmarks.__main__
with contextlib.suppress(SystemExit):
    benchmarks.__main__.main(["--help"])
print("loaded:", *(name for name in ["torch", "timm", "numba", "cv2", "ffcv", "wandb", "numpy"] if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    *shown, last_line = done.stdout.splitlines()
    assert (last_line, done.stderr) == ("loaded:", "")
    assert shown[0].startswith("usage: ")


def test_every_bench_has_a_description_and_a_function():
    from benchmarks import commands
    from benchmarks.__main__ import DESCRIPTIONS

    functions = commands.described(DESCRIPTIONS)
    assert list(functions) == list(DESCRIPTIONS)
    assert {*functions.values()} == {*vars(commands)["_COMMANDS"].values()}
    assert {name: one.__doc__ for name, one in functions.items()} == DESCRIPTIONS
