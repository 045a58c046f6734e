"""The images that a compression needs: some training images for the moments, all validation images for the scores.

One pass over the images scores several models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filters import FILTERS
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions, usual_workers
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import KINDS, DataOptions, columns_of, kind_of, locate
from lowrank_vit.lowrank.curve import SampleScores
from lowrank_vit.lowrank.options import CompressOptions
from lowrank_vit.model.class_match import Trust
from lowrank_vit.plan.order import subset
from lowrank_vit.plan.plans import EvalPlan
from lowrank_vit.score.results import Counted, ScoringProgress
from lowrank_vit.score.scorer import Scorer
from lowrank_vit.score.validation import follow_model


class Images:
    """Batches of both sets, preprocessed as in validation. Use it as a context manager."""

    def __init__(
        self,
        options: CompressOptions,
        scorer: Scorer,
        device: torch.device,
        say: Callable[[str], object] = terminal.say,
    ) -> None:
        """Open the sets in --data, converting them if needed, with the labels of the model. Raises `UserError`."""
        self._options, self._scorer, self._device, self._say = options, scorer, device, say
        self._stack = ExitStack()
        data = options.data
        nested: Any = data.nested_classes or scorer.args.get("nested-classes") or "leaf"
        where = DataOptions(data.dataset, data.data, False, data.beton_dir, data.train_split, data.val_split)
        where = replace(where, nested=nested, flag="--data")
        if kind_of(data.dataset, "--data") in KINDS:
            where = replace(where, **columns_of(scorer.args))
        self.train, self.val = (Beton(path) for path in locate(where, say))
        for beton in (self.train, self.val):
            follow_model(scorer, beton, Trust(data.trust_labels), say)
        count = min(data.calibration_images, self.train.num_samples)
        self.calibration_ids = subset(data.seed, self.train.num_samples, count)
        self._loaders: dict[str, Loader] = {}

    def __enter__(self) -> Images:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def num_calibration(self) -> int:
        """How many images the moments are computed from."""
        return len(self.calibration_ids)

    @property
    def num_calibration_classes(self) -> int:
        """How many classes these images have."""
        return len(np.unique(self.train.labels_of(self.calibration_ids)))

    def calibration(self) -> Iterator[Tensor]:
        """Batches of normalised calibration images, float32 (N, 3, height, width) on the device."""
        for batch in self._loader("calibration").batches(0):
            yield self._scorer.augment.normalize(batch.images)

    def score(self, models: Sequence[nn.Module], which: str = "validation") -> list[SampleScores]:
        """Score models in one pass over the images of "validation" or "calibration"; show progress."""
        count = self.val.num_samples if which == "validation" else self.num_calibration
        doing = f"scoring {len(models)} models" if len(models) > 1 else "scoring"
        with ScoringProgress(count, doing) as progress:
            batches = Counted(self._loader(which), progress.advance).batches(0)
            return score_models(models, batches, self._scorer.augment.normalize)

    def _loader(self, which: str) -> Loader:
        """The loader of a set, opened on first use."""
        if which not in self._loaders:
            ids, beton = (None, self.val) if which == "validation" else (self.calibration_ids, self.train)
            spec, running = self._scorer.spec, self._options.running
            plan = EvalPlan(
                *beton.sides,
                img_size=spec.img_size,
                crop_pct=spec.crop_pct,
                batch_size=min(running.batch_size, beton.num_samples),
                interpolation=FILTERS[self._scorer.interpolation],
                samples=ids,
            )
            decoding = LoaderOptions(running.loader, running.workers or usual_workers(self._device))
            self._loaders[which], line = open_loader(beton, plan, self._device, decoding, say=self._say)
            self._stack.callback(self._loaders[which].close)
            self._say(line if ids is None else f"{line}, of which {len(ids):,} calibrate")
        return self._loaders[which]


@torch.no_grad()
def score_models(
    models: Sequence[nn.Module], batches: Iterable[Batch], normalize: Callable[[Tensor], Tensor]
) -> list[SampleScores]:
    """Score every model on every batch, one after the other; sets the models to evaluation mode.

    Args:
        models: on the batches' device.
        batches: one pass over the samples.
        normalize: turns a batch's uint8 images into the models' input.

    Raises:
        UserError: there is no sample to score.
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
        raise UserError("There is no sample to score: all samples are damaged and were skipped. Convert the set again.")
    pairs = zip(losses, hits, strict=True)
    return [SampleScores(torch.cat(loss).cpu(), torch.cat(hit).cpu()) for loss, hit in pairs]
