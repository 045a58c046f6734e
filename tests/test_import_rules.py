"""The arrows of `docs/architecture.md`: who may import whom, and where randomness and heavy imports may live."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("lowrank_vit", "data_prep") for path in (ROOT / package).rglob("*.py"))

# A file below the folder on the left imports of the project only what begins with a name on the right.
MAY_IMPORT = {
    "data_prep": ("data_prep",),
    "lowrank_vit/data": ("data_prep", "lowrank_vit.data"),
    "lowrank_vit/augment": ("data_prep.errors", "lowrank_vit.augment", "lowrank_vit.options", "lowrank_vit.data.plan"),
    "lowrank_vit/spectral": ("data_prep.errors", "data_prep.resources", "data_prep.terminal", "lowrank_vit.spectral"),
    "lowrank_vit/report": (
        "data_prep.errors",
        "data_prep.terminal",
        "data_prep.typed",
        "lowrank_vit.report",
        "lowrank_vit.spectral",
    ),
    "lowrank_vit/bench": ("data_prep", "lowrank_vit"),
    "lowrank_vit/timm_flags.py": (),
    "lowrank_vit/option_types.py": (),
    "lowrank_vit/score_flags.py": ("data_prep.errors",),
    "lowrank_vit/options.py": (),
    "lowrank_vit/meaning.py": ("data_prep.errors",),
    "lowrank_vit/keywords.py": ("data_prep.errors",),
    "lowrank_vit/timm_line.py": ("data_prep.errors", "lowrank_vit.option_types", "lowrank_vit.timm_flags"),
    "lowrank_vit/config_yaml.py": (
        "data_prep.errors",
        "data_prep.shipped",
        "lowrank_vit.meaning",
        "lowrank_vit.option_types",
        "lowrank_vit.timm_flags",
        "lowrank_vit.timm_line",
    ),
    "lowrank_vit/config_check.py": (
        "data_prep.errors",
        "lowrank_vit.keywords",
        "lowrank_vit.option_types",
        "lowrank_vit.options",
    ),
    "lowrank_vit/config.py": (
        "data_prep.errors",
        "data_prep.help_text",
        "data_prep.terminal",
        "data_prep.typed",
        "lowrank_vit.config_check",
        "lowrank_vit.config_yaml",
        "lowrank_vit.keywords",
        "lowrank_vit.meaning",
        "lowrank_vit.option_types",
        "lowrank_vit.options",
        "lowrank_vit.timm_flags",
        "lowrank_vit.timm_line",
    ),
    "lowrank_vit/engine": (
        "data_prep.class_names",
        "data_prep.errors",
        "data_prep.terminal",
        "lowrank_vit.__version__",
        "lowrank_vit.config",
        "lowrank_vit.keywords",
        "lowrank_vit.meaning",
        "lowrank_vit.option_types",
        "lowrank_vit.options",
        "lowrank_vit.data",
        "lowrank_vit.augment",
        "lowrank_vit.engine",
        "lowrank_vit.spectral",
    ),
}
HEAVY = ("wandb", "matplotlib", "nvidia", "sklearn", "plotly", "pandas")
RANDOM = set(
    """
    random rand randn randint randperm rand_like randn_like manual_seed default_rng Generator bernoulli bernoulli_
    normal normal_ uniform uniform_ permutation shuffle choice multinomial beta gamma exponential_ random_
    """.split()
)


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """The modules that a file imports, as dotted names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module.count(".") else {f"{node.module}.{a.name}" for a in node.names}
    return found


def of_project(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("lowrank_vit", "data_prep")}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows(room):
    files = [path for path in FILES if path.relative_to(ROOT).as_posix().startswith(room)]
    assert files
    if room != "data_prep":  # an entry point joins rooms
        files = [path for path in files if path.name != "__main__.py"]
    for path in files:
        foreign = {n for n in of_project(imports(path)) if not n.startswith(MAY_IMPORT[room])}
        assert not foreign, f"{path.relative_to(ROOT)} must not import {foreign}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_heavy_imports_are_made_where_they_are_used(path):
    heavy = {name for name in imports(path, top_level_only=True) if name.split(".")[0] in HEAVY}
    assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} at its top"


def test_randomness_lives_in_the_plan():
    """No random number is drawn in the data path or the augmentation but by Philox."""
    for path in FILES:
        if not path.relative_to(ROOT).as_posix().startswith(("lowrank_vit/data", "lowrank_vit/augment")):
            continue
        names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert not names & RANDOM, f"{path.relative_to(ROOT)} draws random numbers: {names & RANDOM}"
        assert "random" not in {name.split(".")[0] for name in imports(path)}


def test_files_can_be_read_in_one_sitting():
    too_long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in FILES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not too_long


def test_converting_needs_no_torch():
    code = "import sys, data_prep.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
