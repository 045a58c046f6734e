"""Squared singular values and the directions of both ends of a spectrum, from Gram matrices on the short side.

Matrix by matrix, on a CPU; `gram_stack` does the same for a whole stack. Shape legend: see `solve`; L is the long side,
M = 2 m.

On the CPU one tridiagonalisation gives all values and only the wanted vectors: Gram matrix L K^2 operations,
tridiagonal form 4/3 K^3, all eigenvalues about 30 K^2, M vectors 4 K^2 M. Call inside `lapack.one_blas_thread`.

Eigenvalues of a Gram matrix are accurate to about eps sigma_1^2. A matrix with smaller ones, such as one of low rank,
is therefore split by an orthogonal change of basis into its leading directions and a remainder. The remainder has a
Gram matrix of its own, and so on: each is accurate relative to its own greatest value. If the leading directions are
few, they are found before the tridiagonal form (`_leading_directions`, CPU only); otherwise the remainder is the
eigenvectors below `SPLIT` sigma_1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from lowrank_vit.spectral.solving.extremes import ABSOLUTE_LIMIT, EPS, RELATIVE_LIMIT
from lowrank_vit.spectral.solving.index import PROBES, enclosure, gram_times, probes
from lowrank_vit.spectral.solving.lapack import (
    all_tridiagonal_vectors,
    apply_householder,
    apply_reflectors,
    gram,
    householder_qr,
    pivoted_rank,
    sturm_counts,
    tridiagonal_solve,
    tridiagonal_values,
    tridiagonal_vectors,
    tridiagonalize,
)

SPLIT = 1e-2
"""Values below this share of the greatest are the remainder. Its directions, eigenvectors of the Gram matrix, are off
towards that of a greater value s by about eps sigma_1^2 / s^2, which moves its values by at most eps sigma_1^2 / s."""
_LEADING_SHARE = 4
"""Leading directions are searched for before the tridiagonal form if they are fewer than K / this."""
_MORE = 12
"""Random columns beyond the rank of a block, since the whole matrix may have a higher rank."""
_LEADING_GAP = 1e-5
"""Leading directions are accepted where the remainder is smaller than the least of their values by this factor."""
_MANY = 48
"""If more vectors than this are wanted, all are computed: inverse iteration takes the square of their number."""
DEPTH = 8
"""Limit of splits. Each remainder is smaller than the last by `SPLIT`, so only wrong numbers need more."""


Array = TypeVar("Array", np.ndarray, Tensor)
Inverse = Callable[[np.ndarray], np.ndarray]


@dataclass
class Ends:
    """A matrix's spectrum and the directions of its ends, as its Gram matrices give them."""

    squares: np.ndarray
    """(K,) squared singular values, ascending."""
    basis: np.ndarray
    """(K, M) directions on the short side: of the last m values in the order of `squares`, then of the first m."""
    floor: float
    """Absolute accuracy of the smallest squares."""
    inverses: tuple[Inverse, ...] = ()
    """For a split matrix one function per part, the last part first: it maps columns (K, J) to (A^T A)^-1 times them on
    the directions of that part (in the last part without the last m). Empty where nothing was split."""


def gram_floor(squares: np.ndarray) -> np.ndarray:
    """Absolute accuracy K eps sigma_1^2 of the eigenvalues (..., K), ascending, of a float64 Gram matrix."""
    return squares.shape[-1] * EPS * squares[..., -1]


def needs_split(squares: np.ndarray, m: int, unit: np.ndarray | float, depth: int) -> np.ndarray:
    """Whether values between the two ends lie below the floor and are not all negligible; unit = sigma_1^2.

    For a part (`depth` above 0): whether they are too small to be accurate to `RELATIVE_LIMIT`.
    """
    share = 2 * RELATIVE_LIMIT if depth else 1.0
    return (share * squares[..., m] < gram_floor(squares)) & (squares[..., -1] > ABSOLUTE_LIMIT**2 * unit)


def of_small(s_K: np.ndarray, v_KK: np.ndarray, m: int, unit: float) -> Ends:
    """The ends of a part with K <= 2 m from its whole SVD; some directions are then in both ends."""
    k, squares = s_K.size, s_K**2
    m = min(m, k)
    columns = np.concatenate([np.arange(k - 1, k - m - 1, -1), np.arange(m - 1, -1, -1)])
    floor = (k * EPS) ** 2 * float(squares[0])
    inverses = ()
    if k > m and squares[0] > ABSOLUTE_LIMIT**2 * unit:
        inverses = (functools.partial(inverse_on, v_KK[:, : k - m], 1 / (squares[: k - m] + floor)),)
    return Ends(squares[::-1], v_KK[:, columns], floor, inverses)


def leans(squares: np.ndarray, unit: np.ndarray | float) -> np.ndarray:
    """Whether rounding of A v may turn the last left vectors of a part so far that their certificates show it.

    They turn by eps sigma_1 / sigma_K towards other vectors of that part.
    """
    return squares[..., -1] > np.maximum(1e4 * squares[..., 0], ABSOLUTE_LIMIT**2 * unit)


@dataclass
class Tridiagonal:
    """The Gram matrix of `a_RC` as Q T Q^T, and its eigenvalues, ascending."""

    a_RC: np.ndarray
    reflectors_KK: np.ndarray
    d: np.ndarray
    e: np.ndarray
    tau: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, a_RC: np.ndarray, gram_KK: np.ndarray) -> Tridiagonal:
        """Factorise the Gram matrix in place."""
        d, e, tau = tridiagonalize(gram_KK)
        return cls(a_RC, gram_KK, d, e, tau, tridiagonal_values(d, e))

    def vectors(self, chosen: np.ndarray) -> np.ndarray:
        """Eigenvectors (K, len(chosen)) of the Gram matrix, ascending indices."""
        return self.turned(tridiagonal_vectors(self.d, self.e, self.squares, chosen))

    def split(self, m: int, unit: float, depth: int = 0) -> Ends:
        """The ends, with a separate Gram matrix for the values below `SPLIT` sigma_1; unsplit where there are none."""
        k = self.squares.size
        q = int(np.count_nonzero(self.squares < SPLIT**2 * self.squares[-1]))
        others = np.concatenate([np.arange(q, m), np.arange(max(q, k - m), k)])
        above_KJ = self.vectors(others) if others.size else np.empty((k, 0))
        split = max(m - q, 0)
        if q == 0:
            return Ends(self.squares, above_KJ, float(gram_floor(self.squares)))
        if q > _MANY:
            below_KQ = self.turned(all_tridiagonal_vectors(self.d, self.e)[:, :q].copy(order="F"))
        else:
            below_KQ = self.vectors(np.arange(q))
        deeper = ends_of_matrix(np.ascontiguousarray(_tall(self.a_RC) @ below_KQ), m, unit, depth + 1)[0]
        basis_KM, least = below_KQ @ deeper.basis, min(m, q)
        top = np.concatenate([basis_KM[:, least:], above_KJ[:, split:]], axis=1)[:, -m:]
        basis_KM = np.concatenate([basis_KM[:, :least], above_KJ[:, :split], top], axis=1)
        inner = (functools.partial(inverse_within, below_KQ, one) for one in deeper.inverses)
        squares = np.concatenate([deeper.squares, self.squares[q:]])
        # Vectors of one cluster that were computed separately become orthogonal only by the QR factorisation.
        inverses = *inner, functools.partial(self.inverse, below_KQ)
        return Ends(np.sort(squares), np.linalg.qr(basis_KM)[0], deeper.floor, inverses)

    def inverse(self, below_KQ: np.ndarray, columns_KJ: np.ndarray) -> np.ndarray:
        """G^-1 times the columns, on all directions but `below_KQ`. A shift keeps T positive definite."""
        leading_KJ = np.array(columns_KJ - below_KQ @ (below_KQ.T @ columns_KJ), order="F")
        turned_KJ = apply_reflectors(self.reflectors_KK, self.tau, leading_KJ, "T")
        found_KJ = self.turned(tridiagonal_solve(self.d + gram_floor(self.squares), self.e, turned_KJ))
        return found_KJ - below_KQ @ (below_KQ.T @ found_KJ)

    def has_right_values(self, m: int) -> bool:
        """Whether the first and last m + 1 eigenvalues are those of T, by Sturm's counts a little below and above."""
        k = self.d.size
        chosen = np.concatenate([np.arange(m + 1), np.arange(k - m - 1, k)])
        margin = max(float(gram_floor(self.squares)), 1e-300)  # positive for a zero matrix too
        points = np.stack([self.squares[chosen] - margin, self.squares[chosen] + margin], axis=1)
        counts = sturm_counts(self.d, self.e, points)
        return bool((counts[:, 0] <= chosen).all() and (counts[:, 1] > chosen).all())

    def error(self, count: int = PROBES) -> float:
        """A bound of |A^T A - Q T Q^T|_2, see `index.enclosure`, and so of the eigenvalues' errors."""
        z_KP = probes(self.d.size, count)
        image_KP = self.d[:, None] * z_KP
        image_KP[:-1] += self.e[:, None] * z_KP[1:]
        image_KP[1:] += self.e[:, None] * z_KP[:-1]
        both = self.turned(np.asfortranarray(np.concatenate([z_KP, image_KP], axis=1)))
        difference_KP = gram_times(self.a_RC, both[:, :count]) - both[:, count:]
        return enclosure(difference_KP) + float(gram_floor(self.squares))

    def turned(self, vectors_KM: np.ndarray) -> np.ndarray:
        """Turn vectors of T into vectors of the Gram matrix, in place; Fortran order."""
        return apply_reflectors(self.reflectors_KK, self.tau, vectors_KM)


def ends_of_matrix(a_RC: np.ndarray, m: int, unit: float = 0.0, depth: int = 0) -> tuple[Ends, Tridiagonal | None]:
    """The ends of one matrix, split where values between them need it, and its factorised Gram matrix if there is one.

    Args:
        a_RC: finite float64, C-contiguous; not changed.
        m: directions of each end; fewer where K is smaller.
        unit: sigma_1^2 of the whole of which this is a part; 0 for the whole itself.
        depth: how many times the whole was split.

    Raises:
        numpy.linalg.LinAlgError: LAPACK fails.
    """
    k = min(a_RC.shape)
    if 2 * m >= k:
        _, s_K, vh_KK = np.linalg.svd(_tall(a_RC), full_matrices=False)
        return of_small(s_K, vh_KK.T, m, unit), None
    early = _split_early(a_RC, m, unit, depth) if depth < DEPTH else None
    if early is not None:
        return early, None
    found = Tridiagonal.of(a_RC, gram(a_RC))
    unit = unit or float(found.squares[-1])
    if depth < DEPTH and needs_split(found.squares, m, unit, depth):
        return found.split(m, unit, depth), found
    vectors_KM = found.vectors(np.concatenate([np.arange(m), np.arange(k - m, k)]))
    matters = depth and leans(found.squares, unit)
    inverses = (functools.partial(found.inverse, vectors_KM[:, :m]),) if matters else ()
    return Ends(found.squares, vectors_KM, float(gram_floor(found.squares)), inverses), found


def _leading_directions(a_RC: np.ndarray, unit: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The singular values (J,) and right vectors on the short side (K, J), where all other values are negligible.

    None unless J < K / `_LEADING_SHARE`, which a block of K / `_LEADING_SHARE` rows shows at once: its rank is at most
    that of the whole. The directions come from A^T A A^T times random columns, `_MORE` more than that rank (Halko,
    Martinsson & Tropp, SIAM Review 53 (2011), algorithm 4.4), so their error has the square of the ratio of values.
    """
    tall_LK = _tall(a_RC)
    most = tall_LK.shape[1] // _LEADING_SHARE
    block = a_RC[:: len(a_RC) // max(most, 1)][:most, : 2 * most]
    gram_JJ = block @ block.T
    if most < _MORE or (gram_JJ.diagonal().max() or np.vdot(a_RC, a_RC)) <= ABSOLUTE_LIMIT**2 * unit:
        return None
    rank = pivoted_rank(gram_JJ, _LEADING_GAP**2)
    if rank == most:
        return None
    random = np.random.default_rng(0).random((len(tall_LK), rank + _MORE)) - 0.5
    short_KJ = np.linalg.qr((random.T @ tall_LK).T)[0]
    long_LJ = np.linalg.qr(tall_LK @ short_KJ)[0]
    short_KJ, triangle = np.linalg.qr((long_LJ.T @ tall_LK).T)
    turn, s_J, _ = np.linalg.svd(triangle)
    gaps = s_J[1:] <= _LEADING_GAP * s_J[:-1]
    j = int(np.argmax(gaps)) + 1
    return (s_J[:j], short_KJ @ turn[:, :j]) if gaps.any() and s_J[0] > 0 else None


def _split_early(a_RC: np.ndarray, m: int, unit: float, depth: int) -> Ends | None:
    """The ends from the leading directions, if they are few, and the Gram matrix of the part orthogonal to them."""
    leading = _leading_directions(a_RC, unit)
    if leading is None:
        return None
    s_J, above_KJ = leading
    reflectors, tau = householder_qr(above_KJ)
    j, turned, is_tall = s_J.size, a_RC.copy(), a_RC.shape[0] >= a_RC.shape[1]
    if is_tall:
        apply_householder(reflectors, tau, turned.T, "L", "T")
    else:
        apply_householder(reflectors, tau, turned.T, "R", "N")
    rest = np.ascontiguousarray(turned[:, j:] if is_tall else turned[j:])
    if np.vdot(rest, rest) > (_LEADING_GAP * s_J[-1]) ** 2:
        return None
    deeper, _ = ends_of_matrix(rest, m, unit or float(s_J[0]) ** 2, depth + 1)

    def below(columns_QM: np.ndarray) -> np.ndarray:
        columns_KM = np.asfortranarray(np.pad(columns_QM, ((j, 0), (0, 0))))
        apply_householder(reflectors, tau, columns_KM, "L", "N")
        return columns_KM

    def within(inverse: Inverse, columns_KM: np.ndarray) -> np.ndarray:
        columns_KM = np.array(columns_KM, order="F")
        apply_householder(reflectors, tau, columns_KM, "L", "T")
        return below(inverse(columns_KM[j:]))

    last, top = np.split(below(deeper.basis), [m], axis=1)
    basis_KM = np.concatenate([last, np.concatenate([top, above_KJ[:, ::-1]], axis=1)[:, -m:]], axis=1)
    inner = (functools.partial(within, one) for one in deeper.inverses)
    inverses = *inner, functools.partial(inverse_on, above_KJ, 1 / s_J**2)
    return Ends(np.sort(np.concatenate([deeper.squares, s_J**2])), basis_KM, deeper.floor, inverses)


def inverse_on(vectors_KJ: Array, inverse_squares_J: Array, columns: Array) -> Array:
    """(A^T A)^-1 times columns (K, M), on the directions of some eigenvectors."""
    return vectors_KJ @ (inverse_squares_J[:, None] * (vectors_KJ.T @ columns))


def inverse_within(below_KQ: Array, inverse: Callable[[Array], Array], columns: Array) -> Array:
    """An inverse in the coordinates of a basis, applied to columns (K, M)."""
    return below_KQ @ inverse(below_KQ.T @ columns)


def _tall(a_RC: np.ndarray) -> np.ndarray:
    return a_RC if a_RC.shape[0] >= a_RC.shape[1] else a_RC.T


def all_values(a_RC: np.ndarray) -> np.ndarray:
    """The singular values (K,), descending, of a finite float64 matrix of entries of about 1; from its Gram matrix."""
    d, e, _ = tridiagonalize(gram(a_RC))
    return np.sqrt(np.maximum(tridiagonal_values(d, e)[::-1], 0.0))
