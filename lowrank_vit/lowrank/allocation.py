"""Ranks for a budget: how many directions each layer keeps.

A budget is a share of the whole model's parameters, or of its FLOPs, and is never exceeded. A layer has rank 1 at
least, and stays whole where no rank that it could have would save anything (`Layer.pays`); it is not named then.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.layers import By, Costs
from lowrank_vit.lowrank.truncate import Decomposition

Ranks = dict[str, int]
"""By the name of a layer; layers that are not named stay whole."""
_NEAR = 0.1
"""The share of the targets' parameters that the constant is best measured at."""
_HALVINGS = 60


def uniform(decompositions: Mapping[str, object], budget: float, costs: Costs, by: By = "params") -> Ranks:
    """The greatest common share of its own cost for every layer; budget and errors as for `greedy`.

    Of `decompositions` the names alone count.
    """

    def rank_at(name: str, share: float) -> int:
        return max(int(share * costs.layers[name].cost(None) / costs.layers[name].cost(1)), 1)

    return _bisected(decompositions, budget, costs, by, rank_at)


def energy(decompositions: Mapping[str, Decomposition], budget: float, costs: Costs, by: By = "params") -> Ranks:
    """The greatest common share of its squared values that every layer keeps; budget and errors as for `greedy`."""
    left_out = {name: one.own_losses / (one.own_losses[0] or 1.0) for name, one in decompositions.items()}

    def rank_at(name: str, share: float) -> int:
        return max(int(np.argmax(left_out[name] <= 1.0 - share)), 1)

    return _bisected(decompositions, budget, costs, by, rank_at)


def greedy(decompositions: Mapping[str, Decomposition], budget: float, costs: Costs, by: By = "params") -> Ranks:
    """The next rank goes where it lessens the sum of the method's own losses most for its cost.

    Losses fall ever more slowly with the rank, but the step from the greatest rank that pays to the whole layer is
    dear: so a step may pass over ranks to where its saving for its cost is greatest, which is the next corner of the
    convex hull of cost and loss. What is left of the budget at last goes to the best steps that it has room for. The
    sum is that of the best ranks for the budget (a knapsack) but for less than one step.

    Args:
        decompositions: of every layer of `costs`.
        budget: share of the whole model's parameters or FLOPs, above 0.
        costs: of the model.
        by: what the budget is a share of.

    Raises:
        UserError: the budget is below what the model needs with all layers at rank 1, or no number above 0.
    """
    left = _left_over(decompositions, budget, costs, by)
    steps = {name: _Steps.of(one, costs, name, by) for name, one in decompositions.items()}
    at = dict.fromkeys(steps, 0)
    heap: list[tuple[float, int, str, int]] = []

    def push(order: int, name: str) -> None:
        if best := steps[name].best(at[name], left):
            heapq.heappush(heap, (-best[0], order, name, best[1]))

    for order, name in enumerate(steps):
        push(order, name)
    while heap:
        _, order, name, to = heapq.heappop(heap)
        cost = steps[name].costs[to] - steps[name].costs[at[name]]
        if cost <= left:
            left -= int(cost)
            at[name] = to
        push(order, name)
    ranks = {name: steps[name].ranks[at[name]] for name in steps}
    return {name: rank for name, rank in ranks.items() if rank is not None}


ALLOCATIONS: dict[str, Callable[[Mapping[str, Decomposition], float, Costs, By], Ranks]] = {
    "uniform": uniform,
    "energy": energy,
    "greedy": greedy,
}
"""By the name that the command line has for them."""


def least_budget(costs: Costs, by: By = "params") -> float:
    """The least share of the model that a budget can be: all that is not factorised, and each layer at rank 1."""
    return costs.count(_least(costs), by) / costs.count({}, by)


def check_share_of(flag: str, share: float, costs: Costs) -> None:
    """Raise `UserError` for a share of the targets' parameters that has no room for rank 1 of all; `costs_alone`."""
    if share < (least := least_budget(costs)):
        raise UserError(
            f"{flag}: rank 1 of every target needs {math.ceil(least * 1e4) / 1e4:g} of their parameters. Give at least "
            "that, or other --lowrank-targets."
        )


def predicted_loss(decompositions: Mapping[str, Decomposition], ranks: Ranks) -> float:
    """The sum over layers of the losses predicted at these ranks, nats an image; see `truncate.decompose`."""
    return math.fsum(float(decompositions[name].losses[rank]) for name, rank in ranks.items())


class Measured(NamedTuple):
    """A truncation that was scored."""

    share: float
    """Of the targets' parameters that it keeps."""
    predicted: float
    """Loss above the original's, nats an image, as `predicted_loss` has it."""
    loss: float
    """The same, measured."""


def measured_constant(points: Iterable[Measured]) -> float:
    """What predicted losses are to be multiplied by: measured over predicted, of the truncation nearest a tenth.

    Predictions take tokens for independent, the loss for quadratic and the errors of layers for unrelated, so they are
    too low, by much the same factor at all shares where the loss is above its noise. Nearest by the ratio of the
    shares. 1 where no point has both losses above 0.
    """
    usable = [point for point in points if point.share > 0 and point.predicted > 0 and point.loss > 0]
    if not usable:
        return 1.0
    near = min(usable, key=lambda point: abs(math.log(point.share / _NEAR)))
    return near.loss / near.predicted


def sensitivities(
    decompositions: Mapping[str, Decomposition], costs: Costs, shares: Sequence[float] = (0.5, 0.3, 0.2, 0.1, 0.05)
) -> list[dict[str, float | int | str]]:
    """A table of the loss that each layer alone is predicted to cause: a row for each layer and share of it kept.

    Columns: `layer`, `share`, `rank` (the greatest that the share has room for, 1 at least), `predicted_loss`. Shares
    whose rank saves nothing are left out.
    """
    rows: list[dict[str, float | int | str]] = []
    for name, one in decompositions.items():
        layer = costs.layers[name]
        for share in shares:
            rank = max(int(share * layer.cost(None) / layer.cost(1)), 1)
            if rank <= layer.pays:
                loss = float(one.losses[rank])
                rows.append({"layer": name, "share": share, "rank": rank, "predicted_loss": loss})
    return rows


def _least(costs: Costs) -> Ranks:
    return {name: 1 for name, layer in costs.layers.items() if layer.pays}


def _left_over(decompositions: Mapping[str, object], budget: float, costs: Costs, by: By) -> int:
    """What the budget has left with all layers at rank 1, parameters or FLOPs."""
    assert decompositions.keys() == costs.layers.keys(), "decompositions and costs are of the same layers"
    least = least_budget(costs, by)
    if not budget >= least:
        what = "parameters" if by == "params" else "FLOPs"
        raise UserError(
            f"A budget of {budget:g} of the model's {what} is too small: with every target at rank 1 it still needs "
            f"{math.ceil(least * 1e4) / 1e4:.4f}. Give at least that, or name more targets."
        )
    whole = costs.count({}, by)
    return max(math.floor(min(budget, 1.0) * whole) - costs.count(_least(costs), by), 0)


def _bisected(
    decompositions: Mapping[str, object],
    budget: float,
    costs: Costs,
    by: By,
    rank_at: Callable[[str, float], int],
) -> Ranks:
    """The ranks of the greatest share, 0 to 1, that fits; `rank_at` must not fall with it.

    Where the next rank comes at one share for many layers, as those of all blocks, the budget may have room for some of
    them: they go out one at a time, in the order of the layers.
    """
    limit = costs.count(_least(costs), by) + _left_over(decompositions, budget, costs, by)
    if costs.count({}, by) <= limit:
        return {}

    def ranks_at(share: float) -> Ranks:
        if share >= 1:
            return {}
        ranks = {name: rank_at(name, share) for name in decompositions}
        return {name: rank for name, rank in ranks.items() if rank <= costs.layers[name].pays}

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if costs.count(ranks_at(middle), by) <= limit:
            low = middle
        else:
            high = middle
    ranks, next_ranks = ranks_at(low), ranks_at(high)
    left = limit - costs.count(ranks, by)
    queue = deque(name for name in costs.layers if name in ranks and next_ranks.get(name) != ranks[name])
    while queue:
        name = queue.popleft()
        layer, rank = costs.layers[name], ranks.pop(name)
        more_rank = rank + 1 if rank < layer.pays else None
        more = layer.cost(more_rank, by) - layer.cost(rank, by)
        if more > left:
            ranks[name] = rank
            continue
        left -= more
        if more_rank is not None:
            ranks[name] = more_rank
            if more_rank != next_ranks.get(name):
                queue.append(name)
    return {name: ranks[name] for name in decompositions if name in ranks}


class _Steps(NamedTuple):
    """What a layer may be: its ranks from 1 on that save something, and None for the whole; costs rise."""

    ranks: list[int | None]
    costs: np.ndarray
    losses: np.ndarray

    @classmethod
    def of(cls, one: Decomposition, costs: Costs, name: str, by: By) -> _Steps:
        layer = costs.layers[name]
        ranks: list[int | None] = [*range(1, min(layer.pays, one.rank) + 1), None]
        losses = [0.0 if rank is None else float(one.own_losses[rank]) for rank in ranks]
        return cls(ranks, np.array([layer.cost(rank, by) for rank in ranks], np.int64), np.array(losses))

    def best(self, at: int, left: int) -> tuple[float, int] | None:
        """The greatest saving for its cost of any step from `at` that there is room for, and where it leads."""
        more = self.costs[at + 1 :] - self.costs[at]
        fits = int(np.searchsorted(more, left, side="right"))
        if not fits:
            return None
        rates = (self.losses[at] - self.losses[at + 1 : at + 1 + fits]) / more[:fits]
        best = int(np.argmax(rates))
        return (float(rates[best]), at + 1 + best) if rates[best] > 0 else None
