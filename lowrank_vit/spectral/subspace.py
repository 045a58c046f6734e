"""How the singular subspaces of one matrix at two moments (or of two matrices of one shape) lie to each other.

Pure numpy, float64. k is the number of recorded vectors of an end, R and C the matrix's rows and columns.
"""

from __future__ import annotations

import numpy as np

from lowrank_vit.spectral.extremes import Solved

FLOOR = 1e-12
"""Of `relative_change`, as a share of the earlier sigma_1: below it a value is rounding."""


def principal_cosines(a_NK: np.ndarray, b_NK: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles between two subspaces, descending, 0-1: singular values of A^T B (k,).

    Bjorck & Golub, "Numerical methods for computing angles between linear subspaces", Math. Comp. 27 (1973). The first
    belongs to the direction the two subspaces share best, not to vector 1. Neither signs nor the order of the vectors
    matter, nor a rotation among vectors of equal singular value. An angle below 1e-8 is lost to rounding in a cosine.

    Args:
        a_NK, b_NK: orthonormal columns, float64. A NaN in either gives NaN.
    """
    product = a_NK.T @ b_NK
    if np.isnan(product).any():
        return np.full(min(product.shape), np.nan)
    return np.clip(np.linalg.svd(product, compute_uv=False), 0.0, 1.0)


def chance_level(k: int, n: int) -> float:
    """The root mean square cosine between two random k-dimensional subspaces of n dimensions: sqrt(k / n).

    E |A^T B|_F^2 = k^2 / n for uniformly random subspaces, over k cosines (Absil, Edelman & Koev 2006).
    """
    return (k / n) ** 0.5


def cosine_metrics(prefix: str, before: Solved, now: Solved) -> dict[str, float]:
    """Principal cosines of the recorded vectors of both ends, as scalars.

    Returns:
        "<prefix>_u1".."<prefix>_u<k>" and "..._v..." of the top, "<prefix>_u_last1".. and "..._v_last.." of the end,
        largest cosine first; "<prefix>_u_max", "<prefix>_u_mean", "<prefix>_v_max", "<prefix>_v_mean" of the top.
    """
    values: dict[str, float] = {}
    for side in ("u", "v"):
        top = principal_cosines(getattr(before.top, side), getattr(now.top, side))
        last = principal_cosines(getattr(before.last, side), getattr(now.last, side))
        values |= {f"{prefix}_{side}{i}": float(c) for i, c in enumerate(top, start=1)}
        values |= {f"{prefix}_{side}_last{i}": float(c) for i, c in enumerate(last, start=1)}
        values |= {f"{prefix}_{side}_max": float(top.max()), f"{prefix}_{side}_mean": float(top.mean())}
    return values


def relative_change(before: Solved, now: Solved) -> float:
    """Mean over the recorded top values of |sigma_i - sigma_i'| / max(sigma_i', FLOOR sigma_1'), ' being the earlier.

    0 where both are 0.
    """
    old, new = before.top.s, now.top.s
    scale = np.maximum(old, FLOOR * float(before.s[0]))
    difference = np.abs(new - old)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.mean(np.where(difference == 0, 0.0, difference / scale)))
