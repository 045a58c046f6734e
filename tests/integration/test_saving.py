"""When a run saves, what it keeps, and what it does not save: states that have diverged, and what no disk takes."""

from __future__ import annotations

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.run import checkpoints as checkpoints_module
from lowrank_vit.run.checkpoints import write_checkpoint
from lowrank_vit.training.trainer import Trainer
from tests.integration.conftest import RECIPE, UPDATES
from tests.runs import at_update, records, stop_after


def test_checkpoints_between_validations(small, tmp_path, monkeypatch):
    """By updates; the file that a killed run is left with is the newest of them."""
    written: list[int] = []

    def note(path, content):
        write_checkpoint(path, content)
        written.append(content["step"]["num_updates"])

    monkeypatch.setattr(checkpoints_module, "write_checkpoint", note)
    Trainer(parse(small(*RECIPE, "--checkpoint-interval", "5")), "x").run()
    assert {11, 22, 33} < set(written) <= {5, 10, 11, 15, 20, 22, 25, 30, 33}  # none while another is being written
    assert written == sorted(written)
    written.clear()
    Trainer(parse(small(*RECIPE, "--checkpoint-interval", "0.0001m")), "x").run()  # at every line of the log
    assert {11, 22, 33} < set(written) <= {4, 8, 11, 15, 19, 22, 26, 30, 33}


def test_the_best_epochs_are_kept(small, tmp_path):
    run = Trainer(parse(small(*RECIPE, "--epochs", "5", "--checkpoint-hist", "2")), "x").run().run_dir
    top1 = {r["epoch"]: max(r["eval_ema_top1"], r["eval_top1"]) for r in records(run, "eval")}
    best = sorted(top1, key=lambda epoch: -top1[epoch])[:2]  # the older of two that are equal
    kept = {path.name: read_checkpoint(path).epoch for path in run.glob("checkpoint-*.pth.tar")}
    assert kept == {f"checkpoint-{epoch}.pth.tar": epoch for epoch in best}
    assert read_checkpoint(run / "model_best.pth.tar").epoch == best[0]


def test_the_smallest_loss_can_be_the_best(small):
    result = Trainer(parse(small(*RECIPE, "--eval-metric", "loss")), "x").run()
    found = {r["epoch"]: min(r["eval_ema_loss"], r["eval_loss"]) for r in records(result.run_dir, "eval")}
    assert (result.metric, result.best) == ("loss", min(found.values()))
    assert found[result.best_epoch] == result.best


def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(small, tmp_path, monkeypatch, capsys):
    from lowrank_vit.common.errors import UserError as Refused

    def full(path, content):
        if content["step"]["num_updates"] == 2 * UPDATES:
            raise Refused(f"Checkpoint {path} cannot be written: No space left on device. The older one is kept.")
        write_checkpoint(path, content)

    monkeypatch.setattr(checkpoints_module, "write_checkpoint", full)
    run = Trainer(parse(small(*RECIPE)), "x").run().run_dir
    assert "warning: Checkpoint" in (said := capsys.readouterr().out)
    assert "Training goes on." in said
    assert read_checkpoint(run / "last.pth.tar").epoch == 2
    monkeypatch.setattr(
        checkpoints_module, "write_checkpoint", lambda path, content: full(path, {"step": {"num_updates": 22}})
    )
    with pytest.raises(UserError, match="No space left"):  # nothing was saved at the end: not a success
        Trainer(parse(small(*RECIPE, "--epochs", "1", "--warmup-epochs", "0")), "x").run()


def spoil(trainer: Trainer) -> None:
    with torch.no_grad():
        next(trainer.setup.model.parameters()).mul_(float("nan"))


@pytest.mark.parametrize("update", [UPDATES + 1, 2 * UPDATES])  # in an epoch; at the end of one, which is validated
def test_a_diverged_run_keeps_its_last_good_checkpoint(small, capsys, update):
    """Its weights are not finite from one update on, its losses from the next."""
    trainer = Trainer(parse(small(*RECIPE, "--checkpoint-interval", "1", "--log-interval", "100")), "x")
    at_update(trainer, update, lambda: spoil(trainer))
    with pytest.raises(UserError, match=rf"not finite at update {update} .*Nothing was saved since"):
        trainer.run()
    run = trainer.run_dir.path
    # (A checkpoint that is due while another is being written is left out.)
    assert UPDATES <= read_checkpoint(run / "last.pth.tar").content["step"]["num_updates"] < update
    assert read_checkpoint(run / "model_best.pth.tar").epoch == 0
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-0.pth.tar"]
    for name in ("last.pth.tar", "model_best.pth.tar"):
        assert all(weight.isfinite().all() for weight in read_checkpoint(run / name).weights(use_ema=False).values())
    assert capsys.readouterr().out.count("has diverged") == 1


def test_a_signal_to_a_diverged_run_saves_nothing_and_says_so(small):
    trainer = Trainer(parse(small(*RECIPE, "--log-interval", "100")), "x")
    at_update(trainer, UPDATES + 1, lambda: spoil(trainer))
    stop_after(trainer, UPDATES + 3)
    with pytest.raises(UserError, match=r"The run has diverged.* This state is not saved; .*last\.pth\.tar has the"):
        trainer.run()
    assert read_checkpoint(trainer.run_dir.path / "last.pth.tar").content["step"]["num_updates"] == UPDATES


def test_the_best_epoch_is_one_whose_file_is_there(small, monkeypatch):
    """The best of all cannot be written; a later one, better than the one before it, takes its place."""
    scores = iter([20.0, 90.0, 30.0, 25.0])
    monkeypatch.setattr("lowrank_vit.run.checkpoints._by_weights", lambda *_: {"model": next(scores), "ema": 0.0})

    def full(path, content):
        if content["progress"]["best_metric"] == 90.0:
            raise UserError(f"Checkpoint {path} cannot be written: No space left on device.")
        write_checkpoint(path, content)

    monkeypatch.setattr(checkpoints_module, "write_checkpoint", full)
    result = Trainer(parse(small(*RECIPE, "--epochs", "4", "--checkpoint-hist", "2")), "x").run()
    assert (result.best, result.best_epoch) == (30.0, 2)
    assert read_checkpoint(result.run_dir / "model_best.pth.tar").epoch == 2
    kept = {path.name: read_checkpoint(path).epoch for path in result.run_dir.glob("checkpoint-*.pth.tar")}
    assert kept == {"checkpoint-2.pth.tar": 2, "checkpoint-3.pth.tar": 3}
    progress = read_checkpoint(result.run_dir / "last.pth.tar").content["progress"]
    assert (progress["best_metric"], progress["kept"]) == (30.0, [[30.0, 2], [25.0, 3]])


def test_runs_at_trackers_are_remembered_while_they_are_not_used(small):
    trainer = Trainer(parse(small(*RECIPE)), "x")
    trainer.state.tracker_ids = {"wandb": "abc123", "mlflow": "x"}
    stop_after(trainer, 3)
    run = trainer.run().run_dir
    assert read_checkpoint(run / "last.pth.tar").content["progress"]["tracker_ids"] == trainer.state.tracker_ids
