"""What layers in factors cost at a rank, a model put into them, and its checkpoint.

Shape legend: W of R rows and C columns, factors of rank r, P parts of the rows (see `model.low_rank`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import whole_file
from lowrank_vit.config import meaning
from lowrank_vit.lowrank.options import SUFFIXES
from lowrank_vit.lowrank.targets import in_evaluation, logits_of, noise, side_of
from lowrank_vit.model.flops import forward_flops_per_image
from lowrank_vit.model.low_rank import LowRankLinear, ranks_of
from lowrank_vit.model.weight_files import COMPRESSION
from lowrank_vit.model.weights import LOWRANK_RANKS, Checkpoint

By = Literal["params", "flops"]
Factors = tuple[Tensor, Tensor, Tensor | None]
"""The factors `up` (R, r) and `down` (P r, C), and the bias (R,) or None, of any float type."""
_KEPT = (meaning.KEY, "version", "epoch", "num_classes", "class_names", "input")
"""What a compressed checkpoint has of the one that it was made from, beside its flags."""


def pays(rows: int, columns: int, parts: int = 1) -> int:
    """The greatest rank that saves weights, of each part: the greatest r with r (R + P C) < R C; 0 without one."""
    return min((rows * columns - 1) // (rows + parts * columns), rows // parts, columns)


class Layer(NamedTuple):
    """What a layer's cost follows from."""

    rows: int
    columns: int
    tokens: int
    """Vectors of C numbers that it takes in for one image."""
    parts: int = 1

    def cost(self, rank: int | None, by: By = "params") -> int:
        """Weights, or FLOPs of one image (a multiply-add is two), at a rank; None: of the layer as it is."""
        R, C = self.rows, self.columns
        weights = R * C if rank is None else rank * (R + self.parts * C)
        return weights if by == "params" else 2 * self.tokens * weights

    @property
    def pays(self) -> int:
        """The greatest rank that saves anything, see `pays`."""
        return pays(self.rows, self.columns, self.parts)


@dataclass(frozen=True)
class Costs:
    """What a model costs, and how much of that its targets do."""

    layers: dict[str, Layer]
    rest: dict[By, int]
    """Parameters and FLOPs of one image of all else, the targets' biases included."""

    def count(self, ranks: Mapping[str, int], by: By = "params") -> int:
        """Parameters of the model, or FLOPs of its forward pass of one image, with those layers at those ranks."""
        return self.rest[by] + sum(layer.cost(ranks.get(name), by) for name, layer in self.layers.items())


def costs_of(
    model: nn.Module,
    targets: Mapping[str, nn.Linear],
    *,
    img_size: int | None = None,
    parts: Mapping[str, int] | None = None,
) -> Costs:
    """Measure what the model costs in one forward pass of one image; `parts`: see `parts_of_targets`."""
    tokens = dict.fromkeys(targets, 0)

    def count_tokens(name: str) -> Any:
        def hook(layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            tokens[name] += output.numel() // layer.out_features

        return hook

    hooks = [layer.register_forward_hook(count_tokens(name)) for name, layer in targets.items()]
    try:
        logits_of(model, noise(model, img_size)[:1])
    finally:
        for hook in hooks:
            hook.remove()
    layers = {
        name: Layer(layer.out_features, layer.in_features, tokens[name], (parts or {}).get(name, 1))
        for name, layer in targets.items()
    }
    whole: dict[By, int] = {"params": sum(p.numel() for p in model.parameters()), "flops": _flops(model, img_size)}
    return Costs(layers, {by: whole[by] - sum(one.cost(None, by) for one in layers.values()) for by in whole})


def costs_alone(weights: Mapping[str, Tensor]) -> Costs:
    """Of layers as if they were the model, so that budgets are shares of their parameters."""
    return Costs({name: Layer(*weight.shape, tokens=0) for name, weight in weights.items()}, {"params": 0, "flops": 0})


def _flops(model: nn.Module, img_size: int | None) -> int:
    side = side_of(model, img_size)
    with in_evaluation(model):
        try:
            return forward_flops_per_image(model, side)
        except Exception:  # the model looks at numbers, which are not there without data
            return forward_flops_per_image(model, side, next(model.parameters()).device)


def even_factors(u_Rr: Tensor, s_r: Tensor, v_Cr: Tensor) -> tuple[Tensor, Tensor]:
    """Share a truncated matrix out evenly: up = U sqrt(S), (R, r), and down = sqrt(S) V^T, (r, C).

    So weight decay and steps of an optimizer treat both alike. Take U, S and V in float64.
    """
    root = s_r.sqrt()
    return u_Rr * root, root[:, None] * v_Cr.mT


def joined(parts: Sequence[Factors]) -> Factors:
    """The factors of a layer from those of the parts of its rows, in order; each part is of the same rank."""
    ups, downs, biases = zip(*parts, strict=True)
    return torch.cat(ups), torch.cat(downs), None if biases[0] is None else torch.cat(biases)


def factorise(model: nn.Module, factors: Mapping[str, Factors], *, anyway: bool = False, shared: bool = False) -> None:
    """Put layers in these factors, in place; their dtype, device and mode stay.

    `shared`: the model's parameters are the factors' own memory where dtype and device are the same, for a model that
    is not trained. Else they are copies.

    Raises:
        UserError: a layer is none that can be, a rank is above the matrix or, without `anyway`, saves nothing, factors
            do not fit or are not finite. The model is as it was then.
    """
    made: dict[str, LowRankLinear] = {}
    modules = dict(model.named_modules())
    for name, (up, down, bias) in factors.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            what = "is in factors already" if isinstance(layer, LowRankLinear) else "is no Linear of the model"
            raise UserError(f"{name} {what}, so it cannot be put in factors.")
        R, C, like = layer.out_features, layer.in_features, layer.weight
        if (bias is not None) != ("bias" in dict(layer.named_parameters())):
            raise UserError(f"{name}: factors and layer must both have a bias, or none.")
        copy = not shared
        bias_R = None if bias is None else bias.to(like, copy=copy)
        new = LowRankLinear(up.to(like, copy=copy), down.to(like, copy=copy), bias_R)
        if (new.out_features, new.in_features) != (R, C):
            raise UserError(f"{name} is {R} x {C}, its factors make {new.out_features} x {new.in_features}.")
        limit = min(R // new.parts, C)
        if new.rank > limit:
            raise UserError(f"{name}: rank {new.rank} is above the matrix, whose greatest is {limit}.")
        if new.rank > pays(R, C, new.parts) and not anyway:
            raise UserError(
                f"{name}: factors of rank {new.rank} have no fewer weights than its {R * C:,}; {pays(R, C, new.parts)} "
                "is the greatest rank that saves any. Leave that layer whole."
            )
        if not all(bool(parameter.isfinite().all()) for parameter in new.parameters()):
            raise UserError(f"{name}: its factors are not finite, or too great for {like.dtype}.")
        made[name] = new.train(layer.training)
    for name, new in made.items():
        model.set_submodule(name, new)


def save_compressed(
    model: nn.Module,
    path: Path,
    source: Checkpoint | None,
    arch: str,
    compression: Mapping[str, Any],
    args: Mapping[str, Any] | None = None,
) -> None:
    """Write the model's weights as a checkpoint that validate, inference, analyze_spectrum and train take as it is.

    Merged or not: a model in factors keeps their ranks beside them. One in the original shapes is a checkpoint of plain
    timm's too. A path that ends in .safetensors gets the tensors, from whose shapes the ranks are known, and how they
    were made.

    Args:
        model: with the weights that were chosen of `source`, the EMA's or its own; they become `state_dict`.
        path: what is there is replaced, once the new file is whole.
        source: whose classes, flags and input are kept; None: of published weights.
        arch: timm's name of the model.
        compression: how it was made, plain values.
        args: flags by name to put over those of `source`, such as "model-kwargs" given by hand.

    Raises:
        UserError: the file cannot be written, or its name is of another format.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} has no name of a checkpoint: {', '.join(SUFFIXES)}. Say small.pth.tar.")
    kept = {key: value for key in _KEPT if source is not None and (value := source.content.get(key)) is not None}
    flags = {**(source.args if source else {}), **(args or {})}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = {**kept, "arch": arch, "state_dict": weights, COMPRESSION: dict(compression)}
    content |= {"args": flags} if flags else {}
    if ranks := ranks_of(model):
        content[LOWRANK_RANKS] = ranks
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            if path.suffix == ".safetensors":
                about = {"format": "pt", COMPRESSION: json.dumps(dict(compression))}
                file.write(safetensors.torch.save({name: one.clone() for name, one in weights.items()}, about))
            else:
                torch.save(content, file)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}. Give another name.") from error
