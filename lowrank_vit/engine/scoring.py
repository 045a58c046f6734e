"""A checkpoint made ready to score images: what `validate` and `inference` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.errors import UserError
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.engine.checkpoint import Checkpoint, load_weights, read_checkpoint
from lowrank_vit.engine.model import InputSpec, create_model, input_spec, parse_model_kwargs


@dataclass(frozen=True)
class Scorer:
    """A model with its weights on a device, and how its images must look."""

    checkpoint: Checkpoint
    model: nn.Module
    """In evaluation mode."""
    spec: InputSpec
    augment: Augment
    """For its `normalize`."""
    num_classes: int

    @property
    def class_names(self) -> list[str]:
        """Of the training set, in label order; the labels' numbers where the checkpoint does not tell."""
        names = list(self.checkpoint.content.get("class_names") or ())
        return names + [str(label) for label in range(len(names), self.num_classes)]  # --num-classes may exceed them


def load_scorer(
    path: Path,
    device: torch.device,
    *,
    use_ema: bool = False,
    model: str = "",
    model_kwargs: tuple[str, ...] = (),
    img_size: int | None = None,
    crop_pct: float | None = None,
) -> Scorer:
    """Load a checkpoint; what is not given is taken from it. Raises `UserError`."""
    checkpoint = read_checkpoint(path)
    weights, args = checkpoint.weights(use_ema), checkpoint.args
    name = model or checkpoint.arch
    if not name:
        raise UserError(f"{path} does not name its model. Give --model.")
    kwargs = model_kwargs or tuple(args.get("model-kwargs", ()))
    img_size = img_size or parse_model_kwargs(kwargs).get("img_size") or args.get("img-size")
    num_classes = int(checkpoint.content.get("num_classes") or _outputs(weights, path))
    made = create_model(name, num_classes, img_size=img_size, model_kwargs=kwargs)
    load_weights(made, checkpoint, weights, name)
    spec = input_spec(made, img_size, crop_pct or args.get("crop-pct"), args.get("mean"), args.get("std"))
    augment = Augment(spec.mean, spec.std, num_classes, smoothing=0.0).to(device)
    return Scorer(checkpoint, made.to(device).eval(), spec, augment, num_classes)


def _outputs(weights: dict[str, Any], path: Path) -> int:
    """The number of classes that the last layer tells apart, for checkpoints of other programs."""
    for name in ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight"):
        if name in weights:
            return int(weights[name].shape[0])
    raise UserError(f"{path} does not tell its number of classes, and has no layer named head, fc or classifier.")
