"""A few kills of one training, see `tests/kill_runs.py` and `kill_ranks.py`; the scripts do it as often as asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import kill_ranks, kill_runs


def kills(script: str, state: Path, *options: str) -> str:
    """What that many kills come to, as the script says it."""
    line = [sys.executable, "-m", script, "--runs", "1", *options, "--state", str(state)]
    # A process of its own: it forks, which one that has threads must not.
    done = subprocess.run(line, cwd=kill_runs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_training_that_is_killed_ten_times_ends_in_the_bits_of_one_that_was_left_alone(tmp_path):
    said = kills("tests.kill_runs", tmp_path / "state", "--kills", "10")
    assert "10 kills in 1 runs, 0 differ" in said


@pytest.mark.slow
def test_kills_around_switches_to_factors_end_in_the_same_bits(tmp_path):
    number = [kind.name for kind in kill_runs.KINDS].index("low rank")
    said = kills("tests.kill_runs", tmp_path / "state", "--first", str(number), "--kills", "10")
    assert f"run {number}, low rank" in said
    assert "10 kills in 1 runs, 0 differ" in said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "count"), [(1, 3), (2, 2)])
def test_ranks_and_nodes_that_are_killed_end_as_those_that_were_left_alone(tmp_path, number, count):
    """Five kills: of nodes that are replaced at once, and of nodes that are missed for a while."""
    said = kills("tests.kill_ranks", tmp_path / "state", "--first", str(number), "--kills", str(count))
    assert f"run {number}, {kill_ranks.KINDS[number].name}" in said
    assert f"{count} kills in 1 runs, 0 differ" in said
