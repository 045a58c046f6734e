"""The arrows of `docs/architecture.md`: who may import whom, and where randomness and heavy imports may live."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("lowrank_vit", "data_prep", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
HEAVY = ("wandb", "tensorboard", "trackio", "mlflow", "matplotlib", "nvidia", "sklearn", "plotly", "pandas")
RANDOM = set(
    """
    random rand randn randint randperm rand_like randn_like manual_seed default_rng Generator bernoulli bernoulli_
    normal normal_ uniform uniform_ permutation shuffle choice multinomial beta gamma exponential_ random_
    """.split()
)


@cache
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
    return {name for name in names if name.split(".")[0] in PACKAGES}


@cache
def rooms() -> dict[str, str]:
    """Each room of the page's table, as a path below the repository, to the column of what it imports."""
    table = PAGE.partition("| room |")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for line in table.splitlines()[2:]:
        names, _, arrows = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", names):
            found[name if name.startswith(PACKAGES[1:]) else f"lowrank_vit/{name}"] = arrows
    return found


def allowed(room: str, arrows: str) -> set[str]:
    """The names that a room's imports begin with."""
    if arrows.startswith("everything"):
        excepted = set(re.findall(r"`([^`]+)`", arrows))
        others = {other for other in rooms() if other.endswith("/") and other.split("/")[-2] not in excepted}
        return {other.strip("/").replace("/", ".") for other in others} | {"lowrank_vit.__version__"}
    names = {name if name in PACKAGES else f"lowrank_vit.{name}" for name in re.findall(r"`([^`]+)`", arrows)}
    return names | {room.strip("/").replace("/", "."), "lowrank_vit.__version__"}


def room_of(path: Path) -> str | None:
    """The room that a file lies in."""
    name = path.relative_to(ROOT).as_posix()
    return next((room for room in rooms() if name == room or (room.endswith("/") and name.startswith(room))), None)


def test_every_file_has_its_room_and_every_room_its_files():
    assert {room_of(path) for path in FILES} == set(rooms())


def test_arrows():
    wrong = {}
    for path in FILES:
        room = room_of(path)
        if room is None or (path.name == "__main__.py" and room != "data_prep/"):  # an entry point joins rooms
            continue
        may = tuple(allowed(room, rooms()[room]))
        if foreign := {n for n in of_project(imports(path)) if not f"{n}.".startswith(tuple(f"{m}." for m in may))}:
            wrong[path.relative_to(ROOT).as_posix()] = foreign
    assert not wrong


def test_no_rooms_import_each_other():
    """The rooms stand on one another: no circle of imports, but from a room to itself."""
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        room = room_of(path)
        if room and room.endswith("/") and path.name != "__main__.py":
            targets = {room_of(ROOT / f"{name.replace('.', '/')}.py") for name in of_project(imports(path))}
            arrows.setdefault(room, set()).update(target for target in targets - {room} if target)
    done: list[str] = []
    while left := [room for room in arrows if room not in done]:
        free = [room for room in left if not (arrows[room] & set(left))]
        assert free, f"these rooms import each other in a circle: {left}"
        done += free


def test_heavy_imports_are_made_where_they_are_used():
    heavy = {
        f"{path.relative_to(ROOT)} imports {name} at its top"
        for path in FILES
        for name in imports(path, top_level_only=True)
        if name.split(".")[0] in HEAVY
    }
    assert not heavy


def test_randomness_lives_in_the_plan():
    """No random number is drawn in the data path or the augmentation but by Philox."""
    for path in FILES:
        if (
            not path.relative_to(ROOT)
            .as_posix()
            .startswith(("lowrank_vit/data", "lowrank_vit/plan", "lowrank_vit/augment"))
        ):
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
