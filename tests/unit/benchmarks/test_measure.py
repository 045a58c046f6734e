"""The harness of the benchmarks: the order of the runs, ratios round by round, and what a result looks like."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.harness.measure import (
    DEFAULT_REPEATS,
    Case,
    Result,
    Samples,
    cpu_of_children,
    environment,
    measure,
    order_of,
    power_limit_w,
    version_in_words,
)
from benchmarks.harness.show import Output, bar_chart, number, print_result
from lowrank_vit.common.errors import UserError


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


def test_every_round_runs_every_case_once_between_its_own_preparations() -> None:
    order: list[str] = []
    cases = {
        name: Case(
            run=lambda name=name: order.append(name),
            items=1,
            before=lambda name=name: order.append(f"before {name}"),
            after=lambda name=name: order.append(f"after {name}"),
            first=lambda name=name: order.append(f"first {name}"),
        )
        for name in "AB"
    }
    measure("x", cases, {}, environment={}, repeats=3)
    once = {name: [f"before {name}", name, f"after {name}"] for name in "AB"}
    rounds = ["AB", "BA", "BA", "AB"]  # one to warm up and three that count
    later = [step for names in rounds[1:] for name in names for step in once[name]]
    assert order == ["first A", *once["A"], "first B", *once["B"], *later]


def test_no_case_always_follows_the_same_one() -> None:
    assert {"".join(order_of("ABC", n)) for n in range(6)} == {"ABC", "CBA", "BCA", "ACB", "CAB", "BAC"}
    names = [f"case {n}" for n in range(9)]
    rounds = [order_of(names, n) for n in range(6)]
    assert rounds[0] == names
    for name in names:
        before = {order[order.index(name) - 1] for order in rounds if order[0] != name}
        assert len(before) > 1


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


SPIN = "import time\nwhile time.process_time() < 0.2: pass\nprint(time.process_time(), flush=True)\n"
COARSE_S = 0.03
"""The kernel tells of processes that run in steps of 10 ms, user and system each."""


@pytest.mark.parametrize("is_kept", [False, True], ids=["waited for", "still running"])
def test_cpu_time_of_child_processes_counts_before_and_after_their_end(is_kept: bool) -> None:
    before = cpu_of_children()
    script = f"{SPIN}{'input()' if is_kept else ''}"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        own = float(process.stdout.readline())
        running = cpu_of_children() - before
        process.stdin.close()  # which ends input()
    assert cpu_of_children() - before >= own - COARSE_S
    if is_kept:
        assert running >= own - COARSE_S


def test_cpu_seconds_are_of_the_run_alone_and_their_ratio_is_of_the_same_round() -> None:
    clock, spent = Clock(), list[float]()

    def spin(seconds: float = 0.01) -> None:
        begin = time.process_time()
        while time.process_time() - begin < seconds:
            pass
        spent.append(time.process_time() - begin)

    def lasts() -> None:
        spin()
        clock.now += 1

    cases = {"a": Case(lasts, 4, before=lambda: spin(0.1), after=lambda: spin(0.1)), "b": clock.case([1.0] * 3)}
    result = measure("x", cases, {"b_vs_a": ("b", "a")}, environment={}, repeats=3, warmup=0, clock=clock)
    a, b, ratio = (one.cpu for one in (result.cases["a"], result.cases["b"], result.ratios["b_vs_a"]))
    assert len(a) == len(b) == 3
    for of_run, found in zip(spent[1::3], a, strict=True):
        assert of_run <= 4 * found < 0.1  # 0.21 with what is before and after
    assert ratio == tuple(x / y for x, y in zip(a, b, strict=True))


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


def test_what_there_is_is_kept_after_each_round_that_counts_but_the_last() -> None:
    clock, kept = Clock(), list[Result]()
    cases = {"a": clock.case([1.0] * 5), "b": clock.case([2.0] * 3)}  # b fails in the third round that counts
    result = measure("x", cases, {"a_vs_b": ("a", "b")}, environment={}, repeats=4, clock=clock, keep=kept.append)
    assert [len(one.cases["a"].samples) for one in kept] == [1, 2, 3]
    assert [set(one.cases) for one in kept] == [{"a", "b"}, {"a", "b"}, {"a"}]
    assert kept[1].ratios["a_vs_b"].samples == (2.0, 2.0)
    assert kept[0].limits[0].startswith("Only 1 round:")
    assert (list(kept[2].failed), list(result.failed), len(result.cases["a"].samples)) == (["b"], ["b"], 4)


def test_seconds_are_samples_of_the_unit_s() -> None:
    clock = Clock()
    cases = {"a": clock.case([8, 4, 2], items=2, unit="s")}
    result = measure("x", cases, {}, environment={}, repeats=2, clock=clock)
    assert result.cases["a"].samples == (2, 1)


def failing(error: Exception, clock: Clock | None = None, rounds_before: int = 0) -> Case:
    left = iter(range(rounds_before))

    def run() -> None:
        if clock is None or next(left, None) is None:
            raise error
        clock.now += 1

    return Case(run, 1)


@pytest.mark.parametrize("rounds_before", [0, 2])
def test_a_case_that_fails_does_not_take_the_others_with_it(rounds_before: int) -> None:
    clock = Clock()
    cases = {
        "a": clock.case([1] * 6),
        "broken": replace(failing(RuntimeError("no kernel\nand much more"), clock, rounds_before), peer=True),
        "b": clock.case([2] * 6),
    }
    ratios = {"a_vs_b": ("a", "b"), "a_vs_broken": ("a", "broken"), "broken_vs_b": ("broken", "b")}
    heard: list[str] = []
    result = measure("x", cases, ratios, environment={}, clock=clock, note=heard.append)
    assert list(result.cases) == ["a", "b"]
    assert list(result.ratios) == ["a_vs_b"]
    assert result.failed == {"broken": "RuntimeError: no kernel"}
    assert not result.is_broken
    assert heard.count("broken failed: RuntimeError: no kernel") == 1
    data = json.loads(result.to_json())
    assert (data["failed"], data["peers"]) == (result.failed, ["broken"])


def test_what_is_ours_and_fails_breaks_the_bench_but_not_the_peers_figures() -> None:
    clock = Clock()
    cases = {"ours": failing(ValueError()), "peer": clock.case([1] * 6, peer=True)}
    result = measure("x", cases, {}, environment={}, clock=clock)
    assert result.is_broken
    assert result.failed == {"ours": "ValueError"}
    assert "peer" in result.cases
    assert "smoke test" not in printed(result)
    assert "ours failed: ValueError" in " ".join(printed(result).split())


def test_a_users_error_of_ours_ends_it_and_a_peers_does_not() -> None:
    case = failing(UserError("--data is wrong."))
    with pytest.raises(UserError, match="--data is wrong"):
        measure("x", {"a": case}, {}, environment={})
    result = measure("x", {"a": replace(case, peer=True)}, {}, environment={})
    assert result.failed == {"a": "--data is wrong."}


def test_a_peer_that_cannot_even_be_made_is_a_case_that_fails() -> None:
    def make() -> Case:
        raise ImportError("no module named spdl")

    result = measure("x", {"spdl": Case.of_peer(make)}, {}, environment={})
    assert result.failed == {"spdl": "ImportError: no module named spdl"}
    assert not result.is_broken
    assert Case.of_peer(lambda: Case(make, 3)).peer


def test_json_has_the_projects_schema() -> None:
    data = json.loads(result_of(a=(1.0, 3.0, 2.0)).to_json())
    assert data["bench"] == "prep"
    assert data["environment"]["cpu_cores"] == 2
    assert data["cases"] == {"a": {"unit": "img/s", "median": 2.0, "samples": [1.0, 3.0, 2.0]}}
    assert data["ratios"] == {"a_vs_a_peer_with_a_long_name": {"median": 2.0, "samples": [1.0, 3.0, 2.0]}}
    assert data["settings"]["a"].startswith("the setting of a")
    told = Result("x", {}, {"a": Samples((2.0,), "img/s", cpu=(0.25,))}, {"r": Samples((3.0,), cpu=(4.0,))}).to_dict()
    assert told["cases"]["a"] == {"unit": "img/s", "median": 2.0, "samples": [2.0], "cpu": [0.25]}
    assert told["ratios"]["r"] == {"median": 3.0, "samples": [3.0], "cpu": [4.0]}


def test_environment_tells_versions_and_machine() -> None:
    found = environment()
    wanted = {"commit", "cpu", "cpu_cores", "ffcv", "pillow", "libjpeg_turbo", "torch", "device", "load_average_1min"}
    assert wanted <= set(found)
    json.dumps(found)


@pytest.mark.parametrize(
    ("number", "words"), [(91900, "9.19.0"), (90100, "9.1.0"), (8902, "8.9.2"), (91002, "9.10.2"), (None, "unknown")]
)
def test_cudnns_version_in_words(number: int | None, words: str) -> None:
    assert version_in_words(number) == words


@pytest.mark.parametrize(
    ("script", "watts"),
    [
        ("echo 700.00; echo 350.00", 700.0),  # of the first card
        ("echo '[N/A]'", "unknown"),
        ("exit 9", "unknown"),
        ("true", "unknown"),
    ],
)
def test_the_power_limit_is_said_where_it_is_told(script: str, watts: float | str) -> None:
    assert power_limit_w(("sh", "-c", script)) == watts
    assert power_limit_w(("/no/such/program",)) == "unknown"


def test_table_fits_80_columns_and_shows_everything() -> None:
    text = printed(result_of(passthrough_header=(123456.7, 98765.4, 111111.1), cp=(0.01234, 2.5, 1.0)))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "98,765 .. 123,457" in text
    assert "0.0123 .. 2.50" in text
    for words in ("passthrough_header_vs_a_peer", "img/s", "the setting of cp", "A note", "2 cores", "0123456789ab"):
        assert words in text


def test_cpu_time_stands_beside_what_was_measured_where_it_is_known() -> None:
    result = result_of(passthrough_header=(123456.7, 98765.4, 111111.1), cp=(0.01234, 2.5, 1.0))
    assert "CPU" not in printed(result)
    cases = {**result.cases, "cp": replace(result.cases["cp"], cpu=(0.001, 0.00321, 0.1))}
    ratios = {name: replace(ratio, cpu=(1.0, 1.75, 2.0)) for name, ratio in result.ratios.items()}
    text = printed(replace(result, cases=cases, ratios=ratios))
    assert max(len(line) for line in text.splitlines()) <= 80
    for words in ("CPU ms/item", "3.21", "by CPU time", "1.75"):
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


def test_bars_that_differ_too_much_are_on_a_logarithmic_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_vit.report import style

    drawn: list[object] = []
    log_ticks = style.log_ticks
    monkeypatch.setattr(style, "log_ticks", lambda axis: (drawn.append(axis), log_ticks(axis)))
    bar_chart(result_of(a=(1.0, 2.0), b=(20.0, 30.0)))
    assert not drawn
    bar_chart(result_of(a=(1.0, 2.0), b=(200.0, 300.0)))
    assert len(drawn) == 1


def test_output_complains_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not end in \.png"):
        Output(plot=tmp_path / "a.jpg").check()
    with pytest.raises(UserError, match="is a directory"):
        Output(json=tmp_path).check()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--json .* folder cannot be made"):
        Output(json=tmp_path / "file" / "a.json").check()
