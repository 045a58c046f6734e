"""docs/architecture.md against the code: every file has its place there, and its arrows are the tested ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_import_rules import FILES, MAY_IMPORT, ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TABLES = {
    "Converting": "data_prep",
    "The augmentation room": "lowrank_vit/augment",
    "The engine room": "lowrank_vit/engine",
    "The data room": "lowrank_vit/data",
    "The report room": "lowrank_vit/report",
    "The bench room": "lowrank_vit/bench",
}
"""Sections with a table of files, and the folder that each is about."""
OF_ALL = ("data_prep", "lowrank_vit")
"""What "everything" stands for."""


def rows() -> dict[str, str]:
    """The table of rooms: each room to its column of imports."""
    table = PAGE.partition("| room |")[2].partition("\n\n")[0]
    found = {}
    for line in table.splitlines()[2:]:
        rooms, _, arrows = (cell.strip() for cell in line.strip("|").split("|"))
        folder = ""
        for name in re.findall(r"`([^`]+)`", rooms):
            folder = folder if "/" not in name else name.rpartition("/")[0] + "/"
            found[name if "/" in name else folder + name] = arrows
    return found


def described() -> dict[str, set[str]]:
    """Files that the page names, by the folder that its section is about."""
    sections = {
        "lowrank_vit": PAGE.partition("| room |")[2].partition("\n\n")[0],
        "lowrank_vit/spectral": PAGE.partition("\nInside `spectral/`")[2].partition("\n\n")[0],
    }
    sections |= {folder: section(title) for title, folder in TABLES.items()}
    return {folder: set(re.findall(r"\b\w+\.py\b", text)) for folder, text in sections.items()}


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_has_its_place(path: Path):
    folder = path.relative_to(ROOT).parent.as_posix()
    if path.name == "__init__.py" and folder != "lowrank_vit":
        assert len(path.read_text().splitlines()) < 20  # a docstring, nothing to describe
    else:
        assert path.name in described()[folder], f"{path.relative_to(ROOT)} is not in docs/architecture.md"


def test_every_file_that_has_a_place_exists():
    for title, folder in TABLES.items():
        table = "\n".join(line for line in section(title).splitlines() if line.startswith("| `"))
        for name in re.findall(r"\b\w+\.py\b", table):
            assert (ROOT / folder / name).exists(), f"{folder}/{name}"


def test_arrows_are_the_tested_ones():
    told = {room.rstrip("/"): arrows for room, arrows in rows().items()}
    for room, allowed in MAY_IMPORT.items():
        arrows = told[room]
        names = OF_ALL if arrows == "everything" else re.findall(r"`([^`]+)`", arrows)
        full = {name if name.startswith(OF_ALL) else f"lowrank_vit.{name}" for name in names}
        own = room.replace("/", ".")
        assert full - {own} == set(allowed) - ({own} if arrows != "everything" else set()), room
