"""A machine's record says what was found, and what was not."""

from __future__ import annotations

import json

import pytest

from data_prep.errors import UserError
from lowrank_vit.bench.record import Options, write

ENVIRONMENT = {"gpu": "NVIDIA H100 80GB HBM3", "device": "cuda", "torch": "2.11.0", "commit": "abc"}


def samples(*values: float) -> dict:
    return {"unit": "img/s", "median": sorted(values)[len(values) // 2], "samples": list(values)}


def write_parts(folder):
    loader = {"environment": ENVIRONMENT, "cases": {"dali_gpu": samples(11_000, 12_500, 13_000)}, "ratios": {}}
    end = {"environment": ENVIRONMENT, "cases": {}, "ratios": {"end_to_end_vs_synthetic": samples(0.9, 0.91, 0.92)}}
    content = {
        "environment": ENVIRONMENT,
        "cases": {"loader/dali_gpu": loader["cases"]["dali_gpu"]},
        "ratios": {"end-to-end/end_to_end_vs_synthetic": end["ratios"]["end_to_end_vs_synthetic"]},
        "benches": {"loader": loader, "end-to-end": end},
        "failed": {"spectral": "ended with code 1"},
    }
    (folder / "b.json").write_text(json.dumps(content))
    tests = {"a": {"outcome": "passed"}, "b": {"outcome": "failed", "message": "x"}, "c": {"outcome": "passed"}}
    (folder / "t.json").write_text(json.dumps({"environment": ENVIRONMENT, "tests": tests}))


def test_a_record_of_tests_and_benches(tmp_path):
    write_parts(tmp_path)
    page = write(Options(tmp_path / "t.json", tmp_path / "b.json", tmp_path / "out"))
    assert page.name.endswith("_nvidia-h100-80gb-hbm3.md")
    text = page.read_text()
    assert "1 failed, 2 passed." in text
    assert "- failed: `b`" in text
    assert "| loader | loader dali on the GPU, img/s | 1.25e+04 | 1.1e+04 .. 1.3e+04 | 12000 | yes |" in text
    assert "| 0.91 | 0.9 .. 0.92 | 0.97 | **no** |" in text
    assert "resident 32 px images, img/s |  |  | 100000 | not measured |" in text
    missing = text.partition("## Not measured")[2]
    assert "augmentation on the GPU" in missing
    assert "spectral: ended with code 1" in missing
    assert json.loads(page.with_suffix(".json").read_text())["tests"]["tests"]["b"]["outcome"] == "failed"


def test_parts_that_are_missing_are_said(tmp_path):
    with pytest.raises(UserError, match="Run make gpu-check"):
        write(Options(tmp_path / "t.json", tmp_path / "b.json", tmp_path))
    write_parts(tmp_path)
    (tmp_path / "b.json").unlink()
    assert "Not measured." in write(Options(tmp_path / "t.json", tmp_path / "b.json", tmp_path / "out")).read_text()
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a record"):
        write(Options(tmp_path / "t.json", tmp_path / "b.json", tmp_path))
