"""The bench `growth`: every point is measured where it says, and drawn. No test asserts a time."""

from __future__ import annotations

import json
import os

import pytest

from data_prep.errors import UserError
from lowrank_vit.bench import growth
from lowrank_vit.bench.__main__ import main
from lowrank_vit.bench.measure import Result, Samples


def test_smoke(tmp_path):
    path, plot, scratch = tmp_path / "growth.json", tmp_path / "growth.png", tmp_path / "scratch"
    sizes = "--count 40 --batches 4 8 --sizes 24 32 --repeats 1 --sweeps batch samples".split()
    main(["growth", *sizes, "--scratch", str(scratch), "--json", str(path), "--plot", str(plot)])
    result = json.loads(path.read_text())
    assert {sweep: sorted(lines) for sweep, lines in result["growth"].items()} == {
        "batch": ["dali", "ffcv"],
        "samples": ["dali", "ffcv", "resident"],
    }
    assert list(result["growth"]["batch"]["ffcv"]) == ["4", "8"]
    assert list(result["growth"]["samples"]["dali"]) == ["10", "20", "40"]
    names = {name for lines in result["growth"].values() for places in lines.values() for name in places.values()}
    assert names == set(result["cases"])
    assert all(case["median"] > 0 for case in result["cases"].values())
    assert result["settings"]["batch=8/ffcv"].startswith("--loader ffcv, batch 8, 24 px")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_memory_grows_by_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "KINDS", ())
    monkeypatch.setattr(growth, "_sets", lambda _options: (10, 60))
    options = growth.Options(("memory",), count=60, batches=(4, 8), sizes=(24, 32), scratch=tmp_path)
    small, large = growth.run(options).cases.values()
    decoded_mb = 50 * 500 * 375 * 3 / 1e6
    assert 0.5 * decoded_mb < large.median - small.median < 4 * decoded_mb
    assert small.unit == "MB"


def test_one_point_a_number_of_workers_up_to_the_cores(monkeypatch):
    for cores, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, cores=cores: range(cores))
        points = growth._points("workers", growth.Options())
        assert list(points) == [point.workers for point in points.values()] == expected


def test_a_picture_of_all_sweeps_is_small():
    grown = growth._Growth()
    for sweep in growth.SWEEPS:
        for line in ("ffcv", "dali"):
            for x in (1, 2, 4):
                grown.add(sweep, line, x, Samples((x - 0.1, float(x), x + 0.2), "img/s"))
    result = Result("growth", {"cpu_cores": 2, "cpu": "A processor"}, grown.cases, {}, extra={"growth": grown.lines})
    assert len(growth.growth_chart(result)) < 150_000


def test_wrong_options():
    for options, message in (
        (growth.Options(batches=(8,)), "--batches and --sizes each take two or more"),
        (growth.Options(widths=(100,)), "--widths 100 is not that of a ViT here"),
        (growth.Options(count=100), "--count 100 is too few for these batches, expected 256 or more"),
        (growth.Options(repeats=0), "--repeats is 0, expected 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            growth.run(options)
