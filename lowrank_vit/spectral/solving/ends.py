"""The first singular triplets alone, from vectors of the same matrix a little earlier, and proof of their indices.

Weights differ little from those at the last refresh, so the first right vectors of then and some more (`GUARD`) nearly
span the wanted directions. `nearby` improves them by products with the Gram matrix. The result is certified as in
`solve.solve_stack`, and a Cholesky factor proves that no value was missed. That takes a fifth to a half of the time of
a whole spectrum.

Shape legend: see `solve`; m triplets are wanted, J = m + 1 computed, B = m + `GUARD` columns kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.common.devices import cuda_path
from lowrank_vit.spectral.solving import nearby
from lowrank_vit.spectral.solving.extremes import (
    ABSOLUTE_LIMIT,
    ANGLE_LIMIT,
    ENDS,
    EPS,
    ORTHOGONALITY_LIMIT,
    Solved,
    Triplets,
)
from lowrank_vit.spectral.solving.nearby import Near
from lowrank_vit.spectral.solving.solve import (
    Cancelled,
    MatrixStack,
    divided_by,
    float64_numpy,
    never,
    scales_of,
    side_by_side,
)

LOG = logging.getLogger(__name__)

GUARD = 17
"""Columns kept beyond the wanted ones: a filter separates the wanted directions from those below these."""
_FAR = 2.0**30
"""A float32 matrix is scaled unless its greatest entry is between 1 over this and this."""


def solve_ends(
    stack: MatrixStack,
    before: Mapping[str, np.ndarray],
    m: int,
    *,
    cpu_threads: int = 1,
    cancelled: Callable[[], bool] = never,
    log: Callable[[str], object] = LOG.debug,
) -> dict[str, Solved | None]:
    """The first m triplets of each matrix; None where they are not proven, and `solve_stack` has to find them.

    On a CPU a matrix's numbers depend neither on its neighbours nor on the number of threads or cores.

    Args:
        stack: see `solve.solve_stack`.
        before: by name, `Solved.start` of the same matrix a little earlier.
        m: triplets wanted.
        cpu_threads, cancelled: see `solve.solve_stack`.
        log: called with the reason for each matrix that has a start but no result.

    Returns:
        By name: triplets with certificates of at most `ABSOLUTE_LIMIT` sigma_1 and proven indices, not `full`, with a
        `start` for the next time. The first m values are known, and sigma_{m+1} where it is proven too. None for all
        unless `is_large_enough`.

    Raises:
        Cancelled: `cancelled()` was true.
    """
    if cancelled():
        raise Cancelled
    found: dict[str, Solved | None] = dict.fromkeys(stack.names)
    shape = (int(stack.matrices_NRC.shape[1]), int(stack.matrices_NRC.shape[2]))
    k = min(shape)
    warm = [i for i, name in enumerate(stack.names) if name in before and _is_start(before[name], k, m)]
    if not warm or not is_large_enough(k, m):
        return found
    with torch.no_grad():
        scales = scales_of(stack.matrices_NRC)
        warm = [i for i in warm if np.isfinite(scales[i])]
        starts = [_filled(before[stack.names[i]], m) for i in warm]
        if cuda_path(stack.matrices_NRC):
            each = _on_device(stack.matrices_NRC[warm], starts, m, scales[warm])
        else:
            each = _on_cpu([stack.matrices_NRC[i] for i in warm], starts, m, scales[warm], cpu_threads, cancelled)
    dtype = stack.matrices_NRC.dtype
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else EPS
    for i, (near, scale) in zip(warm, each, strict=True):
        solved = near if isinstance(near, str) else _proven(near, shape, m)
        if isinstance(solved, str):
            log(f"spectra of {stack.names[i]}: {solved}; the whole spectrum is computed")
        else:
            found[stack.names[i]] = replace(_scaled(solved, scale), eps=eps)
    return found


def is_large_enough(k: int, m: int) -> bool:
    """Whether the first m of K values are found alone: for a smaller matrix all of them cost no more."""
    return k >= 2 * (m + GUARD)


def _is_start(start: np.ndarray, k: int, m: int) -> bool:
    return start.shape[0] == k and m <= start.shape[1] <= m + GUARD


def _filled(start: np.ndarray, m: int) -> np.ndarray:
    """The start with random columns of about unit length up to m + `GUARD`; a stored one has only the first vectors."""
    k, known = start.shape
    random = np.random.default_rng(0).standard_normal((k, m + GUARD - known)) / k**0.5
    return np.concatenate([start, random], axis=1, dtype=np.float32)


def _on_cpu(
    matrices: list[Tensor],
    starts: list[np.ndarray],
    m: int,
    scales: np.ndarray,
    cpu_threads: int,
    cancelled: Callable[[], bool],
) -> list[tuple[Near | str, float]]:
    def one(i: int) -> tuple[Near | str, float]:
        if cancelled():
            raise Cancelled
        usual = matrices[i].dtype == torch.float32 and 1 / _FAR < scales[i] < _FAR
        scale = 1.0 if usual else float(scales[i])
        a_RC = matrices[i].numpy() if usual else float64_numpy(matrices[i], scale)
        try:
            return nearby.of_matrix(a_RC, starts[i], m), scale
        except np.linalg.LinAlgError as error:
            return str(error), scale

    return side_by_side(one, range(len(matrices)), cpu_threads)


def _on_device(
    matrices_NRC: Tensor, starts: list[np.ndarray], m: int, scales: np.ndarray
) -> list[tuple[Near | str, float]]:
    divided, divisors = divided_by(matrices_NRC, scales)
    try:
        found = nearby.of_stack(divided, torch.from_numpy(np.stack(starts)).to(divided.device), m)
    except torch.linalg.LinAlgError as error:
        return [(f"no convergence ({error})", 1.0)] * len(scales)
    return list(zip(found, divisors.tolist(), strict=True))


def _proven(near: Near, shape: tuple[int, int], m: int) -> Solved | str:
    """The first m triplets if all their checks pass, else the check that failed, in words."""
    known, ratio = near.known, float(near.certificate.max() / near.s[0])
    if not ratio <= ABSOLUTE_LIMIT:
        return f"certificate {ratio:.0e} of sigma_1"
    if not near.orthogonality <= ORTHOGONALITY_LIMIT:
        return f"vectors are orthogonal only to {near.orthogonality:.0e}"
    # That many true values lie within this distance of the found ones, each near its own (Kahan; Parlett, 11.5.1).
    together = 2 * float(np.linalg.norm(near.certificate)) + near.s.size * near.orthogonality * float(near.s[0])
    gap = float(near.s[known - 1]) - together - max(near.beyond, 0.0) ** 0.5
    if not gap > 0:
        return f"sigma_{known} cannot be told from those after it"
    allowed = max(ANGLE_LIMIT * gap, 16 * EPS * max(shape) ** 0.5 * float(near.s[0]))
    if not near.certificate[:known].max() <= allowed:
        return f"vectors may be off by {near.certificate[:known].max() / gap:.0e}"
    s_K = np.full(min(shape), np.nan)
    s_K[:known] = near.s[:known]
    u, v = (near.long_LJ, near.short_KJ) if shape[0] >= shape[1] else (near.short_KJ, near.long_LJ)
    top = Triplets(near.s, u, v, near.certificate).pick(list(range(m)))
    start = np.concatenate([near.short_KJ.astype(np.float32), near.others_KB], axis=1)
    found = Solved(s_K, top, top.pick([]), near.orthogonality, ENDS, index=True, full=False, frobenius=near.frobenius)
    return replace(found, beyond=max(near.beyond, 0.0) ** 0.5, start=start)


def _scaled(solved: Solved, scale: float) -> Solved:
    top = replace(solved.top, s=solved.top.s * scale, certificate=solved.top.certificate * scale)
    sizes = {"frobenius": solved.frobenius * scale, "beyond": solved.beyond * scale}
    return replace(solved, s=solved.s * scale, top=top, **sizes)
