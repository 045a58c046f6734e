"""Angles between the singular subspaces of a matrix at two moments, and what chance alone would give.

Float64 numpy. R and C are the matrix's rows and columns, k is the number of vectors recorded at an end, p the greatest
index recorded from the top: the block 1..p has no gaps (p = k at interval 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lowrank_vit.spectral.solving.extremes import Solved, Triplets
from lowrank_vit.spectral.solving.lapack import one_blas_thread, tridiagonal_values

_VALUES, _LEAST_DRAWS, _MOST_DRAWS = 16384, 32, 2048
"""For the simulation of `chance_cosines`: about how many cosines in all, and bounds on the number of pairs."""


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


@lru_cache(maxsize=256)
def chance_cosines(k: int, n: int) -> tuple[float, ...]:
    """The expected principal cosines, first to k-th, between two random k-dimensional subspaces of n dimensions.

    Means over simulated pairs: the same ones at every call, accurate to about 1 % and in their mean square exactly k/n.
    The squared cosines are a Jacobi ensemble (a = 0, b = n - 2k, real). The cosines are distributed like the singular
    values of a bidiagonal matrix of 2k - 1 independent Beta variables (Edelman & Sutton, "The beta-Jacobi matrix model,
    the CS decomposition, and generalized singular value problems", Found. Comput. Math. 8 (2008)). Where 2k > n, 2k - n
    directions are shared, and the other cosines are those of the two complements.

    Raises:
        ValueError: not 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"subspaces of k = {k} of n = {n} dimensions: expected 1 <= k <= n")
    if 2 * k > n:
        return (1.0,) * (2 * k - n) + (chance_cosines(n - k, n) if k < n else ())
    draws = min(_MOST_DRAWS, max(_LEAST_DRAWS, _VALUES // k))
    random = np.random.default_rng((k, n))
    down, up = np.arange(k, 0, -1), np.arange(k - 1, 0, -1)
    c2 = random.beta(down / 2, (n - 2 * k + down) / 2, (draws, k))
    d2 = random.beta(up / 2, (n - 2 * k + 1 + up) / 2, (draws, k - 1))
    # Squares of the diagonal and superdiagonal of the upper bidiagonal B. B B^T is tridiagonal.
    diagonal2 = np.concatenate([c2[:, :1], c2[:, 1:] * (1 - d2)], axis=1)
    above2 = (1 - c2[:, :-1]) * d2
    d = diagonal2 + np.concatenate([above2, np.zeros((draws, 1))], axis=1)
    e = np.sqrt(above2 * diagonal2[:, 1:])
    squares = np.stack([tridiagonal_values(*one) for one in zip(d, e, strict=True)]).clip(0.0, 1.0)[:, ::-1]
    scale = (k / n / squares.mean()) ** 0.5
    return tuple(np.minimum(scale * np.sqrt(squares).mean(axis=0), 1.0).tolist())


def chance_metrics(k: int, p: int, shape: tuple[int, int]) -> dict[str, float]:
    """The numbers of `cosine_metrics` for two random subspaces; "chance" stands for "cos" in their names.

    Returns:
        "chance_u" and "chance_v", root mean squares (see `chance_level`); "chance_u_max", "chance_u_mean",
        "chance_u_mean_sq", "block_chance_u_mean", "block_chance_u_min", "block_chance_u_mean_sq", and "..._v_...". The
        mean squares k/R, p/R (k/C, p/C) are exact, maxima, means and minima expected values.
    """
    values = {"chance_u": chance_level(k, shape[0]), "chance_v": chance_level(k, shape[1])}
    for side, n in zip("uv", shape, strict=True):
        recorded, block = chance_cosines(k, n), chance_cosines(p, n)
        values |= {f"chance_{side}_max": recorded[0], f"chance_{side}_mean": sum(recorded) / k}
        values |= {f"chance_{side}_mean_sq": k / n, f"block_chance_{side}_mean": sum(block) / p}
        values |= {f"block_chance_{side}_min": block[-1], f"block_chance_{side}_mean_sq": p / n}
    return values


def chance_of_each(k: int, shape: Sequence[int]) -> dict[str, list[float]]:
    """`chance_cosines` of k left vectors, "u", and of k right ones, "v", first to k-th."""
    return {side: list(chance_cosines(k, n)) for side, n in zip("uv", shape, strict=True)}


def overlap(mean_square: float, k: int, n: int) -> float:
    """The mean squared cosine c^2 on a scale from chance, 0, to equality, 1, whatever k and n: (c^2 - k/n) / (1 - k/n).

    A little below 0 is possible. NaN where k = n: two such subspaces are the whole space.
    """
    return (mean_square - k / n) / (1 - k / n) if k < n else float("nan")


def cosine_metrics(prefix: str, before: Solved, now: Solved) -> dict[str, float]:
    """Principal cosines of the recorded top vectors and of the blocks 1..p, as scalars.

    Returns:
        "<prefix>_u1".."<prefix>_u<k>" and "..._v...", largest cosine first; "<prefix>_u_max", "<prefix>_u_mean",
        "<prefix>_u_mean_sq" (of the squares) and "<prefix>_u_overlap" (see `overlap`) of these, and "..._v_...";
        "block_<prefix>_u_mean", "..._min", "..._mean_sq" and "..._overlap" of the blocks, and "..._v_...". The last are
        absent where `before` has no block.
    """
    values: dict[str, float] = {}
    blocks = blocks_of(before, now)
    for side in ("u", "v"):
        top = principal_cosines(getattr(before.top, side), getattr(now.top, side))
        values |= {f"{prefix}_{side}{i}": float(c) for i, c in enumerate(top, start=1)}
        values |= {f"{prefix}_{side}_max": float(top.max()), f"{prefix}_{side}_mean": float(top.mean())}
        n = getattr(now.top, side).shape[0]
        values |= _squares(f"{prefix}_{side}", top, n)
        if blocks is not None:
            # Vectors read from a store may have another memory layout, on which a product's bits depend.
            of_block = [np.ascontiguousarray(getattr(one, side)) for one in blocks]
            cosines = top if blocks[1] is now.top else principal_cosines(*of_block)
            name = f"block_{prefix}_{side}"
            values |= {f"{name}_mean": float(cosines.mean()), f"{name}_min": float(cosines[-1])}
            values |= _squares(name, cosines, n)
    return values


def last_cosines(prefix: str, before: Solved, now: Solved) -> dict[str, float]:
    """Principal cosines of the recorded vectors of the smallest values of two whole spectra.

    Returns "<prefix>_u_last1".."<prefix>_u_last<k>" and "..._v_last..", largest cosine first.
    """
    values: dict[str, float] = {}
    for side in ("u", "v"):
        cosines = principal_cosines(getattr(before.last, side), getattr(now.last, side))
        values |= {f"{prefix}_{side}_last{i}": float(c) for i, c in enumerate(cosines, start=1)}
    return values


def blocks_of(before: Solved, now: Solved) -> tuple[Triplets, Triplets] | None:
    """The first p triplets of both; None where `before` has none, or another number. `now` is of this version."""
    if now.block is None and before.block is None:
        return before.top, now.top
    if now.block is None or before.block is None or before.block.s.size != now.block.s.size:
        return None
    return before.block, now.block


def block_gap(s: np.ndarray, p: int) -> float:
    """(sigma_p - sigma_{p+1}) / sigma_p, 0-1, of all K values `s`, descending; with p = K the next one is 0.

    0 for a zero matrix.
    """
    following = float(s[p]) if p < s.size else 0.0
    return (float(s[p - 1]) - following) / float(s[p - 1]) if s[p - 1] != 0 else 0.0


def turn_bound(before: Solved, now: Solved, norm2: float) -> float:
    """An upper bound of the sine of the greatest angle between both blocks 1..p, for left and right vectors alike.

    |W - W'|_2 / (sigma_p(before) - sigma_{p+1}(now)), infinite where the difference is not positive (Wedin,
    "Perturbation bounds in connection with singular value decomposition", BIT 12 (1972)). At 1 or more it says nothing.
    With p = K the next value is 0, that of the null space. Where the next value is unknown, `Solved.beyond`, a bound of
    all values after the block, takes its place. NaN with a NaN, or where `before` has no block.

    Args:
        before: the solution for W'.
        now: the solution for W.
        norm2: an upper bound of |W - W'|_2.
    """
    blocks = blocks_of(before, now)
    if blocks is None:
        return float("nan")
    p = blocks[0].s.size
    following = float(now.s[p]) if p < now.s.size else 0.0
    room = float(blocks[0].s[-1]) - (now.beyond if np.isnan(following) else following)
    if np.isnan(room) or np.isnan(norm2):
        return float("nan")
    return norm2 / room if room > 0 else float("inf")


def block_energy(before: Solved, now: Solved, weights_RC: np.ndarray) -> float:
    """How much of W the earlier block 1..p still holds, as a share of the most that p directions can hold, 0-1.

    |U_p^T W|_F^2 / sum_{j<=p} sigma_j^2, U_p of `before`, W and sigma of `now`; 1 where no p directions hold more (Ky
    Fan: no p orthonormal columns give more than the sum), also for a zero matrix. It hardly falls where values of the
    block, or at its end, change places. NaN with a NaN, or where `before` has no block.

    Args:
        before: an earlier solution, which gives U_p.
        now: the solution for W.
        weights_RC: W, float64.
    """
    blocks = blocks_of(before, now)
    if blocks is None or not np.isfinite(now.s[0]):
        return float("nan")
    if now.s[0] == 0.0:
        return 1.0
    with one_blas_thread():  # a product's bits depend on the number of threads and on the memory layout
        product = np.ascontiguousarray(blocks[0].u.T) @ np.ascontiguousarray(weights_RC)
    return captured(float(np.linalg.norm(product / now.s[0])), now)


def captured(norm: float, now: Solved) -> float:
    """`block_energy` of a `norm` |U_p^T W|_F / sigma_1."""
    s_p = (now.block or now.top).s
    return float(np.minimum(norm**2 / np.sum((s_p / now.s[0]) ** 2), 1.0))


def _squares(name: str, cosines: np.ndarray, n: int) -> dict[str, float]:
    mean_square = float(np.mean(cosines**2))
    return {f"{name}_mean_sq": mean_square, f"{name}_overlap": overlap(mean_square, cosines.size, n)}
