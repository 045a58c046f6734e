"""One update is that of timm's training script: its losses, clipping, EMA and optimizer, on the same batch."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.data.batch import Batch
from lowrank_vit.model.optimizer import create_optimizer
from lowrank_vit.model.patches import PatchProduct, set_patch_embedding
from lowrank_vit.plan.mixing import NO_MIX, MixRules
from lowrank_vit.plan.plans import BatchPlan, TrainPlan, TrainRules
from lowrank_vit.ranks.world import World
from lowrank_vit.run.metrics import Meter
from lowrank_vit.training.step import RUN_AHEAD, Average, Loss, LossOfBatch, Pace, TrainStep

NUM_CLASSES, BATCH = 10, 8
OPTIONS = (
    "--device cpu --no-amp --no-compile --opt momentum --lr 1e-2 --weight-decay 0.05 --epochs 2 --warmup-epochs 0 "
)


def small_vit() -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=NUM_CLASSES, img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2
    )


def batches(count: int, size: int = BATCH) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for step in range(count):
        images = torch.randint(0, 256, (size, 16, 16, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
        targets = torch.randint(0, NUM_CLASSES, (size,), generator=generator)
        empty = np.zeros((size, 4), np.int32)
        plan = BatchPlan(0, step, np.arange(size), empty, empty[:, 0], empty[:, 0], (NO_MIX,))
        made.append(Batch(images, targets, plan))
    return made


def make_step(argv: str, model: torch.nn.Module) -> tuple[TrainStep, ModelEmaV3]:
    config = parse([*OPTIONS.split(), *argv.split()])
    augment = Augment((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), NUM_CLASSES, config.augment.smoothing)
    ema = ModelEmaV3(model, decay=0.9)
    return TrainStep(config, model, augment, create_optimizer(config.optim, model, 1e-2), ema), ema


def normalized(batch: Batch) -> torch.Tensor:
    return (batch.images.float() / 255 - 0.5) / 0.5


@pytest.mark.parametrize(
    ("argv", "criterion", "clip"),
    [
        ("", LabelSmoothingCrossEntropy(0.1), None),
        ("--smoothing 0", torch.nn.CrossEntropyLoss(), None),
        ("--clip-grad 0.05", LabelSmoothingCrossEntropy(0.1), (0.05, "norm")),
        ("--clip-grad 0.001 --clip-mode value", LabelSmoothingCrossEntropy(0.1), (0.001, "value")),
        ("--clip-grad 0.01 --clip-mode agc", LabelSmoothingCrossEntropy(0.1), (0.01, "agc")),
        ("--bce-loss", BinaryCrossEntropy(0.1), None),
        ("--bce-loss --bce-sum", BinaryCrossEntropy(0.1, sum_classes=True), None),
        ("--bce-loss --bce-target-thresh 0.2", BinaryCrossEntropy(0.1, target_threshold=0.2), None),
    ],
)
def test_updates_are_timms(argv, criterion, clip):
    ours, theirs = small_vit(), small_vit()
    step, ema = make_step(argv, ours)
    optimizer = create_optimizer_v2(theirs, opt="momentum", lr=1e-2, weight_decay=0.05)  # Adam would blow roundings up
    their_ema = ModelEmaV3(theirs, decay=0.9)
    for number, batch in enumerate(batches(4), start=1):
        assert step(batch, measure_norm=True)
        loss = criterion(theirs(normalized(batch)), batch.targets)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in theirs.parameters() if p.grad is not None]).norm()
        if clip:
            parameters = list(theirs.parameters())
            dispatch_clip_grad(parameters[:-2] if clip[1] == "agc" else parameters, clip[0], mode=clip[1])
        optimizer.step()
        optimizer.zero_grad()
        their_ema.update(theirs, step=number)
        assert step.meter.read(World()).loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert step.grad_norm is not None
        assert float(step.grad_norm) == pytest.approx(float(norm), rel=1e-4)
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            ema.module.state_dict()[name], their_ema.module.state_dict()[name], rtol=1e-4, atol=1e-5
        )


def test_updates_with_the_patch_embedding_as_a_product_are_those_with_the_convolution():
    """And the average, which is scored, stays a model of timm's."""
    models = small_vit(), small_vit()
    steps = [make_step("--clip-grad 0.05", model) for model in models]
    assert set_patch_embedding(models[1], as_product=True)
    for batch in batches(3):
        for step, _ in steps:
            step(batch)
        first, second = (step.meter.read(World()).loss for step, _ in steps)
        assert second == pytest.approx(first, rel=1e-5)
    for (name, weight), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(other, weight, rtol=1e-4, atol=1e-6, msg=name)
    assert type(steps[1][1].module.patch_embed.proj) is torch.nn.Conv2d  # type: ignore[union-attr]


def test_a_gpu_trains_the_patch_embedding_as_a_product_and_a_cpu_as_the_convolution(on_cuda_path):
    models = small_vit(), small_vit()
    make_step("", models[0])
    with on_cuda_path():
        make_step("", models[1])
    assert [type(model.patch_embed.proj) for model in models] == [torch.nn.Conv2d, PatchProduct]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_timms_to_the_bit(dtype):
    """Also of statistics and counters, and of types that timm rounds by chance."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 2)).to(dtype)
    ours, theirs = (ModelEmaV3(model, decay=0.9, use_warmup=True) for _ in range(2))
    average = Average(ours, model)
    for update in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 5, dtype=dtype))
        average.update(update)
        theirs.update(model, step=update)
        for name, value in theirs.module.state_dict().items():
            assert torch.equal(ours.module.state_dict()[name], value), name


def test_ema_is_the_weighted_sum_of_the_weights():
    """Written out: decay 0 in the first update, 0.9 afterwards."""
    model = small_vit()
    step, ema = make_step("", model)
    seen = []
    for batch in batches(4):
        step(batch)
        seen.append(model.get_parameter("head.weight").detach().double().clone())
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(ema.module.get_parameter("head.weight").double(), expected, rtol=1e-5, atol=1e-7)


def test_binary_loss_of_mixed_targets_is_timms():
    logits = torch.randn(BATCH, NUM_CLASSES, generator=torch.Generator().manual_seed(1))
    mixup = Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=NUM_CLASSES)
    _, targets = mixup(torch.zeros(BATCH, 3, 8, 8), torch.arange(BATCH))
    assert float(Loss()(logits, targets)) == pytest.approx(float(SoftTargetCrossEntropy()(logits, targets)))
    for sums, threshold in ((False, None), (True, None), (False, 0.3), (True, 0.0)):
        expected = BinaryCrossEntropy(target_threshold=threshold, sum_classes=sums)(logits, targets)
        assert float(Loss(True, sums, threshold)(logits, targets)) == pytest.approx(float(expected))


def test_accumulated_batches_are_one_large_batch():
    large, small = small_vit(), small_vit()
    one, one_ema = make_step("", large)
    four, four_ema = make_step("--grad-accum-steps 4", small)
    for batch in batches(3, 16):
        one(batch, measure_norm=True)
        for n in range(4):
            part = slice(4 * n, 4 * n + 4)
            plan = deepcopy(batch.plan)
            object.__setattr__(plan, "ids", plan.ids[part])
            assert four(Batch(batch.images[part], batch.targets[part], plan), measure_norm=True) == (n == 3)
        assert one.grad_norm is not None
        assert four.grad_norm is not None
        assert one.position.num_updates == four.position.num_updates
        assert float(four.grad_norm) == pytest.approx(float(one.grad_norm), rel=1e-5)
    assert four.meter.read(World()) == pytest.approx(one.meter.read(World()), rel=1e-6)
    for name, weight in one_ema.module.state_dict().items():
        torch.testing.assert_close(four_ema.module.state_dict()[name], weight, rtol=1e-4, atol=1e-6)


def test_gradients_kept_for_a_gpus_graphs_add_up_to_the_same_updates(on_cuda_path, monkeypatch):
    """Where a step is a CUDA graph, gradients of accumulated batches are kept and zeroed."""
    monkeypatch.setattr(torch, "compile", lambda module, mode: module)
    plain, kept = small_vit(), small_vit()
    step, _ = make_step("--grad-accum-steps 2", plain)
    for batch in batches(4):
        step(batch)
    with on_cuda_path():
        step, _ = make_step("--grad-accum-steps 2 --compile --compile-mode reduce-overhead", kept)
        gradients = [parameter.grad for parameter in kept.parameters()]
        for batch in batches(4):
            step(batch)
    assert all(parameter.grad is own for parameter, own in zip(kept.parameters(), gradients, strict=True))
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], weight, rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_batch_compiles_to_one_graph(on_cuda_path):
    """With normalising, mixing and erasing by patches, as on a GPU: nothing in it ends the graph."""
    counters = torch._dynamo.utils.counters
    rules = TrainRules(reprob=0.9, mixing=MixRules(mixup=0.8, cutmix=1.0))
    sides = np.full(2 * BATCH, 16)
    plan = TrainPlan(sides, sides, rules, seed=1, img_size=16, batch_size=BATCH)
    model, augment = small_vit(), Augment((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), NUM_CLASSES, 0.1, "pixel")
    assert set_patch_embedding(model, as_product=True)
    loss_of = LossOfBatch(model, augment, Loss.of(parse(OPTIONS.split())), torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, backend="eager")
    breaks, graphs = counters["graph_break"].total(), counters["stats"]["unique_graphs"]
    for n, (batch, ids) in enumerate(zip(batches(2), plan.ids(0), strict=True)):
        with on_cuda_path():
            images, *drawn = augment.begin(batch.images, plan.batch(0, n, ids))
        assert len(drawn) == 3
        assert all(one is not None for one in drawn)
        compiled(images, batch.targets, *drawn)[0].backward()
    assert counters["graph_break"].total() == breaks, counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs + 1
    torch._dynamo.reset()


def test_dropout_depends_on_the_update_and_the_rank_alone():
    def losses(first: int, count: int, rank: int = 0) -> list[float]:
        torch.manual_seed(first)  # what was drawn before must not matter
        model = small_vit()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        config = parse([*OPTIONS.split(), "--lr", "1e-12"])
        augment = Augment((0.5,) * 3, (0.5,) * 3, NUM_CLASSES, 0.1)
        step = TrainStep(config, model, augment, torch.optim.SGD(model.parameters(), 0.0), None, World(rank=rank))
        step.position.num_updates = first
        found = []
        for batch in batches(1) * count:
            step(batch)
            found.append(step.meter.read(World()).loss)
        return found

    all_four = losses(0, 4)
    assert len(set(all_four)) == 4
    assert losses(2, 2) == all_four[2:]
    assert losses(0, 2, rank=1)[0] != all_four[0]


def test_float16_skips_an_update_that_overflows():
    """As timm's scaler does: weights stay, the scale is halved, training goes on."""
    model = small_vit()
    step, _ = make_step("--amp --amp-dtype float16", model)
    before = deepcopy(model.state_dict())
    step._scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    step(batches(1)[0])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert step.state_dict()["scaler"]["scale"] < 1e38
    step._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step(batches(1)[0])
    assert not torch.equal(model.get_parameter("head.weight"), before["head.weight"])


def test_the_first_loss_that_is_not_finite_is_named():
    meter = Meter(torch.device("cpu"))
    for update, loss in enumerate([1.0, float("inf"), float("nan"), 1.0]):
        meter.add(torch.tensor(loss), torch.tensor(3), 4, update, 0.5)
    with pytest.raises(UserError, match=r"not finite at update 1 \(learning rate 0\.5\)"):
        meter.read(World())


def test_means_are_over_all_updates_since_the_last_look_whatever_they_are_made_of():
    """Interrupted, and gone on with another number of batches in an update."""
    meter = Meter(torch.device("cpu"), accum_steps=2)
    for loss, hits in ((1.0, 4), (2.0, 0)):
        meter.add(torch.tensor(loss), torch.tensor(hits), 4, 0, 0.1)
    state = meter.state_dict(World())
    for accum_steps in (1, 2, 3):
        again = Meter(torch.device("cpu"), accum_steps)
        again.load_state_dict(state)
        for _ in range(accum_steps):
            again.add(torch.tensor(4.5), torch.tensor(3), 4, 1, 0.1)
        assert again.read(World()) == pytest.approx((3.0, 62.5))
        for _ in range(accum_steps):
            again.add(torch.tensor(5.0), torch.tensor(4), 4, 2, 0.1)
        assert again.read(World()) == pytest.approx((5.0, 100.0))


def test_the_first_bad_update_of_all_ranks_is_remembered(monkeypatch):
    """Also by a run that goes on from there, whose own learning rates do not reach back so far."""
    monkeypatch.setattr(World, "sum", lambda self, values: None)
    monkeypatch.setattr(World, "least", lambda self, value: value.clamp(max=7))  # what the other rank has seen
    meter = Meter(torch.device("cpu"))
    meter.add(torch.tensor(1.0), torch.tensor(3), 4, 9, 0.5)
    state = meter.state_dict(World(size=2))
    assert int(state["bad_update"]) == 7
    again = Meter(torch.device("cpu"))
    again.load_state_dict(state)
    again.add(torch.tensor(float("nan")), torch.tensor(3), 4, 10, 0.5)
    with pytest.raises(UserError, match=r"not finite at update 7\."):
        again.read(World())


def test_only_running_statistics_are_averaged(monkeypatch):
    """Three times a constant over three is another number in the last digit."""
    monkeypatch.setattr(World, "sum", lambda self, values: values.mul_(3.5))
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    module.register_buffer("constant", torch.tensor([0.1, 0.7]))
    World(size=3).average_buffers(module)
    assert torch.equal(module.get_buffer("constant"), torch.tensor([0.1, 0.7]))
    torch.testing.assert_close(module.get_buffer("0.running_var"), torch.full((2,), 3.5 / 3))


@pytest.fixture
def cuda_events(monkeypatch) -> list[str]:
    """What is asked of CUDA's events, in order."""
    log: list[str] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self) -> None:
            self.step = sum(line.startswith("step") for line in log)
            log.append(f"step {self.step}")

        def synchronize(self) -> None:
            log.append(f"host waits for {self.step}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return log


def test_the_host_waits_for_a_step_that_leaves_the_device_others_to_do(cuda_events):
    pace = Pace(torch.device("cuda"))
    for _ in range(RUN_AHEAD):
        pace.step()
    assert cuda_events == [f"step {n}" for n in range(RUN_AHEAD)]
    cuda_events.clear()
    pace.step()
    assert cuda_events[-1] == "host waits for 0"
    pace.step()
    assert cuda_events[-1] == "host waits for 1"


def test_a_cpu_is_not_paced(cuda_events):
    pace = Pace(torch.device("cpu"))
    for _ in range(9):
        pace.step()
    assert cuda_events == []
