"""Balanced factors of a layer's current weight, and factors of its average in the same gauge.

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
"""Singular values of a factor below this share of its largest are rounding errors of float32."""


class NewFactors(NamedTuple):
    """A layer's new factors, in the layer's dtype and on its device."""

    up: Tensor
    """(R, r)."""
    down: Tensor
    """(P r, C)."""
    bias: Tensor | None
    """(R,): the layer's own bias, or the one that corrects for the mean input."""
    mean: Tensor | None = None
    """(C,), float64: the mean input that the bias corrects for; None: the bias is the layer's own."""


def weight_of(layer: nn.Module) -> Tensor:
    """The weight (R, C) of a Linear, or the product of a factorised layer; float64."""
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
    """Factors of layers as they are now: the matrix of the given rank nearest to W by a method, from certified
    triplets.

    They are balanced: A^T A = B B^T = the diagonal matrix of the singular values of A B, by the QR of both and the SVD
    of what is left (`truncate.Decomposition.factors`). Both factors therefore have the same norm, and among all factors
    of that product the least |A|^2 + |B|^2, which is twice its nuclear norm (Srebro, Rennie & Jaakkola, NIPS 2004).

    Args:
        model: its layers are Linear, or factorised at a larger rank.
        ranks: new rank by layer name.
        method: one of `methods.METHODS`. `kfac` and `svdllm` take inputs about their mean if there is a bias.
        moments: of each layer; `svd` needs none.
        progress: called after each layer with the number of layers done.

    Raises:
        UserError: a rank does not fit, weights are not finite, or a method lacks its moments.
    """
    made: dict[str, NewFactors] = {}
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear | LowRankLinear):
            raise UserError(f"{name} is of class {type(layer).__name__}; only a Linear can be factorised.")
        if method != "svd" and (moments is None or name not in moments):
            raise UserError(f"{name} has not been calibrated, but the method {method} needs its moments.")
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
    """Factors of another weight in the gauge of given factors: A' = W' B^+, then B' = A'^+ W'; float64.

    A product A B also equals (A Q)(Q^-1 B) for any invertible Q. Averages of factors make sense only if both have the
    same Q: with A' near A and B' near B, the product of the averages is the average of the products except for (A' -
    A)(B' - B), which is an order smaller. Two separate SVDs differ by signs of columns, the order of close values, and
    rotations within equal ones. A' is the best left factor for B, and B' the best right factor for A': one round of
    alternating least squares.

    Args:
        weight_RC: W', such as the average of W.
        up: A (R, r); only its shape is used.
        down: B (P r, C).

    Returns:
        A' (R, r) and B' (P r, C).
    """
    parts = parts_of(up.shape, down.shape)
    w_PRC, b_PrC = (one.detach().double().unflatten(0, (parts, -1)) for one in (weight_RC, down))
    up_PRr = w_PRC @ torch.linalg.pinv(b_PrC, rtol=RANK_TOLERANCE)
    down_PrC = torch.linalg.pinv(up_PRr, rtol=RANK_TOLERANCE) @ w_PRC
    return up_PRr.flatten(0, 1), down_PrC.flatten(0, 1)
