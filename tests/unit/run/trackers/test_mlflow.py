"""MLflow's names, and the library itself where it is installed."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank_vit.run.trackers.mlflow import accepted
from lowrank_vit.run.trackers.sending import Trackers
from lowrank_vit.run.trackers.tracker import About
from tests.unit.run.trackers.libraries import fake


@pytest.mark.parametrize(
    ("name", "as_sent"),
    [
        ("spec_ema/blocks.0.mlp.fc1/sigma_max", "spec_ema/blocks.0.mlp.fc1/sigma_max"),
        ("train/lr", "train/lr"),
        ("Ä b:c", "Ä b:c"),
        ("a?<b>", "a__b_"),
        ("a//b/", "a/b"),
        ("/a/./b", "a/b"),
        ("../../a..b", "_/_/a_b"),
        ("a..b", "a..b"),
        (".", "_"),
        ("", "_"),
        ("x" * 300, "x" * 249),
    ],
)
def test_names_that_it_refuses_are_changed(name, as_sent):
    assert accepted(name) == as_sent
    assert accepted(as_sent) == as_sent


def test_rows_of_thousands_and_configurations_of_hundreds_go_in_parts(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    library = fake("mlflow", monkeypatch)
    about = About("p", "n", tmp_path, {f"flag-{n}": n for n in range(250)})
    log = Trackers.start(["mlflow"], about)
    log.log({"spec_update": 5, **{f"spec/{n}": 1.0 for n in range(2500)}}, "spec_update")
    log.finish()
    assert [len(row) - 1 for row in library.rows] == [1000, 1000, 500]
    assert len(library.begun[0]["config"]) == 250
    assert library.begun[0]["uri"] == f"sqlite:///{tmp_path}/mlflow/mlflow.db"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "databricks"])
def test_a_server_that_is_named_is_taken_and_a_run_that_is_gone_begins_anew(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    library = fake("mlflow", monkeypatch)
    log = Trackers.start(["mlflow"], About("p", "n", tmp_path), resume_ids={"mlflow": "not there"})
    log.finish()
    assert library.begun[0]["uri"] == uri
    assert log.ids == {"mlflow": "abc123"}
    assert not list(tmp_path.iterdir())


def test_no_database_is_made_beside_a_run_directory_whose_name_it_would_cut(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fake("mlflow", monkeypatch)
    said: list[str] = []
    (tmp_path / "a?b").mkdir()
    Trackers.start(["mlflow"], About("p", "n", tmp_path / "a?b"), say=said.append).finish()
    assert len(said) == 1
    assert "set MLFLOW_TRACKING_URI" in said[0]
    assert [path.name for path in tmp_path.rglob("*")] == ["a?b"]


@pytest.mark.filterwarnings("default")
def test_the_library_itself(tmp_path, monkeypatch):
    tracking: Any = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    about, ids = About("p", "n", tmp_path / "a b", {"data": "", "environment": {"gpu": "x"}}, ("b c",)), {}
    about.run_dir.mkdir()
    for last in (3, 5):  # killed after update 3, and resumed from update 1
        log = Trackers.start(["mlflow"], about, resume_ids=ids, timeout_s=300.0)
        for update in range(2 if ids else 1, last + 1):
            log.log({"update": update, "train/loss": 1.0 / update, "train/lr": float("nan")}, "update")
        log.finish(timeout_s=300.0)
        ids = log.ids
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{about.run_dir}/mlflow/mlflow.db")
    history = client.get_metric_history(ids["mlflow"], "train/loss")
    assert [(point.step, point.value) for point in history] == [(update, 1.0 / update) for update in range(1, 6)]
    run = client.get_run(ids["mlflow"])
    assert (run.info.status, run.info.run_name, run.data.params["environment/gpu"]) == ("FINISHED", "n", "x")
    assert run.data.tags["b c"] == "true"
