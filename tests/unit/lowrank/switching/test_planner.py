"""Ranks under a budget by each rule, and that the model which trains is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank_vit.config.low_rank_options import LowRank, RankRule
from lowrank_vit.lowrank.layers import costs_alone
from lowrank_vit.lowrank.methods import METHODS
from lowrank_vit.lowrank.switching.planner import Planner, merged_copy, ranks_under
from lowrank_vit.lowrank.truncate import decompose_layers
from lowrank_vit.model.low_rank import LowRankLinear
from lowrank_vit.spectral.measures.noise import marchenko_pastur
from tests.unit.lowrank.examples import model_and_images


@pytest.mark.parametrize("rule", ["kfac", "energy", "mp"])
@pytest.mark.parametrize("budget", [0.25, 0.5, 0.9])
def test_every_rule_keeps_to_the_budget(rule: RankRule, budget: float):
    layers = model_and_images()[0].targets()
    costs = costs_alone({name: layer.weight for name, layer in layers.items()})
    found = decompose_layers(layers, METHODS["svd"], None)
    ranks = ranks_under(rule, found, budget, costs)
    assert costs.count(ranks) <= budget * costs.count({})
    assert all(1 <= rank <= costs.layers[name].pays for name, rank in ranks.items())


def test_mp_keeps_nothing_below_the_edge_and_the_budgets_rank_where_nothing_is_above():
    noise = torch.Generator().manual_seed(0)
    layers = {"noise": torch.nn.Linear(40, 60), "signal": torch.nn.Linear(40, 60)}
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(torch.randn(60, 40, generator=noise))
        layers["signal"].weight.add_(torch.randn(60, 3, generator=noise) @ torch.randn(3, 40, generator=noise))
    found = decompose_layers(layers, METHODS["svd"], None)
    costs = costs_alone({name: layer.weight for name, layer in layers.items()})
    above = marchenko_pastur(found["signal"].values_PK[0], (60, 40)).outliers
    assert above == 3
    greedy = ranks_under("kfac", found, 0.5, costs)
    assert ranks_under("mp", found, 0.5, costs) == {"noise": greedy["noise"], "signal": 3}
    assert greedy["noise"] > 1
    model, lines = torch.nn.ModuleDict(layers), list[str]()
    planner = Planner(LowRank(lowrank_train="mp"), list, 4, 0)
    assert planner.ranks(model, costs, 0.5, lines.append)[0]["noise"] == greedy["noise"]
    assert lines == ["no value above the Marchenko-Pastur edge, so the budget alone sets the rank: noise"]


def test_a_copy_has_layers_in_factors_as_one_and_shares_nothing():
    model = model_and_images()[0]
    up, down = torch.randn(6, 2).double(), torch.randn(2, 12).double()
    model.set_submodule("blocks.0.fc1", LowRankLinear(up, down, torch.zeros(6).double()))
    twin = merged_copy(model)
    layer = twin.get_submodule("blocks.0.fc1")
    assert isinstance(layer, torch.nn.Linear)
    np.testing.assert_allclose(layer.weight.detach().numpy(), (up @ down).numpy(), rtol=1e-12)
    assert isinstance(merged_copy(model, set()).get_submodule("blocks.0.fc1"), LowRankLinear)
    assert model.training
    assert not twin.training
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in twin.parameters()}
