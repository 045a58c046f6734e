"""Plain truncation: the least error of the weights themselves."""

from __future__ import annotations

from torch import Tensor

from lowrank_vit.lowrank.calibration import Moments
from lowrank_vit.lowrank.truncate import Weighting


def weighting(weight_RC: Tensor, moments: Moments | None, has_bias: bool) -> Weighting:
    """L = I, M = I: the least |W - W_r|_F (Eckart & Young, Psychometrika 1 (1936)); no moments are needed."""
    return Weighting()
