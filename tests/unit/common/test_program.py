"""How a command is called here, and the names of the files that come with the program."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lowrank_vit.common import program
from lowrank_vit.common.program import CLASSES, CONFIGS, bundled_names, find_bundled

ROOT = Path(__file__).parents[3]


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
