"""By outcome: trainings end where a plain loop of timm's own parts ends, ingredient by ingredient, over five seeds.

The twin is timm's loader, erasing, `FastCollateMixup`, optimizer, schedule and EMA, joined as its train.py joins them.
Both sides start each seed from the same weights and see samples in the same order, which leaves a third of the spread
of their differences.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits
from timm.data import FastCollateMixup, create_dataset, create_loader, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lowrank_vit.config.flags import parse
from lowrank_vit.training.trainer import Trainer
from tests.runs import records

SEEDS = range(5)
FALSE_ALARM = 0.01
"""Chance that an ingredient fails although both sides are the same. Other seeds than these would be other draws."""
RECIPES: dict[str, dict[str, Any]] = {
    "erasing": {"reprob": 0.5},
    "mixing": {"mixup": 0.2, "cutmix": 0.2},
    "all": {"aa": "rand-m5-mstd0.5-inc1", "reprob": 0.5, "mixup": 0.2, "cutmix": 0.2},
}
TRAINED, SIZE, BATCH, EPOCHS, LR, DECAY, EMA = 1000, 16, 64, 12, 3e-3, 0.05, 0.99
KWARGS: dict[str, Any] = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "class_token": False}
MODEL = "vit_tiny_patch16_224"
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """scikit-learn's digits as PNGs, in class folders."""
    root, digits = tmp_path_factory.mktemp("digits"), cast(Any, load_digits())
    for n, i in enumerate(np.random.default_rng(0).permutation(len(digits.target))):
        path = root / ("train" if n < TRAINED else "val") / str(digits.target[i])
        path.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.rint(digits.images[i] * 255 / 16).astype(np.uint8))
        grey.convert("RGB").save(path / f"{i:04d}.png")
    return root


def timms_batches(folder: Path, recipe: dict[str, Any], orders: list[np.ndarray]) -> Callable[[int], PrefetchLoader]:
    """An epoch's batches, as timm's `create_loader` puts them together, but for the order of the samples."""
    transform = create_transform(
        SIZE,
        is_training=True,
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        hflip=0.0,
        color_jitter=0.0,
        use_prefetcher=True,
        auto_augment=recipe.get("aa"),
        interpolation="random",
        mean=HALF,
        std=HALF,
    )
    train: Any = create_dataset("", root=str(folder), split="train", transform=transform)
    collate: Any = fast_collate
    if "mixup" in recipe:
        collate = FastCollateMixup(recipe["mixup"], recipe["cutmix"], label_smoothing=0.1, num_classes=10)

    def batches(epoch: int) -> PrefetchLoader:
        loader = DataLoader(train, BATCH, sampler=orders[epoch].tolist(), collate_fn=collate, drop_last=True)
        erasing = {"re_prob": recipe.get("reprob", 0.0), "re_mode": "pixel"}
        return PrefetchLoader(loader, HALF, HALF, device=torch.device("cpu"), **erasing)

    return batches


def timms_loss(folder: Path, recipe: dict[str, Any], seed: int, orders: list[np.ndarray]) -> float:
    """The validation loss of the EMA."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    model: Any = timm.create_model(MODEL, num_classes=10, img_size=SIZE, global_pool="avg", **KWARGS)
    optimizer, ema = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=DECAY), ModelEmaV3(model, decay=EMA)
    batches = timms_batches(folder, recipe, orders)
    loss_of = SoftTargetCrossEntropy() if "mixup" in recipe else LabelSmoothingCrossEntropy(0.1)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=1e-5, min_lr=0.0
    )
    assert scheduler is not None
    update = 0
    for epoch in range(EPOCHS):
        model.train()
        for images, targets in batches(epoch):
            optimizer.zero_grad()
            loss_of(model(images), targets).backward()
            optimizer.step()
            update += 1
            ema.update(model, step=update)
        scheduler.step(epoch + 1)
    val: Any = create_dataset("", root=str(folder), split="val")
    scored: Any = create_loader(
        val,
        (3, SIZE, SIZE),
        BATCH,
        crop_pct=1.0,
        interpolation="bicubic",
        mean=HALF,
        std=HALF,
        num_workers=0,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    with torch.no_grad():
        losses = [cross_entropy(ema.module.eval()(images), targets, reduction="sum") for images, targets in scored]
    return float(sum(losses)) / len(val)


def our_loss(folder: Path, recipe: dict[str, Any], seed: int, output: Path) -> tuple[float, list[np.ndarray]]:
    """The same of ours, and each epoch's order of the samples."""
    kwargs = " ".join(f"{name}={value}" for name, value in (KWARGS | {"global_pool": "avg"}).items())
    line = (
        f"--model {MODEL} --model-kwargs {kwargs} --img-size {SIZE} --crop-pct 1 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
    )
    line += (
        f" -b {BATCH} --opt adamw --lr {LR} --weight-decay {DECAY} --epochs {EPOCHS} --warmup-epochs 1 --seed {seed}"
    )
    line += f" --model-ema-decay {EMA} --no-model-ema-warmup --scale 1 1 --ratio 1 1 --hflip 0 --color-jitter 0 -j 1"
    line += f" --device cpu --no-amp --no-compile --val-interval {EPOCHS} --output {output} --data-dir {folder}"
    line += "".join(f" --{name} {value}" for name, value in recipe.items())
    trainer = Trainer(parse(line.split()), f"{seed}")
    orders = [trainer.setup.plan.order(epoch) for epoch in range(EPOCHS)]
    return records(trainer.run().run_dir, "eval")[-1]["eval_ema_loss"], orders


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's dataset leaves images to Pillow to close
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("recipe", RECIPES)
def test_five_seeds_end_where_timms_end(folder, recipe, tmp_path):
    """The mean difference lies within its error, by a paired t-test."""
    found, plain = [our_loss(folder, RECIPES[recipe], seed, tmp_path) for seed in SEEDS], []
    for seed, (_, orders) in zip(SEEDS, found, strict=True):
        plain.append(timms_loss(folder, RECIPES[recipe], seed, orders))
    ours, timms = np.array([loss for loss, _ in found]), np.array(plain)
    difference = ours - timms
    error = difference.std(ddof=1) / len(SEEDS) ** 0.5
    told = f"{recipe}: {ours.mean():.3f}, timm {timms.mean():.3f}, difference {difference.mean():.3f} +- {error:.3f}"
    print(told, difference.round(3).tolist())
    assert abs(difference.mean()) < stats.t.ppf(1 - FALSE_ALARM / 2, len(SEEDS) - 1) * error, told
