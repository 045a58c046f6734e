"""W&B: its axes, its offline mode, and the library itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.errors import CommError, UsageError

from lowrank_vit.common.errors import UserError
from lowrank_vit.run.metrics import RunLog
from lowrank_vit.run.trackers import wandb as tracker
from lowrank_vit.run.trackers.sending import Trackers
from lowrank_vit.run.trackers.tracker import About
from tests.unit.run.trackers.libraries import fake
from tests.wandb_files import logged_rows, run_files


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
    assert "goes on without it" in said[-1]


def test_what_failed_can_be_sent_later(tmp_path, monkeypatch):
    said: list[str] = []
    fake("wandb", monkeypatch).failing["log"] = RuntimeError("the service is gone")
    log = started(tmp_path, say=said.append)
    log.log({"epoch": 0, "train_loss": 1.0}, "epoch")
    log.finish()
    assert f"wandb sync {tmp_path}" in said[0]


SPECTRA = {
    "spec/blocks.0.mlp.fc1/sigma_max": 1.5,
    "spec/blocks.0.mlp.fc1/alpha": float("nan"),
    "spec/blocks.0.mlp.fc2/sigma_max": 2.5,
    "spec/blocks.0.mlp.fc2/alpha": 2.5,
    "spec/type/mlp.fc1/turn_bound": float("inf"),
}


def test_a_table_of_the_newest_spectra_comes_at_the_end(tmp_path, monkeypatch):
    library = fake("wandb", monkeypatch)
    with RunLog(tmp_path, trackers=started(tmp_path)) as log:
        log.log("spec", 100, SPECTRA)
        log.log("spec", 200, SPECTRA)
        assert library.tables == []
    (artifact,) = library.tables
    assert (artifact.name, artifact.type) == ("spectra-abc123", "spectra")
    (entry,) = artifact.manifest.entries.values()
    table = json.loads(Path(entry.local_path).read_text())
    assert table["columns"] == ["update", "ema", "name", "sigma_max", "alpha", "turn_bound"]
    assert table["data"][0] == [200, False, "blocks.0.mlp.fc1", 1.5, None, None]
    assert table["data"][1] == [200, False, "blocks.0.mlp.fc2", 2.5, 2.5, None]
    assert library.is_finished


@pytest.mark.parametrize("spectra", [{}, SPECTRA], ids=["none", "some"])
def test_a_table_that_fails_ends_the_run_there_all_the_same(tmp_path, monkeypatch, spectra):
    library, said = fake("wandb", monkeypatch), list[str]()
    monkeypatch.setattr(wandb, "Artifact", lambda *_, **__: 1 / 0)
    with RunLog(tmp_path, trackers=started(tmp_path, say=said.append)) as log:
        if spectra:
            log.log("spec", 100, spectra)
    assert library.is_finished
    assert [line.partition(" (")[0] for line in said] == ["warning: W&B could not send everything"] * bool(spectra)


def test_the_library_itself_takes_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    said: list[str] = []
    with RunLog(tmp_path, trackers=started(tmp_path, say=said.append)) as log:
        log.log("spec", 100, SPECTRA)
    assert said == []
    (file,) = run_files(tmp_path / "wandb")
    assert b"scalars.table.json" in file.read_bytes()


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
