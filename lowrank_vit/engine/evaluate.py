"""Loss and accuracy over every validation sample exactly once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.loader import Loader


@dataclass(frozen=True)
class Scores:
    """Means over all samples."""

    num_samples: int
    loss: float
    """Cross entropy with hard labels, nats."""
    top1: float
    top5: float
    """Percent, 0-100."""


class Evaluator:
    """Scores a model on a loader; compiled once where `compile` is set, since every batch has one shape."""

    def __init__(self, model: nn.Module, augment: Augment, *, amp: bool, compile: bool) -> None:
        self._model, self._augment = model, augment
        device = next(model.parameters()).device
        self._device_type, self._amp = device.type, amp
        self._logits_of: Callable[[Tensor], Tensor] = torch.compile(self._logits) if compile else self._logits

    def _logits(self, images: Tensor) -> Tensor:
        with torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=self._amp):
            return self._model(self._augment.normalize(images)).float()

    @torch.no_grad()
    def __call__(self, loader: Loader, batch_size: int) -> Scores:
        """Score all of `loader`; a short last batch is padded to `batch_size` and the padding left out of the sums.

        Puts the model into evaluation mode. The sums stay on the device until the end.
        """
        self._model.eval()
        device = next(self._model.parameters()).device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        num_samples = 0
        for batch in loader.batches(0):
            logits = self._logits_of(_padded(batch, batch_size))[: len(batch)]
            losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            hits = logits.topk(min(5, logits.shape[1])).indices == batch.targets[:, None]
            sums += torch.stack([losses.double().sum(), hits[:, 0].double().sum(), hits.double().sum()])
            num_samples += len(batch)
        loss, top1, top5 = (sums / num_samples).tolist()
        return Scores(num_samples, loss, 100 * top1, 100 * top5)


def _padded(batch: Batch, batch_size: int) -> Tensor:
    missing = batch_size - len(batch)
    if missing == 0:
        return batch.images
    padding = batch.images[:1].expand(missing, -1, -1, -1)
    return torch.cat([batch.images, padding]).contiguous(memory_format=torch.channels_last)
