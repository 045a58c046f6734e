"""Points of a curve: a model compressed by a method to a budget, with its predicted and its measured loss.

Losses are in nats per image, top-1 in percent. N samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lowrank_vit.lowrank.allocation import (
    ALLOCATIONS,
    Measured,
    Ranks,
    least_budget,
    measured_constant,
    predicted_loss,
    sensitivities,
)
from lowrank_vit.lowrank.calibration import Moments, calibrate_in_turn
from lowrank_vit.lowrank.layers import By, Costs, Factors, factorise
from lowrank_vit.lowrank.methods import METHODS
from lowrank_vit.lowrank.truncate import Decomposition, decompose_layers

Tick = Callable[[int], object]


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of a model that shares all parameters and buffers with it: replacing modules leaves the model as it is."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})  # tensors are shared, not
    # copied


@dataclass(frozen=True)
class Subject:
    """The model to compress, the layers that may be factorised, and their costs."""

    model: nn.Module
    targets: dict[str, nn.Linear]
    parts: dict[str, int]
    costs: Costs

    def with_factors(self, factors: Mapping[str, Factors]) -> nn.Module:
        """A copy with these layers factorised, for scoring: it shares the memory of the factors and of the model."""
        made = copy_of(self.model)
        factorise(made, factors, shared=True)
        return made


@dataclass(frozen=True)
class SampleScores:
    """Loss and correctness of every sample, in the order of the pass; on the CPU."""

    losses_N: Tensor
    """float64, nats: cross entropy with hard labels."""
    hits_N: Tensor
    """bool: whether the most likely class was the sample's."""

    @property
    def loss(self) -> float:
        """Mean loss, nats."""
        return float(self.losses_N.mean())

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent, 0-100."""
        return 100 * float(self.hits_N.double().mean())

    def than(self, other: SampleScores) -> Difference:
        """How this model's scores differ from another's on the same samples."""
        losses_N = self.losses_N - other.losses_N
        hits_N = 100 * (self.hits_N.double() - other.hits_N.double())
        return Difference(float(losses_N.mean()), _error(losses_N), float(hits_N.mean()), _error(hits_N))


@dataclass(frozen=True)
class Difference:
    """Mean differences over paired samples, with their standard errors.

    The standard error covers only the choice of samples, not how another training would come out. It is NaN for a
    single sample.
    """

    loss: float
    loss_error: float
    """Nats."""
    top1: float
    top1_error: float
    """Percentage points."""


def _error(differences_N: Tensor) -> float:
    return float(differences_N.std()) / math.sqrt(len(differences_N)) if len(differences_N) > 1 else math.nan


@dataclass(frozen=True)
class Point:
    """A compressed model."""

    method: str
    allocation: str
    budget: float
    ranks: Ranks
    params: int
    flops: int
    predicted: float
    """Predicted rise of the loss, before the constant is applied; NaN without moments."""
    factors: dict[str, Factors] = field(repr=False)
    sequential: bool = False
    """Whether moments were taken behind compressed layers. The prediction is that of the factors without this."""
    scores: SampleScores | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """Bytes that the factors take."""
        return sum(t.numel() * t.element_size() for one in self.factors.values() for t in one if t is not None)

    def scored(self, scores: SampleScores, *, keep: bool) -> Point:
        """This point with scores; its factors, which take memory, are dropped unless `keep`."""
        return replace(self, scores=scores, factors=self.factors if keep else {})

    def content(self, original: SampleScores, constant: float) -> dict[str, Any]:
        """As plain values; numbers that are not finite become None."""
        assert self.scores is not None
        than, loss = self.scores.than(original), self.scores.loss
        numbers = {
            "top1": self.scores.top1,
            "loss": loss,
            "predicted_loss": original.loss + constant * self.predicted,
            "top1_difference": than.top1,
            "top1_error": than.top1_error,
            "loss_difference": than.loss,
            "loss_error": than.loss_error,
        }
        sizes = {"budget": self.budget, "params": self.params, "flops": self.flops}
        return {
            "method": self.method,
            "allocation": self.allocation,
            "sequential": self.sequential,
            **sizes,
            **{name: plain(value) for name, value in numbers.items()},
            "ranks": self.ranks,
        }


def plain(value: float) -> float | None:
    """The number, or None if JSON cannot hold it (NaN or infinity)."""
    return value if math.isfinite(value) else None


def decompose(
    subject: Subject, method: str, moments: Mapping[str, Moments] | None, tick: Tick
) -> dict[str, Decomposition]:
    """Decompose all layers by a method; `tick` is called with 1 after each. Raises `UserError`."""
    return decompose_layers(subject.targets, METHODS[method], moments, parts=subject.parts, progress=lambda _: tick(1))


def point(
    subject: Subject,
    decompositions: Mapping[str, Decomposition],
    method: str,
    allocation: str,
    budget: float,
    by: By = "params",
) -> Point:
    """The model compressed to a budget. Raises `UserError` for a budget below what the model needs."""
    ranks = ALLOCATIONS[allocation](decompositions, budget, subject.costs, by)
    factors = {name: decompositions[name].factors(rank) for name, rank in ranks.items()}
    sizes = subject.costs.count(ranks), subject.costs.count(ranks, "flops")
    return Point(method, allocation, budget, ranks, *sizes, predicted_loss(decompositions, ranks), factors)


def in_turn(subject: Subject, made: Point, batches: Callable[[], Iterable[Tensor]], seed: int, tick: Tick) -> Point:
    """The same ranks with new factors, block after block: each block's moments are taken behind the compressed ones.

    The predicted loss stays that of the earlier factors. `tick` is called with the number of images more.
    """
    model = copy_of(subject.model)
    factors: dict[str, Factors] = {}
    layers = {name: model.get_submodule(name) for name in subject.targets}
    targets = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}

    def compress(moments: dict[str, Moments]) -> None:
        block = {name: targets[name] for name in moments if name in made.ranks}
        found = decompose_layers(block, METHODS[made.method], moments, parts=subject.parts)
        of_block = {name: one.factors(made.ranks[name]) for name, one in found.items()}
        factorise(model, of_block)
        factors.update(of_block)

    seen = [0]

    def progress(images: int) -> None:
        tick(images - seen[0])
        seen[0] = images

    calibrate_in_turn(model, batches, targets, compress, seed=seed, pieces=subject.parts, progress=progress)
    return replace(made, factors=factors, sequential=True)


def constant_candidates(subject: Subject, decompositions: Mapping[str, Decomposition], method: str) -> list[Point]:
    """Truncations by greedy ranks that keep a tenth and a twentieth of the targets' parameters, to measure the
    constant.

    The second serves a model that loses nothing at a tenth. Neither is below what the model needs.
    """
    rest, whole = subject.costs.rest["params"], subject.costs.count({})
    shares = (max(least_budget(subject.costs), (rest + share * (whole - rest)) / whole) for share in (0.1, 0.05))
    return [point(subject, decompositions, method, "greedy", share) for share in shares]


def constant_of(
    subject: Subject, candidates: Sequence[Point], scores: Sequence[SampleScores]
) -> tuple[float, dict[str, Any]]:
    """The factor for predicted losses, and how it was measured; `scores`: the original's, then one per candidate.

    The first candidate whose loss rises by more than two standard errors is used; without one the factor is 1.
    """
    original, others = scores[0], scores[1:]
    differences = [one.than(original) for one in others]
    clear = [n for n, one in enumerate(differences) if one.loss > 2 * one.loss_error]
    n = clear[0] if clear else 0
    made, rise = candidates[n], differences[n]
    rest, whole = subject.costs.rest["params"], subject.costs.count({})
    share = (made.params - rest) / (whole - rest)
    value = measured_constant([Measured(share, made.predicted, rise.loss)] if clear else [])
    of = {"method": made.method, "allocation": made.allocation, "budget": made.budget, "targets_share": share}
    measured = {"measured": plain(rise.loss), "error": plain(rise.loss_error), "predicted": plain(made.predicted)}
    return value, {"value": value, "is_clear": bool(clear), **of, **measured, "images": len(original.losses_N)}


@dataclass(frozen=True)
class LayerPoint:
    """One layer truncated to a rank, all others unchanged."""

    layer: str
    share: float
    rank: int
    predicted: float
    factors: dict[str, Factors] = field(repr=False)


def layers_alone(
    subject: Subject, decompositions: Mapping[str, Decomposition], *, with_factors: bool
) -> list[LayerPoint]:
    """Every layer alone at several shares of its parameters; with factors, for scoring, if `with_factors`."""
    found: list[LayerPoint] = []
    for row in sensitivities(decompositions, subject.costs):
        name, rank = str(row["layer"]), int(row["rank"])
        factors = {name: decompositions[name].factors(rank)} if with_factors else {}
        found.append(LayerPoint(name, float(row["share"]), rank, float(row["predicted_loss"]), factors))
    return found


def plain_spectra(subject: Subject, tick: Tick) -> dict[str, list[float]]:
    """`spectra_of` the unweighted weights; one layer after the other, since singular vectors take memory."""
    found: dict[str, list[float]] = {}
    for name, layer in subject.targets.items():
        found |= spectra_of(decompose_layers({name: layer}, METHODS["svd"], None, parts=subject.parts))
        tick(1)
    return found


def spectra_of(decompositions: Mapping[str, Decomposition]) -> dict[str, list[float]]:
    """By layer: the singular values of the weighted matrix, of all parts together, descending, to six digits."""
    values = {name: sorted(one.values_PK.ravel().tolist(), reverse=True) for name, one in decompositions.items()}
    return {name: [float(f"{value:.6g}") for value in of_layer] for name, of_layer in values.items()}
