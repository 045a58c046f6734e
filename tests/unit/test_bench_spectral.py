"""The bench of the solver: its accuracy section finds errors, its cases run, its result reads back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from data_prep.errors import UserError
from lowrank_vit.bench import spectral
from lowrank_vit.bench.measure import Result
from lowrank_vit.spectral.ends import Solved
from lowrank_vit.spectral.solve import solve


def test_every_accuracy_case_passes() -> None:
    for name, matrix in spectral.accuracy_cases().items():
        found = spectral.measure_accuracy(name, matrix, 1, torch.device("cpu"))
        assert found.passes, (name, found)


@pytest.mark.parametrize(("wrong", "field"), [("s", "top"), ("u", "sine"), ("certificate", "certified")])
def test_a_wrong_solver_is_found_out(wrong: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*args: object, **more: object) -> dict[str, Solved]:
        result = solve(*args, **more)  # pyright: ignore[reportArgumentType]
        array = getattr(result["m"].top, wrong)
        array[...] = -1 if wrong == "certificate" else array + 1e-3
        return result

    right = spectral.measure_accuracy(
        "m", spectral.accuracy_cases()["rank 8 + noise, 1536x384"], 1, torch.device("cpu")
    )
    assert right.passes
    monkeypatch.setattr(spectral, "solve", spoiled)
    found = spectral.measure_accuracy(
        "m", spectral.accuracy_cases()["rank 8 + noise, 1536x384"], 1, torch.device("cpu")
    )
    assert not found.passes
    assert getattr(found, field) != getattr(right, field)


def test_operations_are_those_of_the_formula_by_hand() -> None:
    counted = spectral.operations("base")
    assert counted["gram"] == pytest.approx(24 * (2304 + 768 + 3072 + 3072) * 768**2 / 1e9)
    assert counted["tridiagonal"] == pytest.approx(24 * 4 * 4 / 3 * 768**3 / 1e9)


def test_a_small_round_runs_and_reads_back(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {"pretrained": False, "img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 2, "num_classes": 4}
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: create("vit_tiny_patch16_224", **tiny))
    before = torch.get_rng_state()
    options = spectral.Options(
        models=("small",), device="cpu", threads=1, step=True, step_batches=(2,), steps=10, repeats=1
    )
    result: Result = spectral.run(options)
    assert torch.equal(torch.get_rng_state(), before)
    content = json.loads(result.to_json())
    assert set(content["ratios"]) == {
        "gram64_vs_inline_svd", "gram64_vs_inline_svd_small", "gram64_share_of_limit_small",
        "step_time_2_with_vs_without",
    }  # fmt: skip
    assert content["ratios"]["gram64_vs_inline_svd"] == content["ratios"]["gram64_vs_inline_svd_small"]
    assert {
        "inline_svd_small",
        "gram64_small",
        "refresh_small",
        "product_limit_small",
        "step_2",
        "step_2_with_monitor",
    } == set(content["cases"])
    refreshes = content["refreshes"]["batch_2"]
    assert len(refreshes["refresh_s"]) == 2  # the warm-up's and the round's
    assert refreshes["skipped"] == [0, 0]
    assert all(one["passes"] for one in content["accuracy"].values())
    spectral.print_accuracy(result, Console(width=80))
    output = capsys.readouterr().out
    assert "condition 1e6" in output
    assert max(map(len, output.splitlines())) <= 80
    assert np.isfinite(content["cases"]["gram64_small"]["median"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 0}, "--threads is 0"),
        ({"step_batches": (64, 0)}, "--step-batches is 64 0"),
        ({"models": ()}, "--models names no model"),
    ],
)
def test_wrong_options(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spectral.run(spectral.Options(**changes))
