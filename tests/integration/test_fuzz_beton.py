"""Mutated `.beton` files through all backends: see `tests.fuzz_beton`, which also runs for days."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("seed", "count"), [(1, 40), pytest.param(2, 500, marks=pytest.mark.slow)])
def test_mutated_files_end_in_a_clean_error_or_the_right_pixels(tmp_path, seed, count):
    """In a process of its own: a fork needs a parent in which no thread has worked."""
    state = tmp_path / "state.json"
    for part in (count // 2, count):  # the second takes up where the first stopped
        command = [sys.executable, "-m", "tests.fuzz_beton", "--count", str(part), "--state", str(state)]
        done = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert f"\n{part:,} mutations" in f"\n{done.stdout}"
    content = json.loads(state.read_text())
    assert content["done"] == count
    assert content["valid_checksum"] >= count / 2
    assert {"refused", "damaged", "intact", "as decoded"} == content["readings"].keys()
    assert sum(content["readings"].values()) == 6 * count
