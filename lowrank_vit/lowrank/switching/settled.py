"""What one matrix tells at one moment: how many directions it needs, which they are, and how far they are from noise.

Pure functions, numpy in float64. W of R rows and C columns has K = min(R, C) singular values s, descending; r is the
number of directions, q the rank of a layer that is in factors already.

*Noise* is W with the sign of every entry drawn anew ("random signflips": Hong, Sheng & Dobriban, "Selecting the number
of components in PCA via random signflips", arXiv 2012.02985). That leaves the size of each entry, so rows, columns and
thirds of different scale stay so, and breaks whatever directions there are. What its first r values hold of the energy,
chance would hold of W; for equal entries that is the Marchenko-Pastur law's.
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
"""Noise is drawn so often that it has so many values in all."""
TURN = 0.1
"""Where rounding alone may turn the first r directions by more than this sine, there is no gap at r to speak of."""


@dataclass(frozen=True)
class Basis:
    """The first directions of a matrix, for later: orthonormal columns of U (R, n) and V (C, n), float32 on the CPU."""

    left: Tensor
    right: Tensor

    @property
    def count(self) -> int:
        """How many."""
        return self.left.shape[1]


@dataclass(frozen=True)
class Likeness:
    """How far the first r directions of a matrix are those of another; shares of the way from chance, 0, to 1."""

    energy: float
    """What the earlier directions hold of the energy of W now: |U'^T W V'|_F^2 over the best, sum_{j<=r} s_j^2."""
    energy_of_chance: float
    """What random ones would hold in the mean."""
    cosine: float
    """The root of the mean squared principal cosine, of the side where it is less above chance."""
    chance: float
    """The same of random directions."""
    energy_share: float
    cosine_share: float
    """Of the square. 1 where there is no gap at r: there the first r are not defined, and energy alone decides."""


@dataclass(frozen=True)
class Look:
    """One matrix at one moment."""

    solved: Solved
    """All values, and the first triplets: `known` of them."""
    rank: int
    """r, of the rule; 0 where it has none that pays."""
    share: float
    """What the first r values hold of the energy, 0-1; of a layer in factors always of q values."""
    share_of_noise: float
    certificate: float
    """The greatest of the r triplets' certificates over sigma_1."""
    turn: float
    """What the sine of the greatest angle to the true r directions cannot exceed, nor that by which rounding of the
    weights turns those: certificates and a last digit of sigma_1, over the gap. Infinite without a gap."""

    @property
    def above_noise(self) -> float:
        """(f - f0) / (f (1 - f0)), f and f0 the shares of W and of noise: of noise 0, of a matrix of rank r 1.

        Without the divisor 1 - f0 it is the part of the energy held that noise would not hold.
        """
        f, f0 = self.share, self.share_of_noise
        return (f - f0) / (f * (1 - f0)) if f > 0 and f0 < 1 else 0.0

    @property
    def is_certain(self) -> bool:
        """Whether these are proven to be the first r triplets."""
        return self.solved.index

    def basis(self) -> Basis:
        """All directions that are known."""
        left, right = (torch.from_numpy(side.astype(np.float32)) for side in (self.solved.top.u, self.solved.top.v))
        return Basis(left, right)

    def likeness(self, before: Basis, matrix_RC: Tensor) -> Likeness:
        """Compare the first r directions with the first r of another time; both know as many.

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
    """Solve a matrix for as many directions as it needs, and `margin` more; None where it is not finite, or zero.

    Args:
        name: for the log.
        matrix_RC: any float dtype and device.
        rank_of: the rule's rank of all K values; below 1 is none.
        most: the greatest rank that pays.
        margin: of a rank.
        in_factors: q, the layer's rank as it is; 0 of a whole one.
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
    # Wedin's theorem, of residuals of |r|_F <= sqrt(2) |certificates| on each side.
    rounding = (2 * float(np.sum(certificates**2))) ** 0.5 + torch.finfo(matrix_RC.dtype).eps * float(s[0])
    turn = rounding / gap if gap > 0 else float("inf")
    f, f0 = _held(s, r, in_factors), noise_share(matrix_RC, r, in_factors)
    return Look(solved, r, f, f0, float(certificates.max() / s[0]), turn)


def rank_by_energy(s_K: np.ndarray, share: float) -> int:
    """The least number of values that hold this share, 0-1, of the sum of squares; 0 of zeros."""
    return int(energy_rank(s_K, 100 * share)) if s_K[0] > 0 else 0


def rank_by_noise(name: str, matrix_RC: Tensor, s_K: np.ndarray, is_fused: bool) -> int:
    """How many values lie above the Marchenko-Pastur edge; of a fused qkv with its thirds brought to one scale."""
    shape = (matrix_RC.shape[0], matrix_RC.shape[1])
    eps = torch.finfo(matrix_RC.dtype).eps
    if is_fused and is_of_full_rank(s_K, shape, eps):
        stack = MatrixStack((name,), matrix_RC[None], frozenset({name}))
        if (thirds := scaled_thirds(stack, {name: s_K}).get(name)) is not None:
            s_K = thirds.s
    outliers = marchenko_pastur(s_K, shape).outliers
    return int(outliers) if np.isfinite(outliers) else 0


def noise_share(matrix_RC: Tensor, r: int, in_factors: int = 0) -> float:
    """What the first r values of noise hold of its energy: of noise truncated to rank q where W is of that rank.

    For such a layer noise may also be a product of two factors of noise, which holds more in its first values; the
    greater one counts.
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
    """What the first r values of a product of normal factors (R, q) and (q, C) hold of its energy, in the mean."""
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
