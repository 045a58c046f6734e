"""The first singular triplet of many matrices, with a proven error bound, by matrix products alone.

Shape legend: N matrices of one shape, K rows, L columns, K <= L.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_vit.lowrank.regularisers.polar import TINY

SQUARINGS = 8
"""Squarings of the Gram matrix G: 2^8 steps of power iteration, and a bound at most K^(1/512) too high (1.3 % at
768)."""
WORST = 0.02
"""A triplet with a larger error is not certified."""
_SLACK = 1e-5
"""Added to the bound, as a share, for rounding in float32."""
_BETTER = 1e-4
"""A triplet from a new start replaces the one that follows the last if its value is larger by this share."""


class Triplets(NamedTuple):
    """First singular triplets of N matrices, float32."""

    value_N: Tensor
    """|W^T u|, at most the first singular value."""
    left_NK: Tensor
    right_NL: Tensor
    error_N: Tensor
    """The first singular value is at most `value` (1 + error), so u v^T is a subgradient up to that share: for every V,
    |V|_2 >= |W|_2 / (1 + error) + <u v^T, V - W>. NaN or infinite if there is no bound, as for a zero matrix."""

    @property
    def is_certified_N(self) -> Tensor:
        """(N,) bool, on the device."""
        return (self.error_N <= WORST) & (self.value_N > 0) & self.value_N.isfinite()


def first_triplets(matrices_NKL: Tensor, last_NK: Tensor) -> Triplets:
    """The first triplets of float32 matrices, started from the last left vectors; zeros: there are none.

    G^256, by repeated squaring, does 256 steps of power iteration with the last vector, which thus keeps to its own
    triplet among close values. (tr G^256)^(1/512) is at least the first value, and |W^T u| of a unit vector at most. If
    another value has overtaken, the column of the largest diagonal entry finds it.
    """
    scale_N11 = matrices_NKL.abs().amax((1, 2), keepdim=True).clamp_min(TINY)
    x_NKL = matrices_NKL / scale_N11
    gram_NKK = power_NKK = x_NKL @ x_NKL.mT
    log_high_N = torch.zeros_like(scale_N11[:, 0, 0])
    for i in range(SQUARINGS + 1):
        trace_N = power_NKK.diagonal(dim1=1, dim2=2).sum(1)
        log_high_N = log_high_N + trace_N.log() / 2 ** (i + 1)
        power_NKK = power_NKK / trace_N.clamp_min(TINY)[:, None, None]
        if i < SQUARINGS:
            power_NKK = power_NKK @ power_NKK
    greatest_N = power_NKK.diagonal(dim1=1, dim2=2).argmax(1)
    column_NK1 = power_NKK.gather(2, greatest_N[:, None, None].expand(-1, power_NKK.shape[1], 1))
    begun_NK2 = torch.cat([power_NKK @ last_NK[:, :, None], column_NK1], 2)
    left_NK2 = _unit(gram_NKK @ _unit(gram_NKK @ _unit(begun_NK2)))
    # In float32, whatever precision products have, so that it is a lower bound up to rounding.
    both = [(x_NKL * left_NK2[:, :, i, None]).sum(1) for i in range(2)]
    values_N2 = torch.stack([torch.linalg.vector_norm(one, dim=1) for one in both], 1)
    is_anew_N = values_N2[:, 1] > values_N2[:, 0] * (1 + _BETTER)
    value_N = torch.where(is_anew_N, values_N2[:, 1], values_N2[:, 0])
    left_NK = torch.where(is_anew_N[:, None], left_NK2[:, :, 1], left_NK2[:, :, 0])
    right_NL = torch.where(is_anew_N[:, None], both[1], both[0]) / value_N.clamp_min(TINY)[:, None]
    error_N = log_high_N.exp() * (1 + _SLACK) / value_N - 1
    return Triplets(value_N * scale_N11[:, 0, 0], left_NK, right_NL, error_N)


def stable_rank_gradient(matrices_NKL: Tensor, first: Triplets) -> tuple[Tensor, Tensor]:
    """Stable ranks |W|_F^2 / s^2 (N,), s the first value, and gradients 2 (W - |W|_F^2 / s u v^T) / s^2, (N, K, L)."""
    value_N = first.value_N.clamp_min(TINY)
    rank_N = (matrices_NKL / value_N[:, None, None]).square().sum((1, 2))
    outer_NKL = first.left_NK[:, :, None] * first.right_NL[:, None, :]
    by_NKL = matrices_NKL - (rank_N * value_N)[:, None, None] * outer_NKL
    return rank_N, by_NKL * (2 / value_N / value_N)[:, None, None]


def _unit(columns_NKM: Tensor) -> Tensor:
    return columns_NKM / torch.linalg.vector_norm(columns_NKM, dim=1, keepdim=True).clamp_min(TINY)
