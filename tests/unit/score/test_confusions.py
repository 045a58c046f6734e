"""Counts of the pairs that occur are those of the whole confusion matrix, and say the same of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank_vit.score import confusions
from lowrank_vit.score.confusions import ConfusionCounter, Confusions, merged

CPU = torch.device("cpu")


def counted(num_classes: int, true: np.ndarray, predicted: np.ndarray, is_in_top5: np.ndarray) -> Confusions:
    counter = ConfusionCounter(num_classes, CPU)
    start = 0
    for size in (0, 1, 7, len(true)):  # batches of several sizes
        part = slice(start, start := start + size)
        counter.add(*(torch.from_numpy(values[part]) for values in (true, predicted, is_in_top5)))
    found = counter.result()
    assert found
    return found


@pytest.fixture(params=[64, 1 << 20])
def small_buffers(request, monkeypatch) -> None:
    """Many runs that have to be merged, piece by piece; or one."""
    monkeypatch.setattr(confusions, "_BUFFER", request.param)
    monkeypatch.setattr(confusions, "_PIECE", request.param)
    monkeypatch.setattr(confusions, "_STRIDE", 8)


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize(("num_classes", "num_samples"), [(2, 0), (2, 50), (10, 3000), (300, 5000), (40_000, 2000)])
@pytest.mark.usefixtures("small_buffers")
def test_what_is_said_is_what_the_whole_matrix_says(num_classes, num_samples, is_sorted):
    """Of 40,000 classes the matrix would have 13 GB, so only those that occur are compared there."""
    rng = np.random.default_rng(num_classes)
    used = rng.choice(num_classes, min(num_classes, 300), replace=False)
    used.sort()
    true, predicted = used[rng.integers(0, len(used), (2, num_samples))]
    predicted = np.where(rng.random(num_samples) < 0.5, true, predicted)
    if is_sorted:
        true.sort()
    is_in_top5 = rng.random(num_samples) < 0.7
    found = counted(num_classes, true, predicted, is_in_top5)
    where = np.searchsorted(used, np.stack([true, predicted]))
    matrix = np.zeros((len(used), len(used)), np.int64)
    np.add.at(matrix, tuple(where), 1)
    assert np.array_equal(found.totals_C()[used], matrix.sum(1))
    assert np.array_equal(found.hits_C()[used], matrix.diagonal())
    assert found.counts_P.sum() == found.totals_C().sum() == num_samples
    assert np.array_equal(found.top5_C, np.bincount(true, is_in_top5, num_classes))
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    other, count = found.most_frequent_mistake_C()
    assert np.array_equal(count[used], wrong.max(1))
    assert np.array_equal(other[used][wrong.any(1)], used[wrong.argmax(1)][wrong.any(1)])
    for asked in (1, 16, 10_000):
        order = np.argsort(-wrong, axis=None, kind="stable")[:asked]
        order = order[wrong.flat[order] > 0]
        pairs, counts = found.most_frequent_mistakes(asked)
        assert np.array_equal(counts, wrong.flat[order])
        assert np.array_equal(pairs, used[order // len(used)] * num_classes + used[order % len(used)])
    if len(used) == num_classes:
        assert np.array_equal(found.binned(1), matrix)
        for together in (2, 7):
            starts = np.arange(0, num_classes, together)
            assert np.array_equal(
                found.binned(together), np.add.reduceat(np.add.reduceat(matrix, starts, 0), starts, 1)
            )


def test_many_classes_cost_what_occurs():
    """A million classes have 8 TB of cells."""
    n = 1_000_000
    found = counted(n, np.arange(20) * 50_000, np.full(20, n - 1), np.ones(20, bool))
    assert len(found.pairs_P) == 20
    assert found.binned(-(-n // 100)).sum() == 20
    assert found.most_frequent_mistake_C()[1].sum() == 20


def test_parts_are_merged_whatever_their_sizes():
    rng = np.random.default_rng(1)
    parts = [np.unique(rng.integers(0, 10**9, size), return_counts=True) for size in (0, 5000, 1, 0, 900)]
    pairs, counts = merged(parts)
    assert np.array_equal(pairs, np.unique(np.concatenate([p for p, _ in parts])))
    assert counts.sum() == sum(c.sum() for _, c in parts)
    assert len(merged([])[0]) == len(merged([parts[0]] * 3)[0]) == 0
