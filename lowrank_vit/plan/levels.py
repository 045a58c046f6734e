"""What a level of timm's scale means to an operation: the `*_level_to_arg` of `timm/data/auto_augment.py`."""

from __future__ import annotations

import math
from enum import IntEnum

from numba import njit

LEVELS = 10.0
"""Greatest level of timm's scale, unless `mmax` says otherwise."""


class Formula(IntEnum):
    """How an operation's argument follows from its level, see `argument_of`."""

    NONE = 0
    SIGNED = 1
    TRANSLATE = 2
    POSTERIZE = 3
    POSTERIZE_INCREASING = 4
    POSTERIZE_ORIGINAL = 5
    SOLARIZE = 6
    SOLARIZE_INCREASING = 7
    SOLARIZE_ADD = 8
    ENHANCE = 9
    ENHANCE_INCREASING = 10
    DESATURATE = 11
    BLUR = 12
    BLUR_RANDOM = 13


@njit(cache=True)
def argument_of(formula: int, factor: float, level: float, sign: float, u: float, translate: float) -> float:
    """The argument at a level of 0-10, a float.

    `factor`: of SIGNED; `sign`: +-1, for operations with a direction; `u`: uniform in (0, 1), for those that draw more;
    `translate`: pixels that level 10 translates by.
    """
    x = level / LEVELS
    # timm's `int()` cuts off, and so does `math.trunc`.
    if formula == Formula.SIGNED:
        return sign * x * factor
    if formula == Formula.TRANSLATE:
        return sign * x * translate
    if formula == Formula.POSTERIZE:
        return float(math.trunc(x * 4))
    if formula == Formula.POSTERIZE_INCREASING:
        return float(4 - math.trunc(x * 4))
    if formula == Formula.POSTERIZE_ORIGINAL:
        return float(4 + math.trunc(x * 4))
    if formula == Formula.SOLARIZE:
        return float(min(256, math.trunc(x * 256)))
    if formula == Formula.SOLARIZE_INCREASING:
        return float(256 - min(256, math.trunc(x * 256)))
    if formula == Formula.SOLARIZE_ADD:
        return float(min(128, math.trunc(x * 110)))
    if formula == Formula.ENHANCE:
        return x * 1.8 + 0.1
    if formula == Formula.ENHANCE_INCREASING:
        return max(0.1, 1.0 + sign * x * 0.9)
    if formula == Formula.DESATURATE:
        return 1.0 - min(max(0.5 + 0.5 * x, 0.5), 1.0)
    if formula == Formula.BLUR:
        return min(max(0.1 + 1.9 * x, 0.1), 2.0)
    if formula == Formula.BLUR_RANDOM:
        return 0.1 + (2.0 * min(max(x, 0.0), 1.0) - 0.1) * u
    return 0.0
