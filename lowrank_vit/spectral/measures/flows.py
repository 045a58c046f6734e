"""Metrics of activations: how the tokens of a block are spread, and how concentrated its attention is.

Torch, float64, on any device. Shape legend: N images of T tokens each, M = N T tokens in all, C channels, H heads of D
channels each. `docs/spectra.md` tells how to read each number and when not to trust it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.spectral.measures.metrics import effective_rank, stable_rank
from lowrank_vit.spectral.solving.extremes import EPS

_LOGITS_AT_ONCE = 2**22
"""Entries of attention matrices held at a time; at least those of one image."""
_ROUNDINGS = 32.0
"""A variance below this many times the rounding of the tokens' mean square counts as 0."""


@dataclass
class TokenSums:
    """Sums that give the covariance and the mean cosines of tokens, added up batch by batch.

    They take the memory of one (C, C) matrix, whatever the number of tokens.
    """

    square_CC: Tensor
    """Sum of x x^T."""
    sum_C: Tensor
    direction_C: Tensor
    """Sum of x / |x|."""
    within: Tensor
    """Sum over the images of the squared norm of the image's own sum of x / |x|."""
    non_zero: Tensor
    """Number of tokens that have a direction."""
    tokens: int = 0
    pairs_within: int = 0
    """Ordered pairs of different tokens of one image."""

    @classmethod
    def like(cls, x_NTC: Tensor) -> TokenSums:
        """Sums of no tokens, on the device of `x_NTC`."""
        c = x_NTC.shape[-1]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=x_NTC.device)

        return cls(zeros(c, c), zeros(c), zeros(c), zeros(), zeros())

    def add(self, x_NTC: Tensor) -> None:
        """Add the tokens of some images, of any floating type."""
        n, t, c = x_NTC.shape
        x_NTC = x_NTC.double()
        x_MC = x_NTC.reshape(n * t, c)
        self.square_CC.addmm_(x_MC.T, x_MC)
        self.sum_C += x_MC.sum(0)
        lengths_NT1 = torch.linalg.vector_norm(x_NTC, dim=2, keepdim=True)
        of_image_NC = (x_NTC / torch.where(lengths_NT1 == 0, 1.0, lengths_NT1)).sum(1)
        self.direction_C += of_image_NC.sum(0)
        self.within += of_image_NC.square().sum()
        self.non_zero += (lengths_NT1 != 0).sum()
        self.tokens += n * t
        self.pairs_within += n * t * (t - 1)


def token_variances(sums: TokenSums) -> np.ndarray:
    """The eigenvalues (C,) of the tokens' covariance, descending: mean of (x - mean)(x - mean)^T over M tokens.

    Values within the rounding of the sums are set to 0. All are NaN where a token is not finite.
    """
    mean_C, square_CC = sums.sum_C / sums.tokens, sums.square_CC / sums.tokens
    covariance_CC = square_CC - torch.outer(mean_C, mean_C)
    if not bool(torch.isfinite(covariance_CC).all()):
        return np.full(len(mean_C), np.nan)
    found_C = torch.linalg.eigvalsh(covariance_CC).flip(0)
    floor = _ROUNDINGS * EPS * square_CC.diagonal().sum()
    return torch.where(found_C > floor, found_C, 0.0).cpu().numpy()


def token_metrics(sums: TokenSums, variances_C: np.ndarray) -> dict[str, float]:
    """The scalars of one block's outputs.

    Args:
        sums: the sums over its tokens.
        variances_C: their `token_variances`.

    Returns:
        "stable_rank" and "effective_rank" of the tokens minus their mean, an (M, C) matrix whose singular values are
        the roots of M times the variances (see `metrics`); "rank_limit", min(C, M - 1), the greatest rank it can have.
        "cosine", the mean cosine of all pairs of different tokens: 0 where directions are isotropic, 1 where all are
        equal (Ethayarajh, "How contextual are contextualized word representations?", EMNLP 2019, which calls it
        anisotropy and takes a sample of pairs). "cosine_image", the same of pairs within an image (Zhou et al.,
        "DeepViT: Towards deeper vision transformer", 2021: tokens become alike with depth). A zero token has cosines
        of 0. NaN where there is no pair, and where a token is not finite.
    """
    s = np.sqrt(variances_C)
    own, pairs = float(sums.non_zero), sums.tokens * (sums.tokens - 1)
    of_all, within = float(sums.direction_C.square().sum()), float(sums.within)
    return {
        "stable_rank": stable_rank(s),
        "effective_rank": effective_rank(s),
        "rank_limit": float(min(len(s), sums.tokens - 1)),
        "cosine": (of_all - own) / pairs if pairs else float("nan"),
        "cosine_image": (within - own) / sums.pairs_within if sums.pairs_within else float("nan"),
    }


def attention_entropies(q_NHTD: Tensor, k_NHTD: Tensor, scale: float) -> Tensor:
    """The entropy of the rows of softmax(scale q k^T), in nats, each 0 to ln T, summed over N and T: (H,) float64.

    Zhai et al., "Stabilizing transformer training by preventing attention entropy collapse", ICML 2023. A row has ln T
    where its token attends to all tokens equally. A row with a NaN gives NaN.
    """
    n, h, t, _ = q_NHTD.shape
    images = max(1, _LOGITS_AT_ONCE // (h * t * k_NHTD.shape[2]))
    sums_H = torch.zeros(h, dtype=torch.float64, device=q_NHTD.device)
    for first in range(0, n, images):
        q, k = (one[first : first + images].double() for one in (q_NHTD, k_NHTD))
        sums_H += torch.special.entr(torch.softmax(scale * q @ k.mT, dim=-1)).sum(dim=(0, 2, 3))
    return sums_H
