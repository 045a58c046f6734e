"""How a command is called here, and the names of the files that come with the program."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lowrank_vit.common import program
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.program import CLASSES, CONFIGS, bundled_names, find_bundled

ROOT = Path(__file__).parents[3]


def test_a_command_of_one_process_is_refused_on_the_first_of_several_ranks(monkeypatch):
    program.require_one_process("lowrank_vit.report")
    monkeypatch.setenv("WORLD_SIZE", "2")
    program.require_one_process("lowrank_vit.report")  # left over in the environment
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"lowrank_vit.report is the work of one process, and 2 were started"):
        program.require_one_process("lowrank_vit.report")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        program.require_one_process("lowrank_vit.report")
    assert not ended.value.code
    monkeypatch.setenv("WORLD_SIZE", "1")
    program.require_one_process("lowrank_vit.report")


@pytest.mark.parametrize(
    ("argv0", "module", "expected"),
    [
        ("/usr/bin/lowrank-vit", "lowrank_vit.analyze_spectrum", "lowrank-vit analyze-spectrum"),
        ("/usr/bin/lowrank-vit", "data_prep", "lowrank-vit prep"),
        ("/x/lowrank_vit/train.py", "lowrank_vit.train", "python -m lowrank_vit.train"),
        ("/x/lowrank_vit/report/__main__.py", "lowrank_vit.report", "python -m lowrank_vit.report"),
        ("/x/lowrank_vit/__main__.py", "lowrank_vit.report", "python -m lowrank_vit report"),
    ],
)
def test_usage_says_how_the_user_called_the_program(argv0, module, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [argv0])
    assert program.usage_name(module) == expected


def test_a_next_step_can_be_typed_here(tmp_path, monkeypatch):
    script = tmp_path / ".venv" / "bin" / "lowrank-vit"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    (script.parent / "python").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "")
    assert program.pasteable_command("lowrank_vit.report") == ".venv/bin/lowrank-vit report"
    monkeypatch.setenv("PATH", str(script.parent))
    assert program.pasteable_command("lowrank_vit.report") == "lowrank-vit report"
    monkeypatch.setattr(sys, "argv", ["/x/lowrank_vit/train.py"])
    monkeypatch.setattr(sys, "executable", str(script.parent / "python"))
    assert program.pasteable_command("lowrank_vit.report") == "python -m lowrank_vit.report"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert program.pasteable_command("lowrank_vit.report") == ".venv/bin/python -m lowrank_vit.report"
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert program.pasteable_command("data_prep") == f"{script.parent / 'python'} -m data_prep"


def test_files_that_come_with_the_program_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "quickstart" in bundled_names(CONFIGS)
    assert bundled_names(CLASSES) == ("imagenet100_classes.txt", "imagenet1k_classes.txt")
    assert find_bundled(Path("quickstart"), CONFIGS).samefile(ROOT / "configs" / "quickstart.yaml")
    assert find_bundled(Path("quickstart.yaml"), CONFIGS).samefile(ROOT / "configs" / "quickstart.yaml")
    assert find_bundled(Path("imagenet100_classes.txt"), CLASSES).samefile(ROOT / "configs" / "imagenet100_classes.txt")
    for other in (Path("none"), Path("x/quickstart"), Path("quickstart.txt")):
        assert find_bundled(other, CONFIGS) == other
    Path("quickstart.yaml").touch()
    assert find_bundled(Path("quickstart.yaml"), CONFIGS) == Path("quickstart.yaml")


@pytest.mark.parametrize(
    ("name", "version", "is_fine"),
    [
        ("timm", "1.0.9", False),
        ("timm", "1.0.31", True),
        ("timm", "1.1", True),
        ("ffcv", "1.0.1", False),
        ("nvidia-dali-cuda130", "1.49.0", False),
        ("nvidia-dali-cuda130", "2.4", True),
        ("torch", "2.11.0a0+git", True),
        ("torch", "2.9.1+cu128", False),
    ],
)
def test_old_libraries_are_told_at_the_start(name, version, is_fine, monkeypatch):
    needed = ["torch>=2.11", "timm>=1.0.31", "rich>=14"]
    needed += ["ffcv>=1.0.2; extra == 'ffcv'", 'nvidia-dali-cuda130>=2.4.0 ; extra == "dali"']
    monkeypatch.setattr(metadata, "requires", lambda _: needed)
    monkeypatch.setattr(metadata, "version", lambda other: version if other == name else "99")
    if is_fine:
        program.check_versions()
        return
    with pytest.raises(UserError, match=rf"^{name} {re.escape(version)} is too old: `pip install -U '{name}>="):
        program.check_versions()


def test_what_is_installed_is_new_enough():
    program.check_versions()


def test_libraries_under_other_names_and_source_trees_are_not_checked(monkeypatch):
    def missing(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", missing)
    program.check_versions()
    monkeypatch.setattr(metadata, "requires", missing)
    program.check_versions()
