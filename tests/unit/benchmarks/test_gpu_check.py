"""The check of a GPU machine: its flow, what it keeps, and what it adds to. No test asserts a time."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import all_benches, gpu_check
from benchmarks.__main__ import main
from benchmarks.gpu_check import TOO_LONG, Options, files_of
from benchmarks.harness.measure import Result
from benchmarks.harness.processes import SharedProcess
from benchmarks.selection import CUDA
from benchmarks.training import figures
from benchmarks.training.run import key_of
from lowrank_vit.common.errors import UserError
from tests.gpu.conftest import longest_first

ROOT = Path(__file__).parents[3]
SHORT = [name for name, entry in CUDA.items() if entry.is_short and not entry.is_profile]
PROFILED = [name for name, entry in CUDA.items() if entry.is_profile]
ENVIRONMENT = {"device": "cpu", "cpu": "A processor", "commit": "abc"}


MAKE_SETS = gpu_check._make_sets


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "_make_sets", lambda *_: None)
    monkeypatch.setattr(gpu_check, "_must_compile", lambda: False)
    return tmp_path


class Stubs:
    """The bodies of tests and benches; the flow is the check's own."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.calls, self.started = code, list[tuple[list[str], dict[str, str], float]](), list[str]()
        self.speed = 100.0

    def call(self, arguments: Sequence[str], variables: Mapping[str, str], limit_s: float) -> int:
        self.calls.append((list(arguments), dict(variables), limit_s))
        (record,) = (word.partition("=")[2] for word in arguments if word.startswith("--gpu-record="))
        tests = {"environment": ENVIRONMENT, "tests": {"a": {"outcome": "passed"}, "b": {"outcome": "not run"}}}
        Path(record).write_text(json.dumps(tests))
        return self.code

    def start(self, arguments: Sequence[str], path: Path, limit_s: float) -> None:
        self.started.append(path.stem)
        case = {"unit": "img/s", "median": self.speed, "samples": [self.speed]}
        result = {"bench": path.stem, "environment": ENVIRONMENT, "cases": {"ours": case}, "ratios": {}}
        path.write_text(json.dumps(result))


def check(stubs: Stubs, **options: Any) -> tuple[Path, bool]:
    return gpu_check.run(Options(tiny=True, **options), call=stubs.call, start=stubs.start)


def benches_of(page: Path) -> dict:
    return json.loads(page.with_suffix(".json").read_text())["benches"]


def test_the_check_refuses_at_once_without_a_gpu(checkout):
    def no_call(*_: object) -> int:
        pytest.fail("started")

    with pytest.raises(UserError, match=r'torch sees no CUDA device.*ARGS="--without-gpu".*ARGS="--tiny"'):
        gpu_check.run(Options(), call=no_call)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"minutes": 0}, "--minutes is 0"),
        ({"jobs": 0}, "--jobs is 0"),
        ({"only": (",",)}, "--only names nothing"),
        ({"only": ("loader,stpe",)}, r"--only stpe is not a bench. There are: tests, prep"),
        ({"only": ("prep",)}, r"--only prep is not a bench for this device. There are: tests, step"),
        ({"without_gpu": True}, "exclude each other"),
    ]
    for wrong, message in cases:
        with pytest.raises(UserError, match=message):
            gpu_check.run(Options(tiny=True, **wrong), call=no_call)


def test_what_hides_a_gpu_is_said(checkout, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match=r'no CUDA device, since CUDA_VISIBLE_DEVICES is "".* Unset it, make'):
        gpu_check.run(Options())


@pytest.mark.parametrize("code", [0, 1, TOO_LONG])
def test_the_check_runs_tests_and_benches_and_writes_the_record(checkout, code):
    stubs = Stubs(code)
    page, is_clean = check(stubs, minutes=6.0, jobs=3)
    assert is_clean == (code == 0)
    ((tests, variables, limit_s),) = stubs.calls
    assert tests[:4] == ["pytest", "tests/gpu", "-m", "gpu"]
    assert " ".join(tests).count("-n 3 --dist load --maxschedchunk 1 -p no:benchmark") == 1
    assert variables == {"TORCHINDUCTOR_COMPILE_THREADS": "4"}  # a rehearsal needs no GPU
    assert limit_s == pytest.approx(150, abs=20)
    assert stubs.started == SHORT
    text = page.read_text()
    assert "1 not run, 1 passed." in text
    assert all(f"`{name}/ours`" in text for name in SHORT)


def test_a_gpu_is_required_by_the_tests_where_it_is_there(checkout, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100")
    monkeypatch.setattr("lowrank_vit.common.devices.pick_device", lambda _: __import__("torch").device("cuda"))
    stubs = Stubs()
    page, is_clean = gpu_check.run(Options(), call=stubs.call, start=stubs.start)
    ((_, variables, limit_s),) = stubs.calls
    assert (variables["LRV_REQUIRE_GPU"], limit_s) == ("1", pytest.approx(150, abs=20))
    assert page.parent == Path("docs/benchmarks")
    assert is_clean
    assert stubs.started == SHORT


def test_the_longest_gpu_tests_come_first_each_with_a_quick_one():
    names = [
        "t[a]",
        "t[--compile --amp]",
        "t[b]",
        "modes[max-autotune-1]",
        "t[--compile --compile-mode max-autotune]",
        "c",
    ]
    items: list[Any] = [SimpleNamespace(nodeid=name) for name in names]
    assert [item.nodeid for item in longest_first(items)] == [names[n] for n in (3, 0, 4, 2, 1, 5)]


def test_of_quick_gpu_tests_those_of_training_and_loading_come_first():
    names = [f"tests/gpu/test_{room}_gpu.py::t" for room in ("spectral", "ranks", "loader", "train")]
    items: list[Any] = [SimpleNamespace(nodeid=name) for name in names]
    assert [item.nodeid for item in longest_first(items)] == [names[n] for n in (3, 2, 0, 1)]


def test_what_the_benches_read_is_made_before_for_the_same_run_and_within_a_limit(checkout, monkeypatch):
    made: list[str] = []
    monkeypatch.setattr(gpu_check, "photographs", lambda scratch, count, _: scratch / f"photos_{count}")
    monkeypatch.setattr(gpu_check, "converted", lambda folder, suffix, _: made.append(f"{folder.name}{suffix}"))
    found: list[figures.Options] = []

    def start(arguments: Sequence[str], path: Path, limit_s: float) -> None:
        assert limit_s < 120
        monkeypatch.setattr(figures, "run", lambda options, **_: (found.append(options), Result("x", {}, {}, {}))[1])
        for flags in (arguments, [CUDA["step"].bench, *all_benches.Options(short=True).flags(CUDA["step"], "cuda")]):
            main([*flags, "--json", str(path)])

    heard: list[str] = []
    MAKE_SETS(Options(), heard.append, start)
    assert made == ["photos_1024", "photos_1024_256", "photos_1024_400"]
    assert [options.figure for options in found] == ["prepare", "step"]
    assert key_of(found[0]) == key_of(found[1])
    assert not heard

    def lacking(*_: object) -> Path:
        raise UserError("scikit-image is not there")

    monkeypatch.setattr(gpu_check, "photographs", lacking)
    MAKE_SETS(Options(), heard.append, start)
    assert heard == ["data sets of the benches: scikit-image is not there"]


def test_what_numba_compiles_is_compiled_once_before_the_tests(checkout, monkeypatch):
    begun: list[list[str]] = []

    def start(arguments: Sequence[str], path: Path, limit_s: float) -> None:
        begun.append(list(arguments))
        assert limit_s < 180

    heard: list[str] = []
    monkeypatch.setattr(gpu_check, "_must_compile", lambda: True)
    with gpu_check._twins_compiled(heard.append, start):
        pass
    assert [arguments[0] for arguments in begun] == ["training", "loader"]
    assert all(arguments[arguments.index("--device") + 1] == "cpu" for arguments in begun)
    assert not any("compiled" in line for line in heard[1:])
    monkeypatch.setattr(gpu_check, "_must_compile", lambda: False)
    with gpu_check._twins_compiled(heard.append, start):
        pass
    assert len(begun) == 2


def test_what_making_the_sets_takes_is_taken_off(checkout, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def slow(*_: object) -> None:
        now[0] += 60

    class Slow(Stubs):
        def call(self, arguments: Sequence[str], variables: Mapping[str, str], limit_s: float) -> int:
            now[0] += 100
            return super().call(arguments, variables, limit_s)

    monkeypatch.setattr(gpu_check, "_make_sets", slow)
    budgets: list[float] = []
    benches = Options.benches
    monkeypatch.setattr(
        Options, "benches", lambda self, device, budget: (budgets.append(budget), benches(self, device, budget))[1]
    )
    stubs = Slow()
    check(stubs, minutes=6.0, only=("tests", "step"))
    assert stubs.calls[0][2] == pytest.approx(300 * 2.5 / 6)
    assert budgets[-1] == pytest.approx((360 - 160) / 60)


def test_kernels_are_added_by_a_flag_and_come_last(checkout):
    stubs = Stubs()
    check(stubs, profile=True)
    assert stubs.started == [*SHORT, *PROFILED]


def test_only_adds_to_the_record_and_a_whole_check_begins_a_new_one(checkout, monkeypatch):
    stubs = Stubs()
    page, _ = check(stubs)
    stubs.started.clear()
    stubs.speed = 200.0
    again, is_clean = check(stubs, only=("loader,step",))
    assert again == page
    assert is_clean
    assert len(stubs.calls) == 1  # the tests were not run again
    assert stubs.started == ["loader", "step"]
    result = benches_of(page)
    assert list(result["benches"]) == [*(n for n in SHORT if n not in ("loader", "step")), "loader", "step"]
    assert {name: case["median"] for name, case in result["cases"].items()} == {
        f"{name}/ours": 200.0 if name in ("loader", "step") else 100.0 for name in SHORT
    }
    assert "1 not run, 1 passed." in page.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: 0.0)
        check(stubs, only=("tests",), minutes=4.0)
    assert stubs.calls[1][2] == 240  # all the time is theirs
    assert set(benches_of(page)["benches"]) == set(SHORT)
    anew, _ = check(stubs)
    assert anew != page
    assert page.exists()


def test_a_bench_that_is_added_may_be_the_first(checkout):
    page, _ = check(Stubs(), only=("augment",))
    assert list(benches_of(page)["benches"]) == ["augment"]
    assert "Not run." in page.read_text()


def test_a_page_that_was_removed_or_is_wanted_elsewhere_is_a_new_one_of_the_same_record(checkout):
    page, _ = check(Stubs(), out=checkout / "a")
    elsewhere, _ = check(Stubs(), out=checkout / "b", only=("step",))
    assert elsewhere.parent == checkout / "b"
    assert set(benches_of(elsewhere)["benches"]) == set(SHORT)
    shutil.rmtree(checkout / "b")
    again, _ = check(Stubs(), only=("step",))
    assert set(benches_of(again)["benches"]) == set(SHORT)
    assert page.exists()


@pytest.mark.parametrize("part", ["benches", "tests"])
def test_another_gpu_begins_a_record_of_its_own(checkout, part):
    page, _ = check(Stubs())
    file = getattr(files_of(tiny=True), part)
    content = json.loads(file.read_text())
    content["environment"] = {**content["environment"], "gpu": "NVIDIA A100"}
    file.write_text(json.dumps(content))
    heard: list[str] = []
    stubs = Stubs()
    again, _ = gpu_check.run(Options(tiny=True, only=("step",)), note=heard.append, call=stubs.call, start=stubs.start)
    assert again != page
    assert any("another GPU (NVIDIA A100)" in line for line in heard)


def test_a_half_written_record_of_tests_ends_no_bench(checkout):
    page, _ = check(Stubs())
    files_of(tiny=True).tests.write_text('{"environment": {')
    heard: list[str] = []
    stubs = Stubs()
    again, _ = gpu_check.run(Options(tiny=True, only=("step",)), note=heard.append, call=stubs.call, start=stubs.start)
    assert (again, stubs.started) == (page, ["step"])
    assert any("tests.json cannot be read as a record" in line for line in heard)


def test_what_is_there_is_on_the_disk_when_the_machine_goes_away(checkout):
    stubs = Stubs()

    def gone(arguments: Sequence[str], path: Path, limit_s: float) -> None:
        if path.stem == "monitor":
            raise KeyboardInterrupt
        stubs.start(arguments, path, limit_s)

    with pytest.raises(KeyboardInterrupt):
        gpu_check.run(Options(tiny=True), call=stubs.call, start=gone)
    page = Path(files_of(tiny=True).page.read_text())
    assert list(benches_of(page)["benches"]) == SHORT[: SHORT.index("monitor")]
    assert "`step/ours`" in page.read_text()


BODY = """
import json, os, sys, time
from benchmarks.harness.processes import serve

def run(arguments):
    path = arguments[-1]
    name = os.path.basename(path)[:-5]
    case = {"unit": "img/s", "median": 1.0, "samples": [1.0]}
    known = {"device": "cpu", "pid": os.getpid()}
    content = {"bench": name, "environment": known, "cases": {"ours": case}, "ratios": {}}
    open(path, "w").write(json.dumps(content))
    if name == "end-to-end":
        time.sleep(600)

serve(run)
"""


def test_the_benches_of_a_check_share_a_process_and_one_that_hangs_keeps_its_rounds(checkout, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (checkout / "body.py").write_text(textwrap.dedent(BODY))
    command = [sys.executable, str(checkout / "body.py")]
    monkeypatch.setattr(all_benches, "SharedProcess", lambda: SharedProcess(command, grace_s=0.2))
    limits = dict.fromkeys(SHORT, 60)
    limits["end-to-end"] = 8
    monkeypatch.setattr(all_benches, "REHEARSED", 1)
    monkeypatch.setattr("benchmarks.selection.Entry.limit_s", property(lambda entry: limits[name_of(entry)]))
    page, is_clean = gpu_check.run(
        Options(tiny=True, only=("tests", "step", "end-to-end", "loader")), call=Stubs().call
    )
    assert not is_clean
    found = benches_of(page)
    assert found["failed"] == {"end-to-end": "ended after 8 s, the time it was given."}
    pids = {name: one["environment"]["pid"] for name, one in found["benches"].items()}
    assert pids["step"] == pids["end-to-end"] != pids["loader"]
    assert "`end-to-end/ours`" in page.read_text()


def name_of(entry: object) -> str:
    return next(name for name, one in CUDA.items() if one is entry)


@pytest.mark.slow  # half a minute, and minutes where numba has compiled nothing yet
def test_the_whole_check_in_tiny_sizes(checkout, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    out = checkout / "record"
    page, is_clean = gpu_check.run(Options(tiny=True, profile=True, jobs=1, repeats=1, minutes=30, out=out))
    assert is_clean, page.read_text()
    text = page.read_text()
    assert page.parent == out
    assert "Where the time goes: test_vit, a step of a run with data" in text
    assert set(benches_of(page)["benches"]) == {*SHORT, *PROFILED}
