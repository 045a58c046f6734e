"""Ten kills of one training, see `tests/kill_runs.py`; that script does it as often as asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import kill_runs


@pytest.mark.slow
def test_a_training_that_is_killed_ten_times_ends_in_the_bits_of_one_that_was_left_alone(tmp_path):
    line = [sys.executable, "-m", "tests.kill_runs", "--runs", "1", "--kills", "10", "--state", str(tmp_path / "state")]
    # A process of its own: it forks, which one that has threads must not.
    done = subprocess.run(line, cwd=Path(kill_runs.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 kills in 1 runs, 0 differ" in done.stdout
