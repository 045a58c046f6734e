"""The run's files and its directory."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import resource

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.run.directory import RunDir, environment
from lowrank_vit.run.metrics import RunLog, last_recorded
from tests.forked import Forked
from tests.waiting import LONG_S


def rows(path):
    with (path / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_jsonl_is_json_even_for_nan(tmp_path):
    with RunLog(tmp_path) as log:
        log.log("train", 3, {"loss": 0.5, "bad": math.nan, "worse": -math.inf})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"kind": "train", "update": 3, "loss": 0.5, "bad": None, "worse": None}


def test_a_resumed_summary_has_each_epoch_once(tmp_path):
    with RunLog(tmp_path) as log:
        for epoch in range(3):
            log.log_epoch({"epoch": epoch, "update": 9, "eval_top1": 10.0 * epoch})
    with RunLog(tmp_path, start_epoch=2) as log:
        log.log_epoch({"epoch": 2, "update": 9, "eval_top1": 99.0, "eval_ema_top1": 98.0})
    assert [(r["epoch"], r["eval_top1"], r["eval_ema_top1"]) for r in rows(tmp_path)] == [
        ("0", "0", ""),
        ("1", "10", ""),
        ("2", "99", "98"),
    ]


def test_what_is_not_known_of_an_epoch_has_an_empty_cell_and_no_key(tmp_path):
    with RunLog(tmp_path) as log:
        log.log_epoch({"epoch": 0, "update": 9, "img_per_s": None, "eval_top1": 10.0})
    assert (tmp_path / "summary.csv").read_text().splitlines() == ["epoch,update,img_per_s,eval_top1", "0,9,,10"]
    assert "img_per_s" not in (tmp_path / "metrics.jsonl").read_text()


def test_only_one_process_owns_a_run_directory(tmp_path):
    ours = RunDir.create(tmp_path, "run", "x")
    code = (
        "from pathlib import Path; from lowrank_vit.run.directory import RunDir; "
        f"RunDir.reopen(Path({str(ours.path)!r}))"
    )
    _, err = Forked(exec, code, {}).communicate(timeout=LONG_S)
    assert "is in use by another process" in err
    ours.close()
    theirs = Forked(exec, code, {})
    theirs.communicate(timeout=LONG_S)
    assert theirs.returncode == 0


def test_default_names_never_collide(tmp_path):
    first, second = (RunDir.create(tmp_path, "", "same") for _ in range(2))
    assert first.path != second.path
    assert (tmp_path / "latest").resolve() == second.path.resolve()
    for run_dir in (first, second):
        run_dir.close()


def test_a_directory_is_taken_over_unless_it_holds_a_checkpoint_other_files_or_a_process(tmp_path, capsys):
    run = tmp_path / "run"
    first = RunDir.create(tmp_path, "run", "x")
    for name in ("metrics.jsonl", "summary.csv", "args.yaml", ".args.yaml.part"):
        (run / name).write_text("{}")
    (run / "spectra").mkdir()
    (run / "spectra" / "update_00000000.npz").write_text("")
    with pytest.raises(UserError, match="in use by another process"):
        RunDir.require_free(tmp_path, "run")
    first.close()
    RunDir.require_free(tmp_path, "run")
    RunDir.create(tmp_path, "run", "x").close()
    assert f"{run} has an attempt that ended before its first checkpoint" in capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == [".lock", "args.yaml"]
    for name, said in (("thesis.txt", "thesis.txt is not a run's file"), ("last.pth.tar", "--resume .*last")):
        (run / name).write_text("precious")
        with pytest.raises(UserError, match=f"is in use: .*{said}"):
            RunDir.require_free(tmp_path, "run")
        with pytest.raises(UserError, match=f"is in use: .*{said}"):
            RunDir.create(tmp_path, "run", "x")
        (run / name).unlink()
    RunDir.create(tmp_path, "run", "x").close()  # what was refused is not left locked


@pytest.mark.parametrize("is_link", [False, True])
def test_what_was_made_of_a_dead_attempt_goes_with_it(is_link, tmp_path):
    RunDir.create(tmp_path, "run", "x").close()
    run = tmp_path / "run"
    for name in ("spectra", "report", "wandb", "tensorboard", "mlflow"):
        if is_link:
            (tmp_path / name).mkdir()
            (run / name).symlink_to(tmp_path / name)
        else:
            (run / name).mkdir()
    (run / "wandb" / "offline-run-1").mkdir()
    (run / "tensorboard" / "update").mkdir()
    stale = "spectra/update_00000000.npz", "spectra/vectors_123456789.npz", "spectra/weights_00000000.pth"
    stale += "spectra/index.json", "report/training.png", "report.html", "wandb/offline-run-1/run.wandb"
    stale += "tensorboard/update/events.out.tfevents.1.host.2.0", "mlflow/mlflow.db"
    for name in (*stale, "spectra/update_best.npz"):
        (run / name).write_text("")
    RunDir.create(tmp_path, "run", "x").close()
    assert not [name for name in stale if (run / name).exists()]
    assert (run / "spectra" / "update_best.npz").exists()
    assert (run / "spectra").is_symlink() == is_link


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.csv", "epoch,eval_top1\n0,50\n"),
        ("metrics.jsonl", '{"kind": "train", "update": 1}\n{"kind": "eval", "update": 2, "epoch": 0}\n'),
    ],
)
def test_a_run_whose_checkpoints_were_moved_away_keeps_its_records(name, text, tmp_path):
    said = f"run is in use: it has no checkpoint any more, but {name} has the scores"
    RunDir.create(tmp_path, "run", "x").close()
    (tmp_path / "run" / name).write_text(text)
    for look in (RunDir.require_free, lambda output, name: RunDir.create(output, name, "x")):
        with pytest.raises(UserError, match=said):
            look(tmp_path, "run")
    assert (tmp_path / "run" / name).read_text() == text
    (tmp_path / "run" / ".last.pth.tar.7.part").write_text("")  # no: it was killed while it wrote the first of them
    RunDir.create(tmp_path, "run", "x").close()
    assert not (tmp_path / "run" / name).exists()


def test_the_link_to_the_newest_run_is_no_name_for_one(tmp_path):
    RunDir.create(tmp_path, "run", "x").close()
    for look in (RunDir.require_free, lambda output, name: RunDir.create(output, name, "x")):
        with pytest.raises(UserError, match="--experiment latest: this is the name of the link to the latest run"):
            look(tmp_path, "latest")
    assert (tmp_path / "latest").resolve() == tmp_path / "run"


def test_environment_names_versions_but_no_paths():
    found = environment(torch.device("cpu"))
    assert found["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["cpu_cores"] >= 1
    assert "/" not in found["command"].split()[0]


def test_a_resumed_run_has_each_record_once(tmp_path):
    with RunLog(tmp_path) as log:
        for update in (5, 10, 15):
            log.log("train", update, {"loss": 1.0})
        log.log("spec", 8, {"sigma": 2.0})  # finished after 15
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "upd')  # killed while it wrote
    with RunLog(tmp_path, start_update=10) as log:
        log.log("train", 15, {"loss": 7.0})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["update"]) for r in records] == [("train", 5), ("train", 10), ("spec", 8), ("train", 15)]
    assert records[-1]["loss"] == 7.0
    assert not list(tmp_path.glob(".*"))


def test_what_is_no_record_ends_no_resume(tmp_path):
    kept = (
        b'{"kind": "train", "update": 5}\n',
        b'{"kind": "flow", "update": 9, "epoch": 1}\n{"kind": "eval", "update": 9, "epoch": 0}\n',
    )
    odd = (
        b'{"kind": "spec"}\n',
        b"1\n",
        b"\xff\xfe\n",
        b'{"kind": "eval", "update": 8}\n',
        b'{"kind": "flow", "update": 9, "epoch": 2}\n',  # of a validation that is to come again
        b"[]\n",
        b"\n",
        b'{"update": 1}\n',
    )
    (tmp_path / "metrics.jsonl").write_bytes(kept[0] + b"".join(odd) + kept[1])
    (tmp_path / "summary.csv").write_bytes(b"epoch,eval_top1\n0,5\n\xff,7\n1\n,\n")
    assert last_recorded(tmp_path, "train", 9) == 5
    assert last_recorded(tmp_path, "spec", 9) == -1
    RunLog(tmp_path, start_epoch=2, start_update=9).__exit__()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(kept)
    with RunLog(tmp_path, start_epoch=2, start_update=9) as log:
        log.log_epoch({"epoch": 2, "update": 10, "eval_top1": 6.0})
    assert [row["epoch"] for row in rows(tmp_path)] == ["0", "2"]


def test_a_full_disk_is_said_once_and_counted_at_the_end(tmp_path):
    said: list[str] = []
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with RunLog(tmp_path, say=said.append) as log:
        for update in range(3):
            log.log("train", update, {"loss": 1.0})
        (tmp_path / "metrics.jsonl").unlink()
        log.log("train", 3, {"loss": 1.0})
        (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        log.log("train", 4, {"loss": 1.0})
    lost = "warning: metrics.jsonl cannot be written (No space left on device); its numbers are lost until it can be."
    assert said == [lost, "4 lines of metrics.jsonl were lost; the first was reported above"]
    assert (tmp_path / "kept").read_text() == '{"kind": "train", "update": 3, "loss": 1.0}\n'


def test_a_line_for_which_there_is_no_room_leaves_no_piece(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path, say=lambda line: None) as log:
        log.log("train", 0, {"loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 20, before[1]))
        try:
            log.log("train", 1, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log.log("train", 2, {"loss": 1.0})
    assert [json.loads(line)["update"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_no_file_of_a_run_ends_it(tmp_path, monkeypatch, number):
    """At the beginning, when it is resumed, while it goes on and at its end."""
    for update in range(3):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "train", "update": update}) + "\n")

    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    said: list[str] = []
    monkeypatch.setattr("os.open", refused)
    monkeypatch.setattr("pathlib.Path.open", refused)
    with RunLog(tmp_path, start_update=1, say=said.append) as log:
        log.log_epoch({"epoch": 0, "update": 3})
    RunDir(tmp_path, None).write_text("args.yaml", "", said.append)
    assert len(said) == 6
    assert all(os.strerror(number) in line for line in said[:3] + said[5:])


def test_a_run_that_is_gone_on_with_is_rid_of_what_a_kill_has_left(tmp_path):
    (tmp_path / "spectra").mkdir()
    left = [
        ".last.pth.tar.0123abcd.part",
        ".last.pth.tar.77.part",
        ".summary.csv.part",
        "spectra/.index.json.0123abcd.part",
    ]
    left += [f"spectra/{name}.partial" for name in ("update_00000100.npz", "vectors_00000100.npz", "index.json")]
    kept = ["last.pth.tar", "spectra/update_00000100.npz", "notes.partial"]
    for name in (*left, *kept):
        (tmp_path / name).write_text("")
    RunDir.reopen(tmp_path).close()
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*kept, ".lock"}
