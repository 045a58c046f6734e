"""What is said of how long refreshes take."""

from __future__ import annotations

import itertools

import pytest
import torch

from lowrank_vit.spectral.analyze import analyze_weights
from lowrank_vit.spectral.solving.solve import stack_by_shape
from lowrank_vit.spectral.watching import pace
from lowrank_vit.spectral.watching.pace import Pace, foretold_s, in_seconds, operations_of
from lowrank_vit.spectral.watching.refresh import DIRECTION, MODEL, SpectralSettings
from tests.device_path import CudaPath

SETTINGS = SpectralSettings(topk=2)


def weights() -> dict[str, torch.Tensor]:
    shapes = [(24, 8)] * 3 + [(8, 8)] * 2
    return {f"blocks.{i}.mlp.fc1": torch.randn(shape) for i, shape in enumerate(shapes)}


@pytest.fixture
def a_second_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is timed takes a second, and no matrix is too small to be timed."""
    ticks = itertools.count()
    monkeypatch.setattr(pace, "now_s", lambda: float(next(ticks)))
    monkeypatch.setattr(pace, "LONG", 0.0)


def test_each_shape_is_timed_once_and_counted_as_often_as_it_is_there(
    a_second_each: None, on_cuda_path: CudaPath
) -> None:
    groups = [(stack, len(stack.names)) for stack in stack_by_shape(weights())]
    assert foretold_s(groups, SETTINGS) == 5.0
    assert foretold_s(groups, SpectralSettings(topk=2, cpu_threads=2)) == 2.5
    with on_cuda_path():
        assert foretold_s(groups, SpectralSettings(topk=2, cpu_threads=2)) == 5.0
    assert foretold_s([(groups[0][0], 3), (groups[0][0], 3)], SETTINGS) == 6.0
    assert operations_of(one for one, _ in groups) == 3 * (24 * 64 + 4 / 3 * 512) + 2 * (8 * 64 + 4 / 3 * 512)


def test_it_is_told_before_once_and_again_where_it_was_otherwise(a_second_each: None) -> None:
    said: list[str] = []
    one = Pace(100, SETTINGS, said.append)
    stacks = {MODEL: stack_by_shape(weights()), DIRECTION: stack_by_shape(weights())}
    for _ in range(2):
        one.begin(stacks)
    (line,) = said
    assert "a whole refresh of 5 matrices takes about 5 s, every 100 updates" in line
    for seconds in (11.0, 30.0):
        one.end(seconds)
    assert said[1:] == ["spectra: the first refresh took 11 s, not 5 s"]
    for update in (200, 300):
        one.skip(update, 3.0)
    (line,) = said[2:]
    assert "the refresh of update 200 is skipped" in line
    assert "--spec-every 400 leaves none out" in line


def test_nothing_is_said_by_other_ranks_of_short_ones_and_of_what_was_foretold(
    a_second_each: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = {MODEL: stack_by_shape(weights())}
    said: list[str] = []
    for say, long_from, lines in ((None, 0.0, 0), (said.append, 1e10, 0), (said.append, 0.0, 1)):
        monkeypatch.setattr(pace, "LONG", long_from)
        one = Pace(100, SETTINGS, say)
        one.begin(stacks)
        one.end(9.9)
        assert len(said) == lines


def test_an_analysis_tells_it_too_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_vit.spectral.analyze.LONG", 0.0)
    said: list[str] = []
    of = weights()
    told, silent = analyze_weights(of, SETTINGS, say=said.append), analyze_weights(of, SETTINGS)
    assert [line.partition(" take about ")[0] for line in said] == ["spectra of 5 matrices"]
    assert str(told.values) == str(silent.values)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.31, "0.31 s"), (9.4, "9.4 s"), (41.2, "41 s"), (150, "2.5 min"), (9000, "2.5 h")]
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert in_seconds(seconds) == text
