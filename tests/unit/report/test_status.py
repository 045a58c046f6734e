"""What a run says of itself when it ends, and its report after that: how far it came, and commands that can be run."""

from __future__ import annotations

import fcntl
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_vit.config.flags import parse
from lowrank_vit.ranks.world import World
from lowrank_vit.report.page import headline, write_report
from lowrank_vit.report.read import read_run
from lowrank_vit.report.status import Step, next_steps, run_status, shown
from lowrank_vit.train import _farewell
from lowrank_vit.training.trainer import Result


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two of its three epochs, which was stopped in its third; `output/latest` is where one stands."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "bin" / "lowrank-vit"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script)])
    path = tmp_path / "output" / "a"
    path.mkdir(parents=True)
    (tmp_path / "output" / "latest").symlink_to("a")
    save(path, epochs=2, updates=27)
    (path / "model_best.pth.tar").touch()
    (path / "args.yaml").write_text("epochs: 3\ncooldown-epochs: 0\nmodel-ema: true\n")
    (path / "summary.csv").write_text("epoch,update,train_loss,eval_top1\n0,10,2.0,50\n1,20,1.5,60\n")
    write_log(path, 10, 20)
    return Path("output/latest")


def save(path: Path, *, epochs: int, updates: int) -> None:
    torch.save({"progress": {"epoch": epochs}, "step": {"num_updates": updates}}, path / "last.pth.tar")


def write_log(path: Path, *updates: int) -> None:
    lines = [{"kind": "train", "update": u, "epoch": (u - 1) // 10, "loss": 2.0, "img_per_s": 900.0} for u in updates]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def commands(steps: list[Step]) -> list[list[str]]:
    return [shlex.split(step.command().replace("\\\n", " ")) for step in steps]


def test_a_stopped_run_says_how_to_go_on(run):
    first, *others = commands(next_steps(run, {"model-ema": True}, is_finished=False))
    resume = ["--config", "output/a/args.yaml", "--resume", "output/a/last.pth.tar"]
    assert first == ["lowrank-vit", "train", *resume]
    assert ["lowrank-vit", "report", "output/a"] in others
    parse(first[2:])


def test_without_a_checkpoint_it_can_only_begin_anew(run):
    (run / "last.pth.tar").unlink()
    assert commands(next_steps(run, {}, is_finished=False))[0][2:] == ["--config", "output/a/args.yaml"]


@pytest.mark.parametrize(
    ("content", "is_ema"),
    [
        ({"better": "ema", "state_dict_ema": {"w": torch.ones(1)}}, True),
        ({"better": "model", "state_dict_ema": {"w": torch.ones(1)}}, False),
        ({"state_dict_ema": {"w": torch.ones(1)}}, True),  # older: chosen by the EMA
        ({}, False),
    ],
)
def test_a_finished_run_is_scored_with_the_weights_that_were_best(run, content, is_ema):
    torch.save({"state_dict": {"w": torch.ones(1)}, **content}, run / "model_best.pth.tar")
    said = [command for command in commands(next_steps(run, {}, is_finished=True)) if "--checkpoint" in command]
    assert [command[1] for command in said] == ["analyze-spectrum", "validate", "inference"]
    assert ["--use-ema" in command for command in said] == [is_ema] * 3


@pytest.mark.parametrize("data", [{}, {"data-dir": "photos"}])
def test_after_synthetic_data_come_real_ones(run, data):
    *_, last = commands(next_steps(run, {"synthetic": True, **data}, is_finished=True))
    assert last[2:5] == ["--config", "output/a/args.yaml", "--no-synthetic"]
    assert last[5:] == ([] if data else ["--data-dir", "DATA"])


def test_a_run_that_was_not_sent_is_to_be_synced(run):
    (run / "wandb" / "offline-run-1").mkdir(parents=True)
    assert commands(next_steps(run, {}, is_finished=True))[-1] == ["wandb", "sync", "output/a/wandb/offline-run-*"]


def test_what_trackers_wrote_to_the_run_directory_can_be_looked_at(run):
    for name in ("tensorboard/update/events.out.tfevents.1", "mlflow/mlflow.db"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("")
    assert commands(next_steps(run, {}, is_finished=True))[-2:] == [
        ["tensorboard", "--logdir", "output/a/tensorboard"],
        ["mlflow", "ui", "--backend-store-uri", "sqlite:///output/a/mlflow/mlflow.db"],
    ]


def test_ranks_are_started_as_before(run):
    (first, *_) = next_steps(run, {}, is_finished=False, launcher="torchrun ...")
    assert first.command().startswith("torchrun ... -m lowrank_vit.train --config")


def test_paths_are_quoted_and_long_commands_are_broken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(Path("my runs/a")) == "'my runs/a'"
    assert shown(Path("/usr")) == "/usr"
    text = Step("", ("python -m x", *[f"--flag{n} value" for n in range(12)])).command("  ")
    assert max(len(line) for line in text.splitlines()) <= 79
    assert len(shlex.split(text.replace("\\\n", " "))) == 27


def test_how_far_a_stopped_run_came(run):
    args = {"epochs": 3, "cooldown-epochs": 0}
    table = {"epoch": np.array([0.0, 1.0]), "update": np.array([10.0, 20.0])}
    far = run_status(run, args, table, table)
    assert (far.epochs, far.planned, far.updates, far.is_running) == (2, 3, 27, False)
    assert far.in_words == "Stopped after update 27: 2 of 3 epochs are done."
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_status(run, args, table, table).in_words == "Still training: 2 of 3 epochs are done."
    save(run, epochs=3, updates=30)
    assert run_status(run, args, table, table).in_words == ""


def test_logs_tell_how_far_a_run_came_whose_checkpoint_is_damaged(run):
    (run / "last.pth.tar").write_bytes(b"PK not really")
    found = read_run(run).status
    assert found
    assert (found.epochs, found.updates) == (2, 20)


def test_the_report_of_a_stopped_run(run):
    write_report(run)
    html = (run / "report.html").read_text()
    assert "Stopped after update 27: 2 of 3 epochs are done." in html
    assert "--resume output/a/last.pth.tar" in html.replace("\\\n    ", "")
    assert "What next" in html


def test_the_report_of_a_synthetic_run_has_speed_and_loss(run):
    (run / "summary.csv").unlink()
    (run / "args.yaml").write_text("epochs: 3\ncooldown-epochs: 0\nsynthetic: true\n")
    write_log(run, 10, 20, 30)
    save(run, epochs=3, updates=30)
    _, notes = write_report(run)
    assert not any("summary.csv" in note for note in notes)
    assert dict(headline(read_run(run))) == {
        "newest train loss": "2",
        "epochs": "3 of 3",
        "updates": "30",
        "median images / s": "900",
    }
    assert "accuracy" not in (run / "report.html").read_text().replace("Loss, accuracy", "")
    assert (run / "report" / "training.png").exists()


@pytest.fixture
def result(run) -> dict[str, Any]:
    return {"run_dir": run, "metric": "top1", "best": 98.6, "best_epoch": 1, "train_s": 75.0, "num_updates": 30}


def test_a_farewell_lists_what_is_there(run, result):
    config = parse(["--epochs", "3"])
    text = _farewell(Result(**result), config, World())
    assert text.startswith("\ntop-1 98.6 % (best, epoch 2), 1:15 of training\n")
    assert "  output/a/\n" in text
    assert "latest" not in text
    assert "spectra/" not in text
    assert "wandb" not in text
    assert "lowrank-vit report output/a" in text
    (run / "spectra").mkdir()
    (run / "spectra" / "update_00000000.npz").touch()
    (run / "wandb" / "offline-run-1").mkdir(parents=True)
    text = _farewell(Result(**result), config, World())
    assert "spectra/" in text
    assert "wandb sync output/a/wandb/offline-run-*" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_farewell_tells_both_scores(run, result):
    for scores, said in (
        ({"model": 98.6, "ema": 23.0}, "of the model's own weights; the EMA's have 23 %"),
        ({"model": 97.0, "ema": 98.6}, "of the EMA's weights; the model's own have 97 %"),
    ):
        text = _farewell(Result(**result, best_scores=scores), parse([]), World())
        assert text.startswith(f"\ntop-1 98.6 % (best, epoch 2), 1:15 of training\n{said}\n")


def test_a_farewell_of_a_stopped_run_begins_with_resuming(run, result):
    text = _farewell(Result(**result, stopped_by="SIGTERM"), parse(["--epochs", "3"]), World())
    assert "stopped by SIGTERM after update 30; everything is saved" in text
    assert text.partition("next:\n")[2].lstrip().startswith("lowrank-vit train --config output/a/args.yaml")
