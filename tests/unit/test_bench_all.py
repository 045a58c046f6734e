"""The bench `all`: what is to be reached, held against results, and one table. No test asserts a time."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.errors import UserError
from lowrank_vit.bench import everything
from lowrank_vit.bench.aims import AIMS, Aim, judge
from lowrank_vit.bench.measure import Result, Samples


def result_of(bench: str, factor: float, device: str = "cpu") -> Result:
    """A result with every ratio that has an aim, `factor` times what it has to be."""
    ratios = {aim.name: Samples((aim.least * factor,) * 5) for aim in AIMS if aim.bench == bench}
    cases = {"case": Samples((1.0,) * 5, "img/s")}
    return Result(bench, {"device": device, "cpu_cores": 2, "commit": "0123456789ab"}, cases, ratios)


def writer(factor: float, started: list[tuple[str, Sequence[str]]] | None = None, broken: str = ""):
    def start(name: str, flags: Sequence[str], path: Path) -> None:
        if started is not None:
            started.append((name, flags))
        if name == broken:
            raise UserError(f"{name} ended with code 2; see above.")
        path.write_text(result_of(name, factor).to_json())

    return start


def printed(result: Result) -> str:
    file = io.StringIO()
    everything.print_summary(result, Console(file=file, width=80))
    return file.getvalue()


@pytest.mark.parametrize(("factor", "reached"), [(1.0, True), (1.5, True), (0.99, False)])
def test_every_aim_is_judged_by_its_median(factor, reached):
    verdicts = judge({bench: result_of(bench, factor, "cuda").to_dict() for bench in everything.BENCHES})
    assert [verdict.aim for verdict in verdicts] == list(AIMS)
    assert {verdict.is_reached for verdict in verdicts} == {reached}


def test_a_cpu_is_not_held_against_the_aims_of_a_gpu():
    verdicts = judge({bench: result_of(bench, 1.0).to_dict() for bench in everything.BENCHES})
    assert [verdict.aim for verdict in verdicts] == [aim for aim in AIMS if aim.device == "any"]


def test_what_is_missing_is_not_taken_for_reached():
    aim = Aim("loader", "no_such_ratio", 1.0, "")
    assert judge({"loader": result_of("loader", 1.0).to_dict()}, [aim])[0].is_reached is None


def test_aims_stand_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs/benchmarks/README.md").read_text()
    for aim in AIMS:
        if aim.device == "any" and aim.name != "plan":
            row = next(line for line in page.splitlines() if line.startswith(f"| `{aim.name}`"))
            assert math.isclose(float(row.rstrip("| ").rpartition("|")[2]), aim.least), row


def test_all_runs_every_bench_in_its_short_form_and_joins_them():
    started: list[tuple[str, Sequence[str]]] = []
    result = everything.run(everything.Options(short=True, repeats=1), start=writer(1.1, started))
    assert [name for name, _ in started] == list(everything.BENCHES)
    assert all(list(flags) == [*everything.SHORT[name], "--repeats", "1"] for name, flags in started)
    data = json.loads(result.to_json())
    assert data["ratios"]["loader/best_vs_timm"]["median"] == pytest.approx(2.2)
    assert {one["reached"] for one in data["aims"]} == {True}
    assert set(data["benches"]) == set(everything.BENCHES)
    text = printed(result)
    assert " NO" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_bench_that_fails_does_not_hide_the_others():
    result = everything.run(everything.Options(), start=writer(0.5, broken="loader"))
    text = printed(result)
    assert "not run" in text
    assert " NO" in text
    assert "loader ended with code 2" in text
    assert "prep/passthrough_decode_vs_ffcv" in result.ratios
    with pytest.raises(UserError, match="--only nothing is not a bench"):
        everything.run(everything.Options(only=("nothing",)))


def test_short_flags_are_flags_of_their_benches(capsys):
    from lowrank_vit.bench.__main__ import main

    for name, flags in everything.SHORT.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        assert all(flag in text for flag in flags if flag.startswith("--"))
