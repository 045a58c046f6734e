"""Losses and hits of several models in one pass over the same samples, and what one model's differ by from another's.

Shape legend: M models, N samples, B samples of a batch, K classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.data.batch import Batch


@dataclass(frozen=True)
class SampleScores:
    """What a model made of every sample, in the order of the pass; on the CPU."""

    losses_N: Tensor
    """float64, nats: cross entropy with hard labels."""
    hits_N: Tensor
    """bool: whether the likeliest class was the sample's."""

    @property
    def loss(self) -> float:
        """Their mean, nats."""
        return float(self.losses_N.mean())

    @property
    def top1(self) -> float:
        """Percent, 0-100."""
        return 100 * float(self.hits_N.double().mean())

    def than(self, other: SampleScores) -> Difference:
        """How this model's scores differ from another's on the same samples."""
        losses_N = self.losses_N - other.losses_N
        hits_N = 100 * (self.hits_N.double() - other.hits_N.double())
        return Difference(float(losses_N.mean()), _error(losses_N), float(hits_N.mean()), _error(hits_N))


@dataclass(frozen=True)
class Difference:
    """Means over the samples of what differs in pairs, with the standard errors of these means.

    A standard error of paired differences is that of chance in which samples there are, and says nothing of how another
    training would come out. It is NaN for a single sample.
    """

    loss: float
    loss_error: float
    """Nats."""
    top1: float
    top1_error: float
    """Percentage points."""


def _error(differences_N: Tensor) -> float:
    return float(differences_N.std()) / math.sqrt(len(differences_N)) if len(differences_N) > 1 else math.nan


@torch.no_grad()
def score_models(
    models: Sequence[nn.Module], batches: Iterable[Batch], normalize: Callable[[Tensor], Tensor]
) -> list[SampleScores]:
    """Score every model on every batch, one after the other; they are put into evaluation mode.

    Args:
        models: on the batches' device.
        batches: one pass over the samples.
        normalize: makes what the models see of a batch's uint8 images.

    Raises:
        UserError: there is no sample.
    """
    for model in models:
        model.eval()
    losses: list[list[Tensor]] = [[] for _ in models]
    hits: list[list[Tensor]] = [[] for _ in models]
    for batch in batches:
        images = normalize(batch.images)
        for n, model in enumerate(models):
            logits_BK = model(images).float()
            losses[n].append(torch.nn.functional.cross_entropy(logits_BK, batch.targets, reduction="none").double())
            hits[n].append(logits_BK.argmax(1) == batch.targets)
    if not all(losses):
        raise UserError("There is no sample to score: all were left out as damaged. Convert the set again.")
    pairs = zip(losses, hits, strict=True)
    return [SampleScores(torch.cat(loss).cpu(), torch.cat(hit).cpu()) for loss, hit in pairs]


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of a model that shares all parameters and buffers with it: replacing modules leaves the model as it is."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})  # its memory: not copied
