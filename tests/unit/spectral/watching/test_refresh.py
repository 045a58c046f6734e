"""What a refresh says of a matrix: of fused qkv ones against noise, and of those whose first values alone are known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_vit.spectral.fused import is_named_qkv
from lowrank_vit.spectral.measures.metrics import reach, recorded_indices, spectrum_metrics
from lowrank_vit.spectral.measures.noise import FALSE_ALARMS, marchenko_pastur
from lowrank_vit.spectral.solving.solve import solve, stack_by_shape
from lowrank_vit.spectral.watching.files import list_spectra, read_scaled, read_spectra
from lowrank_vit.spectral.watching.refresh import SpectralSettings, drift_metrics, matrix_metrics, solve_all
from lowrank_vit.spectral.watching.store import SpectraStore
from tests.spectra import orthonormal

WIDTH = 96
SETTINGS = SpectralSettings(topk=2)


def fused_noise(scales: tuple[float, ...], rng: np.random.Generator, width: int = WIDTH) -> torch.Tensor:
    thirds = rng.standard_normal((3, width, width)) * np.array(scales)[:, None, None]
    return torch.from_numpy(thirds.reshape(3 * width, width).astype(np.float32))


def fused(names: Iterable[str]) -> list[str]:
    return [name for name in names if is_named_qkv(name)]


def numbers_of(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    solved = solve_all(stack_by_shape(weights, fused(weights)), SETTINGS)
    return {name: matrix_metrics(one, SETTINGS) for name, one in solved.items()}


@pytest.mark.parametrize("scales", [(0.02, 0.02, 0.06), (0.006, 0.02, 0.04)])
def test_noise_of_three_scales_keeps_the_edges_promise(scales: tuple[float, ...]) -> None:
    rng, count = np.random.default_rng(1), 200
    found = numbers_of({f"blocks.{i}.attn.qkv": fused_noise(scales, rng) for i in range(count)})
    alarms = sum(one["mp_outliers"] > 0 for one in found.values())
    assert abs(alarms - count * FALSE_ALARMS) <= 3.3 * (count * FALSE_ALARMS) ** 0.5
    for part, scale in zip("qkv", scales, strict=True):
        assert np.mean([one[f"mp_sigma_{part}"] for one in found.values()]) == pytest.approx(scale, rel=0.01)
    assert max(one["mp_ks"] for one in found.values()) < 6 / WIDTH
    # One fit to the matrix as it is finds many a value beyond its edge.
    mixed = fused_noise(scales, rng).double().numpy()
    assert marchenko_pastur(np.linalg.svd(mixed, compute_uv=False), mixed.shape).outliers > 5


def test_a_direction_in_the_weakest_third_is_seen() -> None:
    scales = np.array([0.1, 0.02, 0.004])
    weight = fused_noise(tuple(scales), np.random.default_rng(2))
    u, v = orthonormal(WIDTH, 1, 3), orthonormal(WIDTH, 1, 4)
    # 2.5 times what the noise of V alone reaches, and far below that of Q.
    weight[2 * WIDTH :] += torch.from_numpy(2.5 * 0.004 * 3**0.5 * WIDTH**0.5 * 1.6 * (u @ v.T)).float()
    assert numbers_of({"attn.qkv": weight})["attn.qkv"]["mp_outliers"] == 1


def test_the_spectrum_is_that_of_the_thirds_over_their_scales_and_sigma_is_their_mean_square() -> None:
    weight = fused_noise((0.3, 1.0, 2.0), np.random.default_rng(5), 48)
    solved = solve_all(stack_by_shape({"attn.qkv": weight}, ["attn.qkv"]), SETTINGS)["attn.qkv"]
    assert solved.thirds is not None
    scales = solved.thirds.scales
    assert np.mean(scales**2) == pytest.approx(1)
    divided = weight.double().numpy() / np.repeat(scales, 48)[:, None]
    np.testing.assert_allclose(solved.thirds.s, np.linalg.svd(divided, compute_uv=False), rtol=1e-6)
    values, own = matrix_metrics(solved, SETTINGS), spectrum_metrics(solved.s, (144, 48), 2, 1)
    noise = marchenko_pastur(solved.thirds.s, (144, 48))
    assert (values["mp_sigma"], values["mp_edge"], values["mp_outliers"], values["mp_ks"]) == noise
    parts = [values[f"mp_sigma_{part}"] for part in "qkv"]
    assert np.sqrt(np.mean(np.square(parts))) == pytest.approx(noise.sigma)
    of_noise = {key for key in values if key.startswith("mp_")}
    assert all(values[key] == own[key] for key in own.keys() - of_noise)  # all else is of the matrix itself


def test_a_large_matrix_has_its_scales_from_some_of_its_columns() -> None:
    weight = fused_noise((0.01, 0.02, 0.05), np.random.default_rng(6), 512)
    values = numbers_of({"attn.qkv": weight})["attn.qkv"]
    found = [values[f"mp_sigma_{part}"] for part in "qkv"]
    assert found == pytest.approx([0.01, 0.02, 0.05], rel=0.02)
    assert values["mp_outliers"] == 0


def test_thirds_of_one_scale_are_left_as_they_are() -> None:
    weight = fused_noise((0.02,) * 3, np.random.default_rng(7), 256)
    solved = solve_all(stack_by_shape({"attn.qkv": weight, "mlp.fc1": weight}, ["attn.qkv"]), SETTINGS)
    thirds = solved["attn.qkv"].thirds
    assert thirds is not None
    assert thirds.scales.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(thirds.s, solved["attn.qkv"].s)
    assert solved["mlp.fc1"].thirds is None
    fused, other = (matrix_metrics(one, SETTINGS) for one in solved.values())
    assert {key: fused[key] for key in other} == other


@pytest.mark.parametrize(
    ("name", "change"),
    [("attn.qkv", 0.0), ("attn.qkv", float("nan")), ("attn.qkv.q", 3.0), ("mlp.fc1", 3.0)],
    ids=["a third is zero", "not finite", "a third alone", "another matrix"],
)
def test_what_has_no_three_scales_is_fitted_as_it_is(name: str, change: float) -> None:
    weight = fused_noise((0.02,) * 3, np.random.default_rng(8))
    weight[:WIDTH] *= change
    solved = solve_all(stack_by_shape({name: weight}, fused([name])), SETTINGS, log=lambda line: None)[name]
    assert solved.thirds is None
    expected = spectrum_metrics(solved.s, (288, 96), 2, 1).keys()
    assert {key for key in matrix_metrics(solved, SETTINGS) if key.startswith("mp_")} == {
        key for key in expected if key.startswith("mp_")
    }


def test_the_spectrum_that_is_compared_with_noise_is_stored_beside_the_matrixs_own(tmp_path: Path) -> None:
    weights = {"attn.qkv": fused_noise((0.1, 0.2, 0.3), np.random.default_rng(9)), "head": torch.eye(5)}
    solved = solve_all(stack_by_shape(weights, fused(weights)), SETTINGS)
    SpectraStore(tmp_path, 1e9, {}).save(0, {f"spec_ema/{name}": one for name, one in solved.items()})
    (path,) = list_spectra(tmp_path)
    assert list(read_spectra(path).spectra) == ["spec_ema/attn.qkv", "spec_ema/head"]
    (stored,) = read_scaled(path).items()
    thirds = solved["attn.qkv"].thirds
    assert thirds is not None
    assert stored[0] == "spec_ema/attn.qkv"
    np.testing.assert_array_equal(stored[1], thirds.s)


@pytest.mark.parametrize("interval", [1, 3])
def test_first_values_alone_have_the_same_numbers_as_far_as_those_tell(interval: int) -> None:
    settings = SpectralSettings(topk=3, interval=interval)
    rng = np.random.default_rng(5)
    old, new = (torch.from_numpy(rng.standard_normal((40, 24))) for _ in range(2))
    p = reach(3, interval)
    found = solve({"old": old, "new": new}, p)
    recorded = recorded_indices(24, 3, interval)
    whole = {name: one.recorded(recorded) for name, one in found.items()}
    ends = {name: one.first_alone() for name, one in whole.items()}
    every, few = (matrix_metrics(of["new"], settings) for of in (whole, ends))
    assert few.pop("stable_rank") == pytest.approx(every["stable_rank"], rel=1e-12)
    assert few.pop("certificate_max") <= every["certificate_max"]
    assert few == {name: every[name] for name in few}
    assert {"sigma_max", "sv3", "gap_k", "block_gap", "certificate_index", "block_chance_u_min"} <= set(few)
    unknown = ("sv_last", "alpha", "mp_", "rank", "effective", "nuclear", "condition", "numerical", "gap_last")
    assert not [name for name in few if name.startswith(unknown)]

    norms = {"update_norm2_high": 0.1}
    before, now = (drift_metrics(of["old"], of["new"], norms, whole["old"]) for of in (whole, ends))
    assert now == {name: before[name] for name in before if "last" not in name}
    # A matrix whose next value is not known has no gap; its turn is bounded by what that value does not exceed.
    short = replace(ends["new"], s=np.where(np.arange(24) < p, ends["new"].s, np.nan))
    values = matrix_metrics(short, settings) | drift_metrics(whole["old"], short, norms, None)
    assert np.isnan([values[name] for name in ("gap_k", "block_gap", "turn_bound")]).all()
    values = drift_metrics(whole["old"], replace(short, beyond=1.01 * float(ends["new"].s[p])), norms, None)
    assert now["turn_bound"] < values["turn_bound"] < 1.5 * now["turn_bound"]
