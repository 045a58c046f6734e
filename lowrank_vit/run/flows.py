"""Measuring the flows through the models at each validation, with some of its images."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.common.errors import in_short
from lowrank_vit.common.locks import Say
from lowrank_vit.data.batch import Batch
from lowrank_vit.ranks.world import World
from lowrank_vit.score.evaluate import Batches, Evaluator
from lowrank_vit.spectral.flows import Flows, measure
from lowrank_vit.spectral.watching.refresh import EMA, MODEL

IMAGES_AT_ONCE = 16
"""Batch size for this, independent of the validation's, so that the numbers do not depend on that."""
_KINDS = {"": MODEL, "ema_": EMA}
"""Kind of weights by prefix of a score's name."""


Log = Callable[[dict[str, float], dict[str, Flows]], object]
"""Called with the results of a validation: scalars named "<kind>/flow/<block>/<metric>", with kind "spec" or
"spec_ema", and also "spec/flow/images" and "spec/flow/seconds"; and the full flows by kind."""


class FlowWatch(Batches):
    """Takes the same images from every validation and lets the first rank measure the models' flows with them.

    It wraps a validation's loader, and takes the images from its first pass. Copies of the models see them, so the run
    is not changed. Failures are reported, and training goes on.
    """

    def __init__(self, evaluators: Mapping[str, Evaluator], ids: np.ndarray, world: World, say: Say) -> None:
        """`ids`: the validation samples to take; `evaluators`: by prefix of a score's name."""
        self._evaluators, self._world, self._say = evaluators, world, say
        self._ids = ids
        self._loader: Batches | None = None
        self._found: list[tuple[np.ndarray, np.ndarray]] = []

    def begin(self, loader: Batches) -> None:
        """Start a validation with this loader."""
        self._loader, self._found = loader, []

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Give the loader's batches."""
        assert self._loader is not None
        is_complete = bool(self._found)
        for batch in self._loader.batches(epoch):
            if not is_complete and (rows := np.flatnonzero(np.isin(batch.plan.ids, self._ids))).size:
                images = batch.images[torch.from_numpy(rows).to(batch.images.device)]
                self._found.append((batch.plan.ids[rows], images.cpu().numpy()))
            yield batch

    def end(self, log: Log) -> None:
        """End a validation; all ranks call it together, and the first passes the results to `log`."""
        start = time.perf_counter()
        own, self._found = self._found, []
        found = [part for of_rank in self._world.gather_on_first(own) or () for part in of_rank]
        if not found:
            return
        ids, images = (np.concatenate(parts) for parts in zip(*found, strict=True))
        try:
            images = torch.from_numpy(images[np.argsort(ids)])
            flows = {_KINDS[prefix]: self._flows(one, images) for prefix, one in self._evaluators.items()}
        except Exception as error:  # such as too little memory for a copy of the model
            self._say(f"warning: the flows of this validation failed: {in_short(error)}. Training goes on.")
            return
        values = {
            f"{kind}/flow/{block}/{metric}": value
            for kind, found in flows.items()
            for block, metrics in found.values.items()
            for metric, value in metrics.items()
        }
        about = {"spec/flow/images": float(len(images)), "spec/flow/seconds": time.perf_counter() - start}
        log(values | about, flows)

    def _flows(self, evaluator: Evaluator, images: Tensor) -> Flows:
        model, apart = evaluator.apart()
        device = next(model.parameters()).device

        def batches() -> Iterator[Tensor]:
            for batch in images.split(IMAGES_AT_ONCE):
                yield batch.to(device, memory_format=torch.channels_last)
                self._world.progress.tick()

        return measure(model, apart.logits, batches())


@contextmanager
def flows_of(loader: Batches, watch: FlowWatch | None, log: Log) -> Generator[Batches]:
    """A context for a validation: yields its loader, and passes the flows to `log` at the end.

    If the validation ends with an error, nothing is logged.
    """
    if watch is None:
        yield loader
    else:
        watch.begin(loader)
        yield watch
        watch.end(log)
