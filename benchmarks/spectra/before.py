"""A refresh of the spectra as at commit 3036a33, on a CPU, to compare with today's.

It computes all values of |dW| for its norm, with a float64 copy of a whole stack, and has no index certificates, no
blocks 1..p and no scaling of thirds. Results are those of that commit; the fallback to an SVD is left out, since the
measured matrices do not need it. Only LAPACK's calls and unchanged formulas are shared with today's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.spectral.measures import metrics
from lowrank_vit.spectral.measures.noise import median_of_law
from lowrank_vit.spectral.measures.subspaces import principal_cosines
from lowrank_vit.spectral.solving import lapack
from lowrank_vit.spectral.solving.extremes import EPS
from lowrank_vit.spectral.solving.solve import MatrixStack

T = TypeVar("T")


@dataclass
class Solved:
    """All values (K,), and for both ends the recorded s (m,), u (R, m), v (C, m) and certificates (m,)."""

    s: np.ndarray
    ends: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    orthogonality: float


@dataclass
class Memory:
    """The state with which the next refresh is compared, by "<kind>/<name>"."""

    first: dict[str, Solved] = field(default_factory=dict)
    last: dict[str, Solved] = field(default_factory=dict)
    weights: dict[str, list[MatrixStack]] = field(default_factory=dict)


def refresh(
    stacks: Mapping[str, list[MatrixStack]], topk: int, interval: int, threads: int, memory: Memory
) -> dict[str, dict[str, float]]:
    """All numbers of all matrices; `memory` is updated to this refresh."""
    solved: dict[str, Solved] = {}
    values: dict[str, dict[str, float]] = {}
    for kind, of_kind in stacks.items():
        found = {f"{kind}/{name}": one for stack in of_kind for name, one in _solve(stack, topk, interval, threads)}
        solved |= found
        norms: dict[str, dict[str, float]] = {}
        for earlier, now in zip(memory.weights.get(kind, ()), of_kind, strict=False):
            norms |= _update_norms(earlier, now, threads)
        for key, one in found.items():
            values[key] = _spectrum_metrics(one, topk, interval)
            if key in memory.last:
                values[key] |= {"delta_sv_rel": _change(memory.last[key], one)} | _cosines("cos", memory.last[key], one)
            if key in memory.first:
                values[key] |= _cosines("cos0", memory.first[key], one)
            values[key] |= norms.get(key.partition("/")[2], {})
    for key in solved:
        if (of_ema := key.replace("spec/", "spec_ema/", 1)) != key and of_ema in solved:
            values[key] |= _cosines("ema_cos", solved[of_ema], solved[key])
    memory.first, memory.last, memory.weights = solved | memory.first, solved, dict(stacks)
    return values


def _solve(stack: MatrixStack, topk: int, interval: int, threads: int) -> Iterable[tuple[str, Solved]]:
    scales = _scales(stack.matrices_NRC)
    top, last = metrics.recorded_indices(min(stack.matrices_NRC.shape[1:]), topk, interval)
    m = metrics.reach(topk, interval)

    def one(i: int) -> Solved:
        return _solve_matrix(_float64(stack.matrices_NRC[i], scales[i]), m, float(scales[i]), top, last)

    return zip(stack.names, _side_by_side(one, range(len(scales)), threads), strict=True)


def _solve_matrix(a_RC: np.ndarray, m: int, scale: float, top: list[int], last: list[int]) -> Solved:
    tall_LK = a_RC if a_RC.shape[0] >= a_RC.shape[1] else a_RC.T
    gram_KK = lapack.gram(a_RC)
    d, e, tau = lapack.tridiagonalize(gram_KK)
    squares = lapack.tridiagonal_values(d, e)
    k = squares.size
    chosen = np.concatenate([np.arange(m), np.arange(k - m, k)])
    basis_KM = lapack.apply_reflectors(gram_KK, tau, lapack.tridiagonal_vectors(d, e, squares, chosen))
    image_LM = tall_LK @ basis_KM
    long_LM, s_M, turn = np.linalg.svd(image_LM, full_matrices=False)
    short_KM = basis_KM @ turn.T
    ahead = np.linalg.norm(image_LM @ turn.T - long_LM * s_M, axis=0)
    back = np.linalg.norm(tall_LK.T @ long_LM - short_KM * s_M, axis=0)
    off = max(float(np.abs(x.T @ x - np.eye(2 * m)).max()) for x in (long_LM, short_KM))
    frobenius_squared = float(np.vdot(a_RC, a_RC))
    certificate = np.sqrt((ahead**2 + back**2) / 2) + EPS * max(a_RC.shape) ** 0.5 * s_M.max()
    s_K = np.sqrt(np.maximum(squares[::-1], 0.0))
    values = np.sort(np.concatenate([s_M[:m], s_K[m : k - m], s_M[m:]]))[::-1].copy()
    assert abs(float(np.sum(squares)) / frobenius_squared - 1) <= 1e-12
    assert off <= 1e-10
    u, v = (long_LM, short_KM) if tall_LK is a_RC else (short_KM, long_LM)
    columns = {"": [i - 1 for i in top], "_last": [2 * m - 1 - (k - i) for i in last]}
    ends = {end: (s_M[at] * scale, u[:, at], v[:, at], certificate[at] * scale) for end, at in columns.items()}
    return Solved(values * scale, ends, off)


def _update_norms(earlier: MatrixStack, now: MatrixStack, threads: int) -> dict[str, dict[str, float]]:
    change_NRC = now.matrices_NRC.double() - earlier.matrices_NRC.double()
    scales = _scales(change_NRC)

    def one(i: int) -> float:
        d, e, _ = lapack.tridiagonalize(lapack.gram(_float64(change_NRC[i], scales[i])))
        return float(lapack.tridiagonal_values(d, e)[-1] ** 0.5 * scales[i])

    spectral = _side_by_side(one, range(len(scales)), threads)
    with lapack.one_blas_thread():
        frobenius = [float(np.sqrt(np.vdot(d, d))) for d in change_NRC.numpy()]
    pairs = zip(now.names, spectral, frobenius, strict=True)
    return {name: {"update_norm2": two, "update_normF": f} for name, two, f in pairs}


def _scales(matrices_NRC: Tensor) -> np.ndarray:
    low, high = torch.aminmax(matrices_NRC.flatten(1), dim=1)
    return np.ldexp(1.0, np.frexp(torch.maximum(low.abs(), high.abs()).double().numpy())[1])


def _float64(matrix: Tensor, scale: float) -> np.ndarray:
    return np.divide(matrix.numpy(), scale, dtype=np.float64, order="C")


def _side_by_side(one: Callable[[int], T], indices: Iterable[int], threads: int) -> list[T]:
    with lapack.one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        return list(map(one, indices)) if threads == 1 else list(pool.map(one, indices))


def _change(earlier: Solved, now: Solved) -> float:
    old, new = earlier.ends[""][0], now.ends[""][0]
    return float(np.mean(np.abs(new - old) / np.maximum(old, metrics.FLOOR * float(earlier.s[0]))))


def _cosines(prefix: str, earlier: Solved, now: Solved) -> dict[str, float]:
    values: dict[str, float] = {}
    for side, at in (("u", 1), ("v", 2)):
        top, last = (principal_cosines(earlier.ends[end][at], now.ends[end][at]) for end in ("", "_last"))
        values |= {f"{prefix}_{side}{i}": float(c) for i, c in enumerate(top, start=1)}
        values |= {f"{prefix}_{side}_last{i}": float(c) for i, c in enumerate(last, start=1)}
        values |= {f"{prefix}_{side}_max": float(top.max()), f"{prefix}_{side}_mean": float(top.mean())}
    return values


def _spectrum_metrics(solved: Solved, topk: int, interval: int) -> dict[str, float]:
    s, (_, u, v, _) = solved.s, solved.ends[""]
    shape, (top, last) = (len(u), len(v)), metrics.recorded_indices(s.size, topk, interval)
    values = {"sigma_max": float(s[0]), "orthogonality": solved.orthogonality}
    values |= {f"sv{i}": float(s[index - 1]) for i, index in enumerate(top, start=1)}
    values |= {f"sv_last{i}": float(s[index - 1]) for i, index in enumerate(last, start=1)}
    values |= {"gap_k": metrics.relative_gap(s, top), "gap_last": metrics.relative_gap(s, last)}
    values |= {"stable_rank": metrics.stable_rank(s), "effective_rank": metrics.effective_rank(s)}
    values |= {f"rank{percent}": metrics.energy_rank(s, percent) for percent in metrics.ENERGIES}
    values |= {"nuclear_norm": metrics.nuclear_norm(s), "condition": metrics.condition_number(s)}
    values |= dict(zip(("alpha", "alpha_ks", "alpha_sigma", "alpha_tail"), _power_law(s), strict=True))
    sigma = float(np.median(s)) / (max(shape) * median_of_law(min(shape) / max(shape))) ** 0.5
    reach = (max(shape) - 1) ** 0.5 + min(shape) ** 0.5
    width = reach * ((max(shape) - 1) ** -0.5 + min(shape) ** -0.5) ** (1 / 3)
    edge = sigma * (reach**2 + 2.0234 * width) ** 0.5
    values |= {"mp_sigma": sigma, "mp_edge": edge, "mp_outliers": float(np.count_nonzero(s > edge))}
    values["certificate_max"] = max(float(end[3].max()) for end in solved.ends.values()) / float(s[0])
    return values | {"chance_u": (topk / shape[0]) ** 0.5, "chance_v": (topk / shape[1]) ** 0.5}


def _power_law(s: np.ndarray) -> tuple[float, float, float, float]:
    logs = 2 * np.log(s[s > 0][::-1])
    n = logs.size
    counts = n - np.arange(n - 1)
    above = np.cumsum(logs[::-1])[::-1][:-1] - counts * logs[:-1]
    alphas = np.where(above > 0, 1 + counts / above, np.inf)
    distances = np.ones(n - 1)
    for start in range(0, n - 1, 64):
        rows, columns = np.arange(start, min(start + 64, n - 1)), np.arange(start, n)
        usable = np.isfinite(alphas[rows])
        slope = np.where(usable, alphas[rows], 2.0)[:, None]
        fitted = 1 - np.exp((1 - slope) * np.maximum(logs[None, columns] - logs[rows, None], 0.0))
        empirical = (columns[None, :] - rows[:, None]) / counts[rows, None]
        difference = np.where(columns[None, :] >= rows[:, None], np.abs(fitted - empirical), 0.0)
        distances[rows] = np.where(usable, difference.max(axis=1), 1.0)
    best = int(np.argmin(distances))
    alpha, tail = float(alphas[best]), float(counts[best])
    return alpha, float(distances[best]), (alpha - 1) / tail**0.5, tail
