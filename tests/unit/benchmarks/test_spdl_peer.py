"""SPDL as a peer: batches where it works, and a reason where it does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import loader_peers
from benchmarks.harness.sets import ensure_photos


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sorted(ensure_photos(tmp_path_factory.mktemp("spdl") / "photos", 12).glob("*/*.jpg"))


def test_batches_in_random_order(files):
    if reason := loader_peers.why_no_spdl(files[0]):
        pytest.skip(f"SPDL: {reason}")
    batches = loader_peers.spdl_loader(files, steps=3, batch_size=4, img_size=32, workers=2)
    for _ in range(2):  # rounds
        made = list(batches())
        assert [tuple(batch.shape) for batch in made] == [(4, 32, 32, 3)] * 3
        assert len({batch[n].numpy().tobytes() for batch in made for n in range(4)}) == 12  # each file once


def test_a_missing_or_lame_spdl_is_said(files, monkeypatch):
    for name in ("spdl", "spdl.io", "spdl.pipeline"):
        monkeypatch.setitem(sys.modules, name, None)
    reason = loader_peers.why_no_spdl(files[0])
    assert "cannot be imported" in reason
    assert "bench-peers" in reason


def test_missing_libraries_are_said(files, monkeypatch):
    def load_image(path: str) -> None:
        raise RuntimeError("Failed to import libspdl. libavutil.so.59: cannot open shared object file")

    io = type(sys)("spdl.io")
    monkeypatch.setattr(io, "load_image", load_image, raising=False)
    spdl = type(sys)("spdl")
    monkeypatch.setattr(spdl, "io", io, raising=False)
    for name, module in (("spdl", spdl), ("spdl.io", io), ("spdl.pipeline", type(sys)("spdl.pipeline"))):
        monkeypatch.setitem(sys.modules, name, module)
    reason = loader_peers.why_no_spdl(files[0])
    assert "libavutil.so.59" in reason
    assert "libavdevice59" in reason
