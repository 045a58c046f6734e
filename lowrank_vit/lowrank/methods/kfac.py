"""KFAC: the least loss, to second order, with a Kronecker-factored Fisher matrix."""

from __future__ import annotations

from torch import Tensor

from lowrank_vit.lowrank.calibration import Moments
from lowrank_vit.lowrank.methods.svdllm import input_root
from lowrank_vit.lowrank.truncate import Root, Weighting


def weighting(weight_RC: Tensor, moments: Moments, has_bias: bool) -> Weighting:
    """L = G^(1/2), M = S^(1/2): half the sum of the squared values cut off is a loss in nats per image.

    It is therefore the only metric here that can be compared across layers. Sources: Martens & Grosse, "Optimizing
    Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015, for the Fisher matrix as S x G; Chekalina
    et al., "Generalized Fisher-Weighted SVD", arXiv 2505.17974, for truncation by it. For a layer with a bias, S is
    taken about the mean of x, as in `svdllm`.
    """
    return Weighting(Root.of(moments.gradient_RR), input_root(moments, has_bias), is_centred=has_bias)
