"""Packages of extras: what is missing, or there and broken, is named with what mends it."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.packages import needs, why_missing
from tests.hidden_packages import hidden_packages

ROOT = Path(__file__).parents[3]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def package(folder: Path, content: str) -> str:
    """A package `half_there` whose import does what `content` says."""
    (folder / "half_there").mkdir()
    (folder / "half_there" / "__init__.py").write_text(content)
    return "half_there"


def test_what_is_there_is_returned():
    assert needs("xml.dom", extra="lora", to="It").__name__ == "xml.dom"
    assert why_missing("xml.dom") == ""


@pytest.mark.parametrize("module", ["never_there", "never_there.part"])
def test_what_is_not_installed_is_named_with_its_extra(module: str):
    with pytest.raises(UserError) as found:
        needs(module, extra="lora", to="--lora", instead="leave it out")
    assert str(found.value) == (
        "--lora needs the package never_there, which is not installed: `pip install 'lowrank-vit[lora]'`, "
        "or leave it out."
    )
    assert why_missing(module) == "is not installed"


def test_without_an_extra_the_package_is_named_as_pip_knows_it():
    said = r"^It needs the package scikit-learn, .*: `pip install scikit-learn`\.$"
    with hidden_packages("sklearn"), pytest.raises(UserError, match=said):
        needs("sklearn.datasets", extra="", to="It")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("import never_there", "No module named 'never_there'"),
        ("raise ImportError('libfoo.so.4: cannot open shared object file')", "libfoo.so.4: cannot open shared"),
        ("raise OSError('libbar.so: wrong ELF class')", "libbar.so: wrong ELF class"),
        ("raise AttributeError", "AttributeError"),
        ("1 +", "invalid syntax"),
    ],
)
def test_what_is_installed_but_broken_tells_its_cause(content, cause, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = package(tmp_path, content)
    with pytest.raises(UserError) as found:
        needs(name, extra="dali", to="--loader dali")
    assert f"which is installed but cannot be imported ({cause}" in str(found.value)
    assert "`pip uninstall half_there`, then `pip install 'lowrank-vit[dali]'`" in str(found.value)
    assert cause in why_missing(name)


def test_a_part_that_a_package_lacks_is_no_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = package(tmp_path, "")
    assert why_missing(f"{name}.part") == "is installed but cannot be imported (No module named 'half_there.part')"


def test_every_extra_that_the_code_names_is_there():
    named = {
        keyword.value.value
        for package in ("lowrank_vit", "data_prep", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
        if "extra=" in (text := path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Constant)
    }
    assert len(named) > 3
    assert named - {""} <= set(EXTRAS)
