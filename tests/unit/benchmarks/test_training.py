"""The figures that are taken from one run and its one step. No test asserts a time."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.__main__ import main
from benchmarks.harness import limits
from benchmarks.harness.measure import Result, Samples
from benchmarks.training import figures, kernels
from benchmarks.training.decoding import DecodingBeside
from benchmarks.training.end_to_end import _with_smaller
from benchmarks.training.figures import Options
from benchmarks.training.run import TrainingRun, attention_backend, kept_open, training_run
from lowrank_vit.common.errors import UserError
from tests.unit.common.test_streams import OneCurrent

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    """Of a run that is opened once."""
    return Options(
        count=12,
        model="test_vit",
        img_size=32,
        batch_size=4,
        steps=2,
        step_steps=10,
        device="cpu",
        loader="ffcv",
        workers=1,
        repeats=2,
        augment_batch=4,
        augment_batches=1,
        scratch=tmp_path_factory.mktemp("scratch"),
    )


@pytest.fixture(scope="module", autouse=True)
def _one_run():
    with kept_open():
        yield


@pytest.fixture(autouse=True)
def _products_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits._PRODUCT_SIDE, "cpu", 128)


def of(options: Options, figure: figures.Figure) -> Options:
    return Options(**{**vars(options), "figure": figure})


def test_steps_on_the_batch_that_stays_train_and_leave_the_run_where_it_is(options):
    with training_run(options) as training:
        setup, position = training.timed.trainer.setup, training.timed.trainer.state.position
        before, meter = [p.detach().clone() for p in setup.model.parameters()], setup.step.meter
        told: list[int] = []
        training.timed.held(3, told.append)
        assert told == [1, 2, 3]
        assert all(not torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))
        assert (position.num_updates, position.updates_done, setup.step.meter) == (0, 0, meter)
        assert not training.timed._timer._spans


def test_steps_on_the_batch_that_stays_go_where_the_runs_do(options, monkeypatch):
    """So they come before the spectra's, as in a run that watches them."""
    current, seen = OneCurrent(monkeypatch), list[object]()
    with training_run(options) as training:
        monkeypatch.setattr(training.timed.trainer, "stream", current.another())
        training.timed.held(2, lambda _: seen.append(current.stream))
        assert seen == [training.timed.trainer.stream] * 2


@pytest.mark.parametrize(
    ("figure", "cases", "ratios"),
    [
        (
            "step",
            {"ours_eager", "timm_eager", "product_limit"},
            {"eager_vs_timm_eager", "mfu_ours_eager", "mfu_timm_eager"},
        ),
        ("monitor", {"step", "step_with_monitor"}, {"with_monitor_vs_without"}),
        ("augment", {"full_recipe", "copy_limit", "step"}, {"full_recipe_share_of_limit", "full_recipe_vs_step"}),
    ],
)
def test_a_figure_has_its_cases_and_says_how_it_was_run(options, figure, cases, ratios):
    kept = []
    result = figures.run(of(options, figure), keep=kept.append)
    assert (set(result.cases), set(result.ratios)) == (cases, ratios)
    assert not result.failed
    assert result.extra["attention"] in ("flash_attention", "math")
    assert result.extra["loader"]["backend"] == "ffcv"
    assert {"hw_decoder_load", "workers"} <= set(result.extra["loader"])
    assert result.extra["workload"]["steps"] == 10
    half = kept.pop()  # after the first of two rounds
    assert {len(case.samples) for case in half.cases.values()} == {1}
    # Ours is there before timm's step is compiled.
    assert [list(one.cases) for one in kept] == ([["ours_eager"]] if figure == "step" else [])
    if figure == "monitor":
        assert len(result.extra["refreshes"]["skipped"]) == 3  # a block of each round


def test_figures_share_the_run_and_its_kernels_are_those_of_its_steps(options):
    with training_run(options) as first, training_run(of(options, "kernels")) as second:
        assert first is second
    with training_run(options) as training, pytest.MonkeyPatch.context() as patch:
        first = figures._timms(training, 10)
        patch.setattr(figures, "timm_case", lambda *_: pytest.fail("made and compiled once more"))
        result = figures.run(of(options, "kernels"))
        again = figures._timms(training, 5)
    assert (first.items, again.items) == (40, 20)
    tables = result.extra["kernels"]
    assert [table["steps"] for table in tables.values()] == [10, 10, 2]
    for table in tables.values():
        assert len(table["rows"]) == kernels.MOST_ROWS
        assert all(row["share"] == pytest.approx(row["ms"] / table["step_ms"]) for row in table["rows"])
        assert table["ms"] >= sum(row["ms"] for row in table["rows"]) > 0
        assert any(row["name"] == "aten::addmm" for row in table["rows"])


def test_what_is_prepared_before_is_what_the_run_takes(options, tmp_path):
    """The set stays, links and all, and beside it what is measured of it."""
    there = Options(**{**vars(options), "scratch": tmp_path})
    assert figures.run(of(there, "prepare")).cases == {}
    (folder,) = (file.parent for file in tmp_path.glob("*/val.beton"))
    (folder / "train.beton.speed.json").write_text("{}")
    run = TrainingRun(there)
    try:
        assert run.config.data.data_dir == folder
        assert (folder / "train.beton.speed.json").exists()
        assert len(list(folder.glob("train*.beton"))) == run.times > 1
    finally:
        run.close()


def test_a_run_stays_open_between_figures(options):
    with training_run(options) as kept:
        folder = kept.timed.trainer.run_dir.path
    assert folder.exists()


def test_what_the_decoder_gives_beside_the_step_is_measured_from_batch_to_batch(options):
    with training_run(options) as training:
        beside = DecodingBeside(training)
        case = beside.case()
        for _ in range(2):
            case.before()
            case.run()
            case.after()
            assert beside._last > beside._first + training.load.steps - 1
            times = beside._times[beside._first : beside._last + 1]
            speed = training.load.batch_size * (len(times) - 1) / (times[-1] - times[0])
            assert case.sample(1e9) == pytest.approx(speed)
        count = len(beside._times)
        beside.close()
        assert len(beside._times) == count


def test_a_decoder_that_fails_beside_the_step_is_told(options, monkeypatch):
    with training_run(options) as training:
        beside = DecodingBeside(training)
        case = beside.case()
        monkeypatch.setattr("lowrank_vit.data.loader.Loader.batches", lambda *_: (1 / 0 for _ in range(3)))
        case.before()
        case.run()
        with pytest.raises(ZeroDivisionError):
            case.after()
        beside.close()


def test_training_is_held_against_the_smaller_of_step_and_decoder():
    cases = {"end_to_end": (9.0, 8.0), "synthetic": (10.0, 20.0), "decoder_beside_step": (12.0, 10.0)}
    result = Result("end-to-end", {}, {name: Samples(samples) for name, samples in cases.items()}, {})
    assert _with_smaller(result).ratios["end_to_end_vs_smaller"].samples == pytest.approx((0.9, 0.8))
    assert not _with_smaller(Result("end-to-end", {}, {}, {})).ratios


def test_a_run_is_measured_without_its_spectra_where_that_is_asked_for(options):
    unwatched = Options(**{**vars(options), "figure": "end-to-end", "spec_monitor": False})
    result = figures.run(unwatched)
    assert not result.failed
    assert "--no-spec-monitor" in result.cases["end_to_end"].setting
    assert result.extra["refreshes"]["by_round"] == [0, 0]
    assert not any("efresh" in line for line in result.limits)


def test_a_run_whose_loop_has_failed_is_not_kept(options, monkeypatch):
    of_two = Options(**{**vars(options), "batch_size": 2})
    with training_run(of_two) as failed, monkeypatch.context() as patch:
        patch.setattr(type(failed.timed.trainer.setup.step), "__call__", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):  # which a bench notes, and goes on
            failed.timed.before()
    assert not failed.timed.trainer.run_dir.path.exists()
    with training_run(of_two) as another:
        assert another is not failed
        assert not another.timed.is_over


def out_of_memory(*_: object, **__: object) -> None:
    raise RuntimeError("CUDA out of memory")


def test_the_command_writes_its_figures_after_each_round(options, tmp_path):
    path = tmp_path / "out.json"
    flags = "--model test_vit --img-size 32 -b 4 --steps 2 --step-steps 10 --device cpu --loader ffcv --workers 1"
    flags += f" --count 12 --repeats 2 --scratch {options.scratch} --json {path} --figure step"
    main(["training", *flags.split()])
    assert json.loads(path.read_text())["workload"]["model"] == "test_vit"
    with pytest.raises(UserError, match="--repeats is 0"):
        figures.run(Options(device="cpu", repeats=0))


def event(name: str, us: float, device: DeviceType = DeviceType.CUDA, is_annotation: bool = False) -> SimpleNamespace:
    of_host = us if device == DeviceType.CPU else 0
    return SimpleNamespace(
        name=name,
        device_type=device,
        is_user_annotation=is_annotation,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
        self_cpu_time_total=of_host,
    )


def test_the_kernels_of_a_device_are_summed_without_what_holds_them():
    events = [event("gemm", 300.0), event("gemm", 100.0), event("copy", 100.0)]
    events += [event("## Call CompiledFxGraph ##", 500.0, is_annotation=True), event("aten::mm", 700.0, DeviceType.CPU)]
    table = kernels.table_of(kernels.of_kernels(events), 2, 0.5)
    assert (table["ms"], table["steps"], table["others"]) == (0.25, 2, 0)
    assert table["rows"] == [
        {"name": "gemm", "ms": 0.2, "runs": 1.0, "share": 0.4},
        {"name": "copy", "ms": 0.05, "runs": 0.5, "share": 0.1},
    ]
    assert kernels.of_operators(events) == [("aten::mm", 700.0)]
    many = kernels.table_of([(str(n), 1.0) for n in range(40)], 1, 1.0)
    assert (len(many["rows"]), many["others"]) == (30, 10)
    assert kernels.table_of([], 1, 1.0)["rows"] == []


def test_a_model_without_blocks_has_no_known_attention():
    assert attention_backend(torch.nn.Linear(2, 2), 4, torch.float32, CPU) == "unknown"
