"""An interrupted run goes on as if nothing had happened, to the bit; and what a run that is killed leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.errors import UserError
from lowrank_vit.config import parse
from lowrank_vit.engine import saver as saver_module
from lowrank_vit.engine.checkpoint import read_checkpoint, write_checkpoint
from lowrank_vit.engine.trainer import Trainer
from tests.runs import losses, records, same_weights, stop_after

RECIPE = """
--no-spec-monitor --epochs 3 --log-interval 4 --drop 0.1 --drop-path 0.1 --mixup 0.8 --cutmix 1 --reprob 0.25
--aa rand-m9-mstd0.5-inc1 --vflip 0.2 --model-ema-warmup
""".split()
UPDATES = 11
"""Of an epoch of the digits in batches of 128."""


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
        (2 * UPDATES + 5, ("--sched-on-updates",)),
        (UPDATES + 3, ("--batch-size", "32", "--grad-accum-steps", "4", "--clip-grad", "1")),
        (UPDATES + 3, ("--warmup-epochs", "0", "--opt", "sgd")),
        (4, ("--amp", "--amp-dtype", "float16")),  # with a scaled loss
        (UPDATES + 3, ("--sched", "none", "--opt", "lookahead_adamw", "--mean", "0.4", "--std", "0.3")),
        (UPDATES + 3, ("--lr-noise", "0.1", "--sched-on-updates", "--sched", "wsd")),
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
    assert epochs == ["epoch", "0", "1", "2"]


def test_a_run_interrupted_twice_with_other_batches_goes_on(small, whole):
    """The global batch is what counts; losses then agree up to rounding."""
    part = interrupted(small, after=5)
    again = Trainer(parse([*small(*RECIPE), "--resume", str(part / "last.pth.tar")]), "x")
    stop_after(again, UPDATES + 2)
    again.run()
    halves = ("--batch-size", "64", "--grad-accum-steps", "2", "--drop", "0", "--drop-path", "0")
    with pytest.raises(UserError, match=r"other options: --drop was 0\.1"):
        Trainer(parse([*small(*RECIPE, *halves), "--resume", str(part / "last.pth.tar")]), "x")
    Trainer(parse([*small(*RECIPE, *halves[:4]), "--resume", str(part / "last.pth.tar")]), "x").run()
    expected = losses(whole())
    found = losses(part)
    assert found.keys() == expected.keys()
    same = [update for update in found if update <= UPDATES + 2]
    assert all(found[update] == expected[update] for update in same)


def test_another_global_batch_is_refused(small):
    part = interrupted(small, after=5)
    with pytest.raises(UserError, match=r"last\.pth\.tar: .*global batch was 128, now it is 64"):
        Trainer(parse([*small(*RECIPE), "-b", "64", "--resume", str(part / "last.pth.tar")]), "x")


def test_stopping_in_validation_validates_after_resuming(small, whole, monkeypatch):
    trainer = Trainer(parse(small(*RECIPE)), "x")
    assert trainer.parts.val_loader is not None
    batches = trainer.parts.val_loader.batches

    def and_stop(epoch):
        trainer.world.ask_to_stop(signal.SIGINT)
        yield from batches(epoch)

    monkeypatch.setattr(trainer.parts.val_loader, "batches", and_stop)
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
    expected = Trainer(parse(small(*RECIPE, *more, "--experiment", "all")), "x").run().run_dir
    part = interrupted(small, *more, "--experiment", "part", after=13)
    Trainer(parse([*small(*RECIPE, *more), "--resume", str(part / "last.pth.tar")]), "x").run()
    for name in ("update_00000009.npz", "update_00000027.npz"):
        if (expected / "spectra" / name).exists() and (part / "spectra" / name).exists():
            assert (expected / "spectra" / name).read_bytes() == (part / "spectra" / name).read_bytes()
    updates = [record["update"] for record in records(part, "spec")]
    assert updates == sorted(set(updates))


def test_resuming_with_other_options_is_refused(train, tmp_path):
    common = ("--warmup-epochs", "0", "--no-spec-monitor")
    train("--experiment", "a", "--epochs", "1", "--no-model-ema", *common)
    last = ("--resume", str(tmp_path / "a" / "last.pth.tar"), "--epochs", "2", *common)
    with pytest.raises(UserError, match=r"without an EMA\. Resume it with --no-model-ema"):
        train(*last)
    with pytest.raises(UserError, match=r"other options: --weight-decay was 0\.05, now 0\.9\. Resume"):
        train(*last, "--weight-decay", "0.9", "--no-model-ema")
    train(*last, "--no-model-ema", "--log-interval", "3")


def test_checkpoints_between_validations(small, tmp_path, monkeypatch):
    """By updates; the file that a killed run is left with is the newest of them."""
    written: list[int] = []

    def note(path, content):
        write_checkpoint(path, content)
        written.append(content["step"]["num_updates"])

    monkeypatch.setattr(saver_module, "write_checkpoint", note)
    Trainer(parse(small(*RECIPE, "--checkpoint-interval", "5")), "x").run()
    assert {11, 22, 33} < set(written) <= {5, 10, 11, 15, 20, 22, 25, 30, 33}  # none while another is being written
    assert written == sorted(written)
    written.clear()
    Trainer(parse(small(*RECIPE, "--checkpoint-interval", "0.0001m")), "x").run()  # at every line of the log
    assert {11, 22, 33} < set(written) <= {4, 8, 11, 15, 19, 22, 26, 30, 33}


def test_the_best_epochs_are_kept(small, tmp_path):
    run = Trainer(parse(small(*RECIPE, "--epochs", "5", "--checkpoint-hist", "2")), "x").run().run_dir
    top1 = {record["epoch"]: record["eval_ema_top1"] for record in records(run, "eval")}
    best = sorted(top1, key=lambda epoch: -top1[epoch])[:2]  # the older of two that are equal
    kept = {path.name: read_checkpoint(path).epoch for path in run.glob("checkpoint-*.pth.tar")}
    assert kept == {f"checkpoint-{epoch}.pth.tar": epoch for epoch in best}
    assert read_checkpoint(run / "model_best.pth.tar").epoch == best[0]


def test_the_smallest_loss_can_be_the_best(small):
    result = Trainer(parse(small(*RECIPE, "--eval-metric", "loss")), "x").run()
    found = {record["epoch"]: record["eval_ema_loss"] for record in records(result.run_dir, "eval")}
    assert (result.metric, result.best) == ("loss", min(found.values()))
    assert found[result.best_epoch] == result.best


def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(small, tmp_path, monkeypatch, capsys):
    from data_prep.errors import UserError as Refused

    def full(path, content):
        if content["step"]["num_updates"] == 2 * UPDATES:
            raise Refused(f"Checkpoint {path} cannot be written: No space left on device. The older one is kept.")
        write_checkpoint(path, content)

    monkeypatch.setattr(saver_module, "write_checkpoint", full)
    run = Trainer(parse(small(*RECIPE)), "x").run().run_dir
    assert "warning: Checkpoint" in (said := capsys.readouterr().out)
    assert "Training goes on." in said
    assert read_checkpoint(run / "last.pth.tar").epoch == 2
    monkeypatch.setattr(
        saver_module, "write_checkpoint", lambda path, content: full(path, {"step": {"num_updates": 22}})
    )
    with pytest.raises(UserError, match="No space left"):  # nothing was saved at the end: not a success
        Trainer(parse(small(*RECIPE, "--epochs", "1", "--warmup-epochs", "0")), "x").run()


def command(small, *more: str) -> list[str]:
    return [sys.executable, "-m", "lowrank_vit.train", *small(*RECIPE, "--epochs", "1000", *more)]


def modified(path: Path) -> int:
    """Nanoseconds; 0 for a file that is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_save_and_end_cleanly(small, tmp_path, name):
    process = subprocess.Popen(
        command(small, "--experiment", "s"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(last(tmp_path, "s").exists, process)
    process.send_signal(getattr(signal, name))
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()  # a failure must not leave it running
    assert process.returncode == 0, err
    assert f"stopped by {name} after update" in out
    assert "--resume" in out
    state = read_checkpoint(last(tmp_path, "s"))
    said = int(out.partition("after update ")[2].partition(";")[0])
    assert state.content["step"]["num_updates"] == said


def test_a_killed_run_leaves_a_checkpoint_that_loads(small, tmp_path):
    """SIGKILL at many moments, while every update is saved."""
    more = ("--experiment", "k", "--checkpoint-interval", "1")
    resume: tuple[str, ...] = ()
    updates = []
    for wait_s in (0.0, 0.13, 0.29):
        process = subprocess.Popen(
            [*command(small, *more), *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = modified(last(tmp_path, "k"))
        wait_for(lambda since=before: modified(last(tmp_path, "k")) > since, process)
        time.sleep(wait_s)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        updates.append(read_checkpoint(last(tmp_path, "k")).content["step"]["num_updates"])
        resume = ("--resume", str(last(tmp_path, "k")))
    assert updates == sorted(set(updates))
    Trainer(parse([*small(*RECIPE, "--epochs", "1000", *more), *resume]), "x").run_dir.close()
    assert not list((tmp_path / "k").glob(".*.part"))
