"""What a backend is to decode: the batches that are left of one epoch, planned when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lowrank_vit.plan.plans import BatchPlan, EvalPlan, TrainPlan


class Schedule:
    """The rest of an epoch. Ids are known at once; windows and all else of a batch are drawn in `plan`.

    Backends ask for plans in threads of their own, so that drawing them costs the trainer nothing.
    """

    def __init__(
        self,
        plan: TrainPlan | EvalPlan,
        epoch: int,
        first_step: int,
        bad: set[int],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`bad`: samples to do without, see `_without`; `check` is called before each batch and may raise."""
        self._plan, self._check, self.epoch = plan, check, epoch
        rows = _without(plan, epoch, plan.ids(epoch), bad)[first_step:]
        self._steps = [first_step + n for n, ids in enumerate(rows) if len(ids)]
        self.ids = [ids for ids in rows if len(ids)]
        """int64 (B,) for each batch."""

    def __len__(self) -> int:
        return len(self.ids)

    def plan(self, n: int) -> BatchPlan:
        """The n-th of these batches."""
        self._check()
        return self._plan.batch(self.epoch, self._steps[n], self.ids[n])

    def __iter__(self) -> Iterator[BatchPlan]:
        return (self.plan(n) for n in range(len(self)))


def _without(
    plan: TrainPlan | EvalPlan, epoch: int, rows: np.ndarray | list[np.ndarray], bad: set[int]
) -> list[np.ndarray]:
    """The rows of ids without `bad` samples.

    In training the sample that follows in the epoch's order (of all ranks) stands in for a bad one, so that the
    replacement depends on neither ranks nor batches nor on when the damage was found; in evaluation it is left out.
    """
    if not bad:
        return list(rows)
    if isinstance(plan, EvalPlan):
        return [ids[~np.isin(ids, list(bad))] for ids in rows]
    order = plan.order(epoch)
    stand_in = {}
    for sample_id in bad:
        place = int(np.flatnonzero(order == sample_id)[0])
        others = (int(order[(place + n) % len(order)]) for n in range(1, len(order)))
        stand_in[sample_id] = next((other for other in others if other not in bad), sample_id)
    return [np.array([stand_in.get(int(i), int(i)) for i in ids]) for ids in rows]
