"""TensorBoard's own files, read back with its own reader."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import pytest

from lowrank_vit.run.trackers.sending import Trackers
from lowrank_vit.run.trackers.tracker import About
from tests.events import scalars, texts


def started(run_dir: Path, **more: Any) -> Trackers:
    said = {"say": more.pop("say")} if "say" in more else {}
    about = About("p", run_dir.name, run_dir, {"lr": 1.0, "data": "<b>"}, ("small",), **more)
    return Trackers.start(["tensorboard"], about, **said)


def test_a_folder_for_each_axis(tmp_path):
    log = started(tmp_path)
    log.log({"update": 120, "train/loss": 1.0, "train/lr": math.nan}, "update")
    log.log({"spec_update": 100, "spec/blocks.0.mlp.fc1/sigma_max": 2.0}, "spec_update")
    log.log({"update": 120, "epoch": 3, "eval_top1": 7.0}, "epoch")
    log.finish()
    assert {axis.name for axis in (tmp_path / "tensorboard").iterdir()} == {"epoch", "update", "spec_update"}
    train = scalars(tmp_path, "update")
    assert math.isnan(train.pop("train/lr")[0][1])
    assert train == {"train/loss": [(120, 1.0)]}
    assert scalars(tmp_path, "spec_update") == {"spec/blocks.0.mlp.fc1/sigma_max": [(100, 2.0)]}
    assert scalars(tmp_path, "epoch") == {"update": [(3, 120.0)], "eval_top1": [(3, 7.0)]}
    (config,) = texts(tmp_path, "update")
    assert all(text in config for text in ('"lr": 1.0', '"data": "<b>"', '"small"'))


def test_a_run_that_was_killed_and_is_resumed_has_each_point_once(tmp_path):
    """Killed: nothing was closed. The second attempt makes other numbers, as some devices do."""
    first = started(tmp_path)
    for update in range(1, 8):
        first.log({"update": update, "train/loss": 1.0}, "update")
        first.log({"update": update, "epoch": update - 1, "eval_top1": 1.0}, "epoch")
        first.log({"spec_update": update, "spec/x": 1.0}, "spec_update")
    first.finish()
    second = started(tmp_path, goes_on_at={"epoch": 3, "update": 5, "spec_update": 5})
    for update in range(5, 10):
        second.log({"update": update, "train/loss": 2.0}, "update")
        second.log({"update": update, "epoch": update - 1, "eval_top1": 2.0}, "epoch")
        second.log({"spec_update": update, "spec/x": 2.0}, "spec_update")
    second.finish()
    expected = [(update, 1.0 if update < 5 else 2.0) for update in range(1, 10)]
    assert scalars(tmp_path, "update")["train/loss"] == expected
    assert scalars(tmp_path, "spec_update")["spec/x"] == expected
    epochs = scalars(tmp_path, "epoch")["eval_top1"]
    assert epochs == [(0, 1.0), (1, 1.0), (2, 1.0)] + [(epoch, 2.0) for epoch in range(4, 9)]


def test_a_place_that_cannot_be_written_is_said_at_the_start(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    said: list[str] = []
    log = started(tmp_path, say=said.append)
    log.log({"update": 1, "train/loss": 1.0}, "update")
    log.finish()
    (line,) = said
    assert line.startswith("warning: TensorBoard cannot be started (")
    assert line.endswith("; training goes on without it.")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_said_once(tmp_path):
    said: list[str] = []
    log = started(tmp_path, say=said.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        for update in range(400):
            log.log({"update": update, **{f"train/{n}": 1.0 for n in range(100)}}, "update")
        log.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said
    assert said[0].startswith(("warning: TensorBoard failed (", "warning: TensorBoard could not send everything ("))
    assert len(said) <= 2
