"""The bench `all`: what is to be reached, held against results, and one table. No test asserts a time."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import all_benches
from benchmarks.__main__ import main
from benchmarks.all_benches import Options
from benchmarks.harness.aims import AIMS, Aim, aims_chart, judge
from benchmarks.harness.measure import Result, Samples
from benchmarks.selection import BUDGET_MINUTES, CPU, CUDA, SELECTIONS
from benchmarks.training import figures
from benchmarks.training import run as training_run
from lowrank_vit.common.errors import UserError

SHORT = {name: entry for name, entry in CPU.items() if entry.is_short}


def result_of(bench: str, factor: float, device: str = "cpu") -> Result:
    """A result with every figure that has an aim on the device, `factor` times what it has to be."""
    aims = [aim for aim in AIMS if aim.bench == bench and aim.is_for(device)]
    ratios = {a.name: Samples((a.goal / factor if a.is_less_better else a.goal * factor,) * 5) for a in aims}
    cases = {
        "case": Samples((1.0,) * 5, "img/s", "our setting"),
        "peer": Samples((1.0,) * 5, "img/s", f"how the peer of {bench} is set, in more words than a line has"),
    }
    known = {"device": device, "cpu_cores": 2, "commit": "0123456789ab"}
    return Result(bench, known, cases, ratios, peers=frozenset({"peer"}))


Started = list[tuple[Sequence[str], float]]


def writer(
    factor: float, started: Started | None = None, broken: dict[str, Callable[[Path], object]] | None = None
) -> all_benches.Start:
    """Writes the results that a bench would; `broken` has what some benches do instead."""

    def start(arguments: Sequence[str], path: Path, limit_s: float) -> None:
        if started is not None:
            started.append((arguments, limit_s))
        if arguments[0] in (broken or {}):
            (broken or {})[arguments[0]](path)
        else:
            path.write_text(result_of(path.stem, factor).to_json())

    return start


def fail(error: BaseException) -> Callable[[Path], object]:
    def raising(_path: Path) -> None:
        raise error

    return raising


def printed(result: Result) -> str:
    file = io.StringIO()
    all_benches.print_summary(result, Console(file=file, width=80))
    return file.getvalue()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("factor", "reached"), [(1.0, True), (1.5, True), (0.99, False)])
def test_every_aim_is_judged_by_its_median(factor, reached, device):
    verdicts = judge({name: result_of(name, factor, device).to_dict() for name in SELECTIONS[device]}, device)
    assert [verdict.aim for verdict in verdicts] == [aim for aim in AIMS if aim.is_for(device)]
    assert {verdict.is_reached for verdict in verdicts} == {reached}
    assert any(verdict.aim.device == "cuda" for verdict in verdicts) == (device == "cuda")


def test_the_aims_on_a_gpu_are_those_asked_for():
    found = {(aim.bench, aim.name): aim.goal for aim in AIMS if aim.is_for("cuda")}
    assert len(found) == sum(aim.is_for("cuda") for aim in AIMS)  # none twice
    for model in ("", "-base"):
        assert found[f"step{model}", "compiled_vs_timm_compiled"] == 1.1
    assert found["end-to-end", "end_to_end_vs_smaller"] == 0.97
    assert found["end-to-end-base", "end_to_end_vs_synthetic"] == 0.97
    assert found["monitor", "with_monitor_vs_without"] == 0.99
    assert found["loader", "dali_gpu"] == 12_000
    assert found["loader", "dali_gpu_400px"] == 19_000
    assert found["loader", "interpolated_vs_repeated_colours"] == 0.95
    assert found["loader", "resident_256px"] == 100_000
    assert found["loader", "resident"] == 60_000
    assert found["augment", "full_recipe"] == 500_000
    assert found["augment", "full_recipe_vs_step"] == 50  # 2 %
    assert found["spectral", "gram64_vs_inline_svd"] == 50


def test_what_is_missing_is_not_taken_for_reached():
    aim = Aim("loader", "no_such_ratio", 1.0, "")
    assert judge({"loader": result_of("loader", 1.0).to_dict()}, "cpu", [aim])[0].is_reached is None
    # A bench that failed has not even an environment that tells its device.
    assert [one.median for one in judge({"end-to-end-base": {}}, "cuda")] == [None, None]


def test_aims_stand_in_the_documentation():
    folder = Path(__file__).parents[3] / "docs/benchmarks"
    lines = [line for name in ("README.md", "growth.md") for line in (folder / name).read_text().splitlines()]
    for aim in AIMS:
        if aim.device != "cuda" and aim.name != "plan":
            row = next(line for line in lines if line.startswith(f"| `{aim.name}`"))
            assert math.isclose(float(row.rstrip("| ").rpartition("|")[2]), aim.goal), row


def test_a_rehearsal_on_a_cpu_has_time_to_compile():
    started: Started = []
    options = Options(tiny=True, only=("end-to-end",), device="cpu", budget=30)
    all_benches.run(options, start=writer(1.1, started), clock=lambda: 0.0)
    assert [limit_s for _, limit_s in started] == [4 * CUDA["end-to-end"].limit_s]


def test_all_runs_every_bench_in_its_short_form_and_joins_them():
    started: Started = []
    options = Options(short=True, device="cpu", repeats=1)
    result = all_benches.run(options, start=writer(1.1, started), clock=lambda: 0.0)
    assert [arguments[0] for arguments, _ in started] == list(SHORT)
    for (arguments, limit_s), entry in zip(started, SHORT.values(), strict=True):
        device = ["--device", "cpu"] if entry.has_device else []
        assert list(arguments[1:]) == [*entry.flags, *entry.short, *device, "--repeats", "1"]
        assert limit_s == min(entry.limit_s, 15 * 60)
    data = json.loads(result.to_json())
    assert data["ratios"]["loader/best_vs_timm"]["median"] == pytest.approx(2.2)
    assert {one["reached"] for one in data["aims"]} == {True}
    assert set(data["benches"]) == set(SHORT)
    assert data["settings"]["step/peer"].startswith("how the peer of step")
    assert not result.is_broken
    text = printed(result)
    assert " NO" not in text
    assert "how the peer of loader is set" in " ".join(text.split())
    assert "our setting" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_gpu_gets_both_models_under_names_of_their_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda _device: None)
    started: Started = []
    result = all_benches.run(Options(short=True), start=writer(1.0, started))
    wanted = list(result.extra["wanted"])
    assert wanted == [name for name, entry in CUDA.items() if entry.is_short and not entry.is_profile]
    models = {
        name: arguments[arguments.index("--model") + 1]
        for name, (arguments, _) in zip(wanted, started, strict=True)
        if arguments[0] == "training"
    }
    assert models["end-to-end"] == "vit_small_patch16_224"
    assert models["end-to-end-base"] == "vit_base_patch16_224"
    assert {"end-to-end/case", "end-to-end-base/case"} <= set(result.cases)


def test_kernels_are_profiled_last_and_only_where_that_is_asked_for():
    plain, profiled = (list(Options(short=True, profile=profile).entries("cuda")) for profile in (False, True))
    assert profiled == [*plain, "kernels", "kernels-base"]


def test_the_figures_of_a_model_share_its_run():
    """The flags that make the run are the same, so the step is compiled once."""
    found: list[figures.Options] = []
    nothing = Result("x", {}, {}, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "run", lambda options, **_: (found.append(options), nothing)[1])
        for entry in CUDA.values():
            if entry.bench == "training" and entry.is_short:
                assert entry.shares
                main([entry.bench, *Options(short=True).flags(entry, "cpu")])
    runs = {training_run.key_of(options) for options in found}
    assert {options.model for options in runs} == {"vit_small_patch16_224", "vit_base_patch16_224"}
    assert len(runs) == 2 < len(found)


BROKEN = {
    "ended": (fail(UserError("ended with code 2: error: no such file.")), "ended with code 2: error: no such file."),
    "no program": (fail(OSError(8, "Exec format error")), "OSError: [Errno 8] Exec format error"),
    "no file": (lambda _path: None, "it ended without writing its JSON."),
    "half a file": (lambda path: path.write_text('{"bench": "loader", "ca'), "JSONDecodeError"),
    "no cases": (lambda path: path.write_text('{"environment": {}}'), "its JSON is not that of a bench"),
    "no samples": (
        lambda path: path.write_text(
            '{"environment": {}, "ratios": {}, "cases": {"a": {"median": null, "samples": []}}}'
        ),
        "its JSON is not that of a bench",
    ),
    "a list": (lambda path: path.write_text("[]"), "its JSON is not that of a bench"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_bench_that_fails_does_not_hide_the_others(how):
    breaking, reason = BROKEN[how]
    heard: list[str] = []
    start = writer(0.5, broken={"loader": breaking})
    result = all_benches.run(Options(device="cpu"), note=heard.append, start=start)
    assert list(result.failed) == ["loader"]
    assert reason in result.failed["loader"]
    assert result.is_broken
    assert set(result.extra["benches"]) == set(CPU) - {"loader"}
    text = " ".join(printed(result).split())
    assert "not run" in text
    assert " NO" in text
    assert f"loader failed: {reason}" in text


def test_what_a_bench_wrote_before_it_ended_with_an_error_counts():
    """Its exit code tells that a case of ours failed; the other cases are in its JSON."""
    broken = result_of("step", 1.0).to_dict() | {"failed": {"ours": "RuntimeError: x", "peer": "ImportError: y"}}

    def half(path: Path) -> None:
        path.write_text(json.dumps(broken))
        raise UserError("ended with code 1.")

    result = all_benches.run(Options(device="cpu"), start=writer(1.0, broken={"step": half}))
    assert "step/case" in result.cases
    assert result.failed == {
        "step": "ended with code 1.", "step/ours": "RuntimeError: x", "step/peer": "ImportError: y"
    }  # fmt: skip
    only_peer = json.dumps(broken | {"failed": {"peer": "ImportError: y"}})
    result = all_benches.run(
        Options(device="cpu"), start=writer(1.0, broken={"step": lambda path: path.write_text(only_peer)})
    )
    assert result.failed == {"step/peer": "ImportError: y"}
    assert not result.is_broken


def test_nothing_measured_is_no_machine_of_no_cores():
    start = writer(1.0, broken={name: fail(UserError("no.")) for name in CPU})
    text = printed(all_benches.run(Options(device="cpu"), start=start))
    assert "None" not in text
    assert "not run" in text


def test_each_bench_is_saved_when_it_is_done(tmp_path, monkeypatch):
    start = writer(1.0, broken={"augment": fail(KeyboardInterrupt())})
    monkeypatch.setattr(all_benches, "start_bench", start)
    path = tmp_path / "all.json"
    with pytest.raises(SystemExit) as stop:
        main(["all", "--device", "cpu", "--json", str(path)])
    assert stop.value.code == 130
    data = json.loads(path.read_text())
    assert list(data["benches"]) == ["prep", "loader"]
    assert [one.name for one in tmp_path.iterdir()] == ["all.json"]
    assert {one["reached"] for one in data["aims"] if one["bench"] == "spectral"} == {None}


def test_what_comes_too_late_for_the_budget_is_said():
    now = iter(range(0, 100_000, 50))  # every look at the clock is 50 s later
    started: Started = []
    options = Options(short=True, device="cpu", budget=5)
    result = all_benches.run(options, start=writer(1.0, started), clock=lambda: float(next(now)))
    assert [limit_s for _, limit_s in started] == [250, 150, 50]
    assert list(result.failed) == list(SHORT)[3:]
    assert set(result.failed.values()) == {"not started: the budget of 5 minutes was used up (--budget)."}
    assert result.is_broken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(only=("nothing",)), "--only nothing is not a bench. There are: prep"),
        (Options(only=("end-to-end-base",)), "--only end-to-end-base is not a bench for this device"),
        (Options(only=()), "--only names no bench"),
        (Options(repeats=0), "--repeats is 0, expected 1 or more"),
        (Options(budget=0.0), "--budget is 0, expected minutes above 0"),
    ],
)
def test_wrong_options_are_found_before_anything_runs(options, message):
    with pytest.raises(UserError, match=message):
        all_benches.run(options, start=fail(AssertionError("started")))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", SELECTIONS)
def test_flags_of_the_selection_are_flags_of_their_benches(capsys, device):
    for entry in SELECTIONS[device].values():
        with pytest.raises(SystemExit):
            main([entry.bench, "--help"])
        text = capsys.readouterr().out
        flags = Options(short=True, repeats=1).flags(entry, device)
        assert all(flag in text for flag in flags if flag.startswith("-"))


@pytest.mark.parametrize("device", SELECTIONS)
def test_the_short_forms_fit_their_budget(device):
    in_short = Options(short=True).entries(device).values()
    expected = sum(entry.expected_s for entry in in_short)
    assert expected <= 60 * BUDGET_MINUTES[device]


def test_settings_are_those_of_what_is_compared_with():
    settings = {"ours": "a", "peer": "b", "most": "limit: c", "quiet": ""}
    found = all_benches.settings_of_peers(
        {
            "named": {"settings": settings, "peers": ["peer"], "ratios": {}},
            "unnamed": {"settings": settings, "ratios": {"ours_vs_peer": {}}},
            "alone": {"settings": settings, "ratios": {}},
        }
    )
    assert found == {"named/peer": "b", "unnamed/ours": "a", "unnamed/peer": "b"}


def test_a_picture_of_the_aims_is_drawn_with_and_without_figures():
    result = all_benches.run(Options(device="cpu"), start=writer(0.9, broken={"spectral": fail(UserError("no."))}))
    empty = all_benches.run(Options(device="cpu", only=("limits",)), start=writer(1.0))
    for one in (result, empty):
        picture = aims_chart(one)
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 150_000
