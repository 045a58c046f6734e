"""The bench of the solver: errors are found, the rival is right, cases run, results read back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import spectral
from benchmarks.harness.measure import Result, Samples
from benchmarks.spectra import accuracy, before, refreshes
from benchmarks.training import monitored
from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.solving.solve import solve
from lowrank_vit.spectral.watching.refresh import Memory, SpectralSettings, refresh

NEWER = ("mp_sigma", "mp_edge", "mp_outliers")
"""Told otherwise since."""
SOME = ("condition 1e6, 384x1536", "zero, 384x384")


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    """The bench's matrices, which take seconds to make; tests only read them."""
    return accuracy.accuracy_cases()


@pytest.fixture(scope="module")
def right(cases: dict[str, torch.Tensor]) -> accuracy.Accuracy:
    """What the bench finds of the solver as it is."""
    return measured(cases)


def measured(cases: dict[str, torch.Tensor]) -> accuracy.Accuracy:
    return accuracy.measure_accuracy("m", cases["rank 8 + noise, 1536x384"], 1, torch.device("cpu"))


@pytest.mark.parametrize(("wrong", "field"), [("s", "top"), ("u", "sine"), ("certificate", "certified")])
def test_a_wrong_solver_is_found_out(
    cases: dict[str, torch.Tensor],
    right: accuracy.Accuracy,
    wrong: str,
    field: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoiled(*args: object, **more: object) -> dict[str, Solved]:
        result = solve(*args, **more)  # pyright: ignore[reportArgumentType]
        array = getattr(result["m"].top, wrong)
        array[...] = -1 if wrong == "certificate" else array + 1e-3
        return result

    assert right.passes
    monkeypatch.setattr(accuracy, "solve", spoiled)
    found = measured(cases)
    assert not found.passes
    assert getattr(found, field) != getattr(right, field)


def test_operations_are_those_of_the_formula_by_hand() -> None:
    counted = spectral.operations("base")
    assert counted["gram"] == pytest.approx(24 * (2304 + 768 + 3072 + 3072) * 768**2 / 1e9)
    assert counted["tridiagonal"] == pytest.approx(24 * 4 * 4 / 3 * 768**3 / 1e9)


@pytest.mark.parametrize("is_initial", [False, True])
def test_the_refresh_of_before_has_the_same_numbers(is_initial: bool) -> None:
    earlier, now, _ = refreshes.series(
        torch.device("cpu"), {"attn.qkv": (192, 64), "mlp.fc2": (64, 80)}, is_initial=is_initial
    )
    memory, of_before = Memory(), before.Memory()
    refresh(0, earlier, SpectralSettings(3, 2), memory)
    before.refresh(earlier, 3, 2, 1, of_before)
    found = refresh(1, now, SpectralSettings(3, 2), memory).values
    expected = before.refresh(now, 3, 2, 1, of_before)
    assert list(found) == list(expected)
    for key, values in expected.items():
        of_today = {name: found[key][name] for name in values if name not in NEWER}
        assert of_today == pytest.approx({name: values[name] for name in of_today}, rel=1e-9, abs=1e-9)
        assert {"cos_u1", "cos0_v_mean", "update_norm2", "alpha_ks", "delta_sv_rel"} <= set(of_today)


def test_weights_of_both_sets_are_what_they_are_called() -> None:
    random = torch.Generator().manual_seed(0)
    trained, initial = (refreshes.weights((300, 100), random, is_initial=is_initial) for is_initial in (False, True))
    edge = refreshes.STD * (300**0.5 + 100**0.5)
    for matrix, above in ((trained, 32), (initial, 0)):
        assert int((torch.linalg.svdvals(matrix) > 1.1 * edge).sum()) == above
    moved = refreshes.moved(trained, random, refreshes.MOVE)
    assert float((moved - trained).norm() / trained.norm()) == pytest.approx(refreshes.MOVE, rel=0.05)


def test_a_small_round_runs_and_reads_back(
    cases: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(refreshes, "SHAPES", {"attn.qkv": (96, 48), "mlp.fc2": (48, 64)})
    monkeypatch.setattr(spectral, "accuracy_cases", lambda: {name: cases[name] for name in SOME})
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
        "with_monitor_vs_without", "with_monitor_vs_without_2", "with_monitor_but_norms_vs_without_2",
        "lowrank_vs_fullrank", "full_refresh_vs_before", "full_refresh_vs_before_initial",
        "ends_refresh_vs_before", "ends_refresh_vs_before_initial",
    }  # fmt: skip
    of_all, of_small = (content["ratios"][f"gram64_vs_inline_svd{model}"] for model in ("", "_small"))
    assert of_all["samples"] == of_small["samples"]
    assert {
        "inline_svd_small",
        "gram64_small",
        "product_limit_small",
        "step_2",
        "step_2_with_monitor",
        "step_2_with_monitor_but_norms",
        "fullrank",
        "lowrank",
        "full_refresh",
        "full_refresh_initial",
        "ends_refresh",
        "ends_refresh_initial",
        "refresh_before",
        "refresh_before_initial",
    } == set(content["cases"])
    # So small matrices have no ends of their own.
    assert content["fallbacks"] == {"ends_refresh": [1.0, 1.0], "ends_refresh_initial": [1.0, 1.0]}
    of_batch = content["refreshes"]["batch_2"]
    assert len(of_batch["refresh_s"]) == 2  # the warm-up's and the round's
    assert of_batch["skipped"] == [0, 0]
    assert all(one["passes"] for one in content["accuracy"].values())
    accuracy.print_accuracy(result, Console(width=80))
    output = capsys.readouterr().out
    assert "condition 1e6" in output
    assert max(map(len, output.splitlines())) <= 80
    assert np.isfinite(content["cases"]["gram64_small"]["median"])


def test_the_lowest_ratio_of_each_round_is_the_figure() -> None:
    found = spectral._with_lowest(
        {
            "gram64_vs_inline_svd_small": Samples((3.0, 5.0)),
            "gram64_vs_inline_svd_base": Samples((4.0, 2.0)),
            "gram64_share_of_limit_base": Samples((0.1, 0.1)),
        }
    )
    assert found["gram64_vs_inline_svd"].samples == (3.0, 2.0)
    assert "with_monitor_vs_without" not in found


def test_a_part_of_the_layers_has_the_shapes_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch.linalg, "svd", lambda weight, **_: seen.append(tuple(weight.shape)))
    for layers, factor in ((2, 2), (12, 12)):
        seen.clear()
        cases = spectral._solver_cases("small", 1, torch.device("cpu"), layers)
        cases["inline_svd_small"].run()
        assert cases["inline_svd_small"].items == len(seen) == 8 * factor
        assert {shape: seen.count(shape) for shape in seen} == dict.fromkeys(
            [(1152, 384), (384, 384), (1536, 384), (384, 1536)], 2 * factor
        )
        assert cases["gram64_small"].items == 96


def test_compiled_steps_are_warmed_up_and_eager_ones_need_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    created = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=2, num_classes=4)
    monkeypatch.setattr(timm, "create_model", lambda _name: created)
    compiled: list[dict] = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: (compiled.append(how), function)[1])
    cpu = torch.device("cpu")
    training = monitored._Training("x", 2, 3, cpu)
    assert compiled == []  # on a CPU these steps are eager, and need no warming up
    training.warm_up()
    assert training._updates == 0
    training._warm_up_steps = monitored.WARM_UP_STEPS
    training.warm_up()
    training.run()
    assert training._updates == 20 + 3
    cases, _ = monitored.step_cases("x", 2, 3, cpu, ("without", "with", "but norms"))
    assert all(case.first.__name__ == "warm_up" for case in cases.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 0}, "--threads is 0"),
        ({"inline_layers": 0}, "--inline-layers is 0"),
        ({"step_batches": (64, 0)}, "--step-batches is 64 0"),
        ({"models": ()}, "--models names no model"),
    ],
)
def test_wrong_options(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spectral.run(spectral.Options(**changes))
