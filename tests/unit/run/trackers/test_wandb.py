"""W&B: its axes, its offline mode, and the library itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.errors import CommError, UsageError

from lowrank_vit.common.errors import UserError
from lowrank_vit.run.trackers import wandb as tracker
from lowrank_vit.run.trackers.sending import Trackers
from lowrank_vit.run.trackers.tracker import About
from tests.unit.run.trackers.libraries import fake
from tests.wandb_files import logged_rows


def started(run_dir: Path, **more: Any) -> Trackers:
    return Trackers.start(["wandb"], About("p", run_dir.name, run_dir, {"lr": 1.0}), **more)


def test_names_and_axes(tmp_path):
    axes: dict[str, str | None] = {}
    run = SimpleNamespace(id="x", define_metric=lambda name, step_metric=None: axes.update({name: step_metric}))
    tracker.WandbRun(run, About("p", "n", tmp_path))
    assert (axes["train_loss"], axes["eval_*"], axes["train/*"]) == ("epoch", "epoch", "update")
    assert axes["spec/*"] == axes["spec_ema/*"] == "spec_update"


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
    log = started(tmp_path)
    for row in sent:
        log.log(row, next(iter(row)))
    log.finish()
    assert logged_rows(tmp_path / "wandb") == sent


@pytest.mark.parametrize(
    "error", [CommError("timed out"), ConnectionError("refused"), TimeoutError("slow"), TypeError()]
)
def test_without_the_server_the_run_is_kept_on_disk(tmp_path, monkeypatch, error):
    said: list[str] = []
    modes: list[str] = []
    library = fake("wandb", monkeypatch)
    there = wandb.init

    def init(mode: str = "", **more: Any) -> Any:
        modes.append(mode)
        if not mode:
            raise error
        return there(**more)

    monkeypatch.setattr(wandb, "init", init)
    log = started(tmp_path, say=said.append)
    assert log.ids == {"wandb": "abc123"}
    log.finish()
    assert modes == ["", "offline"]
    assert library.is_finished
    assert said[0].startswith("warning: W&B's server does not answer")
    assert f"wandb sync {tmp_path}" in said[0]


def test_without_server_and_disk_training_goes_on(tmp_path, monkeypatch):
    fake("wandb", monkeypatch).failing["start"] = OSError("no space left")
    said: list[str] = []
    log = started(tmp_path, say=said.append)
    log.log({"epoch": 0, "train_loss": 1.0}, "epoch")
    log.finish()
    assert log.ids == {}
    assert "goes on without W&B" in said[-1]


def test_what_failed_can_be_sent_later(tmp_path, monkeypatch):
    said: list[str] = []
    fake("wandb", monkeypatch).failing["log"] = RuntimeError("the service is gone")
    log = started(tmp_path, say=said.append)
    log.log({"epoch": 0, "train_loss": 1.0}, "epoch")
    log.finish()
    assert f"wandb sync {tmp_path}" in said[0]


def test_a_real_server_that_is_away(tmp_path, monkeypatch):
    """The library itself, with nobody at the other end of the line."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(tracker, "INIT_TIMEOUT_S", 2.0)
    said: list[str] = []
    log = started(tmp_path, say=said.append)
    log.log({"epoch": 0, "train_loss": 1.0}, "epoch")
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
        log = started(Path("run"))
        log.log({"epoch": 0, "train_loss": 1.0}, "epoch")
        log.finish()
        assert logged_rows(folder / "run" / "wandb") == [{"epoch": 0, "train_loss": 1.0}]


def test_a_missing_login_is_the_users(tmp_path, monkeypatch):
    fake("wandb", monkeypatch).failing["start"] = UsageError("No API key configured.")
    with pytest.raises(UserError, match="wandb login"):
        started(tmp_path)


def test_a_resumed_run_is_the_same_wandb_run(tmp_path, monkeypatch):
    library = fake("wandb", monkeypatch)
    started(tmp_path, resume_ids={"wandb": "abc123"}).finish()
    assert (library.begun[0]["id"], library.begun[0]["resume"]) == ("abc123", "allow")
