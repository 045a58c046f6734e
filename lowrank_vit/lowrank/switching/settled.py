"""One look at one matrix: how many directions it needs, which they are, and how far they are from noise.

Pure functions, numpy in float64. W of R rows and C columns has K = min(R, C) singular values s, descending; r is the
number of directions, q the rank of a layer that is factorised already.

*Noise* is W with a random sign for every entry ("random signflips": Hong, Sheng & Dobriban, "Selecting the number of
components in PCA via random signflips", arXiv 2012.02985). This keeps the size of each entry, and thus the scales of
rows, columns and thirds, and destroys all directions. The energy share of its first r values is what chance would give
for W; for entries of equal size it is that of the Marchenko-Pastur law.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.spectral.measures.metrics import energy_rank, is_of_full_rank
from lowrank_vit.spectral.measures.noise import marchenko_pastur, scaled_thirds
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.solving.lapack import one_blas_thread
from lowrank_vit.spectral.solving.solve import MatrixStack, all_values, as_numpy, first_triplets

Rule = Literal["energy", "mp", "kfac"]

FEWEST_VALUES = 256
"""Noise is drawn as often as needed for this many singular values in total."""
TURN = 0.1
"""If rounding alone may turn the first r directions by more than this sine, the gap at r is too small to count."""


@dataclass(frozen=True)
class Basis:
    """The first directions of a matrix: orthonormal columns of U (R, n) and V (C, n), float32 on the CPU."""

    left: Tensor
    right: Tensor

    @property
    def count(self) -> int:
        """The number of directions."""
        return self.left.shape[1]


@dataclass(frozen=True)
class Likeness:
    """How similar the first r directions of two matrices are; shares run from chance (0) to equal (1)."""

    energy: float
    """Energy of the current W in the earlier directions, |U'^T W V'|_F^2, over the best possible, sum_{j<=r} s_j^2;
    0-1."""
    energy_of_chance: float
    """The mean of this for random directions."""
    cosine: float
    """The root mean squared principal cosine, on the side where it is less above chance."""
    chance: float
    """The same for random directions."""
    energy_share: float
    cosine_share: float
    """The share of the squared cosine. 1 without a gap at r: the first r are undefined then, and energy alone
    decides."""


@dataclass(frozen=True)
class Look:
    """The result of looking at one matrix at one update."""

    solved: Solved
    """All values, and the first triplets."""
    rank: int
    """r by the rule; 0 if no rank pays."""
    share: float
    """Energy share of the first r values, 0-1; for a factorised layer, of its q values."""
    share_of_noise: float
    certificate: float
    """The largest certificate of the r triplets, divided by sigma_1."""
    turn: float
    """Upper bound of the sine of the largest angle to the true r directions, including their turn by rounding of the
    weights: certificates plus a last digit of sigma_1, divided by the gap. Infinite without a gap."""

    @property
    def above_noise(self) -> float:
        """(f - f0) / (f (1 - f0)), with f and f0 the shares of W and of noise: 0 for noise, 1 for a matrix of rank r.

        Without the divisor 1 - f0 it would be the part of the energy share that noise does not explain.
        """
        f, f0 = self.share, self.share_of_noise
        return (f - f0) / (f * (1 - f0)) if f > 0 and f0 < 1 else 0.0

    @property
    def is_certain(self) -> bool:
        """Whether these triplets are proven to be the first ones."""
        return self.solved.index

    def basis(self) -> Basis:
        """All known directions."""
        left, right = (torch.from_numpy(side.astype(np.float32)) for side in (self.solved.top.u, self.solved.top.v))
        return Basis(left, right)

    def likeness(self, before: Basis, matrix_RC: Tensor) -> Likeness:
        """Compare the first r directions with the first r of an earlier time; both must know at least r.

        Rounding of float32 in `before` moves the shares by less than 1e-6.
        """
        r, (rows, columns) = self.rank, matrix_RC.shape
        left_Rr, right_Cr = (side[:, :r].numpy().astype(np.float64) for side in (before.left, before.right))
        u_Rr, v_Cr = (np.ascontiguousarray(side[:, :r]) for side in (self.solved.top.u, self.solved.top.v))
        w_RC, greatest = as_numpy(matrix_RC.detach().cpu()).astype(np.float64), self.solved.s[0]
        with one_blas_thread():
            held = float(np.sum(((left_Rr.T @ (w_RC / greatest)) @ right_Cr) ** 2))
            squares = [float(np.sum((a.T @ b) ** 2)) / r for a, b in ((left_Rr, u_Rr), (right_Cr, v_Cr))]
        best = float(np.sum((self.solved.s[:r] / greatest) ** 2))
        energy = min(held / best, 1.0)
        of_chance = min(r * r / (rows * columns) * float(np.sum((self.solved.s / greatest) ** 2)) / best, 1.0)
        shares = [_from_chance(min(c2, 1.0), r / n) for c2, n in zip(squares, (rows, columns), strict=True)]
        worse = int(np.argmin(shares))
        cosine_share = shares[worse] if self.turn <= TURN else 1.0
        chance = (r / (rows, columns)[worse]) ** 0.5
        energy_share = _from_chance(energy, of_chance)
        return Likeness(energy, of_chance, min(squares[worse], 1.0) ** 0.5, chance, energy_share, cosine_share)


def look_at(
    name: str,
    matrix_RC: Tensor,
    rank_of: Callable[[np.ndarray], int],
    *,
    most: int,
    margin: Callable[[int], int],
    in_factors: int = 0,
) -> Look | None:
    """Solve a matrix for as many directions as it needs, plus `margin`; None if it is zero or not finite.

    Args:
        name: for the log.
        matrix_RC: any float dtype and device.
        rank_of: the rule's rank for all K values; below 1: none.
        most: the largest rank that pays.
        margin: extra directions for a rank.
        in_factors: q, the layer's current rank; 0 for a whole layer.
    """
    chosen = [0]

    def count(s_K: np.ndarray) -> int:
        r = rank_of(s_K)
        chosen[0] = r if 1 <= r <= most else 0
        return min(chosen[0] + margin(chosen[0]), in_factors or s_K.size) if chosen[0] else 0

    solved = first_triplets(name, matrix_RC, count)
    if not np.isfinite(solved.s).all() or solved.s[0] == 0.0:
        return None
    r, s = chosen[0], solved.s
    if not r:
        return Look(solved, 0, 0.0, 0.0, 0.0, float("inf"))
    following = float(s[r]) if r < s.size else 0.0
    certificates = solved.top.certificate[:r]
    gap = float(s[r - 1] - following) - 2 * float(certificates.max())
    # Wedin's theorem, with residuals |r|_F <= sqrt(2) |certificates| on each side.
    rounding = (2 * float(np.sum(certificates**2))) ** 0.5 + torch.finfo(matrix_RC.dtype).eps * float(s[0])
    turn = rounding / gap if gap > 0 else float("inf")
    f, f0 = _held(s, r, in_factors), noise_share(matrix_RC, r, in_factors)
    return Look(solved, r, f, f0, float(certificates.max() / s[0]), turn)


def rank_by_energy(s_K: np.ndarray, share: float) -> int:
    """The smallest number of values with this share, 0-1, of the sum of squares; 0 if all values are zero."""
    return int(energy_rank(s_K, 100 * share)) if s_K[0] > 0 else 0


def rank_by_noise(name: str, matrix_RC: Tensor, s_K: np.ndarray, is_fused: bool) -> int:
    """How many values lie above the Marchenko-Pastur edge; the thirds of a fused qkv are first scaled alike."""
    shape = (matrix_RC.shape[0], matrix_RC.shape[1])
    eps = torch.finfo(matrix_RC.dtype).eps
    if is_fused and is_of_full_rank(s_K, shape, eps):
        stack = MatrixStack((name,), matrix_RC[None], frozenset({name}))
        if (thirds := scaled_thirds(stack, {name: s_K}).get(name)) is not None:
            s_K = thirds.s
    outliers = marchenko_pastur(s_K, shape).outliers
    return int(outliers) if np.isfinite(outliers) else 0


def noise_share(matrix_RC: Tensor, r: int, in_factors: int = 0) -> float:
    """Energy share of the first r values of noise; if W has rank q, of noise truncated to rank q.

    For such a layer noise may also be a product of two noise factors, which has more energy in its first values; the
    larger share is returned.
    """
    rows, columns = matrix_RC.shape
    draws = -(-FEWEST_VALUES // min(rows, columns))
    random = np.random.default_rng((rows, columns))
    signs_DRC = torch.from_numpy(2 * random.integers(0, 2, (draws, rows, columns), np.int8) - 1)
    flipped_DRC = matrix_RC.detach() * signs_DRC.to(matrix_RC.device)
    of_flipped = float(np.mean([_held(s_K, r, in_factors) for s_K in all_values(flipped_DRC)]))
    return max(of_flipped, _product_share(rows, columns, in_factors, r)) if in_factors else of_flipped


@lru_cache(maxsize=1024)
def _product_share(rows: int, columns: int, q: int, r: int) -> float:
    """Mean energy share of the first r values of a product of normal factors (R, q) and (q, C)."""
    s_Dq = _product_values(rows, columns, q)
    return float(np.mean(np.sum(s_Dq[:, :r] ** 2, axis=1) / np.sum(s_Dq**2, axis=1)))


@lru_cache(maxsize=64)
def _product_values(rows: int, columns: int, q: int) -> np.ndarray:
    random = np.random.default_rng((rows, columns, q))
    found: list[np.ndarray] = []
    with one_blas_thread():
        for _ in range(-(-FEWEST_VALUES // (2 * q))):
            up, down = random.standard_normal((rows, q)), random.standard_normal((q, columns))
            found.append(np.linalg.svd(np.linalg.qr(up)[1] @ np.linalg.qr(down.T)[1].T, compute_uv=False))
    return np.stack(found)


def _held(s_K: np.ndarray, r: int, in_factors: int) -> float:
    squares = (s_K[: in_factors or s_K.size] / s_K[0]) ** 2
    return float(np.sum(squares[:r]) / np.sum(squares))


def _from_chance(value: float, chance: float) -> float:
    return (value - chance) / (1 - chance) if chance < 1 else 0.0
