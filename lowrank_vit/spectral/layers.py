"""The matrices of a model: which of its layers are watched, and their weights as they are now."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.computed import layer_at, path_without_peft, weight_at, weights_by_path
from lowrank_vit.model.foreign import plain_name
from lowrank_vit.model.low_rank import LowRankLinear, product, with_products
from lowrank_vit.spectral.fused import fused_qkv
from lowrank_vit.spectral.select import WEIGHT, Rename, Target, Targets, choose_targets, take_targets


def targets_of_model(
    model: nn.Module,
    patterns: Targets,
    split_qkv: bool = False,
    flags: str = "--spec-",
    rename: Rename | None = None,
) -> dict[str, Target]:
    """`choose_targets` for any model, given without outer wrappers. Raises `UserError`.

    Names are without the parts that torch.compile, activation checkpointing and PEFT insert. A factorised layer counts
    as the layer it replaces; so does a layer whose weight is computed otherwise (`model.computed`).
    """
    weights, embeddings = with_products(weights_by_path(model)), set[str]()
    paths = {plain_name(path): path for path in weights}
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UserError("the model is sharded over ranks (FSDP). Each rank needs the whole weights, as with DDP.")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings.add(plain_name(path_without_peft(model, path) or path))
    fused = {plain_name(path_without_peft(model, name) or name) for name in fused_qkv(model)}
    of_names = {name: weights[path] for name, path in paths.items()}
    watched = choose_targets(of_names, patterns, split_qkv, fused, flags, embeddings=embeddings, rename=rename)
    return {
        name: target._replace(
            module=paths.get(f"{target.module}{WEIGHT}", paths.get(target.module, "")).removesuffix(WEIGHT)
        )
        for name, target in watched.items()
    }


def layer_of(model: nn.Module, target: Target) -> nn.Module | None:
    """The layer whose weight the target is; None for a parameter that is no layer's `weight`."""
    return layer_at(model, target.module)


def matrices_of(model: nn.Module, watched: Mapping[str, Target]) -> dict[str, Tensor]:
    """The watched matrices of a model, see `take_targets`.

    A factorised layer gives a float64 copy of its product, a layer with an adapter one of the sum. Raises
    `UserError` for a layer whose effective weight is not known.
    """

    def weight_of(name: str) -> Tensor:
        layer = layer_at(model, name)
        if isinstance(layer, LowRankLinear):
            return product(layer.up, layer.down)
        return weight_at(model, name if layer is None else f"{name}{WEIGHT}")

    return take_targets(cache(weight_of), watched)


def ranks_of_factors(model: nn.Module, watched: Mapping[str, Target]) -> dict[str, int]:
    """An upper bound of the rank of each matrix of a factorised layer, by name; other matrices are left out."""
    layers = {name: layer_of(model, target) for name, target in watched.items()}
    return {
        name: layer.rank * (layer.parts if watched[name].third is None else 1)
        for name, layer in layers.items()
        if isinstance(layer, LowRankLinear)
    }
