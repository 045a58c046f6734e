"""What the layers of a training model would keep: ranks under a budget, and factors, by images that are left alone.

All is computed on a copy of the model, in which layers in factors are the Linear that they stand for. So neither the
modes, hooks and gradients of the model that trains are touched, nor what was compiled of it.
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
"""The calibration images, normalised, and their labels: (N, 3, height, width) and (N,) of each batch."""

Calibration = Mapping[str, Moments] | None
"""Moments by layer; None: the rule needs none."""


class Measured(NamedTuple):
    """What a switch is judged by."""

    parameters: int
    flops: float | None
    """Of training on one image; None where they cannot be counted."""
    loss: float
    """Mean cross-entropy of the first batch of calibration images in evaluation mode, nats."""


@dataclass
class Planner:
    """Ranks and factors by the rule of --lowrank-train; the same model and images give the same bits."""

    options: LowRank
    images: Images = field(repr=False)
    img_size: int
    """Side of an image, pixels."""
    seed: int
    """Of the labels that are drawn from the model."""

    @property
    def method(self) -> str:
        """How weights are truncated."""
        return "kfac" if self.options.lowrank_train == "kfac" else "svd"

    def ranks(
        self, model: nn.Module, costs: Costs, budget: float, tell: Callable[[str], object] = lambda line: None
    ) -> tuple[Ranks, Calibration]:
        """The rank of each layer of `costs` under a share of the parameters of them all, and what they rest on.

        Layers that stay as they are are left out. `tell` hears of layers that the rule says nothing about. Raises
        `UserError` for weights or logits that are not finite.
        """
        twin, now = merged_copy(model), ranks_of(model)
        layers = _linears(twin, costs.layers)
        moments = self._calibrated(twin, layers)
        found = decompose_layers(layers, METHODS[self.method], moments)
        ranks = ranks_under(self.options.lowrank_train, found, budget, costs)
        unknown = [name for name, one in found.items() if not _outliers(one)]
        if self.options.lowrank_train == "mp" and unknown:
            tell(f"no value above the Marchenko-Pastur edge, so the budget alone says the rank: {', '.join(unknown)}")
        return {name: rank for name, rank in ranks.items() if rank < now.get(name, rank + 1)}, moments

    def ranks_beside(self, model: nn.Module, costs: Costs, budget: float, now: Ranks) -> tuple[Ranks, Calibration]:
        """As `ranks`, of layers that go in factors beside others, `now`, which are, or in a dry run would be."""
        twin = merged_copy(model)
        layers = _linears(twin, costs.layers)
        moments = self._calibrated(twin, layers)
        return ranks_left(decompose_layers(layers, METHODS[self.method], moments), budget, costs, now), moments

    def factors(self, model: nn.Module, ranks: Ranks, moments: Calibration = None) -> dict[str, NewFactors]:
        """Factors of these layers as they are now, by `moments` of now. Raises `UserError`, see `make_factors`."""
        if moments is None:
            twin = merged_copy(model)
            moments = self._calibrated(twin, _linears(twin, ranks))
        return make_factors(model, ranks, self.method, moments, progress=lambda done: beat())

    def measure(self, model: nn.Module, factors: Mapping[str, NewFactors] | None = None) -> Measured:
        """What a model is like, or would be with these factors."""
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
    """How a rule shares a budget out: kfac greedily by its losses, energy by the same share of every layer's energy.

    mp: greedily by singular values, and none at or below the Marchenko-Pastur edge of its layer. Of a layer without a
    value above it nothing is known, and the budget alone decides.

    Args:
        rule: of --lowrank-train.
        found: the layers' decompositions, by kfac's weighting or as they are.
        budget: what factors may have of the layers' parameters, 0-1.
        costs: of these layers alone.
    """
    if rule == "energy":
        return energy(found, budget, costs)
    ranks = greedy(found, budget, costs)
    if rule == "mp":
        return {name: min(rank, _outliers(found[name]) or rank) for name, rank in ranks.items()}
    return ranks


def ranks_left(found: Mapping[str, Decomposition], budget: float, costs: Costs, now: Ranks) -> Ranks:
    """Ranks of rule kfac beside layers in factors: these only shrink, and the others share out what they leave.

    Args:
        found: the decompositions of all layers of `costs`.
        budget: see `ranks_under`.
        costs: likewise.
        now: the ranks of the layers that are in factors.
    """
    fewer = {name: rank for name, rank in greedy(found, budget, costs).items() if rank < now.get(name, 0)}
    whole = Costs({name: layer for name, layer in costs.layers.items() if name not in now}, costs_alone({}).rest)
    if not whole.layers:
        return fewer
    left = budget * costs.count({}) - sum(costs.layers[name].cost(rank) for name, rank in now.items())
    return fewer | greedy({name: found[name] for name in whole.layers}, left / whole.count({}), whole)


def _outliers(found: Decomposition) -> int:
    """How many values lie above the edge; 0 also where there is none, as of a matrix of low rank."""
    count = marchenko_pastur(found.values_PK[0], found.shape).outliers
    return int(count) if np.isfinite(count) else 0


def merged_copy(model: nn.Module, names: set[str] | None = None) -> nn.Module:
    """A copy in evaluation mode, on the same device, with layers in factors as one Linear each; of `names` if given."""
    twin = copy.deepcopy(model).eval()
    for name, layer in low_rank_layers(twin).items():
        if names is None or name in names:
            twin.set_submodule(name, layer.merged())
    return twin


def _linears(twin: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    layers = {name: twin.get_submodule(name) for name in names}
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
