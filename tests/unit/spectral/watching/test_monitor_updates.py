"""What a monitor says of how weights move: their changes, and the optimizer's direction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.optim
import torch

from lowrank_vit.model.low_rank import LowRankLinear
from lowrank_vit.spectral.layers import matrices_of, targets_of_model
from lowrank_vit.spectral.select import Target
from lowrank_vit.spectral.solving.extremes import Solver
from lowrank_vit.spectral.watching.watched import directions_of, remark_on_directions
from tests.monitors import WITH_UPDATES, adamw, nudge, step, watch
from tests.spectra import tiny_vit

pytestmark = pytest.mark.usefixtures("no_thread_is_left")
NAME = "blocks.1.attn.qkv.k"
P = 5
"""The block of three recorded vectors at interval 2."""


def of_update(values: dict[str, float], prefix: str) -> dict[str, float]:
    start = f"spec/{NAME}/{prefix}_"
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


def expected(change: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    u, _, vt = np.linalg.svd(weight)
    u, v, s = u[:, :P], vt[:P].T, np.linalg.svd(change, compute_uv=False)
    whole, p, (rows, cols) = np.sum(change**2), s / s.sum(), change.shape
    shares = [u.T @ change, change @ v, u.T @ change @ v]
    return {
        "stable_rank": whole / s[0] ** 2,
        "effective_rank": np.exp(-np.sum(p * np.log(p))),
        "rank90": 1 + np.searchsorted(np.cumsum(s**2), 0.9 * whole),
        "chance_u": P / rows,
        "chance_v": P / cols,
        "chance": P * P / (rows * cols),
        "most": np.sum(s[:P] ** 2) / whole,
        **dict(zip(("top_u", "top_v", "top"), (np.sum(one**2) / whole for one in shares), strict=True)),
    }


def test_changes_and_directions_are_those_of_numpy(tmp_path: Path):
    model, ema = tiny_vit(0), tiny_vit(1)
    optimizer = adamw(model)
    weights, directions = [], []
    monitor = watch(model, tmp_path, ema, split_qkv=True, settings=WITH_UPDATES, optimizer=optimizer)
    with monitor:
        for update in range(5):
            if update:
                step(model, optimizer, update)
                nudge(ema, update)
            monitor.observe(update)
            monitor.wait()
            if update % 2 == 0:
                weights.append(matrices_of(model, targets_of_model(model, "attn.qkv", split_qkv=True))[NAME].clone())
                if update:
                    state = optimizer.state[model.get_parameter("blocks.1.attn.qkv.weight")]
                    m, v = (state[n] / (1 - b**update) for n, b in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)))
                    directions.append((m / (v.sqrt() + 1e-8))[16:32])  # the second third
    first, *later = (record.values for record in monitor.records())
    assert not of_update(first, "dw")
    assert not of_update(first, "opt")  # nothing was stepped yet
    weights_64 = [w.detach().double().numpy() for w in weights]
    for i, values in enumerate(later):
        change = weights_64[i + 1] - weights_64[i]
        assert of_update(values, "dw") == pytest.approx(expected(change, weights_64[i]), rel=1e-5)
        direction = directions[i].double().numpy()
        assert of_update(values, "opt") == pytest.approx(expected(direction, weights_64[i + 1]), rel=1e-5)
        assert values[f"spec/{NAME}/dw_stable_rank"] == pytest.approx(
            (values[f"spec/{NAME}/update_normF"] / values[f"spec/{NAME}/update_norm2"]) ** 2
        )
        assert "spec/type/attn.qkv.k/dw_top_u" in values
    assert not [key for values in later for key in values if key.startswith("spec_ema/") and "/dw_" in key]
    assert set(np.load(tmp_path / "update_00000004.npz")) == {
        "update",
        *(f for f in np.load(tmp_path / "update_00000000.npz") if f != "update"),
    }


@pytest.mark.parametrize("solver", ["gram64", "svd"])
def test_beside_first_values_alone_is_what_a_norm_tells_and_whole_refreshes_have_their_bits(
    tmp_path: Path, solver: Solver
):
    of_all = {f"{prefix}_{name}" for prefix in ("dw", "opt") for name in ("effective_rank", "rank90", "most")}
    records: list[list[dict[str, float]]] = []
    for every in (1, 3):
        model = tiny_vit(0)
        optimizer = adamw(model)
        settings = replace(WITH_UPDATES, full_every=every, solver=solver)
        with watch(model, tmp_path / str(every), every=1, settings=settings, optimizer=optimizer) as monitor:
            for update in range(5):
                weight = model.get_parameter("blocks.0.mlp.fc1.weight")
                before = weight.detach().clone()
                if update:
                    step(model, optimizer, update)
                if update == 2:  # no change, and a direction of zeros
                    weight.data.copy_(before)
                    optimizer.state[weight]["exp_avg"].zero_()
                monitor.observe(update)
                monitor.wait()
        assert monitor.failed == 0
        records.append([record.values for record in monitor.records()])
    for update, (whole, mixed) in enumerate(zip(*records, strict=True)):
        told = {key for key in whole if key.rpartition("/")[2].startswith(("dw_", "opt_"))}
        if update % 3:
            told -= {key for key in told if key.rpartition("/")[2] in of_all}
        assert {key for key in mixed if key.rpartition("/")[2].startswith(("dw_", "opt_"))} == told
        assert bool(told) == bool(update)
        for key in told:
            rel = 0 if update % 3 == 0 and "dw_top" not in key else 1e-8
            assert mixed[key] == pytest.approx(whole[key], rel=rel, abs=1e-300, nan_ok=True), key
    assert records[1][2]["spec/blocks.0.mlp.fc1/dw_stable_rank"] == 0.0
    assert np.isnan(records[1][2]["spec/blocks.0.mlp.fc1/opt_top"])


def test_without_the_setting_or_a_known_optimizer_less_is_said(tmp_path: Path):
    model = tiny_vit(0)
    cases: list[tuple[str, dict[str, Any], set[str]]] = [
        ("off", {"optimizer": adamw(model)}, set()),
        ("changes", {"settings": WITH_UPDATES}, {"dw"}),
        ("unknown", {"settings": WITH_UPDATES, "optimizer": torch.optim.NAdam(model.parameters())}, {"dw"}),
    ]
    for folder, more, prefixes in cases:
        with watch(model, tmp_path / folder, **more) as monitor:
            for update in (0, 2):
                if "optimizer" in more:
                    step(model, more["optimizer"], update)
                nudge(model, update)
                monitor.observe(update)
                monitor.wait()
        assert monitor.failed == 0
        _, last = (record.values for record in monitor.records())
        found = {name.rpartition("/")[2].partition("_")[0] for name in last if name.startswith("spec/blocks.0.mlp.fc1")}
        assert found & {"dw", "opt"} == prefixes


def test_which_matrices_have_no_direction_is_said_before_the_first_step():
    """Of a frozen layer, one in factors, and of groups with different rules; the line agrees with what is copied."""
    model = tiny_vit(0)
    watched = targets_of_model(model, "attn.qkv,mlp.fc1", split_qkv=True)
    assert not remark_on_directions(model, adamw(model), watched)
    model.set_submodule("blocks.0.attn.qkv", LowRankLinear(torch.randn(48, 4), torch.randn(12, 16)))
    frozen, others = model.get_parameter("blocks.1.mlp.fc1.weight"), model.get_parameter("blocks.0.mlp.fc1.weight")
    rest = [one for one in model.parameters() if one is not frozen and one is not others]
    groups = [{"params": rest}, {"params": [others], "nesterov": True}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    line = remark_on_directions(model, optimizer, watched)
    assert line.startswith(
        "--spec-updates: no spectra of the optimizer's direction for 3 of 8 matrices (such as blocks.0.attn."
    )
    assert "for 1 of 8 matrices (such as blocks.0.mlp.fc1): Nesterov momentum" in line
    assert "for 1 of 8 matrices (such as blocks.1.mlp.fc1): the optimizer does not step it" in line
    for one in (*rest, others):
        one.grad = torch.ones_like(one)
    optimizer.step()
    assert set(directions_of(model, optimizer, watched)) == {f"blocks.1.attn.qkv.{part}" for part in "qkv"}
    none = remark_on_directions(model, torch.optim.NAdam(model.parameters()), {"a": Target("blocks.0.mlp.fc1")})
    assert none.startswith(
        "--spec-updates: no spectra of the optimizer's direction: that of torch.optim.nadam.NAdam is"
    )


def test_of_muon_it_is_what_the_step_has_moved(tmp_path: Path):
    model = tiny_vit(0)
    optimizer = timm.optim.Muon(model.parameters(), lr=0.01)
    with watch(model, tmp_path, settings=WITH_UPDATES, optimizer=optimizer, targets="attn.qkv", every=1) as monitor:
        for update in range(3):
            if update:
                step(model, optimizer, update)
            monitor.observe(update)
            monitor.wait()
    values = monitor.records()[-1].values
    for name in ("stable_rank", "effective_rank", "most"):  # one step lies between refreshes
        of_step, key = values[f"spec/blocks.1.attn.qkv/dw_{name}"], f"spec/blocks.1.attn.qkv/opt_{name}"
        assert values[key] == pytest.approx(of_step, rel=1e-3), name


def test_a_nan_in_the_optimizer_is_a_nan_of_that_matrix_alone(tmp_path: Path):
    model = tiny_vit(0)
    optimizer = adamw(model)
    step(model, optimizer, 0)
    optimizer.state[model.get_parameter("blocks.0.mlp.fc1.weight")]["exp_avg"][0, 0] = torch.nan
    with watch(model, tmp_path, settings=WITH_UPDATES, optimizer=optimizer) as monitor:
        monitor.observe(0)
        monitor.wait()
    (record,) = monitor.records()
    assert np.isnan(
        [record.values[f"spec/blocks.0.mlp.fc1/opt_{name}"] for name in ("stable_rank", "top_u", "most")]
    ).all()
    assert np.isfinite(record.values["spec/blocks.1.mlp.fc1/opt_top_u"])
    assert np.isfinite(record.values["spec/blocks.0.mlp.fc1/stable_rank"])
