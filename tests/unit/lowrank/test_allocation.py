"""Ranks for a budget, against exhaustive search and exact dynamic programming."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.allocation import (
    ALLOCATIONS,
    Measured,
    Ranks,
    greedy,
    least_budget,
    measured_constant,
    predicted_loss,
    sensitivities,
)
from lowrank_vit.lowrank.layers import By, Costs, Layer
from lowrank_vit.lowrank.truncate import Decomposition

BYS: tuple[By, ...] = ("params", "flops")


def decomposition(values: np.ndarray, rows: int, cols: int) -> Decomposition:
    """Of a matrix with these singular values; only what allocation looks at."""
    own = np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0) / 2
    return Decomposition((rows, cols), 1, values[None], own, 3 * own, torch.float32, None, (), None)


def example(shapes: list[tuple[int, int]], seed: int, rest: int) -> tuple[dict[str, Decomposition], Costs]:
    """Layers with spectra of unlike scale and decay, and differing numbers of tokens."""
    made = np.random.default_rng(seed)
    layers: dict[str, Layer] = {}
    decompositions: dict[str, Decomposition] = {}
    for n, (rows, cols) in enumerate(shapes):
        k = min(rows, cols)
        values = 10 ** made.uniform(-1, 1) * np.exp(-np.arange(k) * made.uniform(0, 1)) * made.uniform(0.5, 1, k)
        decompositions[f"layer{n}"] = decomposition(np.sort(values)[::-1], rows, cols)
        layers[f"layer{n}"] = Layer(rows, cols, tokens=int(made.integers(1, 5)))
    return decompositions, Costs(layers, {"params": rest, "flops": 7 * rest})


def own_loss(decompositions: dict[str, Decomposition], ranks: Ranks) -> float:
    return sum(float(decompositions[name].own_losses[rank]) for name, rank in ranks.items())


def choices(costs: Costs, by: By) -> dict[str, list[tuple[int | None, int]]]:
    """For each layer what it may be, and at what cost."""
    return {
        name: [(rank, layer.cost(rank, by)) for rank in [*range(1, layer.pays + 1), None]]
        for name, layer in costs.layers.items()
    }


def exhaustive(decompositions: dict[str, Decomposition], costs: Costs, limit: float, by: By) -> float:
    best = math.inf
    for ranks in itertools.product(*choices(costs, by).values()):
        if sum(cost for _, cost in ranks) + costs.rest[by] <= limit:
            named = {name: rank for name, (rank, _) in zip(costs.layers, ranks, strict=True) if rank is not None}
            best = min(best, own_loss(decompositions, named))
    return best


def dynamic(decompositions: dict[str, Decomposition], costs: Costs, limit: float, by: By) -> float:
    """The least sum of losses that the limit has room for: a knapsack over every whole cost."""
    room = int(limit) - costs.rest[by]
    best = np.zeros(room + 1)
    for name, options in choices(costs, by).items():
        new = np.full(room + 1, math.inf)
        for rank, cost in options:
            if cost <= room:
                loss = 0.0 if rank is None else float(decompositions[name].own_losses[rank])
                new[cost:] = np.minimum(new[cost:], best[: room + 1 - cost] + loss)
        best = new
    return float(best[-1])


@pytest.mark.parametrize("by", BYS)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_within_a_step_of_the_best_ranks(seed: int, by: By):
    shapes = [(9, 12), (6, 5), (12, 8)]
    decompositions, costs = example(shapes, seed, rest=20)
    whole = costs.count({}, by)
    for budget in np.linspace(least_budget(costs, by), 1.0, 12):
        limit = budget * whole + 1e-9
        best = dynamic(decompositions, costs, limit, by)
        assert best == pytest.approx(exhaustive(decompositions, costs, limit, by), abs=1e-12)
        found = own_loss(decompositions, greedy(decompositions, float(budget), costs, by))
        # The best of a relaxed knapsack, whose steps may be taken in part, is no worse than the best of whole steps.
        steps = [
            float(one.own_losses[rank] - (0.0 if rank == costs.layers[name].pays else one.own_losses[rank + 1]))
            for name, one in decompositions.items()
            for rank in range(1, costs.layers[name].pays + 1)
        ]
        assert best - 1e-12 <= found <= best + max(steps)
    decompositions, costs = example([(40, 30), (30, 40), (20, 60), (60, 20)], seed, rest=100)
    close: list[float] = []
    for budget in np.linspace(0.2, 0.9, 8):
        limit = float(budget) * costs.count({}, by)
        found = own_loss(decompositions, greedy(decompositions, float(budget), costs, by))
        close.append(found / max(dynamic(decompositions, costs, limit, by), 1e-9))
    assert np.median(close) < 1.05


SIZES = st.integers(1, 40)


@given(
    shapes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    rest=st.integers(0, 500),
    share=st.floats(0.0, 1.2),
    allocation=st.sampled_from(sorted(ALLOCATIONS)),
    by=st.sampled_from(BYS),
)
def test_a_budget_is_never_exceeded(
    shapes: list[tuple[int, int]], seed: int, rest: int, share: float, allocation: str, by: By
):
    decompositions, costs = example(shapes, seed, rest)
    least = least_budget(costs, by)
    budget = least + share * (1 - least)
    ranks = ALLOCATIONS[allocation](decompositions, budget, costs, by)
    assert costs.count(ranks, by) <= budget * costs.count({}, by) * (1 + 1e-12)
    assert all(1 <= rank <= costs.layers[name].pays for name, rank in ranks.items())
    if share >= 1:
        assert allocation == "greedy" or not ranks
        assert own_loss(decompositions, ranks) <= 1e-9


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("by", BYS)
def test_more_budget_is_used(allocation: str, by: By):
    decompositions, costs = example([(40, 30), (30, 40), (20, 60), (60, 20)], 3, rest=100)
    spent = [
        costs.count(ALLOCATIONS[allocation](decompositions, budget, costs, by), by) / costs.count({}, by)
        for budget in (0.2, 0.4, 0.6, 0.8)
    ]
    for used, budget in zip(spent, (0.2, 0.4, 0.6, 0.8), strict=True):
        assert budget - 0.16 < used <= budget


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
@pytest.mark.parametrize("by", BYS)
def test_less_than_a_rank_of_one_layer_is_left_where_many_are_alike(allocation: str, by: By):
    """Layers of one shape and one spectrum get their next rank at the same share, which has room for some of them."""
    decompositions, costs = example([(40, 30), (20, 60)], 3, rest=100)
    decompositions = {f"{name}.{n}": one for n in range(6) for name, one in decompositions.items()}
    costs = Costs({name: costs.layers[name.partition(".")[0]] for name in decompositions}, costs.rest)
    greatest = max(layer.cost(1, by) for layer in costs.layers.values())
    for budget in np.linspace(least_budget(costs, by), 1.0, 40):
        ranks = ALLOCATIONS[allocation](decompositions, float(budget), costs, by)
        left = float(budget) * costs.count({}, by) - costs.count(ranks, by)
        assert -1e-6 <= left < greatest + 1
        of_shape = {name: [ranks.get(f"{name}.{n}", 99) for n in range(6)] for name in ("layer0", "layer1")}
        assert all(found == sorted(found, reverse=True) for found in of_shape.values())  # the first layers first
        assert all(found[0] - found[-1] <= 1 for found in of_shape.values() if found[0] < 99)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("budget", [0.01, 0.0, -1.0, math.nan])
def test_a_budget_below_what_is_left_alone_names_the_least_there_is(allocation: str, budget: float):
    decompositions, costs = example([(40, 30), (3, 1)], 0, rest=500)
    with pytest.raises(UserError, match=r"with every target at rank 1 it still needs 0\.3365") as caught:
        ALLOCATIONS[allocation](decompositions, budget, costs, "params")
    assert "parameters is too small" in str(caught.value)
    ranks = ALLOCATIONS[allocation](decompositions, 0.3365, costs, "params")
    assert ranks == {"layer0": 1}  # a 3 x 1 matrix stays whole: rank 1 has four numbers


def test_a_layer_without_directions_gets_no_more_than_one():
    decompositions, costs = example([(20, 20), (20, 20)], 0, rest=0)
    decompositions["layer1"] = decomposition(np.zeros(20), 20, 20)
    assert greedy(decompositions, 0.9, costs) == {"layer1": 1}


def test_energy_keeps_one_share_in_every_layer():
    decompositions, costs = example([(40, 30), (30, 40), (20, 60)], 5, rest=10)
    ranks = ALLOCATIONS["energy"](decompositions, 0.4, costs, "params")
    kept = {name: 1 - one.own_losses / one.own_losses[0] for name, one in decompositions.items()}
    least = min(kept[name][rank] for name, rank in ranks.items())
    assert all(kept[name][rank - 1] <= least for name, rank in ranks.items() if rank > 1)


def test_uniform_keeps_one_share_of_the_weights_in_every_layer():
    decompositions, costs = example([(40, 40), (40, 80)], 5, rest=10)
    ranks = ALLOCATIONS["uniform"](decompositions, 0.5, costs, "params")
    shares = [costs.layers[name].cost(rank) / costs.layers[name].cost(None) for name, rank in ranks.items()]
    assert len(shares) == 2
    assert max(shares) - min(shares) < 0.05


def test_predicted_losses_add_up_and_are_scaled_by_what_was_measured_near_a_tenth():
    decompositions, costs = example([(40, 30), (30, 40)], 1, rest=10)
    ranks = greedy(decompositions, 0.3, costs)
    expected = 3 * own_loss(decompositions, ranks)
    assert predicted_loss(decompositions, ranks) == pytest.approx(expected)
    assert predicted_loss(decompositions, {}) == 0.0
    points = [Measured(0.5, 0.001, -0.01), Measured(0.08, 0.1, 0.9), Measured(0.2, 0.01, 0.2), Measured(0.1, 0.1, -1)]
    assert measured_constant(points) == pytest.approx(9.0)
    assert measured_constant(points[:1]) == measured_constant([]) == 1.0


def test_sensitivities_are_losses_of_one_layer_alone():
    decompositions, costs = example([(40, 30), (2, 2)], 1, rest=10)
    rows = sensitivities(decompositions, costs, shares=(0.5, 0.1))
    assert [(row["layer"], row["share"], row["rank"]) for row in rows] == [("layer0", 0.5, 8), ("layer0", 0.1, 1)]
    assert rows[0]["predicted_loss"] == decompositions["layer0"].losses[8]
