"""The result of a solver: all singular values of a matrix, and certified triplets from both ends of the spectrum.

Shape legend: N matrices of one shape, R rows, C columns, K = min(R, C), M = 2 m triplets (m of each end).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

Solver = Literal["gram64", "svd"]

ENDS = "ends"
"""The value of `Solved.solver` where the first values were found without the others."""

EPS = float(np.finfo(np.float64).eps)
RELATIVE_LIMIT, ABSOLUTE_LIMIT = 1e-6, 1e-12
"""A value is accepted when its error is proved to be at most RELATIVE_LIMIT sigma_i or ABSOLUTE_LIMIT sigma_1."""
ANGLE_LIMIT, LEAST_GAP = 1e-6, 1e-3
"""The angle of a vector to its end's true subspace is at most ANGLE_LIMIT where the relative gap is LEAST_GAP or more
(with a smaller gap the subspace itself is not well defined)."""
ORTHOGONALITY_LIMIT = 1e-10
TRACE_LIMIT = 1e-12

LEAST = 1 / 64
"""Below this sigma_{m+1} / sigma_1 there is no `Solved.start`, since float32 would not be accurate enough."""


class Recorded(NamedTuple):
    """Which singular indices are recorded one by one, 1-based in a descending spectrum; see `metrics`."""

    top: list[int]
    last: list[int]


@dataclass(frozen=True)
class Triplets:
    """M singular triplets, float64: `s` (M,), unit columns of `u` (R, M) and `v` (C, M), `certificate` (M,).

    A true singular value lies within `certificate[i]` of `s[i]` (absolute, same unit as the weights).
    """

    s: np.ndarray
    u: np.ndarray
    v: np.ndarray
    certificate: np.ndarray

    def pick(self, columns: list[int]) -> Triplets:
        """The triplets of these columns, copied."""
        return Triplets(self.s[columns], self.u[:, columns], self.v[:, columns], self.certificate[columns])


class Thirds(NamedTuple):
    """A fused qkv matrix with Q, K and V brought to one scale of noise, for comparisons with noise."""

    scales: np.ndarray
    """(3,) divisors of Q, K and V: their noise's deviations over the root mean square of the three."""
    s: np.ndarray
    """(K,) the singular values afterwards, descending."""


@dataclass(frozen=True)
class Solved:
    """One matrix: all its values (K,), descending, float64, and its first and last triplets.

    A solver returns the first m triplets in `top` and the last m in `last`, the smallest *first*; `recorded` picks
    from these. Where it is not `full`, the values after the first known ones are NaN, and `last` has no triplets.
    """

    s: np.ndarray
    top: Triplets
    last: Triplets
    orthogonality: float
    """Greatest entry of |U^T U - I| and |V^T V - I| within each end."""
    solver: str
    """The solver used: gram64, svd, `ENDS`, or none for a matrix with a NaN or an infinity."""
    note: str = ""
    """Why that is not the solver asked for; empty otherwise."""
    thirds: Thirds | None = None
    """For a fused qkv matrix; None for others, and where its thirds have no scale (of lower rank or not finite)."""
    index: bool = False
    """Whether each triplet is proven to be that of its index, see `index.index_is_proven`."""
    eps: float = float(np.finfo(np.float32).eps)
    """Relative spacing of the weights' own dtype, see `metrics.numerical_rank`."""
    block: Triplets | None = None
    """The first p triplets, p the greatest recorded index of the top, where the recorded ones leave some out.

    None where they do not, and in results stored by earlier versions."""
    full: bool = True
    """Whether the whole spectrum is known, not only its first values."""
    frobenius: float = float("nan")
    """|W|_F if it is not `full`; NaN otherwise, since the values give it."""
    beyond: float = float("nan")
    """An upper bound of the values after the first known ones, where it is not `full` and a bound is proven."""
    start: np.ndarray | None = None
    """Where `ends.solve_ends` starts next time, float32 (K, m or more): the first right vectors, or of a wide matrix
    the left ones. None where the first values lie too far apart for that, or a search for them has just failed."""

    def recorded(self, indices: Recorded) -> Solved:
        """The same with only the triplets of the recorded indices, in their order, and `block` where it is needed."""
        k, p = self.s.size, indices.top[-1]
        top = self.top.pick([i - 1 for i in indices.top])
        block = self.top.pick(list(range(p))) if p > len(indices.top) else None
        last = self.last.pick([k - i for i in indices.last]) if self.full else self.last
        return replace(self, top=top, last=last, block=block)

    def first_alone(self) -> Solved:
        """From a whole result with its recorded triplets, keep only the first values, up to the one after the block."""
        known = (self.block or self.top).s.size + 1
        greatest = float(self.s[0])
        return replace(
            self,
            s=np.where(np.arange(self.s.size) < known, self.s, np.nan),
            last=self.last.pick([]),
            thirds=None,
            full=False,
            frobenius=greatest * float(np.linalg.norm(self.s / greatest)) if greatest != 0.0 else 0.0,
        )

    @property
    def certificate_max(self) -> float:
        """The greatest certificate relative to sigma_1; 0 for a zero matrix, NaN for one that is not finite."""
        worst = max((float(np.max(t.certificate)) for t in (self.top, self.last) if t.s.size), default=0.0)
        return worst / float(self.s[0]) if self.s.size and self.s[0] != 0 else worst


def start_of(s: np.ndarray, top: Triplets) -> np.ndarray | None:
    """`Solved.start` from the first triplets and the values; the value after these triplets may be unknown (NaN)."""
    m, k = top.s.size, min(len(top.u), len(top.v))
    if m >= k or not (s[m] if m < s.size and np.isfinite(s[m]) else top.s[-1]) > LEAST * top.s[0]:
        return None
    return (top.v if len(top.v) == k else top.u).astype(np.float32)


def not_finite(shape: tuple[int, int], m: int) -> Solved:
    """The result for a matrix with a NaN or an infinity: everything is NaN."""
    rows, cols = shape
    nan = Triplets(np.full(m, np.nan), np.full((rows, m), np.nan), np.full((cols, m), np.nan), np.full(m, np.nan))
    note = "the matrix holds a NaN or an infinity"
    return Solved(np.full(min(shape), np.nan), nan, nan, float("nan"), "none", note)


def assemble(
    s_K: np.ndarray,
    u_RM: np.ndarray,
    ends_M: np.ndarray,
    v_CM: np.ndarray,
    residual_M: np.ndarray,
    orthogonality: float,
) -> Solved:
    """Put a solver's arrays together: M = 2 m columns, the first m of the spectrum, then the last m, descending.

    The certificate is the residual plus an allowance for the rounding of the residual itself. The values of the ends
    replace those of `s_K`, which are less accurate there.
    """
    m = ends_M.size // 2
    k = s_K.size
    certificate = residual_M + EPS * np.sqrt(max(u_RM.shape[0], v_CM.shape[0])) * ends_M.max(initial=0.0)
    merged = np.concatenate([ends_M[:m], s_K[m : k - m], ends_M[m:]])
    values = np.sort(merged)[::-1].copy()  # neighbours of nearly equal size may come from both
    both = Triplets(ends_M, u_RM, v_CM, certificate)
    backwards = list(range(2 * m - 1, m - 1, -1))
    return Solved(values, both.pick(list(range(m))), both.pick(backwards), orthogonality, "gram64")


def objection(solved: Solved, squares_K: np.ndarray, frobenius_squared: float, floor: float) -> str:
    """Why a result must not be trusted, in words; empty when it may be.

    Args:
        solved: the result of `assemble`, m triplets of each end.
        squares_K: the eigenvalues of the Gram matrix, or of several one after another, descending.
        frobenius_squared: |A|_F^2, summed from the entries.
        floor: absolute accuracy of the smallest of `squares_K`.
    """
    s, m = solved.s, solved.top.s.size
    if s.size == 0 or s[0] == 0.0:
        return ""
    if not np.isfinite(solved.orthogonality) or solved.orthogonality > ORTHOGONALITY_LIMIT:
        return f"vectors are orthogonal only to {solved.orthogonality:.0e}"
    if abs(float(np.sum(squares_K)) / frobenius_squared - 1) > TRACE_LIMIT:
        return "the sum of the squared values is not the squared Frobenius norm"
    for end, boundary in ((solved.top, s[m]), (solved.last, s[s.size - m - 1])):
        allowed = np.maximum(RELATIVE_LIMIT * end.s, ABSOLUTE_LIMIT * s[0])
        gap = np.abs(end.s - boundary)
        # The error of a block's Rayleigh-Ritz values is its residual squared over the gap to the rest (Mathias 1998).
        quadratic = np.sum(end.certificate**2) / gap.min() if gap.min() > 0 else np.inf
        if not (np.minimum(end.certificate, quadratic) <= allowed).all():
            worst = int(np.argmax(end.certificate / allowed))
            return f"certificate {end.certificate[worst] / s[0]:.0e} at value {end.s[worst] / s[0]:.0e} (of sigma_1)"
        # A float64 SVD leaves residuals of about this size too, so no solver could have smaller angles.
        within = np.maximum(ANGLE_LIMIT * gap, 16 * EPS * max(len(end.u), len(end.v)) ** 0.5 * s[0])
        if gap.min() > LEAST_GAP * boundary and not (end.certificate <= within).all():
            return f"vectors may be off by {np.max(end.certificate / gap):.0e}"
    # Values that differ by less than the floor may have changed places with values beside the last ones. That matters
    # where they differ by more than their limit.
    greatest, beside = float(solved.last.s.max()), float(squares_K[s.size - m - 1])
    told = floor <= (ABSOLUTE_LIMIT * s[0]) ** 2
    if not told and beside < floor:
        return f"values between the two ends lie below {floor**0.5 / s[0]:.0e} of sigma_1, the limit of its Gram matrix"
    if (
        not told
        and greatest > ABSOLUTE_LIMIT * s[0]
        and beside - greatest**2 < floor
        and floor > 2 * RELATIVE_LIMIT * greatest**2
    ):
        return f"the last values, {greatest / s[0]:.0e} of sigma_1 at most, lie too close together for its Gram matrix"
    at_ends = np.concatenate([squares_K[:m], squares_K[squares_K.size - m :][::-1]])
    if np.abs(np.concatenate([solved.top.s, solved.last.s]) ** 2 - at_ends).max() > 1e-11 * squares_K[0]:
        return "the values from the two steps of the method differ"
    return ""
