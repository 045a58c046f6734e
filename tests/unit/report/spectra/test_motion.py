"""Pictures of flows and of updates: drawn from what a run has logged, with the level of each number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from lowrank_vit.report.interactive.figures import flows_figure
from lowrank_vit.report.interactive.packing import Packer
from lowrank_vit.report.read import read_run
from lowrank_vit.report.spectra.motion import flows_plot, levels_of, updates_plot

PNG = b"\x89PNG\r\n\x1a\n"
FLOW = {"effective_rank": 20.0, "stable_rank": 2.0, "rank_limit": 32.0, "cosine": 0.2, "cosine_image": 0.1}
ENTROPY = {"entropy": 2.5, "entropy_uniform": 2.77}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "args.yaml").write_text("model: vit_small_patch16_224\n")
    return tmp_path


def log(run: Path, kind: str, update: int, values: Mapping[str, float | None]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "update": update, **values}) + "\n")


def drawn_levels(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The heights of dashed lines from now on."""
    found: list[float] = []
    plot, axhline = Axes.plot, Axes.axhline

    def record_plot(axes: Axes, x: Any, y: list[float], **more: Any) -> object:
        if "linestyle" in more:
            found.append(float(y[0]))
        return plot(axes, x, y, **more)

    def record_line(axes: Axes, y: float, **more: Any) -> object:
        found.append(y)
        return axhline(axes, y, **more)

    monkeypatch.setattr(Axes, "plot", record_plot)
    monkeypatch.setattr(Axes, "axhline", record_line)
    return found


@pytest.mark.parametrize("validations", [1, 3])
@pytest.mark.parametrize(("entropy", "kinds"), [(ENTROPY, ("spec", "spec_ema")), ({}, ("spec",))])
def test_flows_have_their_levels(
    run: Path, monkeypatch: pytest.MonkeyPatch, validations: int, entropy: dict[str, float], kinds: tuple[str, ...]
) -> None:
    levels = drawn_levels(monkeypatch)
    for n in range(validations):
        values = {
            f"{kind}/flow/blocks.{block}/{name}": value if (n, name) != (0, "cosine") else None
            for kind in kinds
            for block in range(3)
            for name, value in (FLOW | entropy).items()
        }
        log(run, "flow", 10 * n, {"epoch": n, "spec/flow/images": 40, **values})
    png = flows_plot(read_run(run))
    assert png is not None
    assert png.startswith(PNG)
    expected = [32.0, *([0.0] if validations > 1 else []), 0.0, *([2.77] if entropy else [])]
    assert levels == [level for level in expected for _ in range(2 if validations > 1 else 1)]


def test_a_level_far_above_all_values_is_no_line(run: Path) -> None:
    for block, rank in enumerate((14.0, 12.0)):
        numbers = FLOW | {"effective_rank": rank, "rank_limit": 96.0}
        log(
            run, "flow", block, {f"spec/flow/blocks.{i}/{name}": one for i in range(2) for name, one in numbers.items()}
        )
    found = read_run(run)
    assert levels_of(found, "effective_rank", "rank_limit", 2) == ({}, 96.0)
    figure = flows_figure(found, Packer())
    assert figure is not None
    effective, stable, cosine, *_ = figure["views"]["newest, by depth"]
    assert effective["y"] == "exp(entropy of σ / Σ σ)\ngreatest possible: 96"
    assert stable["y"].endswith("greatest possible: 96")
    assert [[one["name"] for one in panel["series"]] for panel in (effective, stable, cosine)] == [
        ["model"], ["model"], ["model", "isotropic: 0"],
    ]  # fmt: skip


def test_updates_have_chance_as_it_was_logged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = drawn_levels(monkeypatch)
    moves = dict.fromkeys("stable_rank effective_rank rank90 most top_u top_v top".split(), 0.5)
    moves |= {"chance_u": 0.25, "chance_v": 0.125, "chance": 0.03125}
    for n in range(3):
        there = [move for move, since in (("opt", 1), ("dw", 2)) if n >= since]
        names = [f"blocks.{block}.{kind}" for block in range(2) for kind in ("attn.qkv", "mlp.fc1")]
        values = {f"spec/{name}/{m}_{key}": v for name in names for m in there for key, v in moves.items()}
        values = {key: None if (n, key) == (2, "spec/blocks.0.mlp.fc1/dw_top_u") else v for key, v in values.items()}
        log(run, "spec", 10 * n, {"spec/refresh/seconds": 1.0, **values})
    png = updates_plot(read_run(run))
    assert png is not None
    assert png.startswith(PNG)
    np.testing.assert_allclose(levels, np.repeat([0.25, 0.125, 0.03125], 2))


def test_a_run_that_has_logged_neither_has_no_picture(run: Path) -> None:
    log(run, "spec", 0, {"spec/blocks.0.mlp.fc1/sigma_max": 1.0})
    assert flows_plot(read_run(run)) is None
    assert updates_plot(read_run(run)) is None
    log(run, "spec", 10, {"spec/blocks.0.mlp.fc1/sigma_max": 1.0})
    assert updates_plot(read_run(run)) is None
