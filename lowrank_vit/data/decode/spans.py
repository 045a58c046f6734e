"""From a plan to pixels: which stretch of a stored image each output pixel covers, for any backend and device."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

from lowrank_vit.plan.plans import BatchPlan

ORIGIN, SCALE, LOW, LENGTH = range(4)
"""Columns of a span, all in stored pixels along one axis.

Output pixel i covers `SCALE` pixels from `ORIGIN + i * SCALE`. Pixels outside `[LOW, LOW + LENGTH)` count for nothing,
as if the image had been cropped to them first.
"""


def spans(plan: BatchPlan, heights: np.ndarray, widths: np.ndarray, size: int) -> np.ndarray:
    """float64 (B, 2, 4): the span along rows (axis 1, index 0) and columns of each of the plan's samples.

    `heights`, `widths`: int (B,), of those samples as stored; `size`: side of the output, pixels.
    """
    if plan.center is not None:
        length = np.stack([heights, widths], axis=1).astype(np.float64)
        low, scale = np.zeros_like(length), length / plan.center.resized
        return np.stack([plan.center.corners * scale, scale, low, length], axis=2)
    low, length = plan.windows[:, :2].astype(np.float64), plan.windows[:, 2:].astype(np.float64)
    return np.stack([low, length / size, low, length], axis=2)


Spans = TypeVar("Spans", np.ndarray, Tensor)


def cropped(spans: Spans) -> Spans:
    """The same spans, array or tensor, in an image that has been cropped to them already."""
    moved = spans.clone() if isinstance(spans, Tensor) else spans.copy()
    moved[:, :, ORIGIN] -= spans[:, :, LOW]  # type: ignore[operator]
    moved[:, :, LOW] = 0
    return moved
