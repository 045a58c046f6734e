"""Factorised layers: their cost at a rank, putting them into a model, and the model's checkpoint.

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
"""The factors `up` (R, r) and `down` (P r, C), and the bias (R,) or None, of any float dtype."""
_KEPT = (meaning.KEY, "version", "epoch", "num_classes", "class_names", "input")
"""What a compressed checkpoint keeps from its source checkpoint, besides the flags."""


def pays(rows: int, columns: int, parts: int = 1) -> int:
    """The largest rank of each part that saves weights: the largest r with r (R + P C) < R C; 0 if there is none."""
    return min((rows * columns - 1) // (rows + parts * columns), rows // parts, columns)


class Layer(NamedTuple):
    """The numbers that determine a layer's cost."""

    rows: int
    columns: int
    tokens: int
    """Input vectors (C,) for one image."""
    parts: int = 1

    def cost(self, rank: int | None, by: By = "params") -> int:
        """Weights, or FLOPs per image (a multiply-add counts as two), at a rank; None: of the whole layer."""
        R, C = self.rows, self.columns
        weights = R * C if rank is None else rank * (R + self.parts * C)
        return weights if by == "params" else 2 * self.tokens * weights

    @property
    def pays(self) -> int:
        """The largest rank that saves anything, see `pays`."""
        return pays(self.rows, self.columns, self.parts)


@dataclass(frozen=True)
class Costs:
    """The cost of a model, split into its targets and the rest."""

    layers: dict[str, Layer]
    rest: dict[By, int]
    """Parameters, and FLOPs per image, of everything else; the targets' biases are included."""

    def count(self, ranks: Mapping[str, int], by: By = "params") -> int:
        """Parameters of the model, or FLOPs of its forward pass for one image, with these layers at these ranks."""
        return self.rest[by] + sum(layer.cost(ranks.get(name), by) for name, layer in self.layers.items())


def costs_of(
    model: nn.Module,
    targets: Mapping[str, nn.Linear],
    *,
    img_size: int | None = None,
    parts: Mapping[str, int] | None = None,
) -> Costs:
    """Measure the model's cost with one forward pass of one image; `parts`: see `parts_of_targets`."""
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
    """The costs of these layers alone, so that budgets are shares of their parameters."""
    return Costs({name: Layer(*weight.shape, tokens=0) for name, weight in weights.items()}, {"params": 0, "flops": 0})


def _flops(model: nn.Module, img_size: int | None) -> int:
    side = side_of(model, img_size)
    with in_evaluation(model):
        try:
            return forward_flops_per_image(model, side)
        except Exception:  # the model reads values, which meta tensors do not have
            return forward_flops_per_image(model, side, next(model.parameters()).device)


def even_factors(u_Rr: Tensor, s_r: Tensor, v_Cr: Tensor) -> tuple[Tensor, Tensor]:
    """Split a truncated matrix evenly: up = U sqrt(S), (R, r), and down = sqrt(S) V^T, (r, C).

    Weight decay and optimizer steps then treat both factors alike. Give U, S and V in float64.
    """
    root = s_r.sqrt()
    return u_Rr * root, root[:, None] * v_Cr.mT


def joined(parts: Sequence[Factors]) -> Factors:
    """The factors of a layer from those of the parts of its rows, in order; all parts have the same rank."""
    ups, downs, biases = zip(*parts, strict=True)
    return torch.cat(ups), torch.cat(downs), None if biases[0] is None else torch.cat(biases)


def factorise(model: nn.Module, factors: Mapping[str, Factors], *, anyway: bool = False, shared: bool = False) -> None:
    """Replace layers of the model by these factors; dtype, device and training mode stay.

    With `shared`, the model's parameters use the factors' own memory if dtype and device are the same; use it for a
    model that is not trained. Otherwise they are copies.

    Raises:
        UserError: a layer cannot be factorised, a rank exceeds the matrix or, without `anyway`, saves nothing, or
        factors do not fit or are not finite. The model is unchanged then.
    """
    made: dict[str, LowRankLinear] = {}
    modules = dict(model.named_modules())
    for name, (up, down, bias) in factors.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            what = "is factorised already" if isinstance(layer, LowRankLinear) else "is not a Linear layer of the model"
            raise UserError(f"{name} {what}, so it cannot be factorised.")
        R, C, like = layer.out_features, layer.in_features, layer.weight
        if (bias is not None) != ("bias" in dict(layer.named_parameters())):
            raise UserError(f"{name}: either both factors and layer must have a bias, or neither.")
        copy = not shared
        bias_R = None if bias is None else bias.to(like, copy=copy)
        new = LowRankLinear(up.to(like, copy=copy), down.to(like, copy=copy), bias_R)
        if (new.out_features, new.in_features) != (R, C):
            raise UserError(f"{name} is {R} x {C}, but its factors make {new.out_features} x {new.in_features}.")
        limit = min(R // new.parts, C)
        if new.rank > limit:
            raise UserError(f"{name}: rank {new.rank} is too large for the matrix. The largest is {limit}.")
        if new.rank > pays(R, C, new.parts) and not anyway:
            raise UserError(
                f"{name}: factors of rank {new.rank} have at least as many weights as the layer ({R * C:,}). The "
                f"largest rank that saves weights is {pays(R, C, new.parts)}. Leave that layer whole."
            )
        if not all(bool(parameter.isfinite().all()) for parameter in new.parameters()):
            raise UserError(f"{name}: its factors are not finite, or too large for {like.dtype}.")
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
    """Write the model's weights as a checkpoint that validate, inference, analyze_spectrum and train read as it is.

    A factorised model is saved with its ranks. A merged model, in the original shapes, is also a checkpoint for plain
    timm. A path that ends in .safetensors gets the tensors, whose shapes tell the ranks, and the description of how
    they were made.

    Args:
        model: with the weights to save; they become `state_dict`, whether they were the EMA's or the model's own.
        path: an existing file is replaced once the new one is complete.
        source: the checkpoint whose classes, flags and input settings are kept; None: published weights.
        arch: timm's name of the model.
        compression: how the model was made, plain values.
        args: flags by name that override those of `source`, such as "model-kwargs" given by hand.

    Raises:
        UserError: the file cannot be written, or its suffix is not a checkpoint's.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} does not end like a checkpoint ({', '.join(SUFFIXES)}). Say small.pth.tar.")
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
