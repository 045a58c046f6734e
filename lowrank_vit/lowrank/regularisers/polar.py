"""Functions of the singular values of many matrices by products alone, so that a device never waits for its host.

Polar factor: U V^T of W = U S V^T, the gradient of the nuclear norm. Clipping: values above a limit are brought to it.

Shape legend: N matrices of one shape, K rows, L columns, K <= L.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-4
"""Values down to this share of `bound` come out as 1; a smaller one in proportion, as the smoothed norm's gradient."""
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
"""Of s, s^3 and s^5: each is as near 1 as a quintic can be on what the one before makes of [FLOOR, 1]. Their chain is
the best for that interval (Amsel et al., Polar Express, arXiv 2505.16932); the last is Newton-Schulz's of fifth degree.
"""
_SAFETY = 1.01
"""Each but the last is given s over that, as there: beyond its interval a quintic is steep, and roundings grow."""
_STEPS = (*((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in QUINTICS[:-1]), QUINTICS[-1])
EDGE = 1e-3
"""Values less than this share above a limit count as at it, so that what was clipped is left alone the next time."""
_MARGIN = 1.001
"""Of the bound, for roundings."""
TINY = torch.finfo(torch.float32).tiny


class Clipped(NamedTuple):
    """What came of N matrices."""

    matrices_NKL: Tensor
    """To the bit as they were where no value was above the limit."""
    count_N: Tensor
    """How many values were, to a rounding; 0 where that is no number, as of a matrix that is not finite."""


def polar(matrices_NKL: Tensor) -> Tensor:
    """U V^T of each, float32 (N, K, L); of a rank-deficient one U V^T of the values that are there, 0 of a zero matrix.

    By nine steps of Newton-Schulz's kind, X <- (a + b X X^T + c (X X^T)^2) X. `bound` is (sum s^4)^(1/4), which is at
    least the greatest value and at most K^(1/4) times it.
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
    """W - sum (s - limit) u v^T over the triplets whose value s is above the limit, to an `EDGE`.

    With P = U V^T and H = W P^T = U S U^T, the projector on the left vectors of those values is (1 + sign(H - limit)) /
    2, and a sign is a polar factor. So the other values keep theirs, which (W + limit P - ...) / 2 would not grant.
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
