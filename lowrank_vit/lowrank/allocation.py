"""Ranks for a budget: how many directions each layer keeps.

A budget is a share of the whole model's parameters or FLOPs, and is never exceeded. A factorised layer has at least
rank 1. A layer stays whole, and is not listed, if no possible rank saves anything (`Layer.pays`).
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
"""Rank by layer name; layers that are not listed stay whole."""
_NEAR = 0.1
"""The share of the targets' parameters at which the constant is measured best."""
_HALVINGS = 60


def uniform(decompositions: Mapping[str, object], budget: float, costs: Costs, by: By = "params") -> Ranks:
    """Give every layer the same share of its own cost, as large as the budget allows; errors as for `greedy`.

    Only the names in `decompositions` are used.
    """

    def rank_at(name: str, share: float) -> int:
        return max(int(share * costs.layers[name].cost(None) / costs.layers[name].cost(1)), 1)

    return _bisected(decompositions, budget, costs, by, rank_at)


def energy(decompositions: Mapping[str, Decomposition], budget: float, costs: Costs, by: By = "params") -> Ranks:
    """Let every layer keep the same share of its squared values, as large as the budget allows; see `greedy`."""
    left_out = {name: one.own_losses / (one.own_losses[0] or 1.0) for name, one in decompositions.items()}

    def rank_at(name: str, share: float) -> int:
        return max(int(np.argmax(left_out[name] <= 1.0 - share)), 1)

    return _bisected(decompositions, budget, costs, by, rank_at)


def greedy(decompositions: Mapping[str, Decomposition], budget: float, costs: Costs, by: By = "params") -> Ranks:
    """Give the next rank to the layer where it lowers the sum of the method's own losses most for its cost.

    The loss falls ever more slowly with the rank, but the step from the largest rank that pays to the whole layer is
    expensive. A step may therefore skip ranks, to the one with the greatest saving for its cost: the next corner of the
    convex hull of cost and loss. The rest of the budget goes to the best steps that still fit. The sum differs from
    that of the best ranks for the budget (a knapsack problem) by less than one step.

    Args:
        decompositions: one for every layer of `costs`.
        budget: share of the whole model's parameters or FLOPs, above 0.
        costs: of the model.
        by: what the budget is a share of.

    Raises:
        UserError: the budget is not above 0, or is below what the model needs with all layers at rank 1.
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
"""By the name on the command line."""


def least_budget(costs: Costs, by: By = "params") -> float:
    """The smallest possible budget: everything that is not factorised, and each layer at rank 1, as a share."""
    return costs.count(_least(costs), by) / costs.count({}, by)


def check_share_of(flag: str, share: float, costs: Costs) -> None:
    """Raise `UserError` if a share of the targets' parameters is too small for rank 1 everywhere; see `costs_alone`."""
    if share < (least := least_budget(costs)):
        raise UserError(
            f"{flag}: rank 1 of every target needs {math.ceil(least * 1e4) / 1e4:g} of their parameters. Give at least "
            "that, or other --lowrank-targets."
        )


def predicted_loss(decompositions: Mapping[str, Decomposition], ranks: Ranks) -> float:
    """The sum over layers of the losses predicted at these ranks, nats per image; see `truncate.decompose`."""
    return math.fsum(float(decompositions[name].losses[rank]) for name, rank in ranks.items())


class Measured(NamedTuple):
    """The score of a truncation."""

    share: float
    """Share of the targets' parameters that it keeps, 0-1."""
    predicted: float
    """Rise of the loss over the original's, nats per image, by `predicted_loss`."""
    loss: float
    """The measured rise, nats per image."""


def measured_constant(points: Iterable[Measured]) -> float:
    """The factor for predicted losses: measured over predicted rise, of the truncation nearest to a tenth.

    Predictions assume independent tokens, a quadratic loss and unrelated errors of layers. So they are too low, by much
    the same factor at all shares where the rise exceeds its noise. The nearest truncation is the one with the smallest
    ratio between the shares. Returns 1 if no point has both losses above 0.
    """
    usable = [point for point in points if point.share > 0 and point.predicted > 0 and point.loss > 0]
    if not usable:
        return 1.0
    near = min(usable, key=lambda point: abs(math.log(point.share / _NEAR)))
    return near.loss / near.predicted


def sensitivities(
    decompositions: Mapping[str, Decomposition], costs: Costs, shares: Sequence[float] = (0.5, 0.3, 0.2, 0.1, 0.05)
) -> list[dict[str, float | int | str]]:
    """The predicted loss when one layer alone is truncated: a row for each layer and share of it that is kept.

    Columns: `layer`, `share`, `rank` (the largest that fits the share, at least 1), `predicted_loss`. Shares whose rank
    saves nothing are left out.
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
    """What is left of the budget with all layers at rank 1, in parameters or FLOPs."""
    assert decompositions.keys() == costs.layers.keys(), "decompositions and costs must have the same layers"
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
    """The ranks of the largest share, 0 to 1, that fits the budget; `rank_at` must not fall as the share rises.

    Many layers, such as those of all blocks, may gain their next rank at the same share. If the budget has room for
    only some of them, the ranks are given one at a time, in the order of the layers.
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
    """A layer's choices: the ranks from 1 on that save something, then None for the whole layer; costs rise."""

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
        """The best ratio of saving to cost among the steps from `at` that fit `left`, and where it leads; or None."""
        more = self.costs[at + 1 :] - self.costs[at]
        fits = int(np.searchsorted(more, left, side="right"))
        if not fits:
            return None
        rates = (self.losses[at] - self.losses[at + 1 : at + 1 + fits]) / more[:fits]
        best = int(np.argmax(rates))
        return (float(rates[best]), at + 1 + best) if rates[best] > 0 else None
