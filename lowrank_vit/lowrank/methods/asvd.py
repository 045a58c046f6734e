"""ASVD: columns are weighted by the size of their inputs."""

from __future__ import annotations

from torch import Tensor

from lowrank_vit.lowrank.calibration import Moments
from lowrank_vit.lowrank.truncate import Root, Weighting


def weighting(weight_RC: Tensor, moments: Moments, has_bias: bool) -> Weighting:
    """L = I, M = diag(E|x|)^(1/2): the paper's S with its exponent alpha = 0.5.

    Source: Yuan et al., "ASVD: Activation-aware Singular Value Decomposition", arXiv 2312.05821, section 3.2.
    """
    return Weighting(right=Root.of(moments.magnitude_C))
