"""What a run adds up between two looks at it, kept on the device so that no step waits for the host."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_vit.common.errors import UserError
from lowrank_vit.ranks.world import World


class Means(NamedTuple):
    """Over the updates and ranks of an interval."""

    loss: float
    top1: float
    """Percent of images whose own label, before mixing, is predicted."""


NEVER = torch.iinfo(torch.int64).max
"""The first update whose loss is not finite, where there is none."""


class Meter:
    """Sums of losses and hits since the last `read`, and the first update whose loss was not finite.

    The loss of float16 is judged before it is scaled: an update that the scaler skips, since its gradients overflow,
    has a finite loss. One whose loss is not finite has overflowed in the forward pass, which no scale can mend.
    """

    def __init__(self, device: torch.device, accum_steps: int = 1) -> None:
        """`accum_steps`: batches that make up an update."""
        self._accum_steps = accum_steps
        # Of each update's mean, so that a run can go on with another number of batches in an update.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._bad_update = torch.full((), NEVER, dtype=torch.int64, device=device)
        self._lrs: dict[int, float] = {}

    def add(self, loss: Tensor, hits: Tensor, batch_size: int, update: int, lr: float) -> None:
        """Note one batch of the update numbered `update`: its mean loss, and how many of its labels were predicted."""
        self._sums.add_(torch.stack([loss.double(), hits.double() / batch_size]), alpha=1 / self._accum_steps)
        self._bad_update = torch.where(torch.isfinite(loss), self._bad_update, self._bad_update.clamp(max=update))
        self._lrs[update] = lr

    def read(self, world: World) -> Means:
        """Means since the last call, over all ranks (this waits for the device); every rank calls it together.

        Raises `UserError` naming update and learning rate if a loss was not finite.
        """
        world.sum(self._sums)
        loss, hits = (self._sums / max(1, len(self._lrs) * world.size)).tolist()
        if not math.isfinite(loss):
            self._raise_not_finite(world)
        self._sums.zero_()
        self._lrs.clear()
        return Means(loss, 100 * hits)

    def _raise_not_finite(self, world: World) -> None:
        number = int(world.least(self._bad_update))
        lr = f" (learning rate {self._lrs[number]:.3g})" if number in self._lrs else ""
        raise UserError(
            f"The loss is not finite at update {number}{lr}. "
            "Nothing was saved since. Try a smaller --lr, a longer --warmup-epochs or --clip-grad 1."
        )

    def state_dict(self, world: World) -> dict[str, Any]:
        """The sums so far, averaged over the ranks; every rank calls it together unless nothing was added."""
        sums, bad_update = self._sums.clone(), self._bad_update
        if self._lrs:
            world.sum(sums)
            bad_update = world.least(bad_update)
        return {"sums": sums / world.size, "bad_update": bad_update, "lrs": self._lrs.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the sums of `state_dict`, whatever the number of ranks and of batches in an update was."""
        self._sums.copy_(state["sums"])
        self._bad_update.copy_(state["bad_update"])
        self._lrs = dict(state["lrs"])
