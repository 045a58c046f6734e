"""A compression's page, from what `compress --out` writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.report.compression.plots import curve_plot
from lowrank_vit.report.compression.read import (
    Compression,
    headline,
    prediction_quality,
    read_compression,
    smallest_within,
    tables,
)
from lowrank_vit.report.page import write_report

SHAPES = {"blocks.0.attn.qkv": [6, 4], "blocks.0.mlp.fc1": [8, 4]}


def point(method: str, budget: float, rise: float, *, factor: float = 1.0, rank: int | None = 2) -> dict[str, Any]:
    """A point whose loss rises by `rise`, which is `factor` times what was predicted."""
    return {
        "method": method,
        "allocation": "greedy",
        "budget": budget,
        "params": int(1000 * budget),
        "flops": int(2000 * budget),
        "top1": 98.0 - 10 * rise,
        "loss": 0.1 + rise,
        "predicted_loss": 0.1 + rise / factor,
        "top1_difference": -10 * rise,
        "top1_error": 0.3,
        "loss_difference": rise,
        "loss_error": 0.001,
        "ranks": {"blocks.0.attn.qkv": 1} | ({} if rank is None else {"blocks.0.mlp.fc1": rank}),
    }


def content() -> dict[str, Any]:
    return {
        "source": {"checkpoint": "c.pth", "weights": "ema", "fingerprint": "f", "model": "vit <tiny>"},
        "by": "params",
        "original": {"top1": 98.0, "loss": 0.1, "params": 1000, "flops": 2000, "num_samples": 360},
        "constant": {"value": 9.5, "method": "kfac", "budget": 0.125, "is_clear": True},
        "points": [
            *(point("svd", budget, rise, factor=0.5) for budget, rise in ((0.5, 0.01), (0.2, 0.2), (0.1, 1.0))),
            point("kfac", 0.5, 0.0005, rank=None),
            *(point("kfac", budget, rise) for budget, rise in ((0.2, 0.02), (0.1, 0.3))),
        ],
        "shapes": SHAPES,
        "spectra": {name: {"svd": [3.0, 2.0, 1.0, 0.0], "kfac": [2.0, 0.1, 0.01, 1e-9]} for name in SHAPES},
        "sensitivities": {
            "method": "kfac",
            "layers": [
                {"layer": name, "share": share, "rank": rank, "predicted": 0.1 / rank, "measured": 0.2 / rank}
                for name in SHAPES
                for share, rank in ((0.5, 2), (0.1, 1))
            ],
        },
        "latency": None,
        "environment": {"torch": "2"},
    }


@pytest.fixture
def found(tmp_path: Path) -> Compression:
    (tmp_path / "compression.json").write_text(json.dumps(content()))
    return read_compression(tmp_path / "compression.json")


def test_the_page_holds_pictures_and_tables(found, tmp_path):
    assert write_report(tmp_path) == (tmp_path, [])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 3
    assert "vit &lt;tiny&gt;" in page
    assert "EMA weights" in page
    assert [table.title for table in tables(found)] == [
        "Points",
        "How good the predicted loss was",
        "Ranks by layer and budget, kfac",
        "Sensitivities of the layers, kfac",
    ]
    ranks = tables(found)[2]
    assert ranks.rows == [["blocks.0.attn.qkv", "4", "1", "1", "1"], ["blocks.0.mlp.fc1", "4", "whole", "2", "2"]]


def test_rows_in_parts_have_the_rank_of_a_part(tmp_path):
    made = content() | {"parts": {"blocks.0.attn.qkv": 3, "blocks.0.mlp.fc1": 1}}
    layer = {"rows": 6, "columns": 4, "parts": 3, "tokens": 5, "pays_up_to": 1, "faster_up_to": 1, "ratios": {"1": 0.5}}
    made["latency"] = {"models": [], "layers": [layer | {"device": "cpu"}, layer | {"device": "cpu", "parts": 1}]}
    found = Compression(tmp_path / "compression.json", made)
    assert found.full_ranks == {"blocks.0.attn.qkv": 2, "blocks.0.mlp.fc1": 4}
    ranks, layers = tables(found)[2], tables(found)[-1]
    assert [row[1] for row in ranks.rows] == ["2 of 3 parts", "4"]
    assert "ranks are of each part" in ranks.note
    assert layers.title == "Up to which rank a layer is faster"
    assert [row[0] for row in layers.rows] == ["6 x 4 in 3 parts", "6 x 4"]


def test_that_no_prediction_is_of_sequential_factors_is_said(tmp_path):
    made = content()
    plain = tables(Compression(tmp_path / "compression.json", made))
    assert not any("--sequential" in table.note for table in plain)
    made["points"][-1]["sequential"] = True
    points, prediction, *_ = tables(Compression(tmp_path / "compression.json", made))
    assert "without --sequential" in points.note
    assert "without --sequential" in prediction.note


def test_within_a_run_it_is_a_section_of_the_runs_page(found, tmp_path, monkeypatch):
    (tmp_path / "args.yaml").write_text("model: vit\n")
    monkeypatch.setattr("lowrank_vit.report.page._PICTURES", ())
    monkeypatch.setattr("lowrank_vit.report.page._OF_COMPRESSION", (("curve.png", "a curve", lambda found: b"PNG"),))
    folder, notes = write_report(tmp_path)
    page = (folder / "report.html").read_text()
    assert '<img alt="a curve"' in page
    assert "<h2>Sensitivities of the layers, kfac" in page
    assert any("summary.csv" in note for note in notes)
    (tmp_path / "compression.json").unlink()
    write_report(tmp_path)
    assert not (tmp_path / "report" / "curve.png").exists()
    assert "Sensitivities" not in (tmp_path / "report.html").read_text()


def test_only_rises_above_chance_judge_the_prediction(found):
    quality = prediction_quality(found)
    assert quality["svd"] == (3, *[pytest.approx(0.5)] * 3, pytest.approx(1.0))
    count, middle, *_, correlation = quality["kfac"]
    assert (count, middle) == (2, pytest.approx(1.0))  # the third is half a standard error
    assert math.isnan(correlation)


def test_the_smallest_model_within_a_point(found):
    small = smallest_within(found, 1.0)
    assert small is not None
    assert (small["method"], small["budget"]) == ("kfac", 0.2)
    assert ("kept within 1 point of top-1", "20.0 % (kfac)") in headline(found)
    assert smallest_within(found, -1.0) is None


def test_a_loss_that_is_not_finite_is_shown_and_drawn(tmp_path):
    made = content()
    made["points"][0] |= {"loss": None, "loss_difference": None, "loss_error": None, "predicted_loss": None}
    found = Compression(tmp_path / "compression.json", made)
    assert curve_plot(found)
    assert tables(found)[0].rows[0][6] == "not finite"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"points": []}', '{"source": {}, "original": {}, "points": [{}]}'])
def test_a_damaged_or_foreign_file_is_told(text, tmp_path):
    (tmp_path / "compression.json").write_text(text)
    with pytest.raises(UserError, match=r"compression\.json .*lowrank_vit\.compress"):
        write_report(tmp_path)
