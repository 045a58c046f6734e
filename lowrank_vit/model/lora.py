"""LoRA: PEFT's adapters beside frozen layers, the merged weights, and the adapters' entry in checkpoints.

A layer y = W x + b of R rows and C columns becomes y = W x + b + s B (A x), with trained A (r, C) and B (R, r), and
s = alpha / r (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022). B starts at 0, so the
model's outputs are unchanged at first. PEFT names the tensors NAME.base_layer.weight, NAME.base_layer.bias,
NAME.lora_A.default.weight and NAME.lora_B.default.weight; without adapters they are NAME.weight and NAME.bias.

An EMA averages A and B separately, as it does with factors. Their product is not the average of the products: the
difference comes from how A and B vary together within the averaged updates, and is of second order in their steps. But
the product has rank r, so the EMA is a model with adapters like any other, and is resumed, monitored and merged as one.
The average of the products would be a full matrix for each layer, and would cost a product per layer in each update.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.packages import needs

KEY = "lora"
"""Key in a checkpoint of `Lora.content`; absent without adapters."""
_ADAPTER = "default"
"""PEFT's name for the model's only adapters."""
_BASE, _A, _B = ".base_layer", f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"


@dataclass(frozen=True)
class Lora:
    """The adapters of a model."""

    rank: int
    alpha: float
    layers: tuple[str, ...]
    """Names of the layers with an adapter, in the model's order."""

    @property
    def scale(self) -> float:
        """The factor of B A, alpha / rank."""
        return self.alpha / self.rank

    def content(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"rank": self.rank, "alpha": self.alpha, "layers": list(self.layers)}

    @classmethod
    def of_content(cls, told: Any, source: str) -> Lora:
        """Read the output of `content`. Raises `UserError`, which begins with `source`, for anything else."""
        match told:
            case {"rank": int(rank), "alpha": int(alpha) | float(alpha), "layers": [*layers]} if (
                rank > 0 and math.isfinite(alpha) and layers and all(isinstance(name, str) for name in layers)
            ):
                return cls(rank, float(alpha), tuple(map(str, layers)))
            case _:
                raise UserError(
                    f"{source} is damaged: its `{KEY}` lacks the rank, alpha or layers of the adapters. Give "
                    "another checkpoint."
                )


def lora_of(model: nn.Module) -> Lora | None:
    """The adapters of a model; None without any."""
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if has_adapter(module)}
    if not layers:
        return None
    first = next(iter(layers.values()))
    return Lora(first.r[_ADAPTER], float(first.lora_alpha[_ADAPTER]), tuple(layers))


def has_adapter(layer: nn.Module) -> bool:
    """Whether a layer has an adapter. PEFT is not imported for this."""
    return isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) and hasattr(layer, "base_layer")


def require_peft() -> Any:
    """The package PEFT. Raises `UserError` if it is missing."""
    return needs("peft", extra="lora", to="--lora")


def add_adapters(model: nn.Module, lora: Lora, dropout: float = 0.0) -> None:
    """Add adapters to layers, in place, and freeze everything but these and the classifier.

    A is drawn from torch's generator (Kaiming uniform, as in PEFT), B is 0. Names and modes of other modules stay.

    Args:
        model: neither compiled nor wrapped.
        lora: `layers` are Linears of the model.
        dropout: dropout rate of A's inputs in training, 0-1.

    Raises:
        UserError: PEFT is missing.
    """
    peft = require_peft()
    modes = {name: model.get_submodule(name).training for name in lora.layers}
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=dropout,
        target_modules="|".join(map(re.escape, lora.layers)),  # a string must match the whole name
    )
    peft.inject_adapter_in_model(config, model)
    for name, is_training in modes.items():
        layer: Any = model.get_submodule(name).train(is_training)
        layer.cast_input_dtype_enabled = False  # autocast handles dtypes, without a float32 copy
    for parameter in (one for layer in classifiers(model).values() for one in layer.parameters()):
        parameter.requires_grad_(True)


def classifiers(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier of a timm model by name; distilled models have two."""
    found: Any = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    layers = {id(one) for one in (found if isinstance(found, list | tuple) else (found,))}
    return {name: module for name, module in model.named_modules() if id(module) in layers}


def effective_weight(layer: nn.Module, weight_RC: Tensor, adapters: Iterable[str]) -> Tensor | None:
    """W plus s B A of each of these adapters, (R, C), float64; None if one is not plain LoRA."""
    adapted, total = cast("Any", layer), weight_RC
    others = {*getattr(layer, "lora_variant", ())}
    others |= {name for name, is_dora in getattr(layer, "use_dora", {}).items() if is_dora}
    if getattr(layer, "fan_in_fan_out", False) or weight_RC.ndim != 2:
        return None
    for name in adapters:
        if name in others or name not in adapted.lora_A or name not in adapted.lora_B:
            return None
        lora_a, lora_b = adapted.lora_A[name].weight, adapted.lora_B[name].weight
        if (lora_b.ndim, lora_a.ndim) != (2, 2) or (len(lora_b), lora_a.shape[1]) != tuple(weight_RC.shape):
            return None
        total = _sum(total, lora_a, lora_b, adapted.scaling[name])
    return total


def merged(weights: Mapping[str, Tensor], lora: Lora | None, source: str) -> dict[str, Tensor]:
    """A state dict, or parameters by name, with NAME.weight = W + s B A instead of the tensors of each adapter.

    The sum is computed in float64 and rounded once, to the dtype of W. Without adapters the tensors are unchanged.

    Raises:
        UserError: the adapters differ from `lora`; the message begins with `source`.
    """
    if lora is None:
        if stray := next((name for name in weights if name.endswith((_A, _B))), None):
            raise UserError(
                f"{source} has adapters ({stray}) but no `{KEY}` with their scale. Give the checkpoint as the "
                "run wrote it, or one with merged weights."
            )
        return dict(weights)
    found, bases = dict[str, Tensor](), {f"{name}{_BASE}": name for name in lora.layers}
    adapters = {f"{name}{end}" for name in lora.layers for end in (_A, _B)}
    for key, tensor in weights.items():
        base, _, last = key.rpartition(".")
        name = bases.pop(base, None) if last == "weight" else None
        if name is not None:
            pair = [weights.get(f"{name}{end}") for end in (_A, _B)]
            if any(one is None for one in pair):
                raise _does_not_fit(source, f"{name} has no adapter")
            lora_a, lora_b = (one for one in pair if one is not None)
            shapes = [(lora.rank, *tensor.shape[1:]), (*tensor.shape[:1], lora.rank)]
            if [tuple(lora_a.shape), tuple(lora_b.shape)] != shapes:
                raise _does_not_fit(source, f"the adapter of {name} is not of rank {lora.rank} or not of its shape")
            found[f"{name}.weight"] = _sum(tensor, lora_a, lora_b, lora.scale).to(tensor.dtype)
        elif key not in adapters:
            found[key.replace(f"{_BASE}.", ".") if base.removesuffix(_BASE) in lora.layers else key] = tensor
    if bases:
        raise _does_not_fit(source, f"{next(iter(bases.values()))} has no weight")
    return found


def _sum(weight_RC: Tensor, a_rC: Tensor, b_Rr: Tensor, scale: float) -> Tensor:
    return weight_RC.detach().double() + scale * (b_Rr.detach().double() @ a_rC.detach().double())


def _does_not_fit(source: str, what: str) -> UserError:
    return UserError(
        f"{source}: {what}, so its weights and its `{KEY}` differ. The file is damaged, or only one of them was "
        "changed. Give another checkpoint."
    )
