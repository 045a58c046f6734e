"""Mutated `.beton` files through all backends: see `tests.fuzz_beton`, which also runs for days."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_mutated_files_end_in_a_clean_error_or_the_right_pixels(tmp_path):
    """In a process of its own: a fork needs a parent in which no thread has worked."""
    state, counts = tmp_path / "state.json", (250, 500)
    for count in counts:  # the second takes up where the first stopped
        command = [sys.executable, "-m", "tests.fuzz_beton", "--count", str(count), "--state", str(state)]
        done = subprocess.run([*command, "--seed", "2"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert f"\n{count:,} mutations" in f"\n{done.stdout}"
    count = counts[-1]
    content = json.loads(state.read_text())
    assert content["done"] == count
    assert content["valid_checksum"] >= count / 3
    assert {"refused", "damaged", "intact", "as decoded"} == content["readings"].keys()
    assert sum(content["readings"].values()) == 6 * count


@pytest.mark.slow
def test_a_planted_fault_is_found():
    """Without the comparison of sizes DALI is fed windows of images that are not there."""
    plant = "from lowrank_vit.data.sets.beton import Beton; Beton.contradicting = lambda self, ids: ids[:0]"
    code = f"import sys; from tests.fuzz_beton import main; {plant}; sys.argv = ['x', '--count', '150']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "dali, training: garbage" in done.stdout
