"""Make the timm model that a configuration names, and learn from it how its images must look."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from torch import nn

from data_prep.errors import UserError
from lowrank_vit.engine.pretrained import load_pretrained_file, load_published

FLAG_OF = {"num_classes": "num-classes", "img_size": "img-size", "drop_rate": "drop", "drop_path_rate": "drop-path"}
"""Arguments of a constructor that have a flag of their own, which data and run look at too."""


@dataclass(frozen=True)
class InputSpec:
    """How the model wants its images."""

    img_size: int
    """Side, pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of RGB in 0-1."""
    crop_pct: float


def parse_model_kwargs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("patch_size=2", "qkv_bias=False")` as keyword arguments; values are Python literals, else strings."""
    kwargs: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--model-kwargs {pair}: expected NAME=VALUE, e.g. patch_size=2.")
        if name in FLAG_OF:
            raise UserError(f"--model-kwargs {pair}: give it as --{FLAG_OF[name]} {text}.")
        try:
            kwargs[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            kwargs[name] = text
    return kwargs


def create_model(
    name: str,
    num_classes: int,
    *,
    img_size: int | None = None,
    drop: float = 0.0,
    drop_path: float | None = None,
    model_kwargs: tuple[str, ...] = (),
    pretrained: bool = False,
    pretrained_path: Path | None = None,
    grad_checkpointing: bool = False,
    say: Callable[[str], object] = print,
) -> nn.Module:
    """A timm model in channels_last on the CPU, freshly initialised (from torch's generator) or pretrained.

    `pretrained`: with the weights that timm publishes; `pretrained_path`: with those of a file, of any format that timm
    reads. timm interpolates their position embedding to `img_size`; the classifier is a new one where the number of
    classes differs, which is said. Raises `UserError` for an unknown name, arguments that the constructor does not
    take, and weights that cannot be had or do not fit.

    `grad_checkpointing` computes each block's activations anew in the backward pass, compiled or not; gradients stay
    the same. An `img_size` that the constructor does not take (of a convolutional network) is left to the data.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"--model {name} is not a timm model.{hint}")
    kwargs: dict[str, Any] = {"num_classes": num_classes, "drop_rate": drop, "drop_path_rate": drop_path}
    kwargs |= parse_model_kwargs(model_kwargs)
    if img_size is not None:
        kwargs["img_size"] = img_size
    if pretrained_path is not None:
        model = load_pretrained_file(partial(_build, name, kwargs), name, pretrained_path, num_classes, say)
    elif pretrained:
        model = load_published(partial(_build, name, kwargs), name, num_classes, say)
    else:
        model = _build(name, kwargs)
    if grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise UserError(f"--grad-checkpointing: --model {name} cannot do that. Leave it out.") from error
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _build(name: str, kwargs: dict[str, Any], **pretrained: Any) -> nn.Module:
    """Call timm's `create_model`. Raises `UserError` for arguments; errors of loading weights are the caller's."""
    try:
        return timm.create_model(name, **kwargs, **pretrained)
    except TypeError as error:
        if "img_size" in kwargs and "img_size" in str(error):  # convolutional models take images of any size
            return _build(name, {key: value for key, value in kwargs.items() if key != "img_size"}, **pretrained)
        raise _cannot_be_built(name, kwargs, error) from error
    except (ValueError, AssertionError, RuntimeError) as error:
        if pretrained:
            raise
        raise _cannot_be_built(name, kwargs, error) from error


def _cannot_be_built(name: str, kwargs: dict[str, Any], error: Exception) -> UserError:
    given = f"--model {name} with {', '.join(f'{k}={v}' for k, v in kwargs.items() if v not in (None, 0.0))}"
    return UserError(f"{given} cannot be built: {error}. Check --model-kwargs and --img-size.")


def input_spec(model: nn.Module, img_size: int | None, crop_pct: float | None) -> InputSpec:
    """The model's own size, mean, std and crop share (timm's data configuration), with the user's over them."""
    own = timm.data.resolve_data_config({}, model=model)
    return InputSpec(
        img_size=img_size or own["input_size"][-1],
        mean=tuple(own["mean"]),
        std=tuple(own["std"]),
        crop_pct=crop_pct or own["crop_pct"],
    )
