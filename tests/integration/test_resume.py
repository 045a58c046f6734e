"""An interrupted run goes on as if nothing had happened, to the bit; and what a run that is killed leaves behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_vit import train as train_command
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.training.trainer import Trainer
from tests.forked import Forked
from tests.integration.conftest import RECIPE, UPDATES
from tests.runs import at_update, losses, records, same_weights, spectral_records, stop_after
from tests.waiting import LONG_S, wait_until

SHORT = ("--epochs", "2")


def last(tmp_path: Path, name: str) -> Path:
    return tmp_path / name / "last.pth.tar"


@pytest.fixture(scope="module")
def whole(digits_dir, tmp_path_factory):
    """Uninterrupted runs by their extra options; each is made once."""
    from tests.integration.conftest import SMALL

    made: dict[tuple[str, ...], Path] = {}

    def run(*more: str) -> Path:
        if more not in made:
            output = tmp_path_factory.mktemp("whole")
            argv = [*SMALL, "--data-dir", str(digits_dir), "--output", str(output), *RECIPE, *more]
            made[more] = Trainer(parse(argv), "whole").run().run_dir
        return made[more]

    return run


def interrupted(small, *more: str, after: int) -> Path:
    trainer = Trainer(parse(small(*RECIPE, *more)), "x")
    stop_after(trainer, after)
    result = trainer.run()
    assert (result.stopped_by, result.num_updates) == ("SIGTERM", after)
    return result.run_dir


@pytest.mark.parametrize(
    ("after", "more"),
    [
        (1, ()),  # in the first epoch, before anything was logged
        (6, ()),  # between two lines of the log
        (8, ()),  # just after one
        (UPDATES, ()),  # at an epoch's end, before it is validated
        (UPDATES + 1, ("--loader", "ffcv")),
        (2 * UPDATES, ()),
        (UPDATES + 3, (*SHORT, *"--sched none --opt lookahead_adamw --mean 0.4 --std 0.3 --warmup-epochs 0".split())),
        (UPDATES + 3, (*SHORT, *"--lr-noise 0.1 --sched-on-updates --sched wsd --opt sgd".split())),
        (UPDATES + 3, (*SHORT, *"--batch-size 32 --grad-accum-steps 4 --clip-grad 1 --sched-on-updates".split())),
        pytest.param(4, ("--amp", "--amp-dtype", "float16"), marks=pytest.mark.slow),  # with a scaled loss
    ],
)
def test_resumed_is_uninterrupted(small, whole, after, more):
    expected = whole(*more)
    part = interrupted(small, *more, after=after)
    Trainer(parse([*small(*RECIPE, *more), "--resume", str(part / "last.pth.tar")]), "x").run()
    assert losses(part) == losses(expected)
    assert [r["eval_top1"] for r in records(part, "eval")] == [r["eval_top1"] for r in records(expected, "eval")]
    assert same_weights(part / "last.pth.tar", expected / "last.pth.tar")
    epochs = [line.split(",")[0] for line in (part / "summary.csv").read_text().splitlines()]
    assert epochs == ["epoch", "0", "1", "2"][: 3 if "--epochs" in more else 4]
    speeds = [r.get("img_per_s") for r in records(part, "eval")]
    assert [speed is None for speed in speeds] == [
        after == UPDATES * (n + 1) for n in range(len(speeds))
    ]  # none to be measured
    assert all(speed for speed in speeds if speed is not None)
    assert [r["lr"] for r in records(part, "eval")] == [r["lr"] for r in records(expected, "eval")]


def test_a_run_interrupted_twice_with_other_batches_goes_on(small, whole):
    """The global batch is what counts; losses then agree up to rounding."""
    part = interrupted(small, after=5)
    again = Trainer(parse([*small(*RECIPE), "--resume", str(part / "last.pth.tar")]), "x")
    stop_after(again, UPDATES + 2)
    again.run()
    halves = ("--batch-size", "64", "--grad-accum-steps", "2", "--drop", "0", "--drop-path", "0")
    with pytest.raises(UserError, match=r"other options: --drop was 0\.1"):
        Trainer(parse([*small(*RECIPE, *halves), "--resume", str(part / "last.pth.tar")]), "x")
    saved = read_checkpoint(part / "last.pth.tar").content["step"]["meter"]
    assert len(saved["lrs"]) == 2  # of updates 12 and 13, which are logged with the next two
    Trainer(parse([*small(*RECIPE, *halves[:4]), "--resume", str(part / "last.pth.tar")]), "x").run()
    expected = losses(whole())
    found = losses(part)
    assert found.keys() == expected.keys()
    same = [update for update in found if update <= UPDATES + 2]
    assert all(found[update] == expected[update] for update in same)
    assert found[UPDATES + 4] == pytest.approx(expected[UPDATES + 4], rel=0.03)  # but for the draws of dropout


def test_another_global_batch_is_refused(small):
    part = interrupted(small, after=5)
    with pytest.raises(UserError, match=r"last\.pth\.tar: .*global batch was 128, now it is 64"):
        Trainer(parse([*small(*RECIPE), "-b", "64", "--resume", str(part / "last.pth.tar")]), "x")


def test_stopping_in_validation_validates_after_resuming(small, whole, monkeypatch):
    trainer = Trainer(parse(small(*RECIPE)), "x")
    assert trainer.setup.val_loader is not None
    batches = trainer.setup.val_loader.batches

    def and_stop(epoch):
        trainer.stop.ask(signal.SIGINT)
        yield from batches(epoch)

    monkeypatch.setattr(trainer.setup.val_loader, "batches", and_stop)
    part = trainer.run().run_dir
    assert not records(part, "eval")
    Trainer(parse([*small(*RECIPE), "--resume", str(part / "last.pth.tar")]), "x").run()
    assert losses(part) == losses(whole())
    scores = [
        [{name: value for name, value in record.items() if name.startswith("eval_")} for record in records(run, "eval")]
        for run in (part, whole())
    ]
    assert scores[0] == scores[1]


def test_spectra_go_on_after_an_interruption(small, tmp_path):
    """Each is taken once, and of the same weights as without the interruption."""
    more = ("--spec-monitor", "--spec-every", "9")
    expected = trained(Trainer(parse(small(*RECIPE, *more, "--experiment", "all")), "x"))
    trainer = Trainer(parse(small(*RECIPE, *more, "--experiment", "part")), "x")
    stop_after(trainer, 13)
    part = trained(trainer)
    trained(Trainer(parse([*small(*RECIPE, *more), "--resume", str(part / "last.pth.tar")]), "x"))
    updates = [0, 9, 18, 27]
    for update in updates:
        name = f"update_{update:08d}.npz"
        assert (expected / "spectra" / name).read_bytes() == (part / "spectra" / name).read_bytes()
    ours, theirs = spectral_records(part), spectral_records(expected)
    assert [record["update"] for record in ours] == [record["update"] for record in theirs] == updates
    for record, other in zip(ours, theirs, strict=True):
        assert without_times(record) == without_times(other)


def without_times(record: dict) -> dict:
    return {name: value for name, value in record.items() if "seconds" not in name}


def trained(trainer: Trainer) -> Path:
    """Run it; no refresh is left out because the one before is still being computed."""
    step_update = trainer.setup.scheduler.step_update

    def and_wait(num_updates: int, metric: float | None = None) -> None:
        step_update(num_updates, metric)
        assert trainer.monitor is not None
        trainer.monitor.wait()

    trainer.setup.scheduler.step_update = and_wait
    return trainer.run().run_dir


def test_resuming_with_other_options_is_refused(train, tmp_path):
    common = ("--warmup-epochs", "0", "--no-spec-monitor")
    train("--experiment", "a", "--epochs", "1", "--no-model-ema", *common)
    last = ("--resume", str(tmp_path / "a" / "last.pth.tar"), "--epochs", "2", *common)
    with pytest.raises(UserError, match=r"other options: --model-ema was False, now True"):
        train(*last)
    with pytest.raises(UserError, match=r"other options: --weight-decay was 0\.05, now 0\.9\. Resume"):
        train(*last, "--weight-decay", "0.9", "--no-model-ema")
    train(*last, "--no-model-ema", "--log-interval", "3")


def test_resuming_a_finished_run_says_so_and_changes_nothing(train, tmp_path, capsys):
    line = ("--epochs", "1", "--warmup-epochs", "0")
    first = train("--experiment", "a", *line)
    files = [path for path in first.run_dir.rglob("*") if path.name in ("metrics.jsonl", "summary.csv", "last.pth.tar")]
    before = [path.read_bytes() for path in files]
    again = train("--resume", str(first.run_dir / "last.pth.tar"), *line)
    assert "already finished: all 1 epochs are done" in capsys.readouterr().out
    assert [path.read_bytes() for path in files] == before
    assert (again.run_dir, again.best, again.num_updates) == (first.run_dir, first.best, first.num_updates)


def test_a_finished_run_needs_no_data_and_is_not_written_to(small, train, tmp_path, capsys):
    run = train("--experiment", "a", "--epochs", "1", "--warmup-epochs", "0", "--spec-monitor").run_dir
    argv = small("--resume", str(run / "last.pth.tar"), "--epochs", "1", "--warmup-epochs", "0", "--spec-monitor")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    train_command.main([*argv, "--data-dir", str(tmp_path / "gone")])
    out = capsys.readouterr().out
    assert "already finished: all 1 epochs are done" in out
    assert "(best, epoch 1)\n" in out
    assert "next:" in out
    now = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert now == before
    content = torch.load(run / "last.pth.tar", weights_only=True)
    for part, key, value, told in (
        ("progress", "epoch", "x", "its `progress` has 'x' for `epoch`"),
        ("progress", "epoch", 9, "its counts contradict each other"),
        ("progress", "epoch", 11, "its counts contradict each other: 11 epochs and 1"),  # of an update each
        ("progress", "kept", 3, "its `progress` has 3 for `kept`"),
        ("step", "num_updates", None, "its `step` has None for `num_updates`"),
    ):
        torch.save({**content, part: {**content[part], key: value}}, run / "last.pth.tar")
        with pytest.raises(UserError, match=told):
            train_command.main(argv)


def test_a_refresh_that_a_kill_cut_short_is_done_before_a_run_counts_as_finished(small, train, tmp_path, capsys):
    line = ("--epochs", "1", "--warmup-epochs", "0", "--spec-monitor", "--spec-every", "11")
    run = train("--experiment", "a", *line).run_dir
    whole = records(run, "spec")
    path = run / "metrics.jsonl"
    path.write_text(
        "".join(row for row in path.read_text().splitlines(True) if '"spec"' not in row or '"update": 11' not in row)
    )
    assert records(run, "spec") == whole[:-1]
    train_command.main(small("--resume", str(run / "last.pth.tar"), *line))
    assert [row["update"] for row in records(run, "spec")] == [row["update"] for row in whole]
    assert "already finished" in capsys.readouterr().out


def test_an_attempt_that_died_before_its_first_checkpoint_is_taken_over(small, tmp_path, capsys):
    """The line that is submitted again is the same."""
    argv = [*small(), "--experiment", "a", "--spec-monitor", "--spec-every", "2"]

    class KilledError(Exception):
        pass

    def kill():
        raise KilledError

    trainer = Trainer(parse(argv), "x")
    at_update(trainer, 6, kill)
    with pytest.raises(KilledError):
        trainer.run()
    run = tmp_path / "a"
    assert records(run, "train")
    result = Trainer(parse(argv), "x").run()
    assert result.run_dir == run
    assert "has an attempt that ended before its first checkpoint; the run starts anew" in capsys.readouterr().out
    assert list(losses(run))[:2] == [5, 10]
    updates = [record["update"] for record in records(run, "spec")]
    assert updates == sorted(set(updates))


def endless(small, *more: str) -> list[str]:
    return small(*RECIPE, "--epochs", "1000", *more)


def modified(path: Path) -> int:
    """Nanoseconds; 0 for a file that is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_signals_save_and_say_how_to_go_on(small, tmp_path, name, monkeypatch, capsys):
    """Within this process; see the next test for one of its own."""
    made = Trainer.__init__

    def make(trainer: Trainer, *given: Any) -> None:
        made(trainer, *given)
        at_update(trainer, 5, lambda: signal.raise_signal(getattr(signal, name)))

    monkeypatch.setattr(Trainer, "__init__", make)
    train_command.main(small(*RECIPE, "--experiment", "s"))
    out = capsys.readouterr().out
    assert f"stopped by {name} after update 5; everything is saved" in out
    assert "--resume" in out
    assert read_checkpoint(last(tmp_path, "s")).content["step"]["num_updates"] == 5


def test_sigterm_saves_and_ends_cleanly(small, tmp_path):
    command = [sys.executable, "-m", "lowrank_vit.train", *endless(small, "--experiment", "s")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(last(tmp_path, "s").exists, while_runs=process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=LONG_S)
    finally:
        process.kill()  # a failure must not leave it running
    assert process.returncode == 0, err
    assert "stopped by SIGTERM after update" in out
    assert "--resume" in out
    state = read_checkpoint(last(tmp_path, "s"))
    said = int(out.partition("after update ")[2].partition(";")[0])
    assert state.content["step"]["num_updates"] == said


def test_a_killed_run_leaves_a_checkpoint_that_loads(small, tmp_path):
    """SIGKILL at many moments, while every update is saved."""
    more = ("--experiment", "k", "--checkpoint-interval", "1")
    resume: tuple[str, ...] = ()
    updates = []
    for wait_s in (0.0, 0.2):
        process = Forked(train_command.main, [*endless(small, *more), *resume])
        before = modified(last(tmp_path, "k"))
        try:
            wait_until(lambda since=before: modified(last(tmp_path, "k")) > since, while_runs=process)
            time.sleep(wait_s)
        finally:
            process.kill()
        updates.append(read_checkpoint(last(tmp_path, "k")).content["step"]["num_updates"])
        resume = ("--resume", str(last(tmp_path, "k")))
    assert updates == sorted(set(updates))
    Trainer(parse([*small(*RECIPE, "--epochs", "1000", *more), *resume]), "x").run_dir.close()
    assert not list((tmp_path / "k").glob(".*.part"))
