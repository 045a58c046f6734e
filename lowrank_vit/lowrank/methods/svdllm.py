"""SVD-LLM: the least error of the layer's outputs."""

from __future__ import annotations

from torch import Tensor

from lowrank_vit.lowrank.calibration import Moments
from lowrank_vit.lowrank.truncate import Root, Weighting


def weighting(weight_RC: Tensor, moments: Moments, has_bias: bool) -> Weighting:
    """L = I, M = S^(1/2): the least mean |W x - W_r x|^2 over tokens.

    Source: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    ICLR 2025, section 3.1, which whitens by the Cholesky factor of S. For a layer with a bias, S is taken about the
    mean of x here: the bias corrects what W_r does to that mean, so the remaining error is the least over W_r and bias
    together.
    """
    return Weighting(right=input_root(moments, has_bias), is_centred=has_bias)


def input_root(moments: Moments, is_centred: bool) -> Root:
    """The root of the inputs' second moment, about their mean or about zero."""
    return Root.of(moments.covariance_CC if is_centred else moments.input_CC, damp_by=moments.input_CC)
