"""As `nearby`, of a whole stack of matrices at once, for CUDA: through torch's batched routines, on any device.

All is float64, which is no slower there, so filters alone, with the matrix orthonormalised between them, bring the
columns to their vectors. They are made orthonormal by Cholesky factors, since a batched QR is slow.

Shape legend: see `ends`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.spectral.solving.extremes import ABSOLUTE_LIMIT, EPS, LEAST
from lowrank_vit.spectral.solving.gram_stack import gram_stack
from lowrank_vit.spectral.solving.index import square_beyond
from lowrank_vit.spectral.solving.nearby import DEGREE, Near, boundary

PASSES = 10
"""Of the filter at most."""
_COLLAPSE = 25.0
"""Logarithm: by how much a filter may lift the first columns over the last, before all turn to the first."""
_CLEAR = 1e-8
"""A gap between squares, over sigma_1^2, that float64 proves."""


def of_stack(matrices_NRC: Tensor, starts_NKB: Tensor, m: int) -> list[Near | str]:
    """The triplets near the starts, or why there are none.

    Args:
        matrices_NRC: finite, scaled matrices of any float dtype.
        starts_NKB: on the same device; see `nearby.of_matrix`.
    """
    j = m + 1
    float64_NRC = matrices_NRC.double()
    tall_NLK = float64_NRC if matrices_NRC.shape[1] >= matrices_NRC.shape[2] else float64_NRC.mT
    gram_NKK = gram_stack(float64_NRC)
    block_NKB = _orthonormal(starts_NKB.double())
    squares_NB, block_NKB, image_NKB = _ritz(gram_NKK, block_NKB)
    for _ in range(PASSES):
        block_NKB = _orthonormal(_chebyshev(gram_NKK, block_NKB, image_NKB, squares_NB))
        squares_NB, block_NKB, image_NKB = _ritz(gram_NKK, block_NKB)
        residual_NKJ = image_NKB[..., :j] - block_NKB[..., :j] * squares_NB[:, None, :j]
        ratio_NJ = torch.linalg.vector_norm(residual_NKJ, dim=1) / (squares_NB[:, :j] * squares_NB[:, :1]).sqrt()
        if bool((ratio_NJ.amax(dim=1) <= ABSOLUTE_LIMIT / 2).all()):
            break
    image_NLJ = tall_NLK @ block_NKB[..., :j]
    q_NLJ = _orthonormal(image_NLJ)
    turn_NJJ, s_NJ, other_NJJ = torch.linalg.svd((q_NLJ.mT @ image_NLJ).nan_to_num())
    long_NLJ, short_NKJ = q_NLJ @ turn_NJJ, block_NKB[..., :j] @ other_NJJ.mT
    ahead_NJ = torch.linalg.vector_norm(image_NLJ @ other_NJJ.mT - long_NLJ * s_NJ[:, None], dim=1)
    behind_NJ = torch.linalg.vector_norm(tall_NLK.mT @ long_NLJ - short_NKJ * s_NJ[:, None], dim=1)
    certificate_NJ = ((ahead_NJ**2 + behind_NJ**2) / 2).sqrt() + EPS * tall_NLK.shape[1] ** 0.5 * s_NJ[:, :1]
    eye_JJ = torch.eye(j, dtype=torch.float64, device=s_NJ.device)
    off_N = torch.stack([(x.mT @ x - eye_JJ).abs().amax((1, 2)) for x in (long_NLJ, short_NKJ)]).amax(0)
    squares, others = (s_NJ**2).cpu().numpy(), squares_NB[:, j:].cpu().numpy()
    known, mu = zip(*(boundary(one, next_, m, _CLEAR) for one, next_ in zip(squares, others, strict=True)), strict=True)
    # A value of 0 takes nothing away.
    deflated_NJ = s_NJ * (torch.arange(j) < torch.tensor(known)[:, None]).to(s_NJ)
    beyond_N = square_beyond(float64_NRC, gram_NKK, torch.tensor(mu).to(s_NJ), deflated_NJ, short_NKJ)
    frobenius_N = torch.linalg.vector_norm(float64_NRC, dim=(1, 2))
    host = (
        x.cpu().numpy()
        for x in (s_NJ, long_NLJ, short_NKJ, certificate_NJ, off_N, block_NKB[..., j:].float(), beyond_N, frobenius_N)
    )
    found: list[Near | str] = []
    for number, (s, long, short, certificate, off, others_KB, beyond, frobenius) in enumerate(zip(*host, strict=True)):
        if not s[-1] > LEAST * s[0]:
            found.append("the first values lie too far apart")
            continue
        values = (float(off), others_KB, known[number], float(beyond), float(frobenius))
        found.append(Near(s, long, short, certificate, *values))
    return found


def _orthonormal(columns_NKB: Tensor) -> Tensor:
    """Orthonormal columns of the same spans, by three Cholesky factors (Fukaya et al., SIAM J. Sci. Comput. 42 (2020)).

    The first is of the columns' Gram matrix a little shifted, so that it exists however near columns are to others.
    NaN where they are too near all the same.
    """
    columns_NKB = columns_NKB / torch.linalg.vector_norm(columns_NKB, dim=1, keepdim=True)
    k, b = columns_NKB.shape[1:]
    shift = 11 * (k * b + b * (b + 1)) * EPS
    eye_BB = torch.eye(b, dtype=torch.float64, device=columns_NKB.device)
    for lift in (shift, 0.0, 0.0):
        factor_NBB, info_N = torch.linalg.cholesky_ex(columns_NKB.mT @ columns_NKB + lift * eye_BB)
        factor_NBB = torch.where(info_N[:, None, None] == 0, factor_NBB, torch.nan)
        columns_NKB = torch.linalg.solve_triangular(factor_NBB.mT, columns_NKB, upper=True, left=False)
    return columns_NKB


def _ritz(gram_NKK: Tensor, columns_NKB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values (N, B), descending, vectors and their images (N, K, B) of orthonormal columns."""
    image_NKB = gram_NKK @ columns_NKB
    inner_NBB = columns_NKB.mT @ image_NKB
    squares_NB, turn_NBB = torch.linalg.eigh(torch.nan_to_num(inner_NBB, posinf=0.0, neginf=0.0))
    turn_NBB = turn_NBB.flip(-1)
    return squares_NB.flip(-1), columns_NKB @ turn_NBB, image_NKB @ turn_NBB


def _chebyshev(gram_NKK: Tensor, block_NKB: Tensor, image_NKB: Tensor, squares_NB: Tensor) -> Tensor:
    """T_d of the Gram matrices times the blocks, see `nearby`; d is one for all, see `_COLLAPSE`."""
    greatest_N11 = squares_NB[:, :1, None]
    middle_N11 = torch.maximum(squares_NB[:, -1:, None], LEAST**2 * greatest_N11).minimum(greatest_N11) / 2
    first = float(torch.arccosh((greatest_N11 / middle_N11 - 1).nan_to_num(1.0)).max())
    degree = int(np.clip(_COLLAPSE / max(first, 1e-3), 2, DEGREE))
    scale = ratio = middle_N11 / (greatest_N11 - middle_N11)
    now_NKB = (image_NKB - middle_N11 * block_NKB) * (scale / middle_N11)
    for _ in range(degree - 1):
        following = 1 / (2 / ratio - scale)
        next_NKB = (gram_NKK @ now_NKB - middle_N11 * now_NKB) * (2 * following / middle_N11)
        next_NKB -= block_NKB * (scale * following)
        block_NKB, now_NKB, scale = now_NKB, next_NKB, following
    return now_NKB
