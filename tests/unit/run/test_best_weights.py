"""Which weights are the best: the model's or its EMA's; and an EMA that is of use in a short run."""

from __future__ import annotations

import math

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.report.status import next_steps
from lowrank_vit.run.state import BestEpochs
from lowrank_vit.training.resume import as_resumed
from lowrank_vit.training.setup import set_up
from lowrank_vit.training.trainer import Trainer
from tests.runs import checkpoint_of

TINY = """
--device cpu --synthetic --model vit_tiny_patch16_224 --model-kwargs patch_size=16 embed_dim=16 depth=1 num_heads=1
--img-size 16 --num-classes 4 -b 2
""".split()


@pytest.mark.parametrize(
    ("flags", "warms_up"),
    [
        ("--epochs 6", True),
        ("--epochs 499", True),  # 49,900 updates
        ("--epochs 500", False),  # 10 / (1 - 0.9998)
        ("--epochs 6 --model-ema-decay 0.98", False),
        ("--epochs 6 --no-model-ema-warmup", False),
        ("--epochs 500 --model-ema-warmup", True),
        ("--epochs 6 --no-model-ema", None),
    ],
)
def test_a_short_runs_ema_has_a_warm_up_unless_told(flags, warms_up):
    parts = set_up(parse([*TINY, *flags.split()]), None)
    assert parts.config.model.model_ema_warmup is warms_up
    assert [parts.ema.use_warmup if parts.ema else None] == [warms_up]
    is_own_choice = warms_up is True and "warmup" not in flags
    assert any("EMA with warm-up" in line for line in parts.description) == is_own_choice


@pytest.mark.parametrize("chosen", [True, False])
def test_a_resumed_run_keeps_what_it_has_chosen(chosen):
    """Whatever the epochs are now: --epochs may grow. An older run has no warm-up, unless it says so."""
    checkpoint = checkpoint_of({"seed": 42, "model-ema-warmup": chosen})
    assert as_resumed(parse([]), checkpoint, print).model.model_ema_warmup is chosen
    older = checkpoint_of({"seed": 42})
    assert as_resumed(parse([]), older, print).model.model_ema_warmup is False
    with pytest.raises(UserError, match="--model-ema-warmup was"):
        as_resumed(parse([f"--{'no-' if chosen else ''}model-ema-warmup"]), checkpoint, print)


def test_the_better_of_model_and_ema_counts():
    found = BestEpochs()
    for epoch, (model, ema, best) in enumerate([(10, 5, 10), (9, 12, 12), (12, 12, 12), (40, math.nan, 40)]):
        scores = {"model": model, "ema": ema}
        found, *_ = found.after_validation(epoch, scores, lower_is_better=False, num_kept=2)
        assert found.best_metric == best
        assert found.better == ("ema", "model")[epoch in (0, 3)]
    assert found.kept == ((40, 3), (12, 1))
    assert found.best_scores["model"] == 40
    losses, *_ = BestEpochs().after_validation(0, {"model": 2.0, "ema": 1.0}, lower_is_better=True, num_kept=2)
    assert (losses.best_metric, losses.better) == (1.0, "ema")
    alone, *_ = BestEpochs().after_validation(0, {"model": 2.0}, lower_is_better=True, num_kept=2)
    assert (alone.best_metric, alone.better) == (2.0, "model")


def test_an_older_run_goes_on_to_compare_its_emas():
    found = BestEpochs(is_chosen_by_ema=True, best_metric=20.0)
    found, is_best, _ = found.after_validation(0, {"model": 90.0, "ema": 15.0}, lower_is_better=False, num_kept=2)
    assert (is_best, found.best_metric, found.better) == (False, 20.0, "ema")


def test_what_is_kept_said_and_suggested_are_the_same_weights(digits_dir, tmp_path, capsys):
    """An EMA that has hardly moved, beside a model that has learnt."""
    argv = f"--config quickstart --data-dir {digits_dir} --output {tmp_path} --device cpu --epochs 2 --warmup-epochs 0 "
    argv += "--model-kwargs patch_size=4 embed_dim=32 depth=1 num_heads=2 class_token=False global_pool=avg -b 128 "
    argv += "--no-model-ema-warmup --model-ema-decay 0.9998 --no-spec-monitor --checkpoint-hist 1"
    result = Trainer(parse(argv.split()), "x").run()
    run = result.run_dir
    best = read_checkpoint(run / "model_best.pth.tar")
    assert (result.best_epoch, best.epoch, best.content["better"]) == (1, 1, "model")
    assert result.best == result.best_scores["model"] > result.best_scores["ema"]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1.pth.tar"]
    assert not any("--use-ema" in step.words for step in next_steps(run, {"model-ema": True}, is_finished=True))
    ema = set_up(parse([*argv.split(), "--initial-checkpoint", str(run / "model_best.pth.tar")]), None)
    assert all(torch.equal(w, best.content["state_dict"][name]) for name, w in ema.model.state_dict().items())
    assert "initial weights: those of" in capsys.readouterr().out
