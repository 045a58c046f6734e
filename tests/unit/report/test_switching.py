"""What a run's log says of its training becoming low-rank: read, drawn, put in tables and in a run's last lines."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank_vit.config.flags import parse
from lowrank_vit.ranks.world import World
from lowrank_vit.report.page import write_report
from lowrank_vit.report.read import read_run
from lowrank_vit.report.switching import plots
from lowrank_vit.report.switching.plots import switching_plot
from lowrank_vit.report.switching.read import (
    Look,
    beside_the_loss,
    headline,
    in_words,
    mean_over_time,
    notes,
    read_switching,
    tables,
)
from lowrank_vit.train import _farewell
from lowrank_vit.training.trainer import Result
from tests.reported import add_summary

LAYERS = ["blocks.0.mlp.fc1", "blocks.2.attn.qkv", "blocks.2.mlp.fc2", "blocks.10.attn.qkv"]
KNOWN = {"streak": 2, "energy": 0.9, "energy_of_chance": 0.1, "cosine": 0.95, "chance": 0.2}
VERDICT: dict[str, Any] = {"rank": 8, "settled": False, **KNOWN, "above_noise": 0.4, "certificate": 1e-13}


def evidence(seen: int, **more: dict[str, Any]) -> dict[str, Any]:
    layers = {name: VERDICT | more.get(name.replace(".", "_"), {}) for name in LAYERS}
    return {"kind": "lowrank", "update": seen + 10, "event": "evidence", "seen": seen, "due": {}, "layers": layers}


def switch(update: int, names: list[str], rank: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "lowrank",
        "update": update,
        "event": "switch",
        "ranks": dict.fromkeys(names, rank),
        "ranks_before": dict.fromkeys(names),
        "parameters_before": 4_000_000,
        "flops_before": 3e9,
        "loss_before": 1.25,
        "parameters": 1_000_000,
        "flops": 1e9,
        "loss": 1.5,
        "share": 0.15,
        "layers": dict.fromkeys(names, VERDICT | {"settled": True}),
        "change": {f"{name}/scale": 0.5 for name in names},
        **more,
    }


def train(update: int, img_per_s: float) -> dict[str, Any]:
    return {"kind": "train", "update": update, "epoch": 0, "loss": 2.0, "img_per_s": img_per_s}


def log(path: Path, *lines: dict[str, Any], end: str = "") -> Path:
    add_summary(path)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path


RATES = [train(10 * n, rate) for n, rate in enumerate([50, 100, 120, 110, 20, 300, 320, 310], start=1)]


def test_a_run_without_such_lines_has_no_section(tmp_path):
    log(tmp_path, *RATES)
    assert read_switching(tmp_path) is None
    write_report(tmp_path)
    assert not (tmp_path / "report" / "lowrank.png").exists()
    assert "factorised" not in (tmp_path / "report.html").read_text()


def test_ranks_evidence_and_switches_are_drawn_and_told(tmp_path):
    lines = [*RATES, evidence(20), evidence(30), switch(40, LAYERS[1:3], 8), switch(70, LAYERS, 4)]
    write_report(log(tmp_path, *lines, end='{"kind": "lowrank", "update": 90, "event'))
    assert (tmp_path / "report" / "lowrank.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "report.html").read_text()
    for text in ("Factorised layers", "4 → 1", "3 → 1", "1.2500 → 1.5000", "15.0 %", "25.0 %", "Ranks by layer"):
        assert text in html
    found = read_switching(tmp_path)
    assert found is not None
    assert [look.update for look in found.looks] == [20, 30]
    assert found.layers == [LAYERS[0], *LAYERS[1:3], LAYERS[3]]  # block 2 before block 10
    assert [found.ranks_after(n) for n in range(3)] == [{}, dict.fromkeys(LAYERS[1:3], 8), dict.fromkeys(LAYERS, 4)]
    switches, ranks = tables(found, {LAYERS[0]: (64, 16)})
    assert [row[1:4] for row in switches.rows] == [["settled", "2", "15.0 %"], ["settled", "4", "15.0 %"]]
    assert ranks.rows[0][:4] == [LAYERS[0], "64 x 16", "whole", "4"]
    assert dict(zip(ranks.columns, ranks.rows[1], strict=True)).items() >= {
        ("update 40", "8"), ("energy held", "0.9"), ("cosine by chance", "0.2"), ("factor of the lr", "0.5"),
    }  # fmt: skip
    assert headline(found) == [("parameters left", "25.0 %")]


def test_speed_is_that_before_and_after_without_the_interval_that_compiles(tmp_path):
    found = read_switching(log(tmp_path, *RATES, switch(40, LAYERS, 8)))
    assert found is not None
    assert found.speeds() == [(105, 310)]  # 50, 100, 120, 110; then 20 is left out
    (line,) = in_words(found)
    assert line == "update 40: 4 layers factorised, 4 → 1 M parameters, 3 → 1 GFLOP an image, 105 → 310 img/s"


def test_a_scheduled_switch_comes_before_its_update(tmp_path):
    found = read_switching(log(tmp_path, *RATES, switch(40, LAYERS, 8, epoch=3, budget=0.15)))
    assert found is not None
    assert found.speeds() == [(100, 305)]  # the interval up to 40 is the first with factors
    assert tables(found, {})[0].rows[0][1] == "schedule, after epoch 3"


@pytest.mark.parametrize("rates", [[], RATES[:5]])
def test_what_is_not_known_is_left_out_of_a_line(tmp_path, rates):
    found = read_switching(log(tmp_path, *rates, switch(40, LAYERS[:1], 8, flops=None)))
    assert found is not None
    assert math.isnan(found.speeds()[0][1])
    assert in_words(found) == ["update 40: 1 layer factorised, 4 → 1 M parameters, 3 → ? GFLOP an image"]


def test_a_dry_run_and_a_refusal_say_what_they_are(tmp_path):
    dry = switch(40, LAYERS, 8, event="dry-run") | {"change": {}}
    refused = {"kind": "lowrank", "update": 60, "event": "refused", "why": "the budget has no room"}
    write_report(log(tmp_path, *RATES, dry, refused))
    html = (tmp_path / "report.html").read_text()
    assert "would be factorised (dry run)" in html
    assert "parameters left" not in html
    assert "At update 60 no layer was factorised: the budget has no room." in html
    found = read_switching(tmp_path)
    assert found is not None
    assert found.is_dry
    assert "4 layers would be factorised" in in_words(found)[0]
    assert "img/s" not in in_words(found)[0]


def test_of_lines_that_a_resumed_run_repeats_the_later_counts(tmp_path):
    lines = [switch(40, LAYERS, 8), {"kind": "lowrank", "update": 41, "event": "used-up"}, switch(40, LAYERS, 6)]
    found = read_switching(log(tmp_path, *lines, {"kind": "lowrank", "update": "?", "event": "switch"}))
    assert found is not None
    assert [one.ranks[LAYERS[0]] for one in found.switches] == [6]


def test_refusals_alone_are_notes_and_no_picture(tmp_path):
    log(tmp_path, {"kind": "lowrank", "update": 9, "event": "refused", "why": "weights are not finite"})
    found = read_switching(tmp_path)
    assert found is not None
    assert notes(found) == ["At update 9 no layer was factorised: weights are not finite."]
    assert [table.rows for table in tables(found, {})] == [[], []]
    assert switching_plot(read_run(tmp_path)) is None


def test_zeros_that_mean_nothing_is_known_are_not_drawn(tmp_path):
    nothing = {"rank": 0, "streak": 0, "energy": 0.0, "cosine": 0.0, "certificate": 0.0}
    found = read_switching(log(tmp_path, evidence(10, blocks_0_mlp_fc1=nothing)))
    assert found is not None
    (look,) = found.looks
    assert "rank" not in look.layers[LAYERS[0]]
    assert switching_plot(replace(read_run(tmp_path), shapes={})) is not None


def drawn(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The panels of a run's picture by the beginning of their titles."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or b"")
    switching_plot(read_run(run_dir))
    (figure,) = figures
    figure.canvas.draw()
    return {axes.get_title(loc="left").split(" ")[0]: axes for axes in figure.axes}


def test_no_look_is_told_from_no_rank_that_pays(tmp_path, monkeypatch):
    nothing = {"rank": 0, "streak": 0, "energy": 0.0, "cosine": 0.0, "certificate": 0.0}
    looks = [evidence(10, blocks_0_mlp_fc1=nothing), evidence(20)]
    del looks[1]["layers"][LAYERS[1]]
    panel = drawn(log(tmp_path, *looks, switch(90, LAYERS, 4)), monkeypatch)["What"]
    (mesh,) = panel.collections[:1]
    shares = mesh.get_array().reshape(len(LAYERS), 2)
    assert shares[0, 0] == 0
    assert np.ma.getmaskarray(shares).tolist() == [[False, False], [False, True], [False, False], [False, False]]
    assert panel.patch.get_hatch()
    assert "hatched: no data" in panel.get_xlabel()
    assert mesh.get_coordinates()[0, :, 0].tolist() == [10, 20, 30]  # behind it nothing was looked at
    assert panel.get_xlim() == (0, 90)


@pytest.mark.parametrize("certificates", [(1e-13, 1e-13), (1e-13, 9e-13), (1e-15, 1e-12), (0.0, 0.0)])
def test_certificates_have_room_above(tmp_path, monkeypatch, certificates):
    looks = [
        evidence(update, **{name.replace(".", "_"): {"certificate": one} for name in LAYERS})
        for update, one in zip((10, 20), certificates, strict=True)
    ]
    bottom, top = drawn(log(tmp_path, *looks), monkeypatch)["Widest"].get_ylim()
    assert top > 1.04 * max(certificates)
    assert bottom == 0 or bottom < 0.96 * min(certificates)


def test_curves_that_lie_on_one_another_are_all_seen(tmp_path, monkeypatch):
    panel = drawn(log(tmp_path, evidence(10), evidence(20), evidence(30)), monkeypatch)["Share"]
    widths = [line.get_linewidth() for line in panel.get_lines()]
    assert len(widths) == 3  # qkv, fc1, fc2, the same numbers
    assert all(a > b + 1 for a, b in itertools.pairwise(widths))


def test_what_the_run_has_measured_stands_where_the_log_is_too_short(tmp_path):
    speed = {"kind": "speed", "update": 60, "switch": 40, "img_per_s": 250, "img_per_s_before": 90}
    found = read_switching(log(tmp_path, *RATES[:5], switch(40, LAYERS, 8), speed))
    assert found is not None
    assert found.speeds() == [(105, 250)]
    assert tables(found, {})[0].rows[0][6] == "105 → 250"
    speed |= {"switch": 41, "img_per_s_before": None}
    found = read_switching(log(tmp_path, switch(41, LAYERS, 8), speed))
    assert found is not None
    assert tables(found, {})[0].rows[0][6] == "? → 250"


def test_what_was_not_measured_has_one_mark(tmp_path):
    bare = {"kind": "lowrank", "update": 9, "event": "switch", "ranks": {"a.fc": 2}}
    found = read_switching(log(tmp_path, bare))
    assert found is not None
    switches, ranks = tables(found, {})
    assert switches.rows == [["9", "settled", "1", "?", "?", "?", "?", "?"]]
    assert ranks.rows == [["a.fc", "?", "2"]]
    assert "?: not measured" in (switches.note or "")


def test_regularisers_and_adapters_have_a_table(tmp_path):
    lines = [train(n, 100) | {"nuclear_norm": 9.0 - n, "clipped_values": n} for n in (1, 2, 3)]
    log(tmp_path, *lines)
    (tmp_path / "args.yaml").write_text("reg-nuclear: 0.05\nspectral-clip: 2.0\nlora: null\n")
    run = read_run(tmp_path)
    (table,) = beside_the_loss(run.args, run.train)
    assert (table.title, table.note) == ("Regularisers", "--reg-nuclear 0.05, --spectral-clip 2.")
    assert table.rows == [["nuclear norm", "8", "6", "6", "8"], ["clipped values", "1", "3", "1", "3"]]
    assert beside_the_loss({"lora": 4}, {})[0].title == "Adapters"
    assert not beside_the_loss({"lora": None, "reg-nuclear": 0.0}, run.train)
    write_report(tmp_path)
    assert "--reg-nuclear 0.05" in (tmp_path / "report.html").read_text()


def test_means_are_over_those_that_are_known():
    looks = [Look(0, {"a": {"cosine": 1.0}, "b": {"cosine": 0.5}}), Look(5, {"b": {"cosine": 0.25}}), Look(9, {})]
    np.testing.assert_array_equal(mean_over_time(looks, "cosine", ["a", "b"]), [0.75, 0.25, np.nan])


def test_a_run_ends_with_what_its_switches_did(tmp_path):
    log(tmp_path, *RATES, switch(40, LAYERS, 8))
    result = Result(tmp_path, "top1", 90.0, 3, 60.0)
    config = parse("--synthetic --spec-monitor --lowrank-train kfac".split())
    assert "update 40: 4 layers factorised" in _farewell(result, config, World())
    assert "factorised" not in _farewell(result, parse(["--synthetic"]), World())
