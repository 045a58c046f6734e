"""Scores over every sample once: sums, shares of ranks, confusions, mirror images."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score
from torch import Tensor, nn

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.batch import Batch
from lowrank_vit.plan.plans import EvalPlan
from lowrank_vit.report.confusion_plot import Mistake, classes_a_cell, confusion_plot
from lowrank_vit.score.confusions import ConfusionCounter
from lowrank_vit.score.evaluate import Evaluator
from lowrank_vit.score.results import class_rows, rows_to_csv

CLASSES, SAMPLES, SIZE = 7, 53, 8


class Linear(nn.Module):
    """A model whose logits depend on where the pixels are."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE * SIZE, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return 3 * self.head(images.flatten(1))


class Share:
    """One rank's batches of made-up samples."""

    def __init__(self, batch_size: int, rank: int = 0, world_size: int = 1, num_samples: int = SAMPLES) -> None:
        sides = np.full(num_samples, SIZE)
        self.plan = EvalPlan(
            sides, sides, img_size=SIZE, crop_pct=1.0, batch_size=batch_size, rank=rank, world_size=world_size
        )

    def batches(self, epoch: int) -> Iterator[Batch]:
        for step, ids in enumerate(self.plan.ids(epoch)):
            yield Batch(IMAGES[ids], TARGETS[ids], self.plan.batch(epoch, step, ids))


torch.manual_seed(2)
IMAGES = torch.randint(0, 256, (SAMPLES, SIZE, SIZE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
TARGETS = torch.randint(0, CLASSES, (SAMPLES,))
MODEL = Linear().eval()


def evaluator(**more) -> Evaluator:
    augment = Augment((0.5,) * 3, (0.5,) * 3, CLASSES, 0.0)
    return Evaluator(MODEL, augment, amp=False, compile=False, **more)


def logits(images: Tensor) -> np.ndarray:
    with torch.no_grad():
        return MODEL((images.float() / 255 - 0.5) / 0.5).double().numpy()


def shares(of: np.ndarray) -> np.ndarray:
    exponents = np.exp(of - of.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 10, 53, 100])
def test_scores_are_sklearns(batch_size):
    scores = evaluator()(Share(batch_size), batch_size)
    expected, labels = logits(IMAGES), range(CLASSES)
    assert scores.num_samples == SAMPLES
    assert scores.top1 == pytest.approx(100 * np.mean(expected.argmax(1) == TARGETS.numpy()))
    assert scores.top5 == pytest.approx(100 * float(top_k_accuracy_score(TARGETS, expected, k=5, labels=labels)))
    assert scores.loss == pytest.approx(log_loss(TARGETS, shares(expected), labels=list(labels)), rel=1e-5)
    assert scores.confusions is None


def test_mirror_images_count_half():
    expected = (logits(IMAGES) + logits(IMAGES.flip(3))) / 2
    scores = evaluator(tta=2)(Share(10), 10)
    assert scores.top1 == pytest.approx(100 * np.mean(expected.argmax(1) == TARGETS.numpy()))
    assert scores.loss == pytest.approx(log_loss(TARGETS, shares(expected), labels=list(range(CLASSES))), rel=1e-5)
    assert scores.loss != pytest.approx(evaluator()(Share(10), 10).loss, rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 60])
def test_ranks_together_score_each_sample_once(world_size):
    """With 60 ranks some have no sample at all."""
    parts: list[Tensor] = []
    for rank in range(world_size):
        with (
            pytest.raises(UserError, match="no sample to score")
            if world_size > SAMPLES and rank >= SAMPLES
            else _nothing()
        ):
            evaluator()(Share(10, rank, world_size), 10, lambda sums: parts.append(sums.clone()))
    total = torch.stack(parts).sum(0)

    def take_total(sums: Tensor) -> None:
        sums.copy_(total)

    scores = evaluator()(Share(10, 0, world_size), 10, take_total)
    whole = evaluator()(Share(10), 10)
    assert scores.num_samples == SAMPLES
    assert (scores.top1, scores.top5) == (whole.top1, whole.top5)
    assert scores.loss == pytest.approx(whole.loss, rel=1e-12)


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("world_size", [2, 5, 60])  # of 60 ranks some have no sample
def test_ranks_together_count_the_confusions_of_one(world_size):
    alone = evaluator()(Share(10), 10, by_class=True).confusions
    sums, parts = list[list[Tensor]](), list[Any]()
    for rank in range(world_size):
        sums.append([])

        def give(part: Any) -> None:
            parts.append(part)

        with contextlib.suppress(UserError):  # an empty share alone
            scores = evaluator()(Share(10, rank, world_size), 10, sums[-1].append, give, by_class=True)
            assert scores.confusions is None
    _, top5 = (torch.stack(one).sum(0) for one in zip(*sums, strict=True))
    first = ConfusionCounter(CLASSES, torch.device("cpu")).result(lambda values: None, lambda part: [part, *parts])
    assert alone
    assert first
    assert np.array_equal(first.binned(1), alone.binned(1))
    assert np.array_equal(top5, alone.top5_C)


def test_confusions_are_sklearns():
    scores = evaluator()(Share(10), 10, by_class=True)
    assert scores.confusions
    predictions = logits(IMAGES).argmax(1)
    expected = confusion_matrix(TARGETS, predictions, labels=range(CLASSES))
    assert np.array_equal(scores.confusions.binned(1), expected)
    names = [f"c{n}" for n in range(CLASSES)]
    rows = list(csv.DictReader(io.StringIO(rows_to_csv(class_rows(scores, names)))))
    for label, row in enumerate(rows):
        assert int(row["num_samples"]) == int(TARGETS.eq(label).sum())
        assert float(row["top1"]) == pytest.approx(100 * expected[label, label] / expected[label].sum(), rel=1e-5)
        assert float(row["top5"]) >= float(row["top1"])
        assert int(row["taken_for_samples"]) == max(0, *np.delete(expected[label], label))
        assert row["taken_for"] != names[label]


@pytest.mark.parametrize("classes", [2, 30])
def test_the_picture_is_a_picture_and_repeats(classes):
    confusion = np.arange(classes * classes).reshape(classes, classes)
    names = [f"a class with a rather long name {n}" for n in range(classes)]
    mistakes = [Mistake(0, 1, 3, 7)]
    confusion_plot(confusion[:2, :2], mistakes, [r"$\frac$", "\udce9"], r"$\frac$ \udce9")  # names are no formulas
    content = confusion_plot(confusion, mistakes, names, "a model")
    assert content == confusion_plot(confusion, mistakes, names, "a model")
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert pixels.shape[1] > 1000
    assert pixels.std() > 10


def test_a_picture_of_many_classes_has_all_of_them_in_its_cells():
    """A mistake of the last class alone colours the last row, at its left."""
    classes = 5_000
    together = classes_a_cell(classes)
    bins = -(-classes // together)
    counts = np.zeros((bins, bins), np.int64)
    counts[-1, 0] = 1
    names = [str(n) for n in range(classes)]
    blank, drawn = (
        np.asarray(Image.open(io.BytesIO(confusion_plot(one, [], names, ""))).convert("L")).astype(int)
        for one in (np.zeros_like(counts), counts)
    )
    rows, columns = np.nonzero(blank != drawn)
    assert len(rows)
    assert rows.min() > 0.85 * len(drawn)
    assert columns.max() < 0.1 * drawn.shape[1]
