"""Factorised layers: a Linear whose weight is the product of two factors; building from a file, and merging.

W (R, C) of y = W x + b is `up` (R, r) times `down` (r, C). If the rows are split into P parts of R / P, each with its
own factors, `down` is (P r, C): part p of W is part p of `up` times part p of `down`. P follows from the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_vit.common.errors import UserError

UP, DOWN, WEIGHT = ".up", ".down", ".weight"
"""Endings of parameter names."""


class LowRankLinear(nn.Module):
    """A factorised Linear: y = up (down x) + bias, with r (R + P C) weights instead of R C. It has no `weight`."""

    up: nn.Parameter
    down: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, up_Rr: Tensor, down_PrC: Tensor, bias_R: Tensor | None = None) -> None:
        """Use the tensors themselves as parameters. Raises `ValueError` for shapes that do not fit."""
        super().__init__()
        self.parts = parts_of(up_Rr.shape, down_PrC.shape)
        if not self.parts:
            raise ValueError(f"factors of {tuple(up_Rr.shape)} and {tuple(down_PrC.shape)} have no product")
        (self.out_features, self.rank), self.in_features = up_Rr.shape, down_PrC.shape[1]
        self.up, self.down = nn.Parameter(up_Rr.detach()), nn.Parameter(down_PrC.detach())
        self.register_parameter("bias", None if bias_R is None else nn.Parameter(bias_R.detach()))

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) to (..., R)."""
        low = F.linear(input, self.down)
        if self.parts == 1:
            return F.linear(low, self.up, self.bias)
        low_Pr, up_PRr = low.unflatten(-1, (self.parts, self.rank)), self.up.unflatten(0, (self.parts, -1))
        output = torch.einsum("...pr,por->...po", low_Pr, up_PRr).flatten(-2)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        """Describe it as torch's own layers do."""
        has_bias, parts = self.bias is not None, f", parts={self.parts}" if self.parts > 1 else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{parts}, {has_bias=}"

    def merged(self) -> nn.Linear:
        """The equivalent Linear; the product is computed in float64 and rounded once."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(product(self.up, self.down).to(self.up.dtype))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)


def parts_of(up_shape: tuple[int, ...], down_shape: tuple[int, ...]) -> int:
    """The number of parts P of the product's rows, from the shapes of the factors; 0 if these have no product."""
    if len(up_shape) != 2 or len(down_shape) != 2 or min(*up_shape, *down_shape) < 1:
        return 0
    (rows, rank), stacked = up_shape, down_shape[0]
    parts = stacked // rank
    return parts if parts * rank == stacked and parts and rows % parts == 0 else 0


def product(up_Rr: Tensor, down_PrC: Tensor) -> Tensor:
    """The weight (R, C), float64. For float32 factors only the sums are rounded, also on a GPU with TF32."""
    parts = parts_of(up_Rr.shape, down_PrC.shape)
    up, down = up_Rr.detach().double(), down_PrC.detach().double()
    return (up.unflatten(0, (parts, -1)) @ down.unflatten(0, (parts, -1))).flatten(0, 1)


def factor_names(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of the factorised modules in a state dict, or in parameters by name."""
    named = [
        name.removesuffix(UP) for name in weights if name.endswith(UP) and f"{name.removesuffix(UP)}{DOWN}" in weights
    ]
    return [name for name in named if parts_of(weights[f"{name}{UP}"].shape, weights[f"{name}{DOWN}"].shape)]


def with_products(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, but with the product NAME.weight, float64, instead of NAME.up and NAME.down."""
    found: dict[str, Tensor] = {}
    factorised = set(factor_names(weights))
    for key, tensor in weights.items():
        name, _, last = key.rpartition(".")
        if name not in factorised or f".{last}" not in (UP, DOWN):
            found[key] = tensor
        elif f".{last}" == UP:
            found[f"{name}{WEIGHT}"] = product(tensor, weights[f"{name}{DOWN}"])
    return found


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The factorised layers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank of each factorised layer (of each of its parts), by name; checkpoints keep this."""
    return {name: layer.rank for name, layer in low_rank_layers(model).items()}


def merge(model: nn.Module) -> None:
    """Replace each factorised layer by the equivalent Linear, in place."""
    for name, layer in low_rank_layers(model).items():
        model.set_submodule(name, layer.merged())


def rebuild(model: nn.Module, weights: Mapping[str, Tensor], ranks: Mapping[str, int], source: str) -> None:
    """Factorise the layers of a model, in place, that are factorised in `weights`, so that these can be loaded.

    The factors get the shapes of the model's layer. If these differ from the file's, or the model has no such layer,
    loading reports it. `ranks`: the file's ranks; empty if it has none, as in safetensors.

    Raises:
        UserError: ranks and factors disagree; the message begins with `source`.
    """
    names = factor_names(weights)
    again = "The file is damaged, or only one of them was changed. Give another checkpoint."
    if ranks and (different := sorted(set(ranks) ^ set(names))):
        lacks = "lists a rank but has no factors" if different[0] in ranks else "has factors but lists no rank"
        raise UserError(f"{source}: it {lacks} for {different[0]}, so its `lowrank_ranks` and weights differ. {again}")
    modules = dict(model.named_modules())
    for name in names:
        up, down = weights[f"{name}{UP}"], weights[f"{name}{DOWN}"]
        if ranks and ranks[name] != up.shape[1]:
            raise UserError(
                f"{source}: its `lowrank_ranks` lists rank {ranks[name]} for {name}, but the factors have rank "
                f"{up.shape[1]}. {again}"
            )
        layer, parts = modules.get(name), parts_of(up.shape, down.shape)
        if isinstance(layer, nn.Linear) and layer.out_features % parts == 0:
            new_up = layer.weight.new_zeros(layer.out_features, up.shape[1])
            new = LowRankLinear(new_up, layer.weight.new_zeros(len(down), layer.in_features), layer.bias)
            model.set_submodule(name, new.train(layer.training))
