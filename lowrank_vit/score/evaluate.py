"""Loss, accuracy and confusions over every validation sample exactly once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.batch import Batch
from lowrank_vit.score.confusions import ConfusionCounter, Confusions, Counts


class Batches(Protocol):
    """The part of a loader that is used here."""

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one pass over the samples."""
        ...


@dataclass(frozen=True)
class Scores:
    """Means over all samples."""

    num_samples: int
    loss: float
    """Cross entropy with hard labels, nats."""
    top1: float
    top5: float
    """Percent, 0-100."""
    confusions: Confusions | None = None
    """None: not counted, or on a rank that has only its own part."""


class Evaluator:
    """Scores a model on a loader; with `compile` compiled once, since all batches have the same shape."""

    def __init__(
        self,
        model: nn.Module,
        augment: Augment,
        *,
        amp: bool,
        compile: bool,
        amp_dtype: torch.dtype = torch.bfloat16,
        tta: int = 0,
    ) -> None:
        """`tta` 2: score the mean of the logits of each image and its mirror image.

        (timm's `--tta` averages neighbouring images instead, since its loader does not repeat images.)
        """
        self._model, self._augment, self._is_mirrored = model, augment, tta == 2
        device = next(model.parameters()).device
        self._device, self._amp, self._amp_dtype = device, amp, amp_dtype
        self._logits_of: Callable[[Tensor], Tensor] = torch.compile(self.logits) if compile else self.logits

    def apart(self) -> tuple[nn.Module, Evaluator]:
        """A copy of the model in evaluation mode, and its evaluator, uncompiled: hooks on it affect nothing else.

        Images are not mirrored.
        """
        model = copy.deepcopy(self._model).eval()
        return model, Evaluator(model, self._augment, amp=self._amp, compile=False, amp_dtype=self._amp_dtype)

    def logits(self, images: Tensor) -> Tensor:
        """Float32 (B, num_classes) logits that are scored, from uint8 (B, 3, S, S) images on the model's device."""
        normalized = self._augment.normalize(images)
        with torch.autocast(self._device.type, dtype=self._amp_dtype, enabled=self._amp):
            logits = self._model(normalized).float()
            if self._is_mirrored:
                logits = (logits + self._model(normalized.flip(3)).float()) / 2
        return logits

    @torch.no_grad()
    def __call__(
        self,
        loader: Batches,
        batch_size: int,
        reduce: Callable[[Tensor], None] | None = None,
        gather: Callable[[Counts], Sequence[Counts] | None] | None = None,
        *,
        by_class: bool = False,
    ) -> Scores:
        """Score all of `loader`; a short last batch is padded to `batch_size` and the padding left out of the sums.

        Puts the model into evaluation mode. The sums stay on the device until the end. `reduce` adds a tensor up over
        the ranks, in place, if each has a share of the samples; every rank calls it equally often, also one whose share
        is empty. `by_class`: count the confusions, too; of several ranks, the one for which `gather` returns all parts
        has them. Raises `UserError` if there is no sample at all.
        """
        self._model.eval()
        device = next(self._model.parameters()).device
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        counter = ConfusionCounter(self._augment.num_classes, device) if by_class else None
        for batch in loader.batches(0):
            logits = self._logits_of(_padded(batch, batch_size))[: len(batch)]
            losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            likeliest = logits.topk(min(5, logits.shape[1])).indices
            hits = likeliest == batch.targets[:, None]
            added = losses.double().sum(), hits[:, 0].double().sum(), hits.double().sum()
            sums += torch.stack([*added, sums.new_full((), len(batch))])
            if counter:
                counter.add(batch.targets, likeliest[:, 0], hits.any(1))
        if reduce:
            reduce(sums)
        confusions = counter.result(reduce, gather) if counter else None
        loss, top1, top5, num_samples = sums.tolist()
        if num_samples == 0:
            raise UserError("There is no sample to score: all were left out as damaged. Convert the set again.")
        scores = loss / num_samples, 100 * top1 / num_samples, 100 * top5 / num_samples
        return Scores(int(num_samples), *scores, confusions)


def _padded(batch: Batch, batch_size: int) -> Tensor:
    missing = batch_size - len(batch)
    if missing == 0:
        return batch.images
    padding = batch.images[:1].expand(missing, -1, -1, -1)
    return torch.cat([batch.images, padding]).contiguous(memory_format=torch.channels_last)
