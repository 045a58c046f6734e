"""Augmentation on a GPU gives the CPU's images, without waiting for the device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.plan.operations import parse_policy
from lowrank_vit.plan.plans import TrainPlan, TrainRules

pytestmark = pytest.mark.gpu
RECIPE = TrainRules(
    vflip=0.3, policy=parse_policy("rand-m9-mstd0.5-inc1"), color_jitter=(0.4, 0.4, 0.4), reprob=0.5, recount=2
)


def plan_of(rules, count, size, epoch=0):
    sides = np.full(count, size)
    plan = TrainPlan(sides, sides, rules, seed=1, img_size=size, batch_size=count)
    return plan.batch(epoch, 0, np.arange(count))


def random_images(count, size):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def finished(augment, images, plan):
    """The model's input, and soft targets, as the step makes them."""
    images, *drawn = augment.begin(images, plan)
    return augment(images, torch.zeros(len(images), dtype=torch.long, device=images.device), *drawn)


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "rand-m9-n3", "original-mstd0.5", "v0r", "3a"])
@pytest.mark.parametrize(("count", "size"), [(1, 32), (33, 224)])
def test_operations_are_the_cpus_within_one_level(aa, count, size):
    rules = replace(TrainRules(), policy=parse_policy(aa))
    plan, images = plan_of(rules, count, size), random_images(count, size)
    augment = Augment((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 10, 0.1)
    on_cpu = augment.prepare(images.clone().permute(0, 3, 1, 2), plan)
    on_gpu = augment.cuda().prepare(images.cuda().permute(0, 3, 1, 2), plan).cpu()
    error = (on_cpu.int() - on_gpu.int()).abs()
    assert error.float().mean() < 0.02  # a level on few pixels, which the next operation may make larger
    assert error.float().flatten().kthvalue(int(0.999 * error.numel())).values <= 3


@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
def test_erasing_is_the_cpus(remode):
    rules = TrainRules(reprob=0.8, recount=3)
    plan, images = plan_of(rules, 17, 64), random_images(17, 64)
    augment = Augment((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 10, 0.1, remode)
    on_cpu, _ = finished(augment, images.clone().permute(0, 3, 1, 2), plan)
    on_gpu, _ = finished(augment.cuda(), images.cuda().permute(0, 3, 1, 2), plan)
    torch.testing.assert_close(on_cpu, on_gpu.cpu(), rtol=0, atol=2e-6)


def test_warm_augmentation_never_waits():
    augment = Augment((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 10, 0.1, "pixel").cuda()
    images = random_images(64, 64).cuda().permute(0, 3, 1, 2)
    plans = [plan_of(RECIPE, 64, 64, epoch) for epoch in range(6)]
    for plan in plans[:3]:
        finished(augment, augment.prepare(images.clone(memory_format=torch.channels_last), plan), plan)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for plan in plans[3:]:
            finished(augment, augment.prepare(images.clone(memory_format=torch.channels_last), plan), plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
