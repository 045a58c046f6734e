"""A machine's record says what was found, and what was not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.harness.aims import AIMS
from benchmarks.harness.measure import environment
from benchmarks.record import Options, to_markdown, write
from lowrank_vit.common.errors import UserError
from lowrank_vit.run.directory import PACKAGES

ENVIRONMENT = {
    "gpu": "NVIDIA H100 80GB HBM3", "gpu_memory_gib": 79.6, "memory_gib": 128.0, "device": "cuda", "torch": "2.11.0",
    "nvidia-dali-cuda130": "2.4.0", "commit": "abc+changes",
}  # fmt: skip
ROOT = Path(__file__).parents[3]


def samples(*values: float) -> dict:
    return {"unit": "img/s", "median": sorted(values)[len(values) // 2], "samples": list(values)}


def write_parts(folder: Path) -> None:
    loader = {
        "environment": ENVIRONMENT, "cases": {"dali_gpu": samples(11_000, 12_500, 13_000)}, "ratios": {},
        "settings": {"dali_gpu": "ours", "timm": "create_loader | 16 processes"}, "peers": ["timm"],
        "batch_size": 256, "peak_gpu_memory_gib": 3.25,
    }  # fmt: skip
    end = {
        "environment": ENVIRONMENT, "cases": {}, "ratios": {"end_to_end_vs_synthetic": samples(0.9, 0.91, 0.92)},
        "workload": {"model": "vit_small_patch16_224", "batch_size": 256}, "bottleneck": "backward",
    }  # fmt: skip
    content = {
        "environment": {},
        "device": "cuda",
        "wanted": ["loader", "end-to-end", "spectral"],
        "seconds": {"loader": 61.3, "end-to-end": 44.0, "spectral": 3.0},
        "cases": {"loader/dali_gpu": loader["cases"]["dali_gpu"]},
        "ratios": {"end-to-end/end_to_end_vs_synthetic": end["ratios"]["end_to_end_vs_synthetic"]},
        "benches": {"loader": loader, "end-to-end": end},
        "failed": {"spectral": "ended with code 1: RuntimeError: x", "loader/timm": "ImportError: timm"},
    }
    (folder / "b.json").write_text(json.dumps(content))
    tests = {
        "a": {"outcome": "passed"},
        "b": {"outcome": "failed", "message": "x"},
        "c": {"outcome": "passed"},
        "d": {"outcome": "skipped", "message": "needs two GPUs"},
    }
    (folder / "t.json").write_text(json.dumps({"environment": ENVIRONMENT, "tests": tests}))


def test_a_record_of_tests_and_benches(tmp_path):
    write_parts(tmp_path)
    page = write(Options(tmp_path / "t.json", tmp_path / "b.json", tmp_path / "out"))
    assert page.name.endswith("_nvidia-h100-80gb-hbm3.md")  # the tests', since the benches know of none
    text = page.read_text()
    assert "1 failed, 2 passed, 1 skipped." in text
    assert "- failed: `b`" in text
    assert "| loader | loader dali on the GPU, img/s | 1.25e+04 | 1.1e+04 .. 1.3e+04 | 12000 | yes |" in text
    assert "| 0.91 | 0.9 .. 0.92 | 0.97 | **no** |" in text
    assert "resident 32 px images, img/s |  |  | 100000 | not measured |" in text
    for row in ("gpu_memory_gib | 79.6", "memory_gib | 128.0", "nvidia-dali-cuda130 | 2.4.0"):
        assert f"| {row} |" in text
    assert "| loader | 61 | batch_size 256 |  |  | 3.25 |" in text
    assert "| end-to-end | 44 | model vit_small_patch16_224, batch_size 256 | backward |" in text
    assert "| `loader/timm` | create_loader \\| 16 processes |" in text
    assert json.loads(page.with_suffix(".json").read_text())["tests"]["tests"]["b"]["outcome"] == "failed"


def test_what_was_not_measured_is_complete(tmp_path):
    write_parts(tmp_path)
    page = write(Options(tmp_path / "t.json", tmp_path / "b.json", tmp_path / "out"))
    missing = page.read_text().partition("## Not measured")[2]
    found = {("loader", "dali_gpu"), ("end-to-end", "end_to_end_vs_synthetic")}
    for aim in AIMS:
        if aim.is_for("cuda"):
            line = f"- {aim.bench}: {aim.what} (aim {aim.least:g})"
            assert (line in missing) == ((aim.bench, aim.name) not in found), aim
    assert "float64 spectra / inline float32 SVD (aim 50): its bench failed, see below" in missing
    assert "augmentation on the GPU, img/s (aim 400000): not run" in missing
    assert "- spectral: ended with code 1: RuntimeError: x" in missing
    assert "- loader/timm: ImportError: timm" in missing
    assert "- test `d`: needs two GPUs" in missing
    without = to_markdown({"cpu": "A processor", "device": "cpu"}, None, {"device": "cpu"})
    assert "augmentation on the GPU, img/s (aim 400000): needs a GPU" in without


def test_an_earlier_record_is_never_overwritten(tmp_path):
    write_parts(tmp_path)
    pages = [write(Options(tmp_path / "t.json", tmp_path / "b.json", tmp_path / "out")) for _ in range(4)]
    stem = pages[0].stem
    assert [page.stem for page in pages] == [
        stem, f"{stem}_abc-changes", f"{stem}_abc-changes_2", f"{stem}_abc-changes_3"
    ]  # fmt: skip
    assert len(list((tmp_path / "out").iterdir())) == 8


def test_parts_that_are_missing_are_said(tmp_path):
    options = Options(tmp_path / "t.json", tmp_path / "b.json", tmp_path / "out")
    with pytest.raises(UserError, match="Run make gpu-check"):
        write(options)
    write_parts(tmp_path)
    (tmp_path / "b.json").unlink()
    assert "Not measured." in write(options).read_text()
    for empty in ({"environment": ENVIRONMENT, "tests": {}}, {"environment": ENVIRONMENT}, {}):
        (tmp_path / "t.json").write_text(json.dumps(empty))
        assert "None ran" in write(options).read_text()
    for wrong, message in (("{", "cannot be read as a record"), ("[]", "holds no JSON object")):
        (tmp_path / "t.json").write_text(wrong)
        with pytest.raises(UserError, match=message):
            write(options)


def test_skipped_tests_are_recorded_with_their_reason(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n\n@pytest.mark.skip(reason='no such card')\ndef test_it(): ...\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", f"--gpu-record={path}", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = json.loads(path.read_text())["tests"].values()
    assert (one["outcome"], one["message"]) == ("skipped", "no such card")


def test_versions_of_the_peers_are_known():
    assert {"nvidia-dali-cuda130", "scikit-image", "scikit-learn"} <= set(environment())
    assert {"nvidia-dali-cuda130", "spdl"} <= set(PACKAGES)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "output").mkdir()
    write_parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_check_refuses_at_once_without_a_gpu(checkout, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r'torch sees no CUDA device.*ARGS="--without-gpu'):
        gpu_check.run(gpu_check.Options(), call=lambda *_: pytest.fail("started"))
    with pytest.raises(UserError, match="--minutes is 0"):
        gpu_check.run(gpu_check.Options(minutes=0))


@pytest.mark.parametrize("has_gpu", [True, False])
@pytest.mark.parametrize("code", [0, 1])
def test_the_check_runs_tests_and_benches_and_writes_the_record(checkout, monkeypatch, has_gpu, code):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    calls: list[tuple[list[str], dict[str, str]]] = []

    def call(arguments: Sequence[str], variables: Mapping[str, str]) -> int:
        calls.append((list(arguments), dict(variables)))
        source, target = ("t.json", gpu_check.TESTS) if arguments[0] == "pytest" else ("b.json", gpu_check.BENCHES)
        (checkout / source).rename(target)
        return code if arguments[0] == "pytest" else 0

    options = gpu_check.Options(minutes=6, without_gpu=not has_gpu, out=checkout / "docs")
    page, is_clean = gpu_check.run(options, call=call)
    assert page.exists()
    assert is_clean == (code == 0)
    (tests, variables), (benches, _) = calls
    assert tests[:2] == ["pytest", "tests/gpu"]
    assert variables == ({"LRV_REQUIRE_GPU": "1"} if has_gpu else {})
    assert benches[:5] == ["benchmarks", "all", "--short", "--device", "cuda" if has_gpu else "cpu"]
    assert 5.5 < float(benches[benches.index("--budget") + 1]) <= 6
