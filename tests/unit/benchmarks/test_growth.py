"""The bench `growth`: every point is measured where it says, and drawn. No test asserts a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm

from benchmarks import growth
from benchmarks.__main__ import main
from benchmarks.harness.measure import Result, Samples
from benchmarks.scale import axes
from benchmarks.scale.chart import growth_chart, panels_of
from lowrank_vit.common.errors import UserError


@dataclass(frozen=True)
class Beton:
    """A set that is only a path."""

    path: Path


def test_smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "KINDS", ("dali",))  # FFCV compiles anew for each point
    path, plot, scratch = tmp_path / "growth.json", tmp_path / "growth.png", tmp_path / "scratch"
    sizes = "--count 40 --batches 4 8 --sizes 24 32 --repeats 1 --device cpu --sweeps batch samples".split()
    main(["growth", *sizes, "--scratch", str(scratch), "--json", str(path), "--plot", str(plot)])
    result = json.loads(path.read_text())
    assert {sweep: sorted(lines) for sweep, lines in result["growth"].items()} == {
        "batch": ["dali"],
        "samples": ["dali", "resident"],
    }
    assert list(result["growth"]["batch"]["dali"]) == ["4", "8"]
    assert list(result["growth"]["samples"]["dali"]) == ["10", "20", "40"]
    names = {name for lines in result["growth"].values() for places in lines.values() for name in places.values()}
    assert names == set(result["cases"])
    assert all(case["median"] > 0 for case in result["cases"].values())
    assert result["settings"]["batch=8/dali"].startswith("--loader dali, batch 8, 24 px")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_memory_grows_by_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "KINDS", ())
    monkeypatch.setattr(growth, "_sets", lambda _options: (10, 60))
    options = growth.Options(
        ("memory",), count=60, batches=(4, 8), sizes=(24, 32), device="cpu", repeats=1, scratch=tmp_path
    )
    small, large = growth.run(options).cases.values()
    decoded_mb = 50 * 500 * 375 * 3 / 1e6
    assert 0.5 * decoded_mb < large.median - small.median < 4 * decoded_mb
    assert small.unit == "MB"


def test_memory_is_measured_as_often_as_all_else_and_in_turns(tmp_path, monkeypatch):
    seen: list[tuple[str, str]] = []

    def peak(kind: str, path: Path, _point: growth.Point) -> float:
        seen.append((kind, path.stem))
        if (kind, path.stem) == ("dali", "photos_40") and len(seen) > 20:
            raise RuntimeError("it crashed")
        return float(len(seen))

    monkeypatch.setattr(growth, "_peak_mb", peak)
    monkeypatch.setattr(growth, "_beton", lambda options, count, note: Beton(options.scratch / f"photos_{count}.beton"))
    options = growth.Options(("memory",), count=40, batches=(4, 8), sizes=(24, 32), device="cpu", scratch=tmp_path)
    result = growth.run(options)
    points = {(kind, f"photos_{n}") for kind in ("resident", "ffcv", "dali") for n in (10, 20, 40)}
    assert set(seen[:9]) == set(seen[9:18]) == points
    assert seen[:9] != seen[9:18]
    assert all(len(case.samples) == 5 for case in result.cases.values())
    assert result.failed == {"memory=40/dali": "RuntimeError: it crashed"}
    assert "memory=40/dali" not in result.cases
    assert result.is_broken


def test_a_refresh_is_told_in_seconds_beside_the_solvers_speed(monkeypatch):
    tiny: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 2, "num_classes": 4}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: create("vit_tiny_patch16_224", **tiny))
    result = growth.run(growth.Options(("width",), widths=(192, 384), device="cpu", repeats=2))
    assert {name: case.unit for name, case in result.cases.items()} == {
        "width=192/gram64": "matrices/s", "width=192/refresh": "s",
        "width=384/gram64": "matrices/s", "width=384/refresh": "s",
    }  # fmt: skip
    for width in (192, 384):
        # 8 matrices are solved in each; a refresh does more than that.
        solving = 8 / max(result.cases[f"width={width}/gram64"].samples)
        assert max(result.cases[f"width={width}/refresh"].samples) > 0.5 * solving


def test_one_point_a_number_of_workers_up_to_the_cores(monkeypatch):
    for cores, expected in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr(growth, "available_cores", lambda cores=cores: cores)
        points = growth._points("workers", growth.Options())
        assert list(points) == [point.workers for point in points.values()] == expected


def grown_everywhere() -> Result:
    grown = growth._Growth()
    for sweep in (one for one in growth.SWEEPS if one not in axes.AXES):  # those have lines of their own: test_scale.py
        lines = {"workers": ("ffcv", "dali"), "width": ("gram64", "refresh")}.get(sweep, ("ffcv", "dali", "resident"))
        for line in lines:
            unit = {"memory": "MB", "width": "s" if line == "refresh" else "matrices/s"}.get(sweep, "img/s")
            for x in (1, 2, 4):
                high = 20 if line == "resident" else 1
                grown.add(sweep, line, x, Samples((high * x - 0.1, float(high * x), high * x + 0.2), unit))
    surroundings = {"cpu_cores": 2, "cpu": "A processor"}
    return Result("growth", surroundings, grown.cases, {}, extra={"growth": grown.lines})


def test_a_panel_has_one_unit_and_nothing_that_hides_the_others():
    panels = panels_of(grown_everywhere())
    found = [(panel.sweep, panel.unit, list(panel.lines)) for panel in panels]
    assert ("samples", "img/s", ["ffcv", "dali"]) in found
    assert ("samples", "img/s", ["resident"]) in found
    assert ("width", "matrices/s", ["gram64"]) in found
    assert ("width", "s", ["refresh"]) in found
    assert ("memory", "MB", ["ffcv", "dali", "resident"]) in found
    assert len({panel.title for panel in panels}) == len(panels)
    assert max(len(panel.title) for panel in panels) <= 40  # else it runs into its neighbour


def test_a_picture_of_all_sweeps_is_small():
    assert len(growth_chart(grown_everywhere())) < 200_000


def test_wrong_options():
    for options, message in (
        (growth.Options(batches=(8,)), "--batches and --sizes each take two or more"),
        (growth.Options(widths=(100,)), "--widths 100 is not that of a ViT here"),
        (growth.Options(count=100), "--count 100 is too few for these batches, expected 256 or more"),
        (growth.Options(sweeps=()), "--sweeps names nothing"),
        (growth.Options(repeats=0), "--repeats is 0, expected 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            growth.run(options)
