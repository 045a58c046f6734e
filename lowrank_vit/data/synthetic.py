"""A loader without data: one made-up batch that stays on the device, to measure the step alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from lowrank_vit.data.batch import Batch
from lowrank_vit.data.loader import LoaderStats
from lowrank_vit.plan.plans import TrainPlan, TrainRules

UPDATES_PER_EPOCH = 100


def synthetic_plan(
    *, img_size: int, batch_size: int, rank: int = 0, world_size: int = 1, accum_steps: int = 1, seed: int = 0
) -> TrainPlan:
    """A plan of `UPDATES_PER_EPOCH` updates an epoch over samples that do not exist."""
    sides = np.full(UPDATES_PER_EPOCH * batch_size * world_size * accum_steps, img_size)
    share = {"rank": rank, "world_size": world_size, "accum_steps": accum_steps}
    return TrainPlan(sides, sides, TrainRules(), seed=seed, img_size=img_size, batch_size=batch_size, **share)


class SyntheticLoader:
    """The part of `Loader` that the trainer uses. Every batch has the same images; nothing is decoded or augmented.

    (The step's mixing arithmetic still runs, with a weight of one.)
    """

    name = "synthetic"
    bad = frozenset[int]()
    engine_share = None
    resident_bytes = 0

    def __init__(self, plan: TrainPlan, num_classes: int, device: torch.device) -> None:
        self.plan = plan
        batch, size = plan.batch_size, plan.img_size
        # Fixed pixels of every value in no regular order: a multiplicative sequence modulo a prime.
        pixels = torch.arange(batch * size * size * 3, device=device).remainder_(65521).mul_(31337).remainder_(65521)
        self._images = pixels.remainder_(256).to(torch.uint8).view(batch, size, size, 3).permute(0, 3, 1, 2)
        self._targets = torch.arange(batch, device=device) % num_classes
        self._epoch, self._step, self._is_loaded = 0, 0, False

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the same batch as often as an epoch has steps, from the loaded position on."""
        first = self._step if self._is_loaded and epoch == self._epoch else 0
        self._is_loaded = False
        for step in range(first, self.plan.steps_per_epoch):
            self._epoch, self._step = epoch, step + 1
            yield Batch(self._images, self._targets, self.plan.batch(epoch, step, self.plan.step_ids(epoch, step)))
        self._epoch, self._step = epoch + 1, 0

    def stats(self) -> LoaderStats:
        """Figures of a loader for which nothing waits and nothing is decoded."""
        return LoaderStats(0.0, 0.0, 0.0, 0)

    def state_dict(self) -> dict[str, int]:
        """The position after the last update, as `Loader.state_dict`."""
        return {"epoch": self._epoch, "update": self._step // self.plan.accum_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position, as `Loader.load_state_dict`."""
        self._epoch, self._step, self._is_loaded = state["epoch"], state["update"] * self.plan.accum_steps, True

    def close(self) -> None:
        """Do nothing: there is no thread and no memory to give back."""
