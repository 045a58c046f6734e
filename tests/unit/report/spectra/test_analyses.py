"""What is drawn of an analysis, and of a run, is what was logged of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank_vit.report.read import Run, read_analysis, read_run
from lowrank_vit.report.spectra.metrics import profile_plot
from lowrank_vit.report.spectra.values import bulk_plot
from lowrank_vit.spectral.measures.noise import Noise, marchenko_pastur
from lowrank_vit.spectral.watching.monitor import SpectralMonitor
from lowrank_vit.spectral.watching.refresh import SpectralSettings
from tests.reported import analysis_file
from tests.spectra import tiny_vit


def drawn_edges(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    edges: list[float] = []

    def noted(*args: Any) -> Noise:
        edges.append(marchenko_pastur(*args).edge)
        return marchenko_pastur(*args)

    with monkeypatch.context() as patched:
        patched.setattr("lowrank_vit.report.spectra.values.marchenko_pastur", noted)
        bulk_plot(run)
    return sorted(edges)


def test_the_edge_that_is_drawn_is_the_one_that_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a fused qkv matrix, of an analysis as of a run."""
    path = analysis_file(tmp_path, "--full")
    logged = {name: one["mp_edge"] for name, one in json.loads(path.read_text())["layers"].items()}
    assert drawn_edges(read_analysis(path), monkeypatch) == sorted(logged.values())
    settings = SpectralSettings(topk=3)
    with SpectralMonitor(tiny_vit(), store_dir=tmp_path / "spectra", settings=settings) as monitor:
        monitor.observe(0)
    run = read_run(tmp_path)
    assert len(run.scaled) == 2
    assert drawn_edges(run, monkeypatch) == sorted(logged.values())


def test_alpha_is_drawn_with_its_standard_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = analysis_file(tmp_path)
    errors: list[float] = []
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", lambda axes, x, y, yerr, **style: errors.extend(yerr))
    profile_plot(read_analysis(path))
    logged = json.loads(path.read_text())["layers"].values()
    assert sorted(errors) == sorted(layer["alpha_sigma"] for layer in logged)
