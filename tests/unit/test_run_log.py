"""The run's files and its directory."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys

import pytest
import torch

from data_prep.errors import UserError
from lowrank_vit.engine.metrics import RunLog
from lowrank_vit.engine.progress import Clock, duration
from lowrank_vit.engine.run_dir import RunDir, environment


def rows(path):
    with (path / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_jsonl_is_json_even_for_nan(tmp_path):
    with RunLog(tmp_path, wandb_project=None, config={}, start_epoch=0) as log:
        log.log("train", 3, {"loss": 0.5, "bad": math.nan, "worse": -math.inf})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"kind": "train", "update": 3, "loss": 0.5, "bad": None, "worse": None}


def test_a_resumed_summary_has_each_epoch_once(tmp_path):
    with RunLog(tmp_path, wandb_project=None, config={}, start_epoch=0) as log:
        for epoch in range(3):
            log.log_epoch({"epoch": epoch, "eval_top1": 10.0 * epoch})
    with RunLog(tmp_path, wandb_project=None, config={}, start_epoch=2) as log:
        log.log_epoch({"epoch": 2, "eval_top1": 99.0, "eval_ema_top1": 98.0})
    assert [(r["epoch"], r["eval_top1"], r["eval_ema_top1"]) for r in rows(tmp_path)] == [
        ("0", "0", ""),
        ("1", "10", ""),
        ("2", "99", "98"),
    ]


def test_only_one_process_owns_a_run_directory(tmp_path):
    ours = RunDir.create(tmp_path, "run", "x")
    code = (
        "from pathlib import Path; from lowrank_vit.engine.run_dir import RunDir; "
        f"RunDir.reopen(Path({str(ours.path)!r}))"
    )
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is in use by another process" in theirs.stderr
    ours.close()
    subprocess.run([sys.executable, "-c", code], check=True)


def test_default_names_never_collide(tmp_path):
    first, second = (RunDir.create(tmp_path, "", "same") for _ in range(2))
    assert first.path != second.path
    assert (tmp_path / "latest").resolve() == second.path.resolve()
    for run_dir in (first, second):
        run_dir.close()
    with pytest.raises(UserError, match="is in use"):
        RunDir.create(tmp_path, first.path.name, "x")


def test_environment_names_versions_but_no_paths():
    found = environment(torch.device("cpu"))
    assert found["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["cpu_cores"] >= 1
    assert "/" not in found["command"].split()[0]


def test_clock_counts_waiting_as_part_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def slow_batches():
        for _ in range(3):
            now[0] += 3.0  # waiting for data
            yield 1

    clock = Clock()
    for _ in clock.timed(slow_batches()):
        now[0] += 1.0  # the step
    assert clock.train_s == pytest.approx(12.0)
    assert clock.wait_share == pytest.approx(9 / 12)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3700, "1:01:40")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_spectra_have_their_own_step_axis_in_wandb(tmp_path, monkeypatch):
    import wandb

    defined, logged = {}, []

    class Run:
        def define_metric(self, name, step_metric=None):
            defined[name] = step_metric

        def log(self, values):
            logged.append(values)

        def finish(self):
            pass

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    with RunLog(tmp_path, wandb_project="p", config={}, start_epoch=0) as log:
        log.log("train", 120, {"loss": 1.0})
        log.log("spec", 100, {"spec/blocks.0.mlp.fc1/sigma_max": 2.0})  # late: taken at 100, finished after 120
    assert defined["spec/*"] == defined["spec_ema/*"] == "spec_update"
    assert defined["*"] == "update"
    assert logged == [{"update": 120, "loss": 1.0}, {"spec_update": 100, "spec/blocks.0.mlp.fc1/sigma_max": 2.0}]
