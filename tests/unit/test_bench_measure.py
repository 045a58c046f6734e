"""The harness of the benchmarks: the order of the runs, ratios round by round, and what a result looks like."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.errors import UserError
from lowrank_vit.bench.environment import environment
from lowrank_vit.bench.measure import DEFAULT_REPEATS, Case, Result, Samples, measure
from lowrank_vit.bench.show import Output, bar_chart, number, print_result


class Clock:
    """Time that passes only when a case says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def case(self, seconds: list[float], **kwargs: object) -> Case:
        """A case of 12 items that takes the next of `seconds` each time."""
        left: Iterator[float] = iter(seconds)

        def run() -> None:
            self.now += next(left)

        return replace(Case(run, 12), **kwargs)  # type: ignore[arg-type]


def result_of(**samples: tuple[float, ...]) -> Result:
    cases = {name: Samples(values, "img/s", f"the setting of {name}, " * 8) for name, values in samples.items()}
    ratios = {f"{name}_vs_a_peer_with_a_long_name": Samples(values) for name, values in samples.items()}
    surroundings = {
        "cpu_cores": 2,
        "cpu": "A processor with a long name, as they have",
        "commit": "0123456789ab+changes",
    }
    return Result("prep", surroundings, cases, ratios, ("A note that is longer than a line of eighty columns. " * 3,))


def printed(result: Result, width: int = 80) -> str:
    file = io.StringIO()
    print_result(result, Console(file=file, width=width))
    return file.getvalue()


def test_every_round_runs_every_case_once_in_order() -> None:
    order: list[str] = []
    cases = {
        name: Case(
            run=lambda name=name: order.append(name),
            items=1,
            before=lambda name=name: order.append(f"before {name}"),
            after=lambda name=name: order.append(f"after {name}"),
        )
        for name in "AB"
    }
    measure("x", cases, {}, environment={}, repeats=2)
    one_round = ["before A", "A", "after A", "before B", "B", "after B"]
    assert order == one_round * 3  # one to warm up and two that count


def test_five_rounds_by_default_and_the_warm_up_does_not_count() -> None:
    clock = Clock()
    result = measure("x", {"a": clock.case([100, 1, 2, 3, 4, 6])}, {}, environment={}, clock=clock)
    assert result.cases["a"].samples == (12, 6, 4, 3, 2)
    assert result.cases["a"].median == 4
    assert DEFAULT_REPEATS == 5
    assert not result.limits


def test_only_the_run_is_timed() -> None:
    clock = Clock()

    def pause() -> None:
        clock.now += 1000

    result = measure("x", {"a": clock.case([2] * 6, before=pause, after=pause)}, {}, environment={}, clock=clock)
    assert set(result.cases["a"].samples) == {6}


def test_ratios_are_of_the_same_round() -> None:
    clock = Clock()
    # b always takes twice as long as a, while the machine slows down tenfold: the ratio must not notice.
    seconds = [1, 1, 2, 4, 8, 10]
    cases = {"a": clock.case([*seconds]), "b": clock.case([2 * s for s in seconds])}
    result = measure("x", cases, {"a_vs_b": ("a", "b")}, environment={}, clock=clock)
    assert result.ratios["a_vs_b"].samples == (2, 2, 2, 2, 2)
    assert len(set(result.cases["a"].samples)) == 5


def test_the_median_of_the_ratios_is_not_the_ratio_of_the_medians() -> None:
    clock = Clock()
    cases = {"a": clock.case([1, 2, 3]), "b": clock.case([3, 1, 2])}
    result = measure("x", cases, {"r": ("a", "b")}, environment={}, repeats=3, warmup=0, clock=clock)
    assert result.ratios["r"].samples == pytest.approx((3, 1 / 2, 2 / 3))
    assert result.ratios["r"].median == pytest.approx(2 / 3)


def test_fewer_rounds_are_called_a_smoke_test() -> None:
    clock = Clock()
    result = measure("x", {"a": clock.case([1, 1])}, {}, environment={}, repeats=1, clock=clock)
    assert "smoke test" in result.limits[0]
    with pytest.raises(UserError, match="--repeats is 0, expected 1 or more"):
        measure("x", {}, {}, environment={}, repeats=0)


def test_json_has_the_projects_schema() -> None:
    data = json.loads(result_of(a=(1.0, 3.0, 2.0)).to_json())
    assert data["bench"] == "prep"
    assert data["environment"]["cpu_cores"] == 2
    assert data["cases"] == {"a": {"unit": "img/s", "median": 2.0, "samples": [1.0, 3.0, 2.0]}}
    assert data["ratios"] == {"a_vs_a_peer_with_a_long_name": {"median": 2.0, "samples": [1.0, 3.0, 2.0]}}
    assert data["settings"]["a"].startswith("the setting of a")


def test_environment_tells_versions_and_machine() -> None:
    found = environment()
    wanted = {"commit", "cpu", "cpu_cores", "ffcv", "pillow", "libjpeg_turbo", "torch", "device", "load_average_1min"}
    assert wanted <= set(found)
    json.dumps(found)


def test_table_fits_80_columns_and_shows_everything() -> None:
    text = printed(result_of(passthrough_header=(123456.7, 98765.4, 111111.1), cp=(0.01234, 2.5, 1.0)))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "98,765 .. 123,457" in text
    assert "0.0123 .. 2.50" in text
    for words in ("passthrough_header_vs_a_peer", "img/s", "the setting of cp", "A note", "2 cores", "0123456789ab"):
        assert words in text


@pytest.mark.parametrize(
    ("value", "shown"), [(12345.6, "12,346"), (100, "100"), (98.76, "98.8"), (1.5, "1.50"), (0.04211, "0.0421")]
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_output_writes_what_was_asked_for(tmp_path: Path) -> None:
    result = result_of(a=(1.0, 2.0, 3.0), b=(4.0, 4.0, 5.0))
    output = Output(tmp_path / "new" / "a.json", tmp_path / "a.png")
    output.check()
    output.write(result)
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == result.to_dict()
    assert (tmp_path / "a.png").read_bytes() == bar_chart(result)
    width, height = struct.unpack(">II", bar_chart(result)[16:24])
    assert width > height > 100


def test_output_complains_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not end in \.png"):
        Output(plot=tmp_path / "a.jpg").check()
    with pytest.raises(UserError, match="is a directory"):
        Output(json=tmp_path).check()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--json .* folder cannot be made"):
        Output(json=tmp_path / "file" / "a.json").check()
