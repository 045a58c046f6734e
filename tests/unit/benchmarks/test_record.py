"""A machine's record says what was found, and what was not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.aims import AIMS
from benchmarks.harness.measure import environment
from benchmarks.record import Options, to_markdown, write
from benchmarks.training.budget import GROUPS
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
        "environment": ENVIRONMENT, "cases": {}, "ratios": {"end_to_end_vs_smaller": samples(0.9, 0.91, 0.92)},
        "workload": {"model": "vit_small_patch16_224", "batch_size": 256}, "bottleneck": "backward",
    }  # fmt: skip
    content = {
        "environment": {},
        "device": "cuda",
        "wanted": ["loader", "end-to-end", "spectral"],
        "seconds": {"loader": 61.3, "end-to-end": 44.0, "spectral": 3.0},
        "cases": {"loader/dali_gpu": loader["cases"]["dali_gpu"]},
        "ratios": {"end-to-end/end_to_end_vs_smaller": end["ratios"]["end_to_end_vs_smaller"]},
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
    assert "resident 256 px raw, img/s |  |  | 100000 | not measured |" in text
    for row in ("gpu_memory_gib | 79.6", "memory_gib | 128.0", "nvidia-dali-cuda130 | 2.4.0"):
        assert f"| {row} |" in text
    assert "| loader | 61 | batch_size 256 |  |  |  |  | 3.25 |" in text
    assert "| end-to-end | 44 | model vit_small_patch16_224, batch_size 256 |  |  | backward |" in text
    assert "| `loader/timm` | create_loader \\| 16 processes |" in text
    assert json.loads(page.with_suffix(".json").read_text())["tests"]["tests"]["b"]["outcome"] == "failed"


def test_what_was_not_measured_is_complete(tmp_path):
    write_parts(tmp_path)
    page = write(Options(tmp_path / "t.json", tmp_path / "b.json", tmp_path / "out"))
    missing = page.read_text().partition("## Not measured")[2]
    found = {("loader", "dali_gpu"), ("end-to-end", "end_to_end_vs_smaller")}
    for aim in AIMS:
        if aim.is_for("cuda"):
            line = f"- {aim.bench}: {aim.what} (aim {aim.goal:g})"
            assert (line in missing) == ((aim.bench, aim.name) not in found), aim
    assert "float64 spectra / inline float32 SVD (aim 50): its bench failed, see below" in missing
    assert "augmentation on the GPU, img/s (aim 500000): not run" in missing
    assert "- spectral: ended with code 1: RuntimeError: x" in missing
    assert "- loader/timm: ImportError: timm" in missing
    assert "- test `d`: needs two GPUs" in missing
    without = to_markdown({"cpu": "A processor", "device": "cpu"}, None, {"device": "cpu"})
    assert "augmentation on the GPU, img/s (aim 500000): needs a GPU" in without


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


TESTS = """
import gc

import pytest

from lowrank_vit.run.directory import RunDir


@pytest.mark.skip(reason="no such card")
def test_skipped(): ...


def test_failed(tmp_path):
    run_dir = RunDir.create(tmp_path, "run", "")
    run_dir.itself = run_dir  # so that it is there until it is looked for
    raise ValueError("too wide")


def test_after_it(record_property):
    record_property("psnr_db", 41.25)
    gc.collect()  # a lock that is still held would be a warning, and so an error


def test_ended():
    raise KeyboardInterrupt


def test_never_reached(): ...
"""


def test_a_record_of_tests_is_whole_where_they_are_ended_and_a_failure_leaves_no_lock(tmp_path):
    path = tmp_path / "record.json"
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", f"--gpu-record={path}", str(tmp_path)]
    command += ["-W", "error", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    found = {name.rpartition("::")[2]: one for name, one in json.loads(path.read_text())["tests"].items()}
    assert {name: one["outcome"] for name, one in found.items()} == {
        "test_skipped": "skipped",
        "test_failed": "failed",
        "test_after_it": "passed",
        "test_ended": "not run",
        "test_never_reached": "not run",
    }
    assert found["test_skipped"]["message"] == "no such card"
    assert found["test_after_it"]["figures"] == {"psnr_db": 41.25}
    assert "ValueError: too wide" in found["test_failed"]["message"]


def test_figures_of_tests_and_their_commit_are_on_the_page(tmp_path):
    write_parts(tmp_path)
    tests = json.loads((tmp_path / "t.json").read_text())
    options = Options(tmp_path / "t.json", tmp_path / "b.json", tmp_path / "out")
    assert "not of one commit" not in write(options).read_text()
    tests["environment"] = {**ENVIRONMENT, "commit": "def"}
    tests["tests"]["a"]["figures"] = {"psnr_db": 41.25}
    (tmp_path / "t.json").write_text(json.dumps(tests))
    text = write(options).read_text()
    assert "- the tests: commit def, gpu NVIDIA H100 80GB HBM3, torch 2.11.0" in text
    assert "`a`: psnr_db 41.25." in text


def test_versions_of_the_peers_are_known():
    assert {"nvidia-dali-cuda130", "scikit-image", "scikit-learn"} <= set(environment())
    assert {"nvidia-dali-cuda130", "spdl"} <= set(PACKAGES)


def test_tests_that_did_not_run_are_no_failures_and_are_named():
    tests = {
        "a": {"outcome": "passed"},
        "b": {"outcome": "not run"},
        "c": {"outcome": "failed", "message": "def test():\n>   f()\nE   ValueError: too | wide\nE   more\n\nx.py:3"},
    }
    text = to_markdown({"cpu": "A processor"}, {"tests": tests}, None)
    assert "1 failed, 1 not run, 1 passed." in text
    assert "- failed: `c`: ValueError: too \\| wide" in text
    assert "- test `b`: not run, since the tests ended before" in text
    assert "- failed: `b`" not in text


def test_a_page_says_where_the_time_of_a_step_goes_and_what_it_ran_with():
    row = {"name": "triton_" + "x" * 200, "ms": 1.5, "runs": 2.0, "share": 0.05}
    known = {"gpu": "H100", "power_limit_w": "unknown", "cudnn": "9.19.0", "threads": 16, "device": "cuda"}
    result = {
        "environment": known, "cases": {}, "ratios": {}, "workload": {"model": "vit_small", "batch_size": 240},
        "budget": {"limit": dict.fromkeys(GROUPS, 2.0), "timm": None, "ours": dict.fromkeys(GROUPS, 4.0)},
        "attention": "cudnn_attention",
        "description": ["ViT-S: 22 M parameters", "dali loader"],
        "loader": {"backend": "dali", "hw_decoder_load": 0.65, "workers": 16},
        "kernels": {"step": {"ms": 30.0, "step_ms": 31.25, "steps": 20, "rows": [row], "others": 4}},
    }  # fmt: skip
    older = {"environment": {**known, "commit": "abc"}, "cases": {}, "ratios": {}}
    content = {"device": "cuda", "seconds": {"kernels": 9.0}, "benches": {"kernels": result, "step": older}}
    text = to_markdown(known, None, content)
    for line in (
        "| power_limit_w | unknown |",
        "| cudnn | 9.19.0 |",
        "| threads | 16 |",
        "- step: commit abc, gpu H100",
    ):
        assert line in text
    assert "| cudnn_attention | dali, hw_decoder_load 0.65, workers 16 |" in text
    assert "A step takes 31.25 ms by the clock, and has 30 ms of kernels of the device" in text
    assert "- ViT-S: 22 M parameters; dali loader" in text
    assert "rehearsal" not in text
    assert "rehearsal" in to_markdown(known, None, content | {"form": "tiny"})
    assert "## Where the time goes: vit_small, a step on a batch that stays" in text
    assert f"| `{row['name'][:110]}` | 1.500 | 2 | 5.0% |" in text
    assert "4 others took less." in text
    assert "## The budget of a step: vit_small, batch 240, ms" in text
    assert "| attention | 2.00 | not yet measured | 4.00 |" in text
    assert "| as img/s, if the device were never idle | 20,000 | not yet measured | 10,000 |" in text
    assert "| the device is idle |  | not yet measured | 7.25 |" in text
    assert "| by the clock |  | not yet measured | 31.25 |" in text
    assert "| as img/s |  | not yet measured | 7,680 |" in text
