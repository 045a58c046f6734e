"""Learning rate, schedule and parameter groups as timm's own training script makes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, create_scheduler_v2

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.config.options import Optim
from lowrank_vit.model.optimizer import (
    check_optimizer,
    create_optimizer,
    create_scheduler,
    learning_rate,
    not_for_muon,
)


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


def rates(optim: Optim, updates: int = 3) -> list[float]:
    """Of every update, from the optimizer and schedule of these options."""
    optimizer = create_optimizer(optim, tiny(), 1e-3)
    scheduler, num_epochs = create_scheduler(optim, optimizer, updates, seed=7)
    return _rates(optimizer, scheduler, num_epochs, updates)


def _rates(optimizer, scheduler, num_epochs: int, updates: int) -> list[float]:
    found, update = [], 0
    for epoch in range(num_epochs):
        for _ in range(updates):
            found.append(optimizer.param_groups[0]["lr"])
            update += 1
            scheduler.step_update(update)
        scheduler.step(epoch + 1)
    return found


@pytest.mark.parametrize(
    ("line", "timms"),
    [
        ("--sched step --decay-epochs 2 --decay-rate 0.3", {"decay_epochs": 2, "decay_rate": 0.3}),
        ("--sched multistep --decay-milestones 3 5", {"decay_milestones": [3, 5]}),
        ("--sched poly --dr 2 --lr-k-decay 0.7", {"decay_rate": 2, "k_decay": 0.7}),
        ("--warmup-prefix", {"warmup_prefix": True}),
        (
            "--lr-cycle-mul 2 --lr-cycle-decay 0.4 --lr-cycle-limit 3",
            {"cycle_mul": 2, "cycle_decay": 0.4, "cycle_limit": 3},
        ),
        ("--lr-noise 0.2 0.8 --lr-noise-std 0.5", {"noise": [0.2, 0.8], "noise_std": 0.5}),
        ("--lr-noise 0.5 --lr-noise-pct 0.3 --sched-on-updates", {"noise": 0.5, "noise_pct": 0.3}),
        ("--sched wsd --decay-epochs 3 --lr-decay-fn cosine", {"decay_epochs": 3, "decay_fn": "cosine"}),
        ("--sched rsqrt --lr-stable-timescale 4", {"stable_timescale": 4}),
        ("--sched constant", {}),
        ("--sched tanh --lr-cycle-limit 2", {"cycle_limit": 2}),
    ],
)
def test_schedules_are_timms(line, timms):
    config = parse(["--epochs", "8", "--warmup-epochs", "2", "--min-lr", "1e-5", *line.split()])
    twin = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    known = {"cycle_decay": 0.5, "noise_seed": 7, "step_on_epochs": not config.optim.sched_on_updates} | timms
    known |= {"warmup_epochs": 2, "warmup_lr": 1e-5, "min_lr": 1e-5, "updates_per_epoch": 3}
    scheduler, num_epochs = create_scheduler_v2(twin, config.optim.sched, 8, **known)
    expected = _rates(twin, scheduler, int(num_epochs), 3)
    assert rates(config.optim) == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) > 2


def test_without_a_schedule_the_rate_stays():
    assert set(rates(Optim(opt="adamw", sched="none", epochs=4))) == {1e-3}


def test_noise_depends_on_the_seed_and_the_epoch_alone():
    optim = Optim(opt="adamw", epochs=6, warmup_epochs=0, lr_noise=(0.0,))
    assert rates(optim) == rates(optim)
    optimizer = create_optimizer(optim, tiny(), 1e-3)
    scheduler, _ = create_scheduler(optim, optimizer, 3, seed=7)
    scheduler.step(4)  # as after resuming: nothing was drawn before
    assert optimizer.param_groups[0]["lr"] == rates(optim)[4 * 3]
    other, _ = create_scheduler(optim, optimizer, 3, seed=8)
    other.step(4)
    assert optimizer.param_groups[0]["lr"] != rates(optim)[4 * 3]


def test_phases_that_do_not_fit_are_named():
    optim = Optim(opt="adamw", sched="wsd", epochs=4, warmup_epochs=1, decay_epochs=9)
    with pytest.raises(UserError, match=r"--sched wsd cannot be made: .*decay 9"):
        create_scheduler(optim, create_optimizer(optim, tiny(), 1e-3), 3)


def test_other_arguments_reach_the_optimizer():
    optim = Optim(opt="adamw", opt_betas=(0.8, 0.9), opt_kwargs=("amsgrad=True",))
    group = create_optimizer(optim, tiny(), 1e-3).param_groups[0]
    assert (group["amsgrad"], group["betas"]) == (True, (0.8, 0.9))
    assert type(create_optimizer(Optim(opt="lookahead_adamw"), tiny(), 1e-3)).__name__ == "Lookahead"
    three = create_optimizer(Optim(opt="adan", opt_betas=(0.9, 0.8, 0.7)), tiny(), 1e-3)
    assert three.param_groups[0]["betas"] == (0.9, 0.8, 0.7)


def test_least_factor_of_layer_decay_is_timms():
    options = {"layer_decay": 0.3, "layer_decay_min_scale": 0.2, "layer_decay_no_opt_scale": 0.05}
    ours = create_optimizer(Optim(opt="adamw", weight_decay=0.05, **options), tiny(), 1e-3)  # type: ignore[arg-type]
    timms = create_optimizer_v2(tiny(), opt="adamw", lr=1e-3, weight_decay=0.05, **options)  # type: ignore[arg-type]
    scales = [group["lr_scale"] for group in ours.param_groups]
    assert scales == [group["lr_scale"] for group in timms.param_groups]
    assert min(scales) == 0.2


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        (Optim(opt="fusedadamw"), "--opt fusedadamw cannot be made: .*needs that package"),
        (Optim(opt="bnbadamw8bit"), "--opt bnbadamw8bit cannot be made: "),
        (Optim(opt="lookahead_adamww"), "is not a timm optimizer"),
        (Optim(opt="adamw", opt_kwargs=("lr=1",)), "--opt-kwargs lr=1: give it as --lr"),
        (Optim(opt="adamw", opt_kwargs=("nonsense=1",)), "--opt adamw cannot be made: .*nonsense"),
        (Optim(opt="adan", opt_betas=(0.9, 0.9)), "--opt adan cannot be made: "),
        (
            Optim(opt="adamwlegacy", opt_betas=(0.9, 0.9, 0.9)),
            "--opt-betas 0.9 0.9 0.9: --opt adamwlegacy takes another number",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_found_out_without_the_model(optim, said):
    if torch.cuda.is_available() and optim.opt.startswith(("fused", "bnb")):
        pytest.skip("the package may be there")
    with pytest.raises(UserError, match=said):
        check_optimizer(optim)


def test_what_cannot_be_made_is_named():
    with pytest.raises(UserError, match=r"--opt adamww is not a timm optimizer\. Did you mean adamw"):
        create_optimizer(Optim(opt="adamww"), tiny(), 1e-3)
    with pytest.raises(UserError, match="--layer-decay needs a model with layer groups"):
        create_optimizer(Optim(opt="adamw", layer_decay=0.5), torch.nn.Linear(2, 2), 1e-3)


def by_muon(optim: Optim, model: torch.nn.Module) -> set[str]:
    """The parameters that a step moves by an orthogonal matrix: those without AdamW's moments."""
    optimizer = create_optimizer(optim, model, 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {name for name, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}


@pytest.mark.parametrize("opt", ["muon", "nmuon", "adamuon", "nadamuon"])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_muon_moves_the_matrices_of_the_blocks_and_leaves_the_rest_to_adamw(opt, layer_decay):
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = {f"blocks.{block}.{kind}.weight" for block in range(3) for kind in kinds}
    optim = Optim(opt=opt, weight_decay=0.05, layer_decay=layer_decay)
    assert by_muon(optim, tiny()) == blocks
    everything = blocks | {"head.weight", "patch_embed.proj.weight"}
    assert by_muon(replace(optim, muon_fallback=False), tiny()) == everything
    assert by_muon(replace(optim, opt_kwargs=("fallback_list=['*.attn.*', 'head.*']",)), tiny()) == {
        name for name in everything if ".attn." not in name and "head." not in name
    }


def test_the_first_layers_and_classifiers_of_other_models_are_left_out_too():
    with torch.device("meta"):
        found = {
            name: not_for_muon(timm.create_model(name))
            for name in ("deit_tiny_distilled_patch16_224", "resnet18", "swin_tiny_patch4_window7_224")
        }
    assert {"patch_embed.*", "head.*", "head_dist.*"} <= set(found["deit_tiny_distilled_patch16_224"])
    assert {"conv1.*", "fc.*"} <= set(found["resnet18"])
    assert {"patch_embed.*", "head.*"} <= set(found["swin_tiny_patch4_window7_224"])
    assert not_for_muon(torch.nn.Linear(2, 2)) == []
