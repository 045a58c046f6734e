"""The axes of the bench `growth`: each cost is measured where it says, and its exponent found."""

from __future__ import annotations

import itertools
import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import growth
from benchmarks.__main__ import main, run_command
from benchmarks.harness.measure import Result, Samples
from benchmarks.scale import axes, probes
from benchmarks.scale.exponents import extrapolated, growth_of, ratio_name, ratio_of


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_lies_in_its_interval(exponent):
    rng = np.random.default_rng(0)
    cases = {x: Samples(tuple(3 * x**exponent * np.exp(rng.normal(0, 0.05, 4)))) for x in (10, 1000, 100_000)}
    fit = growth_of(cases)
    assert fit is not None
    assert fit.low < exponent < fit.high
    assert fit.high - fit.low < 0.1
    assert fit.per_item == pytest.approx(cases[100_000].median / 100_000)


def test_no_exponent_of_one_place_and_an_infinite_interval_of_two_samples():
    assert growth_of({10: Samples((1.0, 2.0))}) is None
    assert growth_of({10: Samples((0.0,)), 20: Samples((1.0,))}) is None
    fit = growth_of({10: Samples((1.0,)), 100: Samples((10.0,))})
    assert fit is not None
    assert (fit.low, fit.high) == (-np.inf, np.inf)
    assert fit.exponent == pytest.approx(1)


def test_a_larger_place_lies_on_the_line_through_the_outer_ones_and_not_below():
    cases = {x: Samples((7.0, 5.0 + 2 * x, 1e9)) for x in (10, 20, 100)}
    assert extrapolated(cases, 1000) == pytest.approx(5 + 2 * 1000)
    assert extrapolated({10: Samples((4.0,)), 20: Samples((3.0,))}, 1000) == 3
    assert extrapolated({10: Samples((4.0,))}, 1000) is None


def test_ratios_are_named_after_powers_of_ten():
    assert ratio_name("first_batch", 14_200_000, 100_000) == "first_batch_1e7_vs_1e5"
    cases = {10: Samples((1.0, 2.0)), 20: Samples((9.0, 9.0)), 30: Samples((3.0, 8.0))}
    ratio = ratio_of(cases, (30, 10, 20))
    assert ratio is not None
    assert ratio.samples == (3.0, 4.0)
    assert ratio_of(cases, (10,)) is None


def in_this_process(name: str, /, **arguments: Any) -> dict[str, Any]:
    if name == "per_class":  # a whole validation, which has tests of its own
        peak = float(arguments["num_classes"])
        return {"per_class_peak": {"unit": probes.MB, "samples": [peak]}}
    return json.loads(json.dumps(probes.PROBES[name](**arguments)))


def test_all_axes_of_tiny_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(axes, "probe", in_this_process)
    path, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    sizes = "--sets 200 800 --files 1 3 --classes 5 50 --ranks 1 4 1000 --shards 20 40 --repeats 1".split()
    where = ["--scratch", str(tmp_path / "scratch"), "--json", str(path), "--plot", str(plot)]
    main(["growth", "--sweeps", *axes.AXES, *sizes, *where])
    result = json.loads(path.read_text())
    assert {axis: sorted(next(iter(costs.values())), key=int) for axis, costs in result["growth"].items()} == {
        "sets": ["200", "800"],
        "files": ["1", "3"],
        "classes": ["5", "50"],
        "ranks": ["1", "4"],  # a thousand ranks have more than the set
        "shards": ["20", "40"],
    }
    assert set(result["growth"]["sets"]) >= {"first_open", "open", "first_batch", "resume", "ffcv_memory", "naming"}
    assert set(result["ratios"]) == {
        "second_open_vs_first_open",
        *(f"{name}_1e2_vs_1e2" for name in axes.RATIOS),
    }
    assert {case["unit"] for case in result["cases"].values()} == {"CPU s", "s", "MB", "descriptors"}
    assert result["exponents"]["classes"]["per_class_peak"]["exponent"] == pytest.approx(1)
    assert result["exponents"]["files"]["open"]["per_item"] > 0
    assert set(result["extrapolated"]) == {"100000000"}
    assert set(result["wall_s"]) == {name for name, case in result["cases"].items() if case["unit"] == "CPU s"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_private_memory_counts_what_is_written_and_no_map_of_a_file(tmp_path):
    file = tmp_path / "mapped"
    size = 64 << 20
    file.write_bytes(bytes(size))
    before = probes.private_bytes()
    mapped = np.memmap(file, np.uint8, "r")
    assert mapped.sum() == 0
    mapped_bytes = probes.private_bytes() - before
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own:  # malloc may give pages freed before
        own.write(b"1" * size)
        written_bytes = probes.private_bytes() - before - mapped_bytes
    assert written_bytes > 0.9 * size
    assert mapped_bytes < 0.1 * size


def test_a_place_that_fails_is_told_and_the_others_are_measured(tmp_path, monkeypatch):
    def probe(name: str, /, **arguments: Any) -> dict[str, Any]:
        if arguments["num_classes"] == 50:
            raise RuntimeError("ended with code -9: ")
        return in_this_process(name, **arguments)

    monkeypatch.setattr(axes, "probe", probe)
    result = growth.run(growth.Options(("classes",), classes=(5, 50), scratch=tmp_path, device="cpu", repeats=2))
    assert set(result.cases) == {"classes=5/per_class_peak"}
    assert list(result.failed) == ["classes=50"]
    assert result.is_broken


PLACES = ("--files", "1", "3", "--classes", "5", "50")
DONE = (2, 4, 5, 6, 8, 10, 11, 12)
"""Probes after which a place has a round more: two for a number of files, one for a number of classes."""


def told(name: str, /, **_arguments: Any) -> dict[str, Any]:
    """What a probe tells, without measuring."""
    return {name: {"unit": probes.CPU_SECONDS, "samples": [1.0, 2.0], "wall": [3.0]}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs two axes with probes that only tell; returns the JSON."""
    commits = itertools.chain(["c0ffee"], itertools.repeat("c0ffee+changes"))
    monkeypatch.setattr(growth, "environment", lambda _device: {"commit": next(commits)})
    monkeypatch.setattr(axes, "SETTINGS", {name: name for name in probes.PROBES})
    monkeypatch.setattr(axes, "_simulated", lambda *_args, **_kwargs: tmp_path / "train.beton")

    def run(path: Path, *more: str, probe: Callable[..., dict[str, Any]] = told) -> dict[str, Any]:
        monkeypatch.setattr(axes, "probe", probe)
        where = ["--scratch", str(tmp_path), "--json", str(path), "--device", "cpu"]
        run_command(["growth", "--sweeps", "files", "classes", *PLACES, *where, "--repeats", "2", *more])
        return json.loads(path.read_text())

    return run


class Ended:
    """A probe that is interrupted at its `at`-th call."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return told(name, **arguments)


def test_a_run_that_is_ended_anywhere_goes_on_to_the_result_of_a_whole_one(tmp_path, run):
    def figures(content: dict[str, Any]) -> dict[str, Any]:
        return {key: content.get(key) for key in ("cases", "growth", "exponents", "wall_s", "rounds", "finished")}

    whole = run(tmp_path / "whole.json")
    assert whole["finished"]
    assert Result.of(whole).to_dict() == whole
    for at in (1, 4, 6, 7, 12):
        path = tmp_path / f"{at}.json"
        with pytest.raises(KeyboardInterrupt):
            run(path, probe=Ended(at))
        assert path.exists() == (at > DONE[0])
        if path.exists():
            kept = json.loads(path.read_text())
            assert sum(kept["rounds"].values()) == sum(done < at for done in DONE)
            assert not kept["finished"]
            assert kept["limits"][0].startswith("Not finished: ")
        assert figures(run(path)) == figures(whole)


def test_what_is_finished_or_of_other_options_is_measured_anew_and_a_budget_ends_a_run(tmp_path, run):
    path, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    with pytest.raises(KeyboardInterrupt):
        run(path, probe=Ended(7))
    kept = json.loads(path.read_text())
    drawn = run(path, "--budget", "0", "--plot", str(plot), probe=Ended(1))
    assert drawn["rounds"] == kept["rounds"]
    assert not drawn["finished"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyboardInterrupt):
        run(path, "--sets", "7", probe=Ended(9))  # a run of these options has nothing yet
    assert sum(json.loads(path.read_text())["rounds"].values()) == sum(done < 9 for done in DONE)
    assert run(path)["finished"]
    with pytest.raises(KeyboardInterrupt):
        run(path, probe=Ended(1))  # since it is finished, it is measured anew
    path.write_text("[]")
    assert run(path)["finished"]
