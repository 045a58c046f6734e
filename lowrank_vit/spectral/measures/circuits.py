"""Circuits of attention heads: spectra of W_Q^T W_K and W_O W_V, and how heads of consecutive blocks compose.

A head compares its inputs x and x' by x^T W_Q^T W_K x' (its QK circuit), and adds W_O W_V x' to the stream (its OV
circuit): Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021). Biases and the factor 1 / sqrt(D)
are left out.

Pure numpy, float64. Shape legend: H heads of dimension D in a stream of width n, K = min(n, D) singular values of a
circuit; G heads of the block before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple, cast

import numpy as np

from lowrank_vit.spectral.measures.metrics import effective_rank, stable_rank

CIRCUITS = "circuits"
"""The key in files of circuits that tells which parameters count, see `heads.Circuits`."""
_DRAWS = 64


class HeadWeights(NamedTuple):
    """The projections of one block's attention, float32 or float64, each (H, D, n)."""

    q_HDn: np.ndarray
    k_HDn: np.ndarray
    v_HDn: np.ndarray
    o_HDn: np.ndarray
    """W_O transposed: what each dimension of a head adds to the stream."""


class BlockCircuits(NamedTuple):
    """The circuits of one block, in the weights' unit squared; NaN where a weight of a head is not finite."""

    width: int
    """n."""
    qk_HK: np.ndarray
    """Singular values of each head's W_Q^T W_K, descending."""
    ov_HK: np.ndarray
    """Singular values of each head's W_O W_V, descending."""
    q_HG: np.ndarray
    """Q-composition |QK^T OV|_F / (|QK|_F |OV|_F), 0-1, with each head of the block before; NaN for a zero circuit."""
    k_HG: np.ndarray
    """K-composition: the same with QK in place of its transpose. Both are (H, 0) where there is no block before."""
    spread_HG: np.ndarray
    """Standard deviation of the squared scores of unrelated directions, see `chance_spread`."""
    means_2: np.ndarray
    """The same for the mean of all squared Q scores, and of all squared K scores; (0,) where no block is before."""


def circuits_of(blocks: Iterable[HeadWeights], before: HeadWeights | None = None) -> list[BlockCircuits]:
    """The circuits of consecutive blocks; `before` is the block before the first, if there is one.

    With thin QR factors W_Q^T = Q_1 R_1 and W_K^T = Q_2 R_2 the singular values of W_Q^T W_K are those of R_1 R_2^T, a
    K x K matrix, and the norm of a product with it is that of the product with R_1 W_K. Errors of the values: a few eps
    times |W_Q|_2 |W_K|_2.
    """
    found: list[BlockCircuits] = []
    with np.errstate(all="ignore"):  # zeros and non-finite weights give NaN
        written = _written(before)[1] if before else None
        for weights in blocks:
            q, k = _factored(weights.q_HDn), _factored(weights.k_HDn)
            norms, qk_HK = _spectra(q, k)
            ov_HK, writes = _written(weights)
            heads, width = len(qk_HK), weights.q_HDn.shape[2]
            by_q = by_k = spread = np.empty((heads, 0))
            means = np.empty(0)
            if written:
                reads = [s.r @ o.rows / norms for s, o in ((k, q), (q, k))]
                by_q, by_k = (_scores(one, written.rows_GKn) for one in reads)
                spread = chance_spread(_concentration(qk_HK), written.concentration_G, width)
                shared = np.array([_shared(one) for one in reads]), np.array([_shared(written.rows_GKn)])
                means = chance_spread(*shared, width)[:, 0]
            found.append(BlockCircuits(width, qk_HK, ov_HK, by_q, by_k, spread, means))
            written = writes
    return found


class _Factored(NamedTuple):
    rows: np.ndarray
    """A projection (H, D, n), each head divided by a power of two; zeros for a head that is not finite."""
    r: np.ndarray
    """(H, K, D): R of the thin QR of its transpose."""
    scales: np.ndarray
    """(H, 1, 1): these powers of two; NaN for a head that is not finite."""


class _Written(NamedTuple):
    rows_GKn: np.ndarray
    """Rows whose products with a matrix have the norms of OV's own, over |OV|_F."""
    concentration_G: np.ndarray


def _factored(weights_HDn: np.ndarray) -> _Factored:
    greatest = np.abs(weights_HDn).max(axis=(1, 2), keepdims=True).astype(np.float64)
    is_finite = np.isfinite(greatest)
    scales = np.ldexp(1.0, np.frexp(np.where(is_finite, greatest, 1.0))[1])
    rows = np.where(is_finite, np.divide(weights_HDn, scales, dtype=np.float64), 0.0)
    r = cast(np.ndarray, np.linalg.qr(rows.swapaxes(1, 2), mode="r"))
    return _Factored(rows, r, np.where(is_finite, scales, np.nan))


def _spectra(left: _Factored, right: _Factored) -> tuple[np.ndarray, np.ndarray]:
    """|L^T R|_F (H, 1, 1), without the scales, and its singular values (H, K)."""
    s_HK = np.linalg.svd(left.r @ right.r.swapaxes(1, 2), compute_uv=False)
    scales = left.scales * right.scales
    norms = np.linalg.norm(s_HK, axis=1)[:, None, None]
    return np.where(np.isnan(scales), np.nan, norms), s_HK * scales[:, 0]


def _written(weights: HeadWeights) -> tuple[np.ndarray, _Written]:
    v, o = _factored(weights.v_HDn), _factored(weights.o_HDn)
    norms, ov_HK = _spectra(o, v)
    return ov_HK, _Written(v.r @ o.rows / norms, _concentration(ov_HK))


def _scores(read_HKn: np.ndarray, written_GKn: np.ndarray) -> np.ndarray:
    """The norm of each head's product with each of the block before, (H, G)."""
    products = read_HKn.reshape(-1, read_HKn.shape[2]) @ written_GKn.reshape(-1, written_GKn.shape[2]).T
    squares = np.square(products, out=products).reshape(*read_HKn.shape[:2], *written_GKn.shape[:2])
    return np.sqrt(squares.sum(axis=(1, 3)))


def _concentration(s_HK: np.ndarray) -> np.ndarray:
    """Sum s^4 / (sum s^2)^2 of each circuit, (H,): between 1 / K and 1."""
    shares = np.square(s_HK / s_HK[:, :1])
    return np.square(shares).sum(axis=1) / np.square(shares.sum(axis=1))


def _shared(rows_HKn: np.ndarray) -> float:
    """The trace of M^2, M the mean of the heads' B^T B: one head's `_concentration`, and less the less heads share."""
    return float(np.mean(np.square(_scores(rows_HKn, rows_HKn))))


def chance_spread(p_H: np.ndarray, q_G: np.ndarray, width: int) -> np.ndarray:
    """Standard deviation (H, G) of the squared score of circuits A and B, where the directions of one are random.

    |AB|_F^2 = sum_ij a_i^2 b_j^2 (v_i . u_j)^2, with a, b the singular values, v_i what A reads and u_j what B writes.
    If either set of directions is uniform over all rotations and independent of the other, each (v_i . u_j)^2 has the
    mean 1 / n, hence the squared score too, whatever the spectra. From E x^4 = 3 / n(n+2) of an entry x of a random
    orthogonal matrix, E x^2 y^2 = 1 / n(n+2) of two in one row or column and (n+1) / n(n-1)(n+2) of two in neither
    (Collins & Sniady, Comm. Math. Phys. 264 (2006)) its variance is 2 (n p - 1) (n q - 1) / n^2 (n-1) (n+2).

    If all heads of one side are rotated together, the mean over all pairs of heads is tr M N with M and N the means of
    A^T A / |A|_F^2 and of B B^T / |B|_F^2. Its variance is the same formula with p = tr M^2 and q = tr N^2.

    Args:
        p_H, q_G: sum s^4 / (sum s^2)^2 of the circuits of either side, or tr M^2 of means.
        width: n. With n = 1 the score is always 1 and the result 0.
    """
    n = float(width)
    product = np.maximum(n * p_H - 1, 0.0)[:, None] * np.maximum(n * q_G - 1, 0.0)
    return np.sqrt(2 * product / (max(n - 1, 1.0) * (n + 2))) / n


def as_arrays(found: Mapping[str, BlockCircuits], circuits: str) -> dict[str, np.ndarray]:
    """The arrays of a file: "<key>:<field>" for "width", "qk", "ov" (H, K), "q", "k", "spread" (H, G), "means" (2,).

    "circuits" tells which parameters count, see `heads.Circuits`.
    """
    arrays = {
        f"{key}:{f.partition('_')[0]}": np.asarray(v) for key, one in found.items() for f, v in one._asdict().items()
    }
    return {CIRCUITS: np.asarray(circuits)} | arrays


def of_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, BlockCircuits], str]:
    """The inverse of `as_arrays`: the blocks by key, and which parameters count. `KeyError` if an array is missing."""
    _, *names = (field.partition("_")[0] for field in BlockCircuits._fields)
    keys = dict.fromkeys(name.rpartition(":")[0] for name in arrays if ":" in name)
    blocks = {key: BlockCircuits(int(arrays[f"{key}:width"]), *(arrays[f"{key}:{n}"] for n in names)) for key in keys}
    return blocks, str(arrays[CIRCUITS])


def circuit_metrics(one: BlockCircuits) -> dict[str, float]:
    """The scalars of one block. A NaN of any head makes the block's number NaN.

    Returns:
        For c in "qk", "ov": "<c>_sigma_max", the greatest of all heads, "<c>_stable_rank_mean" and "_max", and
        "<c>_effective_rank_mean" over the heads. Where there is a block before, "composition_chance" = 1 / n and for c
        in "q", "k", over all pairs of heads: "<c>_composition_mean_sq", the mean squared score, whose chance value that
        is; "<c>_composition_max", the greatest score; "<c>_composition_z", by how many standard deviations of chance
        the mean squared score lies above its chance value; "<c>_composition_max_z", the greatest such number of a
        single pair of heads (see `chance_spread`). NaN where chance has no spread.
    """
    values: dict[str, float] = {}
    for name, s_HK in (("qk", one.qk_HK), ("ov", one.ov_HK)):
        stable, effective = ([rank(s) for s in s_HK] for rank in (stable_rank, effective_rank))
        values[f"{name}_sigma_max"] = float(np.max(s_HK[:, 0]))
        values |= {f"{name}_stable_rank_mean": float(np.mean(stable)), f"{name}_stable_rank_max": float(np.max(stable))}
        values[f"{name}_effective_rank_mean"] = float(np.mean(effective))
    if not one.q_HG.size:
        return values
    chance = values["composition_chance"] = 1.0 / one.width
    spread, of_means = (np.where(of > 1e-9 * chance, of, np.nan) for of in (one.spread_HG, one.means_2))
    for name, scores, of_mean in (("q", one.q_HG, of_means[0]), ("k", one.k_HG, of_means[1])):
        squares = np.square(scores)
        mean = values[f"{name}_composition_mean_sq"] = float(np.mean(squares))
        values[f"{name}_composition_z"] = (mean - chance) / float(of_mean)
        values[f"{name}_composition_max"] = float(np.max(scores))
        values[f"{name}_composition_max_z"] = float(np.max((squares - chance) / spread))
    return values


@cache
def chance_stable_rank(width: int, head_dim: int) -> float:
    """The mean stable rank of L^T R with independent Gaussian L, R (D, n) of any scales, from fixed draws.

    The R factors of their QR are drawn directly: entries above the diagonal are normal, the i-th on the diagonal is the
    norm of n - i + 1 normal numbers (Bartlett 1933). The simulation's error is below 1 % from D = 8 on.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([width, head_dim], np.uint64)))
    k = min(width, head_dim)
    degrees = width - np.arange(k)
    r = np.triu(rng.standard_normal((2, _DRAWS, k, head_dim)), 1)
    r[..., np.arange(k), np.arange(k)] = np.sqrt(rng.chisquare(degrees, (2, _DRAWS, k)))
    spectra = np.linalg.svd(r[0] @ r[1].swapaxes(1, 2), compute_uv=False)
    return float(np.mean([stable_rank(s) for s in spectra]))
