"""What a run adds up between two looks at it, kept on the device so that no step waits for the host."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_prep.errors import UserError
from lowrank_vit.engine.distributed import World


class Means(NamedTuple):
    """Over the updates and ranks of an interval."""

    loss: float
    top1: float
    """Percent of images whose own label, before mixing, is predicted."""


class Meter:
    """Sums of losses and hits since the last `read`, and the first update whose loss was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._bad_update = torch.full((), -1, dtype=torch.int64, device=device)
        self._count = 0
        self._lrs: dict[int, float] = {}

    def add(self, loss: Tensor, hits: Tensor, batch_size: int, update: int, lr: float) -> None:
        """Note one batch of the update numbered `update`: its mean loss, and how many of its labels were predicted."""
        self._sums += torch.stack([loss.double(), hits.double() / batch_size])
        is_first_bad = (self._bad_update < 0) & ~torch.isfinite(loss)
        self._bad_update = torch.where(is_first_bad, update, self._bad_update)
        self._lrs[update] = lr
        self._count += 1

    def read(self, world: World) -> Means:
        """Means since the last call, over all ranks (this waits for the device); every rank calls it together.

        Raises `UserError` naming update and learning rate if a loss was not finite.
        """
        world.sum(self._sums)
        loss, hits = (self._sums / max(1, self._count * world.size)).tolist()
        if not math.isfinite(loss):
            self._raise_not_finite(world)
        self._sums.zero_()
        self._count = 0
        self._lrs.clear()
        return Means(loss, 100 * hits)

    def _raise_not_finite(self, world: World) -> None:
        never = torch.iinfo(torch.int64).max
        update = torch.where(self._bad_update < 0, never, self._bad_update)
        if world.size > 1:
            torch.distributed.all_reduce(update, torch.distributed.ReduceOp.MIN)
        number = int(update)
        raise UserError(
            f"The loss is not finite at update {number} (learning rate {self._lrs[number]:.3g}). "
            "Nothing was saved since. Try a smaller --lr, a longer --warmup-epochs or --clip-grad 1."
        )

    def state_dict(self, world: World) -> dict[str, Any]:
        """The sums so far, averaged over the ranks; every rank calls it together unless nothing was added."""
        sums = self._sums.clone()
        if self._count:
            world.sum(sums)
        return {
            "sums": sums / world.size,
            "count": self._count,
            "bad_update": self._bad_update,
            "lrs": self._lrs.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the sums of `state_dict`, whatever the number of ranks was."""
        self._sums.copy_(state["sums"])
        self._bad_update.copy_(state["bad_update"])
        self._count, self._lrs = state["count"], dict(state["lrs"])
