"""The table of Chinese texts: it has exactly the texts that the code has, with the same fields."""

from __future__ import annotations

import ast
import json
import re
import string
from pathlib import Path

from lowrank_vit import report
from lowrank_vit.report.language import in_language, texts, tr

ROOM = Path(report.__file__).parent
_OF_SCRIPTS = re.compile(r'\bt\(\s*((?:"(?:[^"\\]|\\.)*"\s*\+?\s*)+)')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


def marked() -> set[str]:
    """The texts of `tr` and `msg` in Python and in the template, and of `t` in scripts."""
    found: set[str] = set()
    for path in ROOM.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("tr", "msg"):
                text = node.args[0]
                assert not isinstance(text, ast.JoinedStr), f"{path}:{node.lineno}: a field is given by its name"
                found |= {str(text.value)} if isinstance(text, ast.Constant) else set[str]()
    for path in ROOM.rglob("*.html"):
        found |= set(re.findall(r'\btr\("([^"]*)"', path.read_text(encoding="utf-8")))
    for path in ROOM.rglob("*.js"):
        pieces = [_QUOTED.findall(one) for one in _OF_SCRIPTS.findall(path.read_text(encoding="utf-8"))]
        found |= {"".join(map(json.loads, one)) for one in pieces}
    return found


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_the_chinese_table_has_the_texts_of_the_code_and_no_others_with_the_same_fields() -> None:
    with in_language("zh"):
        table = texts()
    english = marked()
    assert (english - table.keys(), table.keys() - english) == (set(), set())
    wrong = {text for text, own in table.items() if fields(text) != fields(own)}
    assert wrong == set()
    assert not any(re.search(r"[\u4e00-\u9fff]", text) for text in table)


def test_a_text_is_english_by_default_and_of_the_language_inside_it() -> None:
    assert tr("All {n} arguments", n=3) == "All 3 arguments"
    with in_language("zh"):
        assert tr("All {n} arguments", n=3) == "全部 3 个参数"
        assert tr("a text of another version, {n:,}", n=1000) == "a text of another version, 1,000"
    assert tr("Environment") == "Environment"
