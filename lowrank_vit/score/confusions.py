"""Confusions of classes: counts of the pairs that occur, at most one per sample, and never C x C cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Counts = tuple[np.ndarray, np.ndarray]
"""int64 (P,) pairs, each true class * C + predicted class, ascending and unique; int64 (P,) how often each occurred."""
_BUFFER = 1 << 20
"""Samples that are counted at once."""
_PIECE, _STRIDE = 1 << 19, 1 << 12
"""About how many pairs are merged at once, and the stride of the pairs that are sampled to find such pieces."""


@dataclass(frozen=True)
class Confusions:
    """How many samples of each class were predicted as each other class."""

    num_classes: int
    pairs_P: np.ndarray
    """int64 (P,): true class * num_classes + predicted class, ascending; only those that occur."""
    counts_P: np.ndarray
    """int64 (P,): how many samples each pair has, at least 1."""
    top5_C: np.ndarray
    """int64 (C,): how many samples of each class had their class among the likeliest five."""

    @cached_property
    def _bounds(self) -> np.ndarray:
        """int64 (C + 1,): the place in the pairs at which each true class begins, and the end."""
        return np.searchsorted(self.pairs_P, self.num_classes * np.arange(self.num_classes + 1))

    @cached_property
    def _right(self) -> np.ndarray:
        """Places of the pairs of a class with itself, for the classes that have one."""
        right = (self.num_classes + 1) * np.arange(self.num_classes)
        places = np.searchsorted(self.pairs_P, right)
        is_there = places < len(self.pairs_P)
        is_there[is_there] = self.pairs_P[places[is_there]] == right[is_there]
        return places[is_there]

    def totals_C(self) -> np.ndarray:
        """int64 (C,): the samples of each class."""
        return np.diff(np.concatenate([[0], np.cumsum(self.counts_P)])[self._bounds])

    def hits_C(self) -> np.ndarray:
        """int64 (C,): the samples of each class that were predicted right."""
        hits_C = np.zeros(self.num_classes, np.int64)
        hits_C[self.pairs_P[self._right] % self.num_classes] = self.counts_P[self._right]
        return hits_C

    def _mistakes_P(self) -> np.ndarray:
        """`counts_P` without the hits."""
        mistakes_P = self.counts_P.copy()
        mistakes_P[self._right] = 0
        return mistakes_P

    def most_frequent_mistake_C(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 (C,): the class that each one was wrongly taken for most often; int64 (C,): how often, 0 for never.

        The first of several with the same count.
        """
        mistakes_P, bounds = self._mistakes_P(), self._bounds
        there = np.flatnonzero(np.diff(bounds))
        most = [
            first + int(mistakes_P[first:end].argmax())
            for first, end in zip(bounds[there], bounds[there + 1], strict=True)
        ]
        other_C, count_C = np.zeros((2, self.num_classes), np.int64)
        other_C[there], count_C[there] = self.pairs_P[most] % self.num_classes, mistakes_P[most]
        return other_C, count_C

    def most_frequent_mistakes(self, count: int) -> Counts:
        """The `count` most frequent pairs of different classes, most frequent first; of equal ones the first."""
        mistakes_P = self._mistakes_P()
        least = max(1, int(np.partition(mistakes_P, -count)[-count])) if len(mistakes_P) > count else 1
        more, as_often = np.flatnonzero(mistakes_P > least), np.flatnonzero(mistakes_P == least)
        order = np.argsort(-mistakes_P[more], kind="stable")[:count]
        chosen = np.concatenate([more[order], as_often[: count - len(order)]])
        return self.pairs_P[chosen], mistakes_P[chosen]

    def binned(self, together: int) -> np.ndarray:
        """int64 (B, B): counts in bins of `together` neighbouring classes, rows true; 1: the confusion matrix."""
        starts = self._bounds[:-1:together].tolist()
        counts_BB = np.zeros((len(starts), len(starts)), np.int64)
        for counts_B, first, end in zip(counts_BB, starts, [*starts[1:], None], strict=True):
            np.add.at(counts_B, self.pairs_P[first:end] % self.num_classes // together, self.counts_P[first:end])
        return counts_BB


class ConfusionCounter:
    """Counts pairs batch by batch; the host waits for the device once in a million samples.

    It keeps 16 bytes on the host for each pair that occurs, twice that while it merges, and 8 MiB on the device.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        self._waiting = torch.empty(_BUFFER, dtype=torch.int64, device=device)
        self._num_waiting = 0
        self._top5_C = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._runs: list[Counts] = []

    def add(self, targets: Tensor, predictions: Tensor, is_in_top5: Tensor) -> None:
        """Count a batch: int64 (B,) labels and predicted classes, bool (B,) whether it is in the top five."""
        pairs = targets * self._num_classes + predictions
        while len(pairs):
            part = pairs[: _BUFFER - self._num_waiting]
            self._waiting[self._num_waiting : self._num_waiting + len(part)] = part
            self._num_waiting += len(part)
            pairs = pairs[len(part) :]
            if self._num_waiting == _BUFFER:
                self._take_in()
        self._top5_C.scatter_add_(0, targets, is_in_top5.long())

    def _take_in(self) -> None:
        waiting = np.sort(self._waiting[: self._num_waiting].cpu().numpy())
        self._num_waiting = 0
        if len(waiting):
            starts = _starts(waiting)
            self._runs.append((waiting[starts], np.diff(starts, append=len(waiting))))
        # Merging when the newer runs are as long as the first one costs a few passes over all in the end.
        if sum(len(pairs) for pairs, _ in self._runs[1:]) > max(
            4 * _BUFFER, len(self._runs[0][0]) if self._runs else 0
        ):
            self._runs = [merged(self._runs)]

    def result(
        self,
        reduce: Callable[[Tensor], None] | None = None,
        gather: Callable[[Counts], Sequence[Counts] | None] | None = None,
    ) -> Confusions | None:
        """All counts, of all ranks if `reduce` and `gather` are given; None on a rank for which `gather` returns None.

        `reduce` adds a tensor up over the ranks, in place; `gather` returns every rank's part on one of them.
        """
        self._take_in()
        if reduce:
            reduce(self._top5_C)
        own = merged(self._runs)
        self._runs.clear()
        parts = gather(own) if gather else [own]
        if parts is None:
            return None
        del own
        return Confusions(self._num_classes, *merged(parts), self._top5_C.cpu().numpy())


def merged(runs: Sequence[Counts]) -> Counts:
    """The sum of several counts.

    It merges piece by piece, so that it needs little memory beside the counts and their sum.
    """
    if len(runs) < 2:
        return runs[0] if runs else (np.empty(0, np.int64), np.empty(0, np.int64))
    looked_at = np.sort(np.concatenate([pairs[::_STRIDE] for pairs, _ in runs]))
    ends = [*looked_at[_PIECE // _STRIDE :: _PIECE // _STRIDE].tolist(), None]
    room = sum(len(pairs) for pairs, _ in runs)
    all_pairs, all_counts = np.empty(room, np.int64), np.empty(room, np.int64)
    places, size = [0] * len(runs), 0
    for end in ends:
        parts = list[Counts]()
        for n, (pairs, counts) in enumerate(runs):
            until = len(pairs) if end is None else int(np.searchsorted(pairs, end))
            parts.append((pairs[places[n] : until], counts[places[n] : until]))
            places[n] = until
        pairs, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if len(pairs):
            order = np.argsort(pairs, kind="stable")
            pairs = pairs[order]
            starts = _starts(pairs)
            found = slice(size, size := size + len(starts))
            all_pairs[found], all_counts[found] = pairs[starts], np.add.reduceat(counts[order], starts)
    all_pairs.resize(size, refcheck=False)  # gives the rest back, without a copy
    all_counts.resize(size, refcheck=False)
    return all_pairs, all_counts


def _starts(pairs: np.ndarray) -> np.ndarray:
    """The place of each pair's first occurrence; `pairs` are sorted and not empty."""
    return np.flatnonzero(np.diff(pairs, prepend=pairs[0] - 1))
