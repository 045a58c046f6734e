"""Factors of a layer's weight as it is now, balanced, and those of its average in the same gauge.

Letters of shapes: weight W (R, C), up A (R, r), down B (P r, C), P parts of the rows (see `model.low_rank`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.calibration import Moments
from lowrank_vit.lowrank.methods import METHODS
from lowrank_vit.lowrank.truncate import decompose
from lowrank_vit.model.low_rank import LowRankLinear, parts_of, product

RANK_TOLERANCE = 1e-6
"""Singular values of a factor below this share of its greatest are rounding of float32."""


class NewFactors(NamedTuple):
    """What a layer becomes, of the layer's own dtype and on its device."""

    up: Tensor
    """(R, r)."""
    down: Tensor
    """(P r, C)."""
    bias: Tensor | None
    """(R,): the layer's own, or that which makes up for what is cut off of the mean input."""
    mean: Tensor | None = None
    """(C,), float64: the mean input that the bias makes up for; None: the bias is the layer's own."""


def weight_of(layer: nn.Module) -> Tensor:
    """The weight (R, C) that a Linear has, or that a layer in factors stands for; float64."""
    if isinstance(layer, LowRankLinear):
        return product(layer.up, layer.down)
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach().double()


def make_factors(
    model: nn.Module,
    ranks: Mapping[str, int],
    method: str = "svd",
    moments: Mapping[str, Moments] | None = None,
    *,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, NewFactors]:
    """Factors of layers as they are now: the matrix of that rank nearest to W by a method, from certified triplets.

    They are balanced, A^T A = B B^T = the diagonal of the singular values of A B, by the QR of both and the SVD of what
    is left (`truncate.Decomposition.factors`). So both have the same norm, and of all factors with that product they
    have the least |A|^2 + |B|^2, which is twice its nuclear norm (Srebro, Rennie & Jaakkola, NIPS 2004).

    Args:
        model: its layers are Linear, or in factors of a greater rank.
        ranks: by the layers' names.
        method: one of `methods.METHODS`. `kfac` and `svdllm` take the inputs about their mean where there is a bias.
        moments: of each layer; `svd` needs none.
        progress: called after each layer with the number of those that are done.

    Raises:
        UserError: a rank does not fit, weights are not finite, or a method lacks its moments.
    """
    made: dict[str, NewFactors] = {}
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear | LowRankLinear):
            raise UserError(f"{name} is of class {type(layer).__name__}; only a Linear is put in factors.")
        if method != "svd" and (moments is None or name not in moments):
            raise UserError(f"{name} has not been calibrated, which the method {method} needs.")
        parts = layer.parts if isinstance(layer, LowRankLinear) else 1
        like = layer.up if isinstance(layer, LowRankLinear) else layer.weight
        of_layer = moments[name] if moments is not None and method != "svd" else None
        try:
            found = decompose(weight_of(layer), layer.bias, METHODS[method], of_layer, parts, rank)
            up, down, bias = found.factors(rank)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        new_bias = None if layer.bias is None or bias is None else bias.to(layer.bias)
        made[name] = NewFactors(up.to(like), down.to(like), new_bias, found.mean_C)
        progress(len(made))
    return made


def in_gauge(weight_RC: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of another weight in the gauge of given ones: A' = W' B^+, then B' = A'^+ W'; float64.

    A product A B is (A Q)(Q^-1 B) as well, for any invertible Q. Averages of factors mean something only where both
    have the same Q: with A' near A and B' near B, the product of the averages is the average of the products but for
    (A' - A)(B' - B), which is smaller by an order. Two SVDs of their own differ by the signs of columns, by the order
    of near values, by any rotation within equal ones. A' is the best left factor for B, and B' the best right one for
    A': one round of alternating least squares.

    Args:
        weight_RC: W', such as the average of W.
        up: A (R, r), of which only the shape counts.
        down: B (P r, C).

    Returns:
        A' (R, r) and B' (P r, C).
    """
    parts = parts_of(up.shape, down.shape)
    w_PRC, b_PrC = (one.detach().double().unflatten(0, (parts, -1)) for one in (weight_RC, down))
    up_PRr = w_PRC @ torch.linalg.pinv(b_PrC, rtol=RANK_TOLERANCE)
    down_PrC = torch.linalg.pinv(up_PRr, rtol=RANK_TOLERANCE) @ w_PRC
    return up_PRr.flatten(0, 1), down_PrC.flatten(0, 1)
