"""Make the timm model that a configuration names, and read its image settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import timm.data
import timm.models
import torch
from torch import nn

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError, did_you_mean
from lowrank_vit.common.hub import hub_errors, quick_without_network, status_of
from lowrank_vit.common.locks import Say
from lowrank_vit.config.option_types import parse_keywords, square_side
from lowrank_vit.model.fit import Build, build_with, build_with_file, in_one_line
from lowrank_vit.model.hub import source_of
from lowrank_vit.model.weights import Checkpoint

FLAG_OF = {"num_classes": "num-classes", "drop_rate": "drop", "drop_path_rate": "drop-path"}
"""Arguments of a constructor that have their own flag, which data and run read too."""
_REFUSED = {
    "in_chans": "images are RGB, so it is always 3",
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
        "initial weights are chosen with --pretrained, --pretrained-path or --initial-checkpoint",
    ),
}
"""Arguments of timm's `create_model` that users may not set, and why."""


@dataclass(frozen=True)
class InputSpec:
    """The image settings of a model."""

    img_size: int
    """Side, pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Standard deviation, like the mean, of red, green and blue, 0-1."""
    crop_pct: float


def parse_model_kwargs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("patch_size=2", "qkv_bias=False")` as keyword arguments; values are Python literals, otherwise strings.

    `img_size` becomes an integer. Raises `UserError` for arguments that have their own flag.
    """
    kwargs = parse_keywords(pairs, "--model-kwargs", "patch_size=2")
    for name, value in kwargs.items():
        if name in FLAG_OF:
            raise UserError(f"--model-kwargs {name}={value}: give it as --{FLAG_OF[name]} {value}.")
        if name in _REFUSED and (name, value) != ("in_chans", 3):
            raise UserError(f"--model-kwargs {name}={value} is not possible: {_REFUSED[name]}. Leave it out.")
    if "img_size" in kwargs:
        kwargs["img_size"] = square_side(str(kwargs["img_size"]))
    return kwargs


def check_model_name(name: str) -> None:
    """Raise `UserError` for a name that timm does not know, with the nearest ones."""
    source_of(name)
    if not timm.is_model(name):
        near = did_you_mean(name.partition(".")[0], timm.list_models())
        raise UserError(f"--model {name} is not a timm model.{near}")


def create_model(
    name: str,
    num_classes: int,
    *,
    img_size: int | None = None,
    drop: float = 0.0,
    drop_path: float | None = None,
    model_kwargs: tuple[str, ...] = (),
    pretrained: bool = False,
    pretrained_file: Checkpoint | None = None,
    grad_checkpointing: bool = False,
    say: Say = terminal.say,
) -> nn.Module:
    """A timm model in channels_last on the CPU, randomly initialised (from torch's generator) or pretrained.

    `pretrained`: use timm's published weights; `pretrained_file`: use a file's weights. timm interpolates their
    position embedding to `img_size`. If the number of classes differs, the classifier is a new one, which `say`
    reports. Raises `UserError` for an unknown name, arguments that the constructor does not take, and weights that are
    not available or do not fit.

    `grad_checkpointing` recomputes each block's activations in the backward pass, compiled or not; gradients stay the
    same. If the constructor does not take `img_size` (convolutional networks), only the data use it.
    """
    check_model_name(name)
    kwargs: dict[str, Any] = {"num_classes": num_classes, "drop_rate": drop, "drop_path_rate": drop_path}
    kwargs |= parse_model_kwargs(model_kwargs)
    if img_size is not None:
        if kwargs.get("img_size", img_size) != img_size:
            raise UserError(
                f"--img-size {img_size} and --model-kwargs img_size={kwargs['img_size']} differ. Give one of them."
            )
        kwargs["img_size"] = img_size
    if pretrained_file is not None:
        model = build_with_file(partial(_build, name, kwargs), name, pretrained_file, num_classes, say)
    elif pretrained:
        model = _build_published(partial(_build, name, kwargs), name, num_classes, say)
    else:
        model = _build(name, kwargs)
    _tell_of_unseen_pixels(model, img_size, say)
    if grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise UserError(f"--grad-checkpointing: --model {name} does not support it. Leave it out.") from error
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def outline(make: Callable[[], nn.Module]) -> nn.Module:
    """The model of `make`, which calls `create_model`, on the meta device if its constructor can do that."""
    try:
        with torch.device("meta"):
            return make()
    except UserError:  # wrong arguments, or the constructor reads values, which meta tensors lack: find out which
        return make()


def _tell_of_unseen_pixels(model: nn.Module, img_size: int | None, say: Say) -> None:
    """Report the pixels that do not fill a patch; timm drops them silently."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "patch_size", None)
    if img_size is None or not isinstance(size, tuple) or getattr(embed, "dynamic_img_pad", False):
        return
    patch = int(size[0])
    if left := img_size % patch:
        near = " or ".join(str(side) for side in (img_size - left, img_size - left + patch) if side)
        say(
            f"note: --img-size {img_size} is not a multiple of the model's patch size, {patch} pixels: the model does "
            f"not see {left} rows at the bottom and {left} columns on the right of each image. {near} would fit."
        )


def _build(name: str, kwargs: dict[str, Any], **pretrained: Any) -> nn.Module:
    """Call timm's `create_model`. Raises `UserError` for wrong arguments; errors of loading weights pass through."""
    try:
        return timm.create_model(name, **kwargs, **pretrained)
    except TypeError as error:
        if "img_size" in kwargs and "img_size" in str(error):  # convolutional models take images of any size
            return _build(name, {key: value for key, value in kwargs.items() if key != "img_size"}, **pretrained)
        raise _cannot_be_built(name, kwargs, error) from error
    except Exception as error:  # a constructor given nonsense fails in many ways
        if pretrained:
            raise
        raise _cannot_be_built(name, kwargs, error) from error


def _cannot_be_built(name: str, kwargs: dict[str, Any], error: Exception) -> UserError:
    given = f"--model {name} with {', '.join(f'{k}={v}' for k, v in kwargs.items() if v not in (None, 0.0))}"
    return UserError(
        f"{given} cannot be built: {str(error) or type(error).__name__}. Check --model-kwargs and --img-size."
    )


def _build_published(build: Build, name: str, num_classes: int, say: Say) -> nn.Module:
    """The model with timm's published weights, from the Hugging Face hub or its local cache.

    Raises `UserError` if there are none, or they cannot be fetched or do not fit.
    """
    published = timm.models.get_pretrained_cfg(name)
    try:
        with quick_without_network():
            return build_with(
                build, name, "--pretrained", (published.num_classes if published else None, num_classes), say
            )
    except UserError:
        raise
    except hub_errors() as error:
        raise _out_of_reach(name, error) from error
    except (RuntimeError, ValueError, AssertionError, LookupError, AttributeError, TypeError) as error:
        raise UserError(
            f"--pretrained: timm has no weights for {name} with these options: {in_one_line(error)} Choose another "
            "--model, or give a file of weights with --pretrained-path FILE."
        ) from error


def check_published(name: str) -> None:
    """Raise `UserError` if timm has no weights for a model, or they are neither reachable nor in the cache."""
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise UserError(
            f"--pretrained: timm has no weights for {name}. Choose another --model, or give a file of weights with "
            "--pretrained-path FILE."
        )
    if not cfg.hf_hub_id or cfg.file or cfg.state_dict:
        return
    from huggingface_hub import constants, try_to_load_from_cache

    with quick_without_network() as why:
        is_out_of_reach = constants.HF_HUB_OFFLINE
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if is_out_of_reach and not any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, one), str) for one in names):
        raise _out_of_reach(name, why)


def _out_of_reach(name: str, why: Exception | None) -> UserError:
    status = status_of(why) if why else 0
    said = f"it answers {status}" if status else "no network?"
    return UserError(
        f"--pretrained: the weights of {name} cannot be fetched from the Hugging Face hub ({said}), and its "
        "local cache does not have them. Fetch them elsewhere and give the file with --pretrained-path FILE."
    )


def input_spec(
    model: nn.Module,
    img_size: int | None,
    crop_pct: float | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> InputSpec:
    """The model's image size, mean, std and crop share (timm's data configuration), unless the user gives others.

    A single number for `mean` or `std` holds for all three channels.
    """
    own = timm.data.resolve_data_config({}, model=model)
    return InputSpec(
        img_size=img_size or own["input_size"][-1],
        mean=_rgb(mean or own["mean"]),
        std=_rgb(std or own["std"]),
        crop_pct=crop_pct or own["crop_pct"],
    )


def _rgb(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values if len(values) == 3 else (values[0],) * 3
    return red, green, blue


def set_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    """Timm's --head-init-scale and --head-init-bias, in place. Raises `UserError` for a model without such a head."""
    if scale is None and bias is None:
        return
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(getattr(head, "weight", None), nn.Parameter):
        raise UserError("--head-init-scale and --head-init-bias need a model with one classifier. Leave them out.")
    with torch.no_grad():
        if scale is not None:
            head.weight.mul_(scale)
            if head.bias is not None:
                head.bias.mul_(scale)
        if bias is not None:
            if head.bias is None:
                raise UserError("--head-init-bias needs a classifier with a bias. This model's has none.")
            head.bias.fill_(bias)
