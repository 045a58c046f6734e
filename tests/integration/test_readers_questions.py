"""The README fits one screen's patience, and leads to the answers that CONTRIBUTING.md promises a newcomer."""

from __future__ import annotations

import re

import pytest

from tests.documents import ROOT, Block, blocks
from tests.integration.test_documents import DOCUMENTS, anchors, text_of

README = "README.md"
ROW = re.compile(r"(?m)^\| ([^|]+\?[^|]*) \| \[[^\]]+\]\(([^)#]+)#([^)]+)\) \| (?:`([^`]+)`)? ?\|$")
QUESTIONS = ROW.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_the_readme_is_short():
    lines = (ROOT / README).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []


def test_there_are_ten_questions():
    assert len(QUESTIONS) == 10


def blocks_of_section(document: str, anchor: str) -> list[Block]:
    """Those between a heading, by its anchor, and the next one of its level or above."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    heading = re.compile(r"(#+) +(.+)")
    first, last, level, is_code = 0, len(lines), 0, False
    for number, line in enumerate(lines, 1):
        is_code ^= line.startswith("```")
        if is_code or not (found := heading.fullmatch(line)):
            continue
        if level and len(found[1]) <= level:
            last = number
            break
        if not level and re.sub(r"[^\w\- ]", "", found[2].lower()).replace(" ", "-") == anchor:
            first, level = number, len(found[1])
    assert level, f"{document} has no section #{anchor}"
    return [block for block in blocks(document) if first < block.line < last]


@pytest.mark.parametrize(("question", "document", "anchor", "command"), QUESTIONS, ids=lambda text: text[:30])
def test_two_clicks_from_the_readme_lead_to_the_answer(question, document, anchor, command):
    linked = re.findall(r"\]\(([^)#\s]+)", text_of(ROOT / README))
    assert document in (*linked, README), f"the README does not link to {document}"
    assert anchor in anchors(ROOT / document)
    if command:  # test_documents.py runs the blocks of every document
        assert document in DOCUMENTS
        assert any(command in block.text for block in blocks_of_section(document, anchor)), f"{question} {command}"
