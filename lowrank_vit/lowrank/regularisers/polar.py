"""Functions of the singular values of many matrices, by matrix products alone, so the device never waits for the host.

Polar factor: U V^T of W = U S V^T, the gradient of the nuclear norm. Clipping: values above a limit become the limit.

Shape legend: N matrices of one shape, K rows, L columns, K <= L.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-4
"""Values down to this share of `bound` become 1; smaller ones are proportional, like the smoothed norm's gradient."""
QUINTICS = (
    (8.509885302615, -25.264304190830, 18.753567898384),
    (4.249573478387, -3.154976488339, 0.585884782490),
    (4.225122185214, -3.138044435346, 0.583953455713),
    (4.124838686946, -3.068332452806, 0.576002949805),
    (3.758010335941, -2.809273889043, 0.546484213746),
    (2.856177544007, -2.134056231018, 0.470110771430),
    (2.020600415755, -1.403721147639, 0.390673900187),
    (1.875875096600, -1.250971993024, 0.375097205309),
    (1.875, -1.25, 0.375),
)
"""Coefficients of s, s^3 and s^5. Each quintic is as near to 1 as possible on the previous one's image of [FLOOR, 1].
The chain is the best for that interval (Amsel et al., Polar Express, arXiv 2505.16932); the last is Newton-Schulz of
degree five.
"""
_SAFETY = 1.01
"""All but the last get s divided by this, as in that paper: a quintic is steep beyond its interval, so errors would
grow."""
_STEPS = (*((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in QUINTICS[:-1]), QUINTICS[-1])
EDGE = 1e-3
"""Values above a limit by less than this share count as equal to it, so clipped values are not clipped again."""
_MARGIN = 1.001
"""Factor on the squared bound, for rounding."""
TINY = torch.finfo(torch.float32).tiny


class Clipped(NamedTuple):
    """The result of clipping N matrices."""

    matrices_NKL: Tensor
    """Bit-identical to the input if no value was above the limit."""
    count_N: Tensor
    """How many values were above the limit, up to rounding; 0 for a matrix that is not finite."""


def polar(matrices_NKL: Tensor) -> Tensor:
    """U V^T of each matrix, float32 (N, K, L). For a rank-deficient one, of its nonzero values; 0 for a zero matrix.

    Nine steps of Newton-Schulz type, X <- (a + b X X^T + c (X X^T)^2) X. `bound` is (sum s^4)^(1/4), which is at least
    the largest value and at most K^(1/4) times it.
    """
    x_NKL = matrices_NKL / matrices_NKL.abs().amax((1, 2), keepdim=True).clamp_min(TINY)
    gram_NKK = x_NKL @ x_NKL.mT
    square_N11 = (torch.linalg.matrix_norm(gram_NKK, keepdim=True) * _MARGIN).clamp_min(TINY)
    x_NKL, gram_NKK = x_NKL / square_N11.sqrt(), gram_NKK / square_N11
    for i, (a, b, c) in enumerate(_STEPS):
        if i:
            gram_NKK = x_NKL @ x_NKL.mT
        by_NKK = torch.baddbmm(gram_NKK, gram_NKK, gram_NKK, beta=b, alpha=c)
        x_NKL = torch.baddbmm(x_NKL, by_NKK, x_NKL, beta=a)
    return x_NKL


def clipped(matrices_NKL: Tensor, limit: float) -> Clipped:
    """Clip singular values: W - sum (s - limit) u v^T over the triplets with s above the limit, up to `EDGE`.

    With P = U V^T and H = W P^T = U S U^T, the projector on the left vectors of those values is (1 + sign(H - limit)) /
    2, and a matrix sign is a polar factor. Unlike (W + limit P - ...) / 2, this keeps the other values.
    """
    polar_NKL = polar(matrices_NKL)
    scaled_NKK = matrices_NKL @ polar_NKL.mT
    values_NKK = (scaled_NKK + scaled_NKK.mT) / 2
    values_NKK.diagonal(dim1=1, dim2=2).sub_(limit * (1 + EDGE))
    above_NKK = polar(values_NKK)
    above_NKK.diagonal(dim1=1, dim2=2).add_(1.0)
    above_NKK /= 2
    count_N = above_NKK.diagonal(dim1=1, dim2=2).sum(1)
    less_NKL = torch.baddbmm(matrices_NKL, above_NKK, matrices_NKL - limit * polar_NKL, alpha=-1)
    is_above_N = count_N > 0.5
    kept_NKL = torch.where(is_above_N[:, None, None], less_NKL, matrices_NKL)
    return Clipped(kept_NKL, torch.where(is_above_N, count_N.round(), 0.0))
