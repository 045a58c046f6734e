"""The numbers of a refresh: which there are, and that they are those of plain numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_vit.spectral.measures.aggregates import aggregates
from lowrank_vit.spectral.measures.subspaces import chance_cosines
from lowrank_vit.spectral.solving.solve import stack_by_shape
from lowrank_vit.spectral.watching import files
from lowrank_vit.spectral.watching.refresh import Memory, SpectralSettings, refresh
from tests.monitors import nudge, targets, watch
from tests.spectra import tiny_vit

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def test_keys_of_the_first_and_of_later_refreshes(tmp_path: Path) -> None:
    model, ema = tiny_vit(0), tiny_vit(1)
    settings = SpectralSettings(topk=2, interval=3)
    with watch(model, tmp_path, ema, settings=settings) as monitor:
        monitor.observe(0)
        monitor.wait()
        nudge(model, 1)
        monitor.observe(2)
    first, second = (
        {k: v for k, v in r.values.items() if k.startswith("spec/blocks.0.attn.qkv/")} for r in monitor.records()
    )

    def family(prefix: str) -> set[str]:
        names = {f"{prefix}_{x}{end}{i}" for x in "uv" for end in ("", "_last") for i in (1, 2)}
        names |= {f"{prefix}_{x}_{what}" for x in "uv" for what in ("max", "mean", "mean_sq", "overlap")}
        return names | {f"block_{prefix}_{x}_{what}" for x in "uv" for what in ("mean", "min", "mean_sq", "overlap")}

    single = set(
        "sigma_max sv1 sv2 sv_last1 sv_last2 gap_k gap_last stable_rank effective_rank rank90 rank95 rank99 "
        "nuclear_norm condition alpha alpha_ks alpha_sigma alpha_tail mp_sigma mp_edge mp_outliers mp_ks "
        "mp_sigma_q mp_sigma_k mp_sigma_v numerical_rank certificate_max certificate_index orthogonality "
        "chance_u chance_v block_gap".split()
    )
    single |= {f"chance_{x}_{what}" for x in "uv" for what in ("max", "mean", "mean_sq")}
    single |= {f"block_chance_{x}_{what}" for x in "uv" for what in ("mean", "min", "mean_sq")}
    of_weights = {"update_norm2", "update_norm2_low", "update_norm2_high", "update_normF", "block_energy", "turn_bound"}
    drift = {"delta_sv_rel"} | of_weights | family("cos") | family("cos0")
    assert {k.rpartition("/")[2] for k in first} == single | family("ema_cos")
    assert {k.rpartition("/")[2] for k in second} == single | family("ema_cos") | drift
    s = files.read_spectra(tmp_path / "update_00000002.npz").spectra["spec/blocks.0.attn.qkv"]
    assert [second[f"spec/blocks.0.attn.qkv/{n}"] for n in ("sv1", "sv2", "sv_last1", "sv_last2")] == [
        s[0], s[3], s[15], s[12],
    ]  # fmt: skip
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["matrices"]["blocks.0.attn.qkv"] == {"shape": [48, 16], "top": [1, 4], "last": [16, 13]}
    assert index["chance"]["blocks.0.attn.qkv"] == {"u": [*chance_cosines(2, 48)], "v": [*chance_cosines(2, 16)]}
    assert monitor.indices_by_type()["mlp.fc2"] == {"top": [1, 4], "last": [16, 13]}


def test_drift_and_norms_are_those_of_plain_numpy(tmp_path: Path) -> None:
    model, ema = tiny_vit(0), tiny_vit(1)
    moments = []
    with watch(model, tmp_path, ema, settings=SpectralSettings(topk=2, interval=2)) as monitor:
        for update in (0, 2, 4):
            moments.append({n: w.detach().double().numpy().copy() for n, w in targets(model).items()})
            monitor.observe(update)
            monitor.wait()
            nudge(model, update)
    record = monitor.records()[-1]
    averaged = {n: w.detach().double().numpy() for n, w in targets(ema).items()}
    svd = [{n: np.linalg.svd(w, full_matrices=False) for n, w in m.items()} for m in (*moments, averaged)]
    for name in moments[0]:
        key = f"spec/{name}"
        change = moments[2][name] - moments[1][name]
        for end in ("", "_low", "_high"):
            assert record.values[f"{key}/update_norm2{end}"] == pytest.approx(np.linalg.norm(change, 2), rel=1e-12)
        assert record.values[f"{key}/update_normF"] == pytest.approx(np.linalg.norm(change), rel=1e-12)
        old, new = svd[1][name].S[:3:2], svd[2][name].S[:3:2]
        assert record.values[f"{key}/delta_sv_rel"] == pytest.approx(np.mean(np.abs(new - old) / old), rel=1e-9)
        room = svd[1][name].S[2] - svd[2][name].S[3]
        bound = np.linalg.norm(change, 2) / room if room > 0 else np.inf
        assert record.values[f"{key}/turn_bound"] == pytest.approx(bound, rel=1e-6)
        captured = np.sum((svd[1][name].U[:, :3].T @ moments[2][name]) ** 2)
        expected = captured / np.sum(svd[2][name].S[:3] ** 2)
        assert record.values[f"{key}/block_energy"] == pytest.approx(expected, rel=1e-9)
        for prefix, then in (("cos", svd[1]), ("cos0", svd[0]), ("ema_cos", svd[3])):
            for side, before, now in (
                ("u", then[name].U, svd[2][name].U),
                ("v", then[name].Vh.T, svd[2][name].Vh.T),
            ):
                block = np.linalg.svd(before[:, :3].T @ now[:, :3], compute_uv=False)
                for what, value in (("mean", block.mean()), ("min", block.min()), ("mean_sq", np.mean(block**2))):
                    assert record.values[f"{key}/block_{prefix}_{side}_{what}"] == pytest.approx(value, abs=1e-7)
                for end, columns in (("", [0, 2]), ("_last", [-1, -3])):
                    expected = np.linalg.svd(before[:, columns].T @ now[:, columns], compute_uv=False)
                    found = [record.values[f"{key}/{prefix}_{side}{end}{i}"] for i in (1, 2)]
                    np.testing.assert_allclose(found, expected, atol=1e-7)
                    if not end:
                        assert record.values[f"{key}/{prefix}_{side}_mean"] == pytest.approx(expected.mean(), abs=1e-7)
                        assert record.values[f"{key}/{prefix}_{side}_max"] == found[0]


def test_aggregates_are_means_over_types_and_depths(tmp_path: Path) -> None:
    with watch(tiny_vit(), tmp_path) as monitor:
        monitor.observe(0)
    (record,) = monitor.records()
    values = record.values
    ranks = [values[f"spec/blocks.{block}.attn.qkv/stable_rank"] for block in (0, 1)]
    assert values["spec/type/attn.qkv/stable_rank"] == pytest.approx(np.mean(ranks))
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    alphas = [values[f"spec/blocks.1.{kind}/alpha"] for kind in kinds]
    assert values["spec/depth/1/alpha"] == pytest.approx(np.mean(alphas))
    assert "spec/type/attn.qkv/sv1" not in values
    assert values["spec/refresh/skipped"] == values["spec/refresh/fallbacks"] == 0
    assert values["spec/refresh/seconds"] > 0


def test_numbers_of_a_block_do_not_depend_on_which_of_its_vectors_are_recorded() -> None:
    noise = torch.Generator().manual_seed(0)
    moments = [{"m": torch.randn(60, 40, generator=noise)}]
    moments.append({"m": moments[0]["m"] + 0.1 * torch.randn(60, 40, generator=noise)})
    found: list[dict[str, float]] = []
    for topk, interval in ((5, 1), (3, 2), (2, 4)):
        memory, values = Memory(), dict[str, dict[str, float]]()
        for update, weights in enumerate(moments):
            stacks = {"spec": stack_by_shape(weights)}
            values = refresh(update, stacks, SpectralSettings(topk=topk, interval=interval), memory).values
        found.append({k: v for k, v in values["spec/m"].items() if "block_" in k or k == "turn_bound"})
    assert "block_energy" in found[0]
    assert "block_cos0_v_overlap" in found[0]
    assert all(one == pytest.approx(found[0], rel=1e-12) for one in found[1:])


def test_of_bounds_that_may_be_infinite_the_aggregate_is_the_median() -> None:
    values = {f"spec/blocks.{i}.fc": {"turn_bound": bound} for i, bound in enumerate([2.0, np.inf, 0.5, np.nan])}
    assert aggregates(values)["spec/type/fc"] == {"turn_bound": 2.0}
    del values["spec/blocks.0.fc"]
    assert aggregates(values)["spec/type/fc"] == {"turn_bound": np.inf}
    assert np.isnan(aggregates(values)["spec/depth/3"]["turn_bound"])
