"""FWSVD: columns are weighted by how sensitive the loss is to their weights."""

from __future__ import annotations

from torch import Tensor

from lowrank_vit.lowrank.calibration import Moments
from lowrank_vit.lowrank.truncate import Root, Weighting


def weighting(weight_RC: Tensor, moments: Moments, has_bias: bool) -> Weighting:
    """L = I, M = diag(sum over rows of F)^(1/2), F the mean squared gradient of each weight.

    Source: Hsu et al., "Language model compression with weighted low-rank factorization", ICLR 2022, section 3.2. The
    paper writes Z = X W, so its rows are our columns. The paper takes gradients of the data set's labels; here labels
    are drawn from the model, as for `kfac`.
    """
    return Weighting(right=Root.of(moments.fisher_PC.sum(dim=0)))
