"""Simulated sets, as they are opened in tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.harness.simulated import Options, simulate
from lowrank_vit.data.sets import published


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A set in one file and the same in 40 parts, of 1,000 samples and 10 classes."""
    root = tmp_path_factory.mktemp("simulated")
    for folder, files in (("one", 1), ("many", 40)):
        simulate(Options(out=root / folder, samples=1000, files=files, classes=10))
    return root


@pytest.fixture(params=["one", "many"])
def beton(made, request, tmp_path, monkeypatch) -> Path:
    """A copy of each, of which everything is published; what goes elsewhere stays in this test's folder."""
    monkeypatch.setattr(published, "PUBLISHED_FROM", 1)
    places = published._places
    monkeypatch.setattr(published, "_places", lambda path, parts: list(places(path, parts))[:1])
    shutil.copytree(made / request.param, tmp_path / "set")
    return tmp_path / "set" / "train.beton"
