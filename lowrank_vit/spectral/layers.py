"""The matrices of a model: which of its layers are watched, and their weights as they are now."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.foreign import plain_name
from lowrank_vit.model.lora import effective_weight, has_adapter, lora_of, merged
from lowrank_vit.model.low_rank import LowRankLinear, product, with_products
from lowrank_vit.spectral.fused import fused_qkv
from lowrank_vit.spectral.select import WEIGHT, Rename, Target, Targets, choose_targets, take_targets

_PARAMETRIZED = re.compile(r"(.+\.)?parametrizations\.(\w+)\.\w+")
"""Names of the parts of tensors under torch's parametrizations."""


def targets_of_model(
    model: nn.Module,
    patterns: Targets,
    split_qkv: bool = False,
    flags: str = "--spec-",
    rename: Rename | None = None,
) -> dict[str, Target]:
    """`choose_targets` in any model, without outer wrappers. Raises `UserError`.

    Names are without what torch.compile and checkpointed activations put into them. A layer in factors counts as the
    one it stands for, as does one with an adapter or a parametrization (weight_norm, say).
    """
    weights, embeddings = with_products(_weights_of(model)), set[str]()
    weights = merged(weights, lora_of(model), "the model")
    paths = {plain_name(path): path for path in weights}
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UserError("the model is sharded over ranks (FSDP). Each rank needs the whole weights, as with DDP.")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings.add(plain_name(path))
    fused = {plain_name(name) for name in fused_qkv(model)}
    of_names = {name: weights[path] for name, path in paths.items()}
    watched = choose_targets(of_names, patterns, split_qkv, fused, flags, embeddings=embeddings, rename=rename)
    return {
        name: target._replace(
            module=paths.get(f"{target.module}{WEIGHT}", paths.get(target.module, "")).removesuffix(WEIGHT)
        )
        for name, target in watched.items()
    }


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by path, in the model's order; parametrized weights stand in the place of their parts.

    Raises `UserError` for a layer that has no weights yet.
    """
    found: dict[str, Tensor] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if part := _PARAMETRIZED.fullmatch(path):
            owner, name = part.groups("")
            found[f"{owner}{name}"] = _parametrized(model.get_submodule(owner.rstrip(".")), name)
        elif is_lazy(parameter):
            raise UserError(
                f"{path} is not there yet: a lazy layer makes it at its first batch. Run one, and begin then."
            )
        else:
            found[path] = parameter
    return found


def _parametrized(module: Any, name: str) -> Tensor:
    """A tensor that a parametrization makes, in evaluation mode: in training spectral_norm would go on a step."""
    made_by = module.parametrizations[name]
    modes = {one: one.training for one in made_by.modules()}
    try:
        made_by.eval()
        with torch.no_grad():
            return getattr(module, name).detach()
    finally:
        for one, is_training in modes.items():
            one.training = is_training


def layer_of(model: nn.Module, target: Target) -> nn.Module | None:
    """The layer whose weight it is; None for a parameter that is no layer's `weight`."""
    try:
        return model.get_submodule(target.module)
    except AttributeError:
        return None


def matrices_of(model: nn.Module, watched: Mapping[str, Target]) -> dict[str, Tensor]:
    """`take_targets` in a model; a float64 copy of the product of factors, and of the sum of layer and adapter."""

    def weight_of(name: str) -> Tensor:
        layer = layer_of(model, Target(name))
        if isinstance(layer, LowRankLinear):
            return product(layer.up, layer.down)
        if layer is not None and has_adapter(layer):
            return effective_weight(layer)
        path = name if layer is None else f"{name}{WEIGHT}"
        owner, _, last = path.rpartition(".")
        module = model.get_submodule(owner)
        return _parametrized(module, last) if parametrize.is_parametrized(module, last) else model.get_parameter(path)

    return take_targets(cache(weight_of), watched)


def ranks_of_factors(model: nn.Module, watched: Mapping[str, Target]) -> dict[str, int]:
    """What the rank of each matrix of a layer in factors is at most, by name; those of others are left out."""
    layers = {name: layer_of(model, target) for name, target in watched.items()}
    return {
        name: layer.rank * (layer.parts if watched[name].third is None else 1)
        for name, layer in layers.items()
        if isinstance(layer, LowRankLinear)
    }
