"""The documents as a site: `make docs` builds it without a warning, with the public API and both languages."""

from __future__ import annotations

import html
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data_prep
import lowrank_vit
from tests.documents import ROOT, tool
from tests.waiting import LONG_S

SOURCES = "Makefile README.md CONTRIBUTING.md CHANGELOG.md LICENSE docs examples lowrank_vit data_prep".split()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` builds, which ends with an error at the first warning."""
    if not importlib.util.find_spec("zensical"):
        pytest.skip("zensical is not installed: run `make setup` again")
    folder = tmp_path_factory.mktemp("docs")
    for name in SOURCES:
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "mkdocs.yml", folder)  # beside which Zensical writes, behind any link
    command = [tool("make"), "docs", f"PY={sys.executable}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LONG_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def plain(page: Path) -> str:
    """The words of a page with one blank between each two."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))).split())


def test_the_api_page_says_what_the_docstrings_say(site):
    page = site / "docs" / "api" / "index.html"
    anchors, words = set(re.findall(r'id="([\w.]+)"', page.read_text(encoding="utf-8"))), plain(page)
    public = {f"lowrank_vit.{name}": getattr(lowrank_vit, name) for name in lowrank_vit.__all__ if name[0] != "_"}
    public["data_prep.convert_dataset"] = data_prep.convert_dataset
    for name, value in public.items():
        assert name in anchors
        first = re.split(r"[`*:]", inspect.getdoc(value) or "")[0].split()
        assert " ".join(first) in words, name
    assert [one for one in anchors if re.search(r"\._[a-z]", one)] == []


def test_links_between_files_lead_somewhere(site):
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="?([^"\s>]+)', page.read_text(encoding="utf-8")):
            name = html.unescape(link).partition("#")[0].partition("?")[0]
            if page.name != "404.html" and not re.match(r"\w+:|//", name):
                assert (page.parent / name).exists(), f"{page.relative_to(site)}: {link}"


def test_the_search_finds_chinese_words_within_a_sentence(site):
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    separator = re.compile(index["config"]["separator"])
    assert [one for one in separator.split("谱监控 of W&B") if one] == ["谱", "监", "控", "of", "W&B"]
    (found,) = (item for item in index["items"] if item["title"] == "显存不足")
    assert found["location"].startswith("docs/guide_zh/#")
