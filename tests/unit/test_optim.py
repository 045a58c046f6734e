"""Learning rate, schedule and parameter groups as timm's own training script makes them."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

from data_prep.errors import UserError
from lowrank_vit.engine.optim import create_optimizer, create_scheduler, learning_rate
from lowrank_vit.options import Optim


@pytest.mark.parametrize(
    ("optim", "batch", "expected"),
    [
        (Optim(opt="adamw", lr=3e-4), 4096, 3e-4),
        (Optim(opt="sgd"), 512, 0.1 * 2),
        (Optim(opt="adamw"), 1024, 0.1 * 2),
        (Optim(opt="lamb", lr_base=0.01), 64, 0.01 * 0.5),
        (Optim(opt="adamw", lr_base_scale="linear"), 1024, 0.1 * 4),
        (Optim(opt="sgd", lr_base_scale="sqrt", lr_base_size=128), 512, 0.1 * 2),
    ],
)
def test_learning_rate_rule(optim, batch, expected):
    lr, origin = learning_rate(optim, batch)
    assert lr == pytest.approx(expected)
    assert origin.startswith("--lr" if optim.lr is not None else "--lr-base")


def tiny():
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, embed_dim=48, depth=3)


def test_groups_are_timms():
    model = tiny()
    ours = create_optimizer(Optim(opt="adamw", weight_decay=0.05, layer_decay=0.65), model, 1e-3)
    timms = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.65)
    assert len(ours.param_groups) == len(timms.param_groups)
    for a, b in zip(ours.param_groups, timms.param_groups, strict=True):
        assert [id(p) for p in a["params"]] == [id(p) for p in b["params"]]
        assert (a["weight_decay"], a["lr_scale"]) == (b["weight_decay"], b["lr_scale"])
    undecayed = {id(p) for g in ours.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    parameters = dict(model.named_parameters())
    assert {id(parameters[name]) for name in ("pos_embed", "cls_token", "blocks.0.norm1.weight")} <= undecayed


@pytest.mark.parametrize("on_updates", [False, True])
def test_schedule_is_timms_cosine(on_updates):
    optim = Optim(opt="adamw", epochs=10, warmup_epochs=3, min_lr=1e-5, cooldown_epochs=2, sched_on_updates=on_updates)
    optimizer = create_optimizer(optim, tiny(), 1e-3)
    scheduler, num_epochs = create_scheduler(optim, optimizer, updates_per_epoch=7)
    assert num_epochs == 12
    per = 7 if on_updates else 1
    twin_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    twin = CosineLRScheduler(
        twin_optimizer,
        t_initial=10 * per,
        lr_min=1e-5,
        warmup_t=3 * per,
        warmup_lr_init=1e-5,
        t_in_epochs=not on_updates,
    )
    update = 0
    for epoch in range(num_epochs):
        for _ in range(7):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(twin_optimizer.param_groups[0]["lr"], rel=1e-12)
            update += 1
            scheduler.step_update(update)
            twin.step_update(update)
        scheduler.step(epoch + 1)
        twin.step(epoch + 1)


def test_what_cannot_be_made_is_named():
    with pytest.raises(UserError, match=r"--opt adamww is not a timm optimizer\. Did you mean adamw"):
        create_optimizer(Optim(opt="adamww"), tiny(), 1e-3)
    with pytest.raises(UserError, match="--layer-decay needs a model with layer groups"):
        create_optimizer(Optim(opt="adamw", layer_decay=0.5), torch.nn.Linear(2, 2), 1e-3)
