"""W&B gets a copy of the numbers and never holds a run up."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.errors import CommError, UsageError

from lowrank_vit.common.errors import UserError
from lowrank_vit.run.metrics import RunLog
from lowrank_vit.run.wandb_log import WandbLog
from tests.wandb_files import logged_rows


class FakeRun:
    """Notes what it is told; `failing` methods raise, `finish` may hang."""

    id = "abc123"

    def __init__(self, failing: str = "", hangs: threading.Event | None = None) -> None:
        self.failing, self.hangs = failing, hangs
        self.axes: dict[str, str | None] = {}
        self.logged: list[dict[str, Any]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any]) -> None:
        if self.failing == "log":
            raise RuntimeError("the service is gone")
        self.logged.append(values)

    def finish(self) -> None:
        if self.hangs:
            self.hangs.wait()
        if self.failing == "finish":
            raise RuntimeError("cannot upload")
        if self.failing == "exit":
            raise SystemExit(1)


def test_names_and_axes(tmp_path):
    run = FakeRun()
    with RunLog(tmp_path, wandb=WandbLog(run, tmp_path, print)) as log:
        log.log("train", 120, {"loss": 1.0, "lr": 0.1})
        log.log("spec", 100, {"spec/blocks.0.mlp.fc1/sigma_max": 2.0})  # late: taken at 100, finished after 120
        log.log_epoch({"epoch": 3, "update": 120, "train_loss": 1.5, "eval_top1": 7.0})
    assert (run.axes["train_loss"], run.axes["eval_*"], run.axes["train/*"]) == ("epoch", "epoch", "update")
    assert run.axes["spec/*"] == run.axes["spec_ema/*"] == "spec_update"
    assert run.logged == [
        {"update": 120, "train/loss": 1.0, "train/lr": 0.1},
        {"spec_update": 100, "spec/blocks.0.mlp.fc1/sigma_max": 2.0},
        {"update": 120, "epoch": 3, "train_loss": 1.5, "eval_top1": 7.0},
    ]


def test_every_metric_gets_its_own_axis(tmp_path, monkeypatch):
    """W&B adds a metric's axis to a row without it, so rows that are as they were sent have no other axis.

    Many names, since W&B takes any of the patterns that fit a name.
    """
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sent = [{"update": n, f"train/k{n}": 1.0} for n in range(20)]
    sent += [{"spec_update": n, f"spec/k{n}": 1.0, f"spec_ema/k{n}": 1.0} for n in range(20)]
    names = "train_loss lr img_per_s data_wait eval_loss eval_top1 eval_ema_top5".split()
    sent += [{"epoch": n, name: 1.0} for n, name in enumerate(names)]
    log = WandbLog.start("p", tmp_path, {})
    for row in sent:
        log.log(row)
    log.finish()
    assert logged_rows(tmp_path / "wandb") == sent


@pytest.mark.parametrize("failing", ["log", "finish", "exit"])
def test_a_failure_is_said_once_and_the_run_goes_on(tmp_path, failing):
    said: list[str] = []
    with RunLog(tmp_path, wandb=WandbLog(FakeRun(failing), tmp_path, said.append)) as log:
        for update in range(3):
            log.log("train", update, {"loss": 1.0})
    assert said[1:] == ["3 lines were not sent to W&B, the first as was said"] * (failing == "log")
    assert "wandb sync" in said[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_upload_that_hangs_does_not_hold_up_the_end(tmp_path):
    said: list[str] = []
    hangs = threading.Event()
    WandbLog(FakeRun(hangs=hangs), tmp_path, said.append).finish(timeout_s=0.05)
    hangs.set()
    assert "not done after 0 s" in said[0]


@pytest.mark.parametrize(
    "error", [CommError("timed out"), ConnectionError("refused"), TimeoutError("slow"), TypeError()]
)
def test_without_the_server_the_run_is_kept_on_disk(tmp_path, monkeypatch, error):
    said: list[str] = []
    modes: list[str] = []

    def init(mode: str = "", **more: Any) -> FakeRun:
        modes.append(mode)
        assert more["config"] == {"data": "\\xff", "names": ["\\ud800"]}  # which its service can take
        if not mode:
            raise error
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    config = {"data": "\udcff", "names": ["\ud800"]}
    assert WandbLog.start("p", tmp_path, config, say=said.append).run_id == "abc123"
    assert modes == ["", "offline"]
    assert said[0].startswith("warning: W&B's server does not answer")
    assert f"wandb sync {tmp_path}" in said[0]


def test_without_server_and_disk_training_goes_on(tmp_path, monkeypatch):
    def init(**_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(wandb, "init", init)
    said: list[str] = []
    log = WandbLog.start("p", tmp_path, {}, say=said.append)
    log.log({"epoch": 0, "train_loss": 1.0})
    log.finish()
    assert log.run_id == ""
    assert "goes on without W&B" in said[-1]


def test_a_real_server_that_is_away(tmp_path, monkeypatch):
    """The library itself, with nobody at the other end of the line."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")
    said: list[str] = []
    log = WandbLog.start("p", tmp_path, {"lr": 1.0}, say=said.append, init_timeout_s=2.0)
    log.log({"epoch": 0, "train_loss": 1.0})
    log.finish()
    assert len(said) == 1
    assert logged_rows(tmp_path / "wandb") == [{"epoch": 0, "train_loss": 1.0}]


def test_runs_of_one_process_started_in_different_folders(tmp_path, monkeypatch):
    """W&B's service stays in the folder of the first."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.joinpath("run").mkdir(parents=True)
        monkeypatch.chdir(folder)
        log = WandbLog.start("p", Path("run"), {})
        log.log({"epoch": 0, "train_loss": 1.0})
        log.finish()
        assert logged_rows(folder / "run" / "wandb") == [{"epoch": 0, "train_loss": 1.0}]


def test_a_missing_login_is_the_users(tmp_path, monkeypatch):
    def init(**_: Any) -> None:
        raise UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match="wandb login"):
        WandbLog.start("p", tmp_path, {})


def test_a_resumed_run_is_the_same_wandb_run(tmp_path, monkeypatch):
    given: dict[str, Any] = {}

    def init(**arguments: Any) -> FakeRun:
        given.update(arguments)
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    WandbLog.start("p", tmp_path, {}, tags=("a", "b"), resume_id="abc123")
    assert (given["id"], given["resume"], given["tags"]) == ("abc123", "allow", ["a", "b"])
