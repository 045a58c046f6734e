"""Load a model to score images, from a file of weights or published ones, and name its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import timm.data
import timm.models
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filters import FILTERS
from lowrank_vit.common.locks import Say
from lowrank_vit.config import meaning
from lowrank_vit.model.class_match import Classes, published_names
from lowrank_vit.model.create import InputSpec, create_model, input_spec, parse_model_kwargs
from lowrank_vit.model.fit import head_names, load_weights, resized
from lowrank_vit.model.hub import find_model, is_of, source_of, with_source
from lowrank_vit.model.weights import Checkpoint, read_checkpoint
from lowrank_vit.score.options import LabelType, ModelOptions

_ARGS = tuple("dataset data-dir beton-dir val-split nested-classes img-size crop-pct mean std model-kwargs".split())
"""Options that come from a checkpoint's run if the flags do not set them."""


@dataclass(frozen=True)
class Scorer:
    """A model with its weights on a device, and how its images must be prepared."""

    name: str
    """timm's name of the model."""
    origin: str
    """The origin of its weights, for people."""
    model: nn.Module
    """The model in evaluation mode."""
    spec: InputSpec
    interpolation: str
    """A key of `FILTERS`."""
    augment: Augment
    """Its `normalize` makes all inputs of the model."""
    num_classes: int
    trained_names: list[str] = field(default_factory=list)
    """Names of the training set's classes in label order; empty if the file does not tell."""
    args: dict[str, Any] = field(default_factory=dict)
    """The flags of the checkpoint's run."""
    half_precision: str = ""
    """The type of the file's weights if that has half precision; the model's weights are float32."""
    is_published: bool = False
    """True for weights that timm publishes, whose classes are known by their number."""

    @property
    def classes(self) -> Classes:
        """The model's classes, for comparing them with a set's."""
        names = self.trained_names or (published_names(self.num_classes) if self.is_published else None)
        return Classes(f"the model ({self.origin})", self.num_classes, names)

    def class_names(self, of_data: list[str] | None = None) -> list[str]:
        """A name for each class: from training, else from the data that are scored, else the label's number."""
        names = self.trained_names or list(of_data or ())
        return names + [str(label) for label in range(len(names), self.num_classes)]  # --num-classes may exceed them


def load_scorer(
    options: ModelOptions, device: torch.device, say: Say = terminal.say, checkpoint: Checkpoint | None = None
) -> Scorer:
    """Load weights; options that are not given come from the checkpoint, else from timm. Raises `UserError`.

    `checkpoint`: the content of --checkpoint, if it was read already.
    """
    if options.checkpoint is None:
        return _published(options, device, say)
    if options.pretrained or options.pretrained_path:
        flag = "--pretrained" if options.pretrained else "--pretrained-path"
        say(f"note: the weights are those of --checkpoint {options.checkpoint}; {flag} is not read")
    checkpoint = checkpoint or read_checkpoint(options.checkpoint)
    weights, args = checkpoint.weights(options.use_ema), checkpoint.checked_args(*_ARGS)
    options = _for_file(options, checkpoint)
    name = options.model or checkpoint.arch
    if not name:
        raise UserError(f"{options.checkpoint} does not name its model. Give --model.")
    num_classes = checkpoint.num_outputs(head_names(name)) or checkpoint.content.get("num_classes")
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(
            f"{options.checkpoint} does not tell its number of classes, and has no layer named head, fc or classifier."
        )
    _check_number(options, num_classes, f"--checkpoint {options.checkpoint}")
    kwargs = options.model_kwargs or tuple(args.get("model-kwargs", ()))
    if options.img_size and not options.model_kwargs:  # the flag overrides the run's own size
        kwargs = tuple(pair for pair in kwargs if not pair.startswith("img_size="))
    img_size = options.img_size or parse_model_kwargs(kwargs).get("img_size") or args.get("img-size")
    made = create_model(name, num_classes, img_size=img_size, model_kwargs=kwargs, say=say)
    load_weights(made, checkpoint, resized(made, weights, checkpoint.path, say), name)
    is_ours = "class_names" in checkpoint.content
    scorer = _scorer(made, name, options, device, say, img_size, args, num_classes, is_ours=is_ours)
    if is_ours:  # options that are newer than the run
        args = {**meaning.values_before(checkpoint.meaning, args), **args}
    origin = f"{options.checkpoint} ({_kind(is_ema=options.use_ema)})"
    half, names = _half_precision(checkpoint, use_ema=options.use_ema), checkpoint.class_names or []
    return replace(scorer, origin=origin, trained_names=names, args=args, half_precision=half)


def _for_file(options: ModelOptions, checkpoint: Checkpoint) -> ModelOptions:
    """The options, completed by a --model of the hub where neither the file nor the flags set them."""
    if not source_of(options.model):
        return options
    if is_of(options.model, str(checkpoint.args.get("model-from", ""))):
        return replace(options, model="")  # the run's own model, which its checkpoint describes better
    flags = find_model(options.model).flags(for_tests=True)
    if "class_names" in checkpoint.content:
        return replace(options, model=flags["model"])
    return with_source(options, flags)


def _kind(*, is_ema: bool) -> str:
    return "EMA weights" if is_ema else "weights"


def _half_precision(file: Checkpoint, *, use_ema: bool) -> str:
    """The type, such as "bfloat16", that `Checkpoint.weights` turns into float32; empty if there is none."""
    found: dict[str, Any] = file.content.get("state_dict_ema" if use_ema else "state_dict", {})
    kinds = (str(one.dtype) for one in found.values() if isinstance(one, torch.Tensor) and one.is_floating_point())
    return next((kind.removeprefix("torch.") for kind in kinds if kind not in ("torch.float32", "torch.float64")), "")


def _published(options: ModelOptions, device: torch.device, say: Say) -> Scorer:
    name, path = options.model, options.pretrained_path
    if options.use_ema:
        raise UserError("--use-ema needs --checkpoint, which is not given. Leave it out.")
    found = find_model(name) if source_of(name) else None
    if found:
        options = with_source(options, found.flags(for_tests=True))
        name = options.model
    file = read_checkpoint(path, "--pretrained-path") if path else found.weights() if found else None
    known = found.cfg if found else timm.models.get_pretrained_cfg(name)
    num_classes = (file.num_outputs(head_names(name)) if file else None) or (known.num_classes if known else 0) or 1000
    source = f"--pretrained-path {path}" if path else f"--pretrained {found.source if found else name}"
    _check_number(options, num_classes, source)
    size, kwargs = options.img_size, options.model_kwargs
    weights: dict[str, Any] = {"pretrained": file is None, "pretrained_file": file}
    made = create_model(name, num_classes, img_size=size, model_kwargs=kwargs, say=say, **weights)
    scorer = _scorer(made, name, options, device, say, size, {}, num_classes, is_ours=False)
    if file is None:
        return replace(scorer, origin=f"{name} (timm's weights)", is_published=True)
    origin = f"{file.source or path} ({_kind(is_ema=file.starts_from_ema)})"
    half, names = _half_precision(file, use_ema=file.starts_from_ema), file.class_names or []
    is_named_by_number = bool(file.source) and not names  # as those that timm publishes
    return replace(scorer, origin=origin, trained_names=names, half_precision=half, is_published=is_named_by_number)


def _check_number(options: ModelOptions, num_classes: int, source: str) -> None:
    if options.num_classes not in (None, num_classes):
        raise UserError(
            f"--num-classes {options.num_classes}: {source} has {num_classes} classes, and another head would be "
            "untrained. Leave --num-classes out, or give other weights."
        )


def _scorer(
    made: nn.Module,
    name: str,
    options: ModelOptions,
    device: torch.device,
    say: Say,
    img_size: int | None,
    args: Mapping[str, Any],
    num_classes: int,
    *,
    is_ours: bool,
) -> Scorer:
    """Make a `Scorer`. `args`: the flags of the run that made the weights.

    `is_ours`: the weights are from a run of this program, which always validates alike; else timm's test configuration
    counts.
    """
    crop_pct, interpolation = options.crop_pct or args.get("crop-pct"), options.interpolation
    if not is_ours:
        own = timm.data.resolve_data_config({}, model=made, use_test_size=True)
        img_size, crop_pct = img_size or own["input_size"][-1], crop_pct or own["crop_pct"]
        interpolation = interpolation or (own["interpolation"] if own["interpolation"] in FILTERS else "")
        for what, has, ours in (
            ("interpolation", own["interpolation"], interpolation or "bicubic"),
            ("crop mode", own["crop_mode"], "center"),
        ):
            if has != ours and not (what == "interpolation" and options.interpolation):
                say(f"note: {name} has the {what} {has} in timm; here it is {ours}")
    colours = {name: getattr(options, name) or args.get(name) for name in ("mean", "std")}
    spec = input_spec(made, img_size, crop_pct, **colours)
    augment = Augment(spec.mean, spec.std, num_classes, smoothing=0.0).to(device)
    return Scorer(name, "", made.to(device).eval(), spec, interpolation or "bicubic", augment, num_classes)


def labels_of(scorer: Scorer, label_type: LabelType) -> list[str]:
    """A text for each class, in label order.

    `auto`: the training set's names, else ImageNet's descriptions if the number of classes is that of one of its sets
    (as timm tells them), else numbers. `none`: numbers. `name`: the training set's names, else ImageNet's synsets.
    `description` and `detail`: ImageNet's, by the synset if the training set's names are synsets. Raises `UserError` if
    there is no description.
    """
    numbers = [str(label) for label in range(scorer.num_classes)]
    trained = scorer.class_names() if scorer.trained_names else []
    if label_type == "none":
        return numbers
    if trained and label_type in ("auto", "name"):
        return trained
    if trained:
        described = [_describe(name, label_type) for name in trained]
        if not all(described):
            raise UserError(
                f"--label-type {label_type}: the model's classes have names of their own, such as {trained[0]}. Use "
                "--label-type name."
            )
        return [text or "" for text in described]
    subset = infer_imagenet_subset({"num_classes": scorer.num_classes})
    if subset is None:
        if label_type in ("auto", "name"):
            return numbers
        raise UserError(
            f"--label-type {label_type}: the {scorer.num_classes} classes have no known names. Leave it out."
        )
    info = ImageNetInfo(subset)
    if label_type == "name":
        return list(info.label_names())
    return [info.index_to_description(label, detailed=_is_detailed(label_type)) for label in range(scorer.num_classes)]


def _describe(name: str, label_type: str) -> str | None:
    try:
        return _imagenet().label_name_to_description(name, detailed=_is_detailed(label_type))
    except KeyError:
        return None


@cache
def _imagenet() -> ImageNetInfo:
    """The table of descriptions in timm, the same for all sets of ImageNet."""
    return ImageNetInfo("imagenet-1k")


def _is_detailed(label_type: str) -> bool:
    return label_type.startswith("detail")
