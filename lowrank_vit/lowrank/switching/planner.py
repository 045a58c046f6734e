"""Ranks under a budget, and factors, for the layers of a model in training, by unaugmented calibration images.

Everything is computed on a copy of the model with merged layers. The modes, hooks and gradients of the model in
training, and its compiled form, are not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from lowrank_vit.common.threads import beat
from lowrank_vit.config.low_rank_options import LowRank, RankRule
from lowrank_vit.lowrank.allocation import Ranks, energy, greedy
from lowrank_vit.lowrank.calibration import Moments, calibrate
from lowrank_vit.lowrank.layers import Costs, costs_alone, factorise
from lowrank_vit.lowrank.methods import METHODS
from lowrank_vit.lowrank.switching.factors import NewFactors, make_factors
from lowrank_vit.lowrank.targets import logits_of
from lowrank_vit.lowrank.truncate import Decomposition, decompose_layers
from lowrank_vit.model.flops import train_flops_per_image
from lowrank_vit.model.low_rank import low_rank_layers, ranks_of
from lowrank_vit.spectral.measures.noise import marchenko_pastur

TARGETS_FLAG = "--lowrank-targets"
Images = Callable[[], Sequence[tuple[Tensor, Tensor]]]
"""Returns batches of normalised calibration images (N, 3, height, width) and their labels (N,)."""

Calibration = Mapping[str, Moments] | None
"""Moments by layer name; None: the rule needs none."""


class Measured(NamedTuple):
    """Measurements before and after a switch."""

    parameters: int
    flops: float | None
    """FLOPs of training on one image; None if they cannot be counted."""
    loss: float
    """Mean cross-entropy of the first batch of calibration images in evaluation mode, nats."""


@dataclass
class Planner:
    """Ranks and factors by the rule of --lowrank-train; deterministic for the same model and images."""

    options: LowRank
    images: Images = field(repr=False)
    img_size: int
    """Side of an image, pixels."""
    seed: int
    """Seed of the labels that are drawn from the model."""

    @property
    def method(self) -> str:
        """The method of truncation."""
        return "kfac" if self.options.lowrank_train == "kfac" else "svd"

    def ranks(
        self, model: nn.Module, costs: Costs, budget: float, tell: Callable[[str], object] = lambda line: None
    ) -> tuple[Ranks, Calibration]:
        """Ranks for the layers of `costs` under a share of all their parameters, and the moments behind them.

        Layers that stay as they are are left out. `tell` gets a line about layers for which the rule gives no rank.
        Raises `UserError` for weights or logits that are not finite.
        """
        twin, now = merged_copy(model), ranks_of(model)
        layers = _linears(twin, costs.layers)
        moments = self._calibrated(twin, layers)
        found = decompose_layers(layers, METHODS[self.method], moments)
        ranks = ranks_under(self.options.lowrank_train, found, budget, costs)
        unknown = [name for name, one in found.items() if not _outliers(one)]
        if self.options.lowrank_train == "mp" and unknown:
            tell(f"no value above the Marchenko-Pastur edge, so the budget alone sets the rank: {', '.join(unknown)}")
        return {name: rank for name, rank in ranks.items() if rank < now.get(name, rank + 1)}, moments

    def ranks_beside(self, model: nn.Module, costs: Costs, budget: float, now: Ranks) -> tuple[Ranks, Calibration]:
        """As `ranks`, beside the layers `now` that are factorised already, or in a dry run would be."""
        twin = merged_copy(model)
        layers = _linears(twin, costs.layers)
        moments = self._calibrated(twin, layers)
        return ranks_left(decompose_layers(layers, METHODS[self.method], moments), budget, costs, now), moments

    def factors(self, model: nn.Module, ranks: Ranks, moments: Calibration = None) -> dict[str, NewFactors]:
        """Factors of these layers as they are now, by current moments. Raises `UserError`, see `make_factors`."""
        if moments is None:
            twin = merged_copy(model)
            moments = self._calibrated(twin, _linears(twin, ranks))
        return make_factors(model, ranks, self.method, moments, progress=lambda done: beat())

    def measure(self, model: nn.Module, factors: Mapping[str, NewFactors] | None = None) -> Measured:
        """Measure a model as it is, or with these factors."""
        twin = merged_copy(model, set(factors or ()))
        if factors:
            factorise(twin, {name: (one.up, one.down, one.bias) for name, one in factors.items()})
        images, labels = self.images()[0]
        place = next(twin.parameters()).device
        loss = functional.cross_entropy(logits_of(twin, images.to(place)).double(), labels.to(place))
        parameters = sum(parameter.numel() for parameter in twin.parameters())
        return Measured(parameters, train_flops_per_image(twin, self.img_size), float(loss))

    def _calibrated(self, twin: nn.Module, layers: Mapping[str, nn.Linear]) -> Calibration:
        if self.method == "svd":
            return None
        return calibrate(twin, (one for one, _ in self.images()), layers, seed=self.seed, progress=lambda done: beat())


def ranks_under(rule: RankRule, found: Mapping[str, Decomposition], budget: float, costs: Costs) -> Ranks:
    """Allocate a budget by a rule: kfac greedily by its losses, energy with the same energy share for every layer.

    mp: greedily by singular values, but only those above the layer's Marchenko-Pastur edge. If a layer has no value
    above it, the budget alone decides.

    Args:
        rule: of --lowrank-train.
        found: the layers' decompositions, weighted by kfac or unweighted.
        budget: share of the layers' parameters that the factors may have, 0-1.
        costs: of these layers alone.
    """
    if rule == "energy":
        return energy(found, budget, costs)
    ranks = greedy(found, budget, costs)
    if rule == "mp":
        return {name: min(rank, _outliers(found[name]) or rank) for name, rank in ranks.items()}
    return ranks


def ranks_left(found: Mapping[str, Decomposition], budget: float, costs: Costs, now: Ranks) -> Ranks:
    """Ranks of rule kfac beside factorised layers: these only shrink, and the others share the rest of the budget.

    Args:
        found: the decompositions of all layers of `costs`.
        budget: see `ranks_under`.
        costs: see `ranks_under`.
        now: the ranks of the factorised layers.
    """
    fewer = {name: rank for name, rank in greedy(found, budget, costs).items() if rank < now.get(name, 0)}
    whole = Costs({name: layer for name, layer in costs.layers.items() if name not in now}, costs_alone({}).rest)
    if not whole.layers:
        return fewer
    left = budget * costs.count({}) - sum(costs.layers[name].cost(rank) for name, rank in now.items())
    return fewer | greedy({name: found[name] for name in whole.layers}, left / whole.count({}), whole)


def _outliers(found: Decomposition) -> int:
    """How many values lie above the edge; 0 also if there is no edge, as for a matrix of low rank."""
    count = marchenko_pastur(found.values_PK[0], found.shape).outliers
    return int(count) if np.isfinite(count) else 0


def merged_copy(model: nn.Module, names: set[str] | None = None) -> nn.Module:
    """A copy in evaluation mode, on the same device, with factorised layers merged to Linear; only `names` if given."""
    twin = copy.deepcopy(model).eval()
    for name, layer in low_rank_layers(twin).items():
        if names is None or name in names:
            twin.set_submodule(name, layer.merged())
    return twin


def _linears(twin: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    layers = {name: twin.get_submodule(name) for name in names}
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
