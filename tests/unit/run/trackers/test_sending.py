"""Trackers get a copy of the numbers, the same at each, and never hold a run up or end it."""

from __future__ import annotations

import errno
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.run.metrics import RunLog
from lowrank_vit.run.trackers import sending
from lowrank_vit.run.trackers.sending import TITLES, Trackers, check
from lowrank_vit.run.trackers.tracker import About
from tests.hidden_packages import hidden_packages
from tests.unit.run.trackers.libraries import NAMES, Library, fake
from tests.waiting import wait_until

AXES = ("epoch", "update", "spec_update")


@pytest.fixture(params=NAMES)
def library(request, monkeypatch) -> Library:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return fake(request.param, monkeypatch)


def about(run_dir: Path, **more: Any) -> About:
    return About(more.pop("project", "p"), run_dir.name, run_dir, **more)


def started(library: Library, run_dir: Path, say: Any = print, **more: Any) -> Trackers:
    limits = {name: more.pop(name) for name in ("timeout_s", "resume_ids") if name in more}
    return Trackers.start([library.name], about(run_dir, **more), say=say, **limits)


def points(library: Library) -> list[dict[str, Any]]:
    """The rows without their axes, which some libraries are told beside them and W&B among them."""
    return [{name: value for name, value in row.items() if name not in (*AXES, "step")} for row in library.rows]


def test_the_same_names_and_values_each_against_its_own_axis(library, tmp_path):
    with RunLog(tmp_path, trackers=started(library, tmp_path)) as log:
        log.log("train", 120, {"loss": 1.0, "lr": 0.5})
        log.log("spec", 100, {"spec/blocks.0.mlp.fc1/sigma_max": 2.0})  # late: taken at 100, finished after 120
        log.log("flow", 120, {"epoch": 3, "spec/blocks.0/entropy": 4.0})
        log.log_epoch({"epoch": 3, "update": 120, "train_loss": 1.5, "eval_top1": 7.0, "img_per_s": None})
    assert points(library) == [
        {"train/loss": 1.0, "train/lr": 0.5},
        {"spec/blocks.0.mlp.fc1/sigma_max": 2.0},
        {"spec/blocks.0/entropy": 4.0},
        {"train_loss": 1.5, "eval_top1": 7.0},
    ]
    if library.name == "wandb":  # whose axes are among the values
        places = [{name: row[name] for name in AXES if name in row} for row in library.rows]
        assert places[:2] == [{"update": 120}, {"spec_update": 100}]
        assert places[2:] == [{"epoch": 3, "spec_update": 120}, {"epoch": 3, "update": 120}]
    else:
        assert [row["step"] for row in library.rows] == [120, 100, 120, 3]
    assert library.is_finished


ERRORS = [RuntimeError("the service is gone"), OSError(errno.ENOSPC, "No space left on device"), SystemExit(1)]


@pytest.mark.parametrize("error", [*ERRORS, KeyboardInterrupt(), KeyError("x"), TypeError()], ids=repr)
@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_failure_is_said_once_and_the_run_goes_on(library, where, error, tmp_path):
    library.failing[where] = error
    said: list[str] = []
    with RunLog(tmp_path, trackers=started(library, tmp_path, said.append)) as log:
        for update in range(3):
            log.log("train", update, {"loss": 1.0})
    title = TITLES[library.name]
    first = {
        "start": f"{title} cannot be started (",
        "log": f"{title} failed (",
        "finish": f"{title} could not send everything (",
    }[where]
    if (library.name, where) == ("wandb", "start"):
        assert "W&B's server does not answer" in said.pop(0)
    assert said[0].startswith(f"warning: {first}")
    assert said[1:] == [f"3 lines were not sent to {title}; the first was reported above"] * (where == "log")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_what_hangs_does_not_hold_up_the_run(library, where, tmp_path):
    hangs = library.hangs[where] = threading.Event()
    said: list[str] = []
    trackers = started(library, tmp_path, said.append, timeout_s=0.05 if where == "start" else 60.0)
    trackers.log({"update": 1, "loss": 1.0}, "update")
    trackers.finish(timeout_s=0.05)
    hangs.set()
    reason = "it has never started" if where == "start" else "not done after 0 s"
    waits = "has not started after 0 s; training goes on, and the numbers wait for it."
    assert [waits in line for line in said] == [True, False] if where == "start" else [False]
    assert f"{TITLES[library.name]} could not send everything ({reason})" in said[-1]
    wait_until(lambda: library.is_finished)


def test_one_that_starts_late_gets_all(library, tmp_path):
    hangs = library.hangs["start"] = threading.Event()
    trackers = started(library, tmp_path, timeout_s=0.05)
    trackers.log({"update": 1, "loss": 1.0}, "update")
    assert trackers.ids == {}
    hangs.set()
    wait_until(lambda: library.rows)
    trackers.finish()
    assert points(library) == [{"loss": 1.0}]
    assert trackers.ids == ({} if library.name == "tensorboard" else {library.name: "abc123"})


def test_a_slow_one_does_not_fill_the_memory(library, tmp_path, monkeypatch):
    monkeypatch.setattr(sending, "MOST_WAITING", 10)
    hangs = library.hangs["log"] = threading.Event()
    said: list[str] = []
    trackers = started(library, tmp_path, said.append)
    for update in range(12):
        trackers.log({"update": update, "loss": 1.0}, "update")
    assert len(said) == 1
    assert "is too slow for the numbers" in said[0]
    hangs.set()
    trackers.finish()
    assert said[1:] == [f"7 lines were not sent to {TITLES[library.name]}; the first was reported above"]
    assert len(library.rows) == 5


def test_all_that_is_a_number_is_sent(library, tmp_path):
    trackers = started(library, tmp_path)
    values = {"nan": math.nan, "inf": -math.inf, "no": None, "text": "x", "is": True, "a": {"b": {"c": 2}}, "l": [1]}
    trackers.log({"update": 1, **values}, "update")
    trackers.log({"update": 2, "a\udcff": 1.0, "b\n": 2.0, "../c": 3.0}, "update")
    trackers.finish()
    first, second = points(library)
    assert math.isnan(first.pop("nan"))
    assert first == {"inf": -math.inf, "is": 1, "a/b/c": 2}
    names = ["a_xff", "b_n", "_/c"] if library.name == "mlflow" else ["a\\xff", "b\\n", "../c"]
    assert list(second.items()) == list(zip(names, (1.0, 2.0, 3.0), strict=True))


def test_texts_come_as_they_can_be_sent(library, tmp_path):
    config = {"data": Path("\udcff"), "names": ["\ud800"], "environment": {"device": "cpu"}}
    trackers = started(library, tmp_path, config=config, tags=("small", "\udcff"), project="\ud800")
    trackers.finish()
    (told,) = library.begun
    if library.name == "tensorboard":
        assert all(text in told["config"] for text in ('"data": "\\\\xff"', '"\\\\ud800"', '"device": "cpu"', "small"))
        return
    assert (told["project"], told["name"]) == ("\\ud800", tmp_path.name)
    names = {
        "mlflow": {"data": "\\xff", "names": "['\\\\ud800']", "environment/device": "cpu"},
        "trackio": {"data": "\\xff", "names": ["\\ud800"], "environment": {"device": "cpu"}, "tags": told.get("tags")},
    }
    if library.name == "trackio":
        names["trackio"]["tags"] = ["small", "\\xff"]
    assert told["config"] == names.get(library.name, {**config, "data": "\\xff", "names": ["\\ud800"]})
    if library.name != "trackio":
        assert told["tags"] == ["small", "_xff" if library.name == "mlflow" else "\\xff"]


def test_a_resumed_run_goes_on_under_its_id_and_has_no_point_twice(library, tmp_path):
    trackers = started(library, tmp_path)
    for update in range(1, 4):
        trackers.log({"update": update, "loss": 1.0}, "update")
    trackers.finish()
    # Killed after update 3, with a checkpoint of update 1.
    then = {"epoch": 0, "update": 2, "spec_update": 2}
    resumed = started(library, tmp_path, resume_ids=trackers.ids, goes_on_at=then)
    for update in range(2, 6):
        resumed.log({"update": update, "loss": 1.0}, "update")
    resumed.finish()
    assert resumed.ids == trackers.ids
    if library.name == "tensorboard":  # which takes back what was written after the checkpoint
        assert [told["purge_step"] for told in library.begun] == [None, 2]
    elif library.name == "wandb":  # which cannot tell
        assert len(library.rows) == 7
    else:
        assert [row["step"] for row in library.rows] == [1, 2, 3, 4, 5]
    if library.name != "tensorboard":
        assert library.begun[-1]["id"] == "abc123"


def test_ids_of_trackers_that_are_not_chosen_are_kept(library, tmp_path):
    trackers = started(library, tmp_path, resume_ids={"another": "x"})
    trackers.finish()
    assert trackers.ids["another"] == "x"


def test_several_at_once_and_one_that_fails_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    libraries = [fake(name, monkeypatch) for name in NAMES]
    libraries[1].failing["log"] = RuntimeError()
    said: list[str] = []
    trackers = Trackers.start(NAMES, about(tmp_path), say=said.append)
    trackers.log({"update": 1, "loss": 1.0}, "update")
    trackers.finish()
    assert said == [
        "warning: TensorBoard failed (RuntimeError); logging to files goes on without it.",
        "1 lines were not sent to TensorBoard; the first was reported above",
    ]
    assert [len(library.rows) for library in libraries] == [1, 0, 1, 1]


def test_what_is_the_users_to_mend_ends_the_start_of_all(tmp_path, monkeypatch):
    libraries = [fake(name, monkeypatch) for name in ("tensorboard", "trackio")]
    libraries[1].failing["start"] = UserError("Log in.")
    with pytest.raises(UserError, match="Log in"):
        Trackers.start(("tensorboard", "trackio"), about(tmp_path))
    assert libraries[0].is_finished


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_installed_is_named(name):
    said = rf"--tracker {name} needs .* is not installed: `pip install 'lowrank-vit\[{name}\]'`"
    with hidden_packages(name), pytest.raises(UserError, match=said):
        check([name], "p")


def test_installed_ones_pass(library, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    check([library.name], "p")
    check([], "a/b")
