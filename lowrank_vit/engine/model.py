"""Make the timm model that a configuration names, and learn from it how its images must look."""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from typing import Any

import timm
import timm.data
import torch
from torch import nn

from data_prep.errors import UserError


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
) -> nn.Module:
    """A freshly initialised timm model in channels_last on the CPU; draws from torch's generator.

    Raises `UserError` for an unknown name or arguments that its constructor does not take.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"--model {name} is not a timm model.{hint}")
    kwargs = parse_model_kwargs(model_kwargs)
    if img_size is not None:
        kwargs["img_size"] = img_size
    try:
        model = timm.create_model(name, num_classes=num_classes, drop_rate=drop, drop_path_rate=drop_path, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = f"--model {name} with {', '.join(f'{k}={v}' for k, v in kwargs.items())}"
        raise UserError(f"{given} cannot be built: {error}. Check --model-kwargs and --img-size.") from error
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def input_spec(model: nn.Module, img_size: int | None, crop_pct: float | None) -> InputSpec:
    """The model's own size, mean, std and crop share (timm's data configuration), with the user's over them."""
    own = timm.data.resolve_data_config({}, model=model)
    return InputSpec(
        img_size=img_size or own["input_size"][-1],
        mean=tuple(own["mean"]),
        std=tuple(own["std"]),
        crop_pct=crop_pct or own["crop_pct"],
    )
