"""One refresh in so many computes the whole spectra, the others their first values alone: which, and what they say."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_vit.model.low_rank import LowRankLinear
from lowrank_vit.spectral.layers import matrices_of, ranks_of_factors
from lowrank_vit.spectral.select import Target
from lowrank_vit.spectral.solving.ends import GUARD, solve_ends
from lowrank_vit.spectral.solving.extremes import Solved, Solver
from lowrank_vit.spectral.solving.solve import MatrixStack
from lowrank_vit.spectral.watching import refresh, worker
from lowrank_vit.spectral.watching.files import read_spectra, read_vectors
from lowrank_vit.spectral.watching.refresh import SpectralSettings
from lowrank_vit.spectral.watching.schedule import FULL_EVERY, FULL_EVERY_ON_CUDA, Schedule, usual_full_every
from lowrank_vit.spectral.watching.store import kept_name
from lowrank_vit.spectral.watching.stored import open_spectra
from tests.device_path import CudaPath
from tests.monitors import comparable, nudge, watch

SETTINGS = SpectralSettings(topk=3, interval=2, full_every=3)
OF_WHOLE = "_last alpha mp_ rank9 effective_rank nuclear_norm condition numerical_rank".split()


def model_of(seed: int = 0) -> nn.Module:
    """Wide enough for the first values to be found alone."""
    torch.manual_seed(seed)
    return nn.ModuleDict({"qkv": nn.Linear(64, 192), "fc": nn.Linear(128, 64)})


def run(folder: Path, updates: range, model: nn.Module, ema: nn.Module | None = None, **more: Any) -> dict[int, Any]:
    """The records of a monitor at each second of these updates, before which the weights have moved a little."""
    records: dict[int, Any] = {}
    options: dict[str, Any] = {"targets": "qkv,fc", "settings": SETTINGS} | more
    with watch(model, folder, ema, **options) as monitor:
        for update in updates:
            if update:
                nudge(model, update, 1e-3)
            monitor.observe(update)
            monitor.wait()
    for record in monitor.records():
        records[record.update] = comparable(record.values)
    assert monitor.failed == 0
    return records


def is_of_whole(key: str) -> bool:
    return any(part in key.rpartition("/")[2] for part in OF_WHOLE)


def of_itself(metric: str) -> bool:
    """Whether a number of a whole refresh depends on that refresh alone, or on the first one."""
    return not metric.startswith(("cos_", "delta", "block_cos_", "turn", "block_energy", "update_"))


@pytest.mark.parametrize("observed", [range(13), [0, 2, 3, 4, 5, 7, 11]])
def test_whole_are_the_first_multiples_or_the_next_one_taken_and_the_last(observed: range | list[int]) -> None:
    schedule = Schedule(1, 3, last_update=11)
    full = [update for update in observed if schedule.take(update)]
    assert full == ([0, 3, 6, 9, 11, 12] if isinstance(observed, range) else [0, 3, 7, 11])


def test_a_run_that_goes_on_at_any_update_chooses_the_same() -> None:
    whole = Schedule(10, 4, last_update=205)
    expected = {update: whole.take(update) for update in range(0, 206, 10)}
    assert [update for update, full in expected.items() if full] == [0, 40, 80, 120, 160, 200]
    for begin in range(10, 200, 10):
        resumed = Schedule(10, 4, last_update=205, taken=begin - 10)
        assert {update: resumed.take(update) for update in range(begin, 206, 10)}.items() <= expected.items()


def test_the_usual_number_depends_on_the_device_and_is_one_where_nothing_is_saved(on_cuda_path: CudaPath) -> None:
    cpu = torch.device("cpu")
    large, small = (4, 2 * (4 + GUARD)), (100, 2 * (4 + GUARD) - 1)
    assert usual_full_every(cpu, "gram64", 4, [small, (400, 2 * (4 + GUARD))]) == FULL_EVERY == 2
    assert usual_full_every(torch.device("mps"), "gram64", 4, [(768, 768)]) == FULL_EVERY
    assert usual_full_every(cpu, "svd", 4, [(768, 768)]) == 1
    with on_cuda_path():
        assert usual_full_every(cpu, "gram64", 4, [(768, 768)]) == FULL_EVERY_ON_CUDA == 40
        assert usual_full_every(cpu, "gram64", 4, [small, large]) == 1


@pytest.mark.parametrize(("rank", "share"), [(5, 0.5), (6, 0.0)])
def test_of_a_layer_in_few_factors_all_is_computed_at_once_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, share: float
) -> None:
    """Behind a block of five values a product of rank five has nothing that could be told from them, and six one."""
    tried: set[str] = set()

    def noted(stack: MatrixStack, before: dict[str, np.ndarray], *args: Any, **more: Any) -> dict[str, Solved | None]:
        tried.update(before)
        return solve_ends(stack, before, *args, **more)

    monkeypatch.setattr(refresh, "solve_ends", noted)
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"qkv": LowRankLinear(torch.randn(192, rank), torch.randn(rank, 64)), "fc": nn.Linear(128, 64)}
    )
    lines: list[str] = []
    found = run(tmp_path, range(0, 9, 2), model, say=lines.append)
    assert ("qkv" in tried, "fc" in tried) == (share == 0.0, True)
    assert not lines
    assert [values["spec/refresh/full_share"] for values in found.values()] == [1.0, share, share, 1.0, share]
    assert all(values["spec/refresh/fallbacks"] == 0 for values in found.values())


@pytest.mark.parametrize("is_aside", [False, True])
@pytest.mark.parametrize(("rank", "share"), [(1, 1.0), (5, 1.0), (6, 0.0)])
def test_a_layer_that_goes_in_factors_between_two_refreshes_is_solved_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, share: float, is_aside: bool
) -> None:
    """The next refresh of the first values has the start of the whole matrix, of which few values are left."""
    monkeypatch.setattr(worker, "Aside", Through)
    monkeypatch.setattr("lowrank_vit.spectral.watching.monitor.Worker", partial(of_way, is_aside))
    model, lines = model_of(), list[str]()
    monkeypatch.setattr(worker.LOG, "log", lambda level, form, *args: lines.append(form % args))
    with watch(model, tmp_path, model, targets="qkv,fc", settings=SETTINGS) as monitor:
        for update in range(0, 5, 2):
            monitor.observe(update)
            monitor.wait()
            if update:
                continue
            for name in ("qkv", "fc"):
                weight = model.get_parameter(f"{name}.weight").detach().double()
                u, s, v = torch.linalg.svd(weight, full_matrices=False)
                model.set_submodule(name, LowRankLinear(u[:, :rank] * s[:rank], v[:rank]))
    records = {record.update: record.values for record in monitor.records()}
    assert not lines
    assert [records[update]["spec/refresh/full_share"] for update in records] == [1.0, share, share]
    for key in ("spec/qkv/sv1", "spec_ema/fc/sv1"):
        assert records[2][key] == pytest.approx(records[0][key], rel=1e-6)


def test_the_rank_of_each_matrix_of_a_layer_in_factors_is_that_of_its_parts() -> None:
    layer = LowRankLinear(torch.randn(192, 2), torch.randn(6, 64))
    model = nn.ModuleDict({"qkv": layer, "fc": nn.Linear(128, 64)})
    thirds = {"qkv.k": Target("qkv", 1), "qkv": Target("qkv", is_fused=True), "fc": Target("fc")}
    ranks = ranks_of_factors(model, thirds)
    assert ranks == {"qkv.k": 2, "qkv": 6}
    matrices = matrices_of(model, thirds)
    assert {name: int(torch.linalg.matrix_rank(matrices[name])) for name in ranks} == ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any], dict[int, Any]]:
    """A folder, and what is recorded with one whole refresh in three, stored in it, and with whole ones alone."""
    folder = tmp_path_factory.mktemp("runs")
    mixed = run(folder / "mixed", range(0, 15, 2), model_of(), model_of(1), last_update=15)
    whole = run(folder / "whole", range(0, 15, 2), model_of(), model_of(1), settings=replace(SETTINGS, full_every=1))
    return folder, mixed, whole


def test_a_refresh_of_the_first_values_says_what_they_tell_and_a_whole_one_has_the_bits_of_whole_ones_alone(
    runs: tuple[Path, dict[int, Any], dict[int, Any]],
) -> None:
    _, mixed, whole = runs
    full = [update for update, values in mixed.items() if values["spec/refresh/full"]]
    assert full == [0, 6, 12, 14]
    for update, values in mixed.items():
        expected = whole[update]
        alike = {key for key in expected if update in full or not is_of_whole(key)} - {"spec/refresh/since_full"}
        assert {key for key in values if key != "spec/refresh/since_full"} == alike
        assert values["spec/refresh/full_share"] == (update in full)  # no matrix fell back
        assert values.get("spec/refresh/since_full") == {6: 6, 12: 6, 14: 2}.get(update)
        assert values.get("spec/refresh/since") == (2 if update else None)
        for key in alike:
            metric = key.rpartition("/")[2]
            if update in full and of_itself(metric) and "full" not in metric:
                assert values[key] == expected[key], key
            elif metric not in ("full", "full_share", "orthogonality", "certificate_max"):
                is_of_another_time = metric.startswith("cos_") and "_last" in metric
                assert is_of_another_time or values[key] == pytest.approx(expected[key], rel=1e-8, abs=1e-9), key
        if update not in full:
            assert values["spec/qkv/certificate_index"] == 1.0
            assert 0 < values["spec/qkv/certificate_max"] <= 1e-12


def test_the_last_values_are_compared_with_those_of_the_whole_refresh_before(tmp_path: Path) -> None:
    mixed = run(tmp_path, range(0, 7, 2), model_of())
    assert mixed[6]["spec/refresh/since_full"] == 6
    found = open_spectra(tmp_path)
    before, now = (found.vectors("fc", update)[1] for update in (0, 6))
    cosines = np.linalg.svd(before.u.T @ now.u, compute_uv=False)
    assert [mixed[6][f"spec/fc/cos_u_last{i}"] for i in (1, 2, 3)] == pytest.approx(cosines.tolist(), abs=1e-12)
    old, new = (found.vectors("fc", update)[0].s for update in (4, 6))
    assert mixed[6]["spec/fc/delta_sv_rel"] == pytest.approx(np.mean(np.abs(new / old - 1)), rel=1e-9)


def test_what_is_stored_of_the_first_values_is_certified_as_whole_ones_are(
    runs: tuple[Path, dict[int, Any], dict[int, Any]],
) -> None:
    folder, _, _ = runs
    for update in range(0, 15, 2):
        mixed, whole = (read_spectra(folder / name / f"update_{update:08d}.npz") for name in ("mixed", "whole"))
        assert mixed.full == (update in (0, 6, 12, 14))
        ends, expected = (read_vectors(folder / name / f"vectors_{update:08d}.npz") for name in ("mixed", "whole"))
        for key, s in mixed.spectra.items():
            known = np.isfinite(s)
            assert known.sum() == (s.size if mixed.full else 6)  # the block of five and the next
            top, last = ends.ends[key]
            assert last.s.size == (3 if mixed.full else 0)
            assert (np.abs(top.s - expected.ends[key][0].s) <= top.certificate).all()
            if mixed.full:
                np.testing.assert_array_equal(s, whole.spectra[key])
                np.testing.assert_array_equal(last.u, expected.ends[key][1].u)
            else:
                np.testing.assert_allclose(s[known], whole.spectra[key][known], rtol=1e-9)


@pytest.mark.parametrize("last_done", [4, 6, 8])
def test_a_run_that_goes_on_chooses_the_same_refreshes_and_finds_the_same_numbers(
    runs: tuple[Path, dict[int, Any], dict[int, Any]], tmp_path: Path, last_done: int
) -> None:
    _, expected, _ = runs
    ema = model_of(1)
    model = cut_off(tmp_path, last_done, ema)
    more = {"resumed_update": last_done, "recorded_update": last_done, "last_update": 15}
    found = run(tmp_path, range(last_done + 2, 15, 2), model, ema, **more)
    assert list(found) == list(range(last_done + 2, 15, 2))
    for update, values in found.items():
        assert list(values) == list(expected[update])
        for key, value in values.items():
            if values["spec/refresh/full"] and of_itself(key.rpartition("/")[2]):
                assert value == expected[update][key], key
            elif not key.endswith(("certificate_max", "orthogonality")):
                assert value == pytest.approx(expected[update][key], rel=1e-8, abs=1e-9), key


def test_what_is_not_proven_is_taken_from_the_whole_spectrum_says_the_same_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "a", range(0, 5, 2), model_of(), model_of(1))

    def unproven(stack: MatrixStack, *args: Any, **more: Any) -> dict[str, Solved | None]:
        return solve_ends(stack, *args, **more) | ({"qkv": None} if "qkv" in stack.names else {})

    monkeypatch.setattr(refresh, "solve_ends", unproven)
    found = run(tmp_path / "b", range(0, 5, 2), model_of(), model_of(1))
    assert [values["spec/refresh/full_share"] for values in found.values()] == [1.0, 0.5, 0.5]
    assert [values["spec/refresh/full"] for values in found.values()] == [1.0, 0.0, 0.0]
    for update in (2, 4):
        assert list(found[update]) == list(expected[update])
        for key, value in found[update].items():
            if not key.endswith(("full_share", "certificate_max", "orthogonality")):
                assert value == pytest.approx(expected[update][key], rel=1e-8, abs=1e-9), key


@pytest.mark.parametrize("is_on_gpus_way", [False, True], ids=["cpu", "a GPU's way"])
def test_what_was_sought_in_vain_is_said_once_and_sought_again_behind_the_next_whole_refresh(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_cuda_path: CudaPath,
    is_on_gpus_way: bool,
) -> None:
    """In a GPU's stacks, where a try costs little, at each refresh."""
    tried: list[set[str]] = []

    def failing(stack: MatrixStack, before: dict[str, np.ndarray], *args: Any, **more: Any) -> dict[str, Solved | None]:
        if "qkv" not in stack.names:
            return solve_ends(stack, before, *args, **more)
        tried.append(set(before) & {"qkv"})
        return solve_ends(stack, {name: start * np.nan for name, start in before.items()}, *args, **more)

    monkeypatch.setattr(refresh, "solve_ends", failing)
    with on_cuda_path() if is_on_gpus_way else nullcontext():
        found = run(tmp_path, range(0, 13, 2), model_of(), settings=replace(SETTINGS, full_every=4))
    again = {"qkv"} if is_on_gpus_way else set[str]()
    assert tried == [{"qkv"}, again, again, {"qkv"}, again]  # updates 2, 4, 6, 10, 12
    assert [values["spec/refresh/full_share"] for values in found.values()] == [1.0, 0.5, 0.5, 0.5, 1.0, 0.5, 0.5]
    (line,) = (line for line in caplog.messages if "qkv" in line)
    assert line.startswith("spec: spectra of qkv: ")
    assert line.endswith("; the whole spectrum is computed")


@pytest.mark.parametrize("solver", ["gram64", "svd"])
def test_bad_and_small_matrices_have_the_keys_of_others(tmp_path: Path, solver: Solver) -> None:
    """One row, all zeros, a NaN in the average alone: every refresh says the same of each as of any matrix."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"qkv": nn.Linear(64, 192), "row": nn.Linear(64, 1), "zero": nn.Linear(64, 64)})
    nn.init.zeros_(model["zero"].weight)  # pyright: ignore[reportArgumentType]
    ema = deepcopy(model)
    nn.init.constant_(ema["qkv"].weight[3], float("nan"))  # pyright: ignore[reportArgumentType, reportIndexIssue]
    settings = replace(SETTINGS, solver=solver)
    with watch(model, tmp_path, ema, targets="qkv,row,zero", settings=settings) as monitor:
        for update in range(0, 9, 2):
            with torch.no_grad():
                model["qkv"].weight.mul_(1.001)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            monitor.observe(update)
            monitor.wait()
    assert monitor.failed == 0
    first, second, third, fourth, fifth = (record.values for record in monitor.records())
    assert list(second) == list(third) == list(fifth)
    assert {key for key in fourth if not is_of_whole(key)} - {"spec/refresh/since_full"} == set(second)
    assert {key for key in second if "row" in key} <= {key for key in first if "row" in key} | {
        key for key in fourth if "row" in key
    }
    assert second["spec/zero/stable_rank"] == second["spec/zero/sv1"] == 0.0
    assert second["spec/row/stable_rank"] == pytest.approx(1.0)
    assert np.isnan([second[f"spec_ema/qkv/{metric}"] for metric in ("sv1", "stable_rank", "certificate_index")]).all()
    assert np.isfinite(second["spec/qkv/sv1"])
    # Of five matrices and an infinite one, that of 64 x 192 is large enough and neither zero nor bad.
    assert second["spec/refresh/full_share"] == (1.0 if solver == "svd" else 5 / 6)


class Through:
    """Calls what a process aside would, here, with what would come through to it and back."""

    def call(self, function: Callable[..., Any], *args: Any, hear: Callable[[Any], object] | None = None) -> Any:
        first = () if hear is None else (hear,)
        return pickle.loads(pickle.dumps(function(*first, *pickle.loads(pickle.dumps(args)))))

    def close(self) -> None:
        """Nothing is left."""


def cut_off(folder: Path, last_done: int, ema: nn.Module | None = None, **more: Any) -> nn.Module:
    """The model of a run that was watched up to an update, of which the weights are kept."""
    model = model_of()
    with watch(model, folder, ema, **({"targets": "qkv,fc", "settings": SETTINGS} | more)) as monitor:
        for update in range(0, last_done + 1, 2):
            nudge(model, update, 1e-3 if update else 0.0)
            monitor.observe(update)
            monitor.wait()
    kept = monitor.kept()
    assert kept is not None
    torch.save(kept.content(), folder / kept_name(last_done))
    return model


def of_way(aside: bool, *args: Any, is_aside: bool, **more: Any) -> worker.Worker:
    """A worker that computes aside, or here, whatever device the weights are on."""
    return worker.Worker(*args, is_aside=aside, **more)


def test_a_whole_refresh_of_which_only_the_weights_are_left_is_compared_with_also_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[int, Any]] = []
    for way in ("here", "aside"):
        model = cut_off(tmp_path / way, 6)
        for path in (tmp_path / way).glob("*_00000006.npz"):  # thinned out
            path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(worker, "Aside", Through)
            patch.setattr("lowrank_vit.spectral.watching.monitor.Worker", partial(of_way, way == "aside"))
            more: dict[str, Any] = {"resumed_update": 6, "recorded_update": 6}
            found.append(run(tmp_path / way, range(8, 13, 2), model, **more))
    assert found[0] == found[1]
    assert [values["spec/refresh/full"] for values in found[0].values()] == [0.0, 0.0, 1.0]
    assert found[0][12]["spec/refresh/since_full"] == 6
    assert 0 < found[0][12]["spec/qkv/delta_sv_rel"] < 0.01


@pytest.mark.parametrize("last_done", [4, 6])
def test_vectors_of_another_interval_are_not_compared_with_though_as_many(tmp_path: Path, last_done: int) -> None:
    """Indices 1, 2, 3 before, and 1, 3, 5 now."""
    model = cut_off(tmp_path, last_done, settings=replace(SETTINGS, interval=1))
    more: dict[str, Any] = {"resumed_update": last_done, "recorded_update": last_done}
    found = run(tmp_path, range(last_done + 2, last_done + 5, 2), model, **more)
    for update, values in found.items():
        assert values["spec/refresh/full"] == (update == 6)
        assert values["spec/fc/cos_u_mean"] > 0.99  # the weights were kept, too
        assert values.get("spec/fc/cos0_u_mean", 1.0) > 0.99


def test_ranks_that_know_of_different_refreshes_before_take_a_whole_one(tmp_path: Path) -> None:
    model = cut_off(tmp_path, 2)

    class Other:
        """The first of two ranks; the other has `last` for the refresh that was taken last."""

        rank, size = 0, 2

        def __init__(self, last: int) -> None:
            self.last, self.asked = last, 0

        def agree(self, number: int) -> Callable[[], int]:
            self.asked += 1  # twice for what is done again, twice for what was taken last
            greatest = max(number, {3: self.last, 4: -self.last}.get(self.asked, number))
            return lambda: greatest

        def gather(self, part: Any, *, of: int | None = None) -> list[Any]:
            return [part]

    for last, full in ((2, False), (-1, True)):
        with watch(
            model, tmp_path, targets="qkv,fc", settings=SETTINGS, ranks=Other(last), resumed_update=2, recorded_update=2
        ) as watching:
            assert watching._schedule.take(4) == full
