"""Certified spectra of many matrices at once: the fast solver, the slow reference, and the fallback to it.

Shape legend: N matrices of one shape, R rows, C columns, K = min(R, C) singular values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.common.devices import cuda_path
from lowrank_vit.spectral.solving import first, gram, refine
from lowrank_vit.spectral.solving.extremes import EPS, Solved, Solver, Triplets, not_finite, start_of
from lowrank_vit.spectral.solving.gram_stack import gram_stack
from lowrank_vit.spectral.solving.index import enclosure, index_is_proven, probes
from lowrank_vit.spectral.solving.lapack import one_blas_thread

S = TypeVar("S")
T = TypeVar("T")

LOG = logging.getLogger(__name__)
LARGE = 256
"""From this K on, `first` finds all triplets of a matrix of which half or more are wanted."""


class Cancelled(Exception):
    """A refresh was given up between two matrices."""


@dataclass(frozen=True)
class MatrixStack:
    """Matrices of one shape, dtype and device, copied side by side: what the batched solver takes."""

    names: tuple[str, ...]
    matrices_NRC: Tensor
    fused: frozenset[str] = frozenset()
    """The names of the matrices whose rows are Q, K and V, a third each."""
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])
    """By name, an upper bound of the rank of a product of factors; other matrices are not listed."""


def never() -> bool:
    """Nobody cancels."""
    return False


def stack_by_shape(
    weights: Mapping[str, Tensor], fused: Collection[str] = (), ranks: Mapping[str, int] | None = None
) -> list[MatrixStack]:
    """Copy the matrices into one stack per (shape, dtype, device), with few kernels and no wait for the device.

    Later changes of `weights` do not reach the stacks, so this also takes a snapshot. `fused`: names of the matrices
    whose rows are Q, K and V. `ranks`: see `MatrixStack`.

    Raises:
        ValueError: a tensor is not 2-D.
    """
    groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[str]] = {}
    fused, ranks = frozenset(fused), ranks or {}
    for name, weight in weights.items():
        if weight.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected a matrix (2 dimensions)")
        groups.setdefault((weight.shape, weight.dtype, weight.device), []).append(name)
    with torch.no_grad():
        return [
            MatrixStack(tuple(names), torch.stack([weights[n] for n in names]), fused.intersection(names), known)
            for names in groups.values()
            for known in [{name: ranks[name] for name in names if name in ranks}]
        ]


def solve_stack(
    stack: MatrixStack,
    m: int,
    solver: Solver = "gram64",
    *,
    cpu_threads: int = 1,
    cancelled: Callable[[], bool] = never,
    log: Callable[[str], object] = LOG.warning,
    guard: int = 0,
) -> dict[str, Solved]:
    """Solve every matrix of one stack on its device; results on the host, float64.

    `gram64`: eigenvalues of the Gram matrix on the short side, in float64; the first and last m values and vectors are
    then refined against the matrix itself (Rayleigh-Ritz). Accuracy: a triplet's certificate r = sqrt((|A v - s u|^2 +
    |A^T u - s v|^2) / 2) bounds its distance to a true singular value (Parlett, The Symmetric Eigenvalue Problem,
    theorem 4.5.1, for [[0, A], [A^T, 0]]); for sigma_i it is about eps sigma_1^2 / sigma_i (eps = 2.2e-16). Values
    between the two ends have relative errors of about eps (sigma_1 / sigma_i)^2. Rank-deficient and ill-conditioned
    matrices are split, see `gram`. A matrix whose checks (`extremes.objection`) fail even so is solved again by `svd`,
    which `log` reports. With K <= 2 m, `first` finds all triplets if K is `LARGE` or more; otherwise `svd` does,
    without a line in the log.

    `svd`: `torch.linalg.svd` in float64, errors of about eps sigma_1 everywhere.

    The result of a matrix on a CPU does not depend on its neighbours, on `cpu_threads` or on the number of cores.

    Args:
        stack: any real dtype and device. A matrix with a NaN or an infinity gives NaN, and `solver` "none".
        m: triplets wanted from each end; fewer where K is smaller.
        solver: see above.
        cpu_threads: how many matrices are solved at once, on a CPU only.
        cancelled: called before every matrix (CPU) or stack; True ends the work.
        log: called with a line when a matrix is not solved as asked.
        guard: how many vectors after the first m go into `Solved.start`, where they cost little: on a CPU, with gram64.
            No other number depends on it.

    Raises:
        Cancelled: `cancelled()` was true.
    """
    if cancelled():
        raise Cancelled
    n, rows, cols = stack.matrices_NRC.shape
    k = min(rows, cols)
    m = min(m, k)
    if k == 0:
        empty = Triplets(np.empty(0), np.empty((rows, 0)), np.empty((cols, 0)), np.empty(0))
        return {name: Solved(np.empty(0), empty, empty, 0.0, solver) for name in stack.names}
    with torch.no_grad():
        scales = scales_of(stack.matrices_NRC)
        by_gram: Sequence[tuple[Solved, str] | None] = [None] * n
        if solver == "svd" or (2 * m >= k and k < LARGE):
            pass
        elif 2 * m >= k:
            threads = 1 if cuda_path(stack.matrices_NRC) else cpu_threads  # another thread works on another stream
            by_gram = side_by_side(partial(_all_of, stack, scales, m, cancelled), range(n), threads)
        elif cuda_path(stack.matrices_NRC):
            by_gram = _gram_on_device(stack.matrices_NRC, m, scales)
        else:
            by_gram = _gram_on_cpu(stack.matrices_NRC, m, scales, cpu_threads, cancelled, guard)
        solved: dict[str, Solved] = {}
        for name, matrix, scale, found in zip(stack.names, stack.matrices_NRC, scales, by_gram, strict=True):
            if not np.isfinite(scale):
                log(f"spectra of {name}: the matrix holds a NaN or an infinity, so its values are NaN")
                solved[name] = not_finite((rows, cols), m)
            elif found is not None and not found[1]:
                solved[name] = _scaled(found[0], scale)
            else:
                if cancelled():
                    raise Cancelled
                note = found[1] if found is not None else ""
                if note:
                    log(f"spectra of {name}: {note}; solved by float64 SVD instead")
                solved[name] = replace(_scaled(_svd(as_float64(matrix, scale), m, turn=bool(note)), scale), note=note)
    dtype = stack.matrices_NRC.dtype
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else EPS
    starts = {name: start_of(one.s, one.top) if one.start is None else one.start for name, one in solved.items()}
    return {name: replace(one, eps=eps, start=starts[name]) for name, one in solved.items()}


def solve(
    weights: Mapping[str, Tensor], m: int, solver: Solver = "gram64", *, cpu_threads: int = 1
) -> dict[str, Solved]:
    """`solve_stack` for matrices of any shapes, in the order of `weights`. Raises `ValueError` for a tensor not 2-D."""
    solved: dict[str, Solved] = {}
    for stack in stack_by_shape(weights):
        solved |= solve_stack(stack, m, solver, cpu_threads=cpu_threads)
    return {name: solved[name] for name in weights}


def first_triplets(
    name: str, matrix_RC: Tensor, count: first.Count, *, log: Callable[[str], object] = LOG.warning
) -> Solved:
    """All values of a matrix, and as many of the first triplets as `count` asks for, up to all; see `first`.

    The result has no triplets of the last values. A matrix that fails its checks is solved by an SVD, which `log`
    reports. On a CPU the bits depend neither on the number of cores nor on torch's threads.

    The first values are those of the triplets, accurate to their certificates. The others are roots of the Gram
    matrix's eigenvalues, which are accurate to about 1e-16 sigma_1^2. Sums of squares keep that accuracy, but a value
    of 0 may come out as 2e-8 sigma_1.

    Args:
        name: for the log.
        matrix_RC: any real dtype and device. With a NaN or an infinity the result is NaN, without triplets.
        count: gets the values (K,), descending, and returns how many triplets are wanted, 0 to K. May be called twice.
        log: see above.
    """
    with torch.no_grad():
        (scale,) = scales_of(matrix_RC[None])
        shape = (matrix_RC.shape[0], matrix_RC.shape[1])
        if not np.isfinite(scale):
            log(f"spectra of {name}: the matrix holds a NaN or an infinity, so its values are NaN")
            return not_finite(shape, 0)
        found, note = _first_of(matrix_RC, float(scale), lambda values: count(values * scale))
        if note:
            log(f"spectra of {name}: {note}; solved by float64 SVD instead")
            values = _svd(as_float64(matrix_RC, float(scale)), min(shape), turn=True, ends=1)
            m = count(values.s * scale) if np.isfinite(values.s).all() else 0
            found = replace(values, top=values.top.pick(list(range(m))), note=note)
    return _scaled(found, float(scale))


def _first_of(matrix_RC: Tensor, scale: float, count: first.Count) -> tuple[Solved, str]:
    """The first triplets of one matrix over its scale, on its device; and an objection, empty if all checks passed."""
    try:
        if cuda_path(matrix_RC):
            return first.solve_on_device(as_float64(matrix_RC, scale), count)
        with one_blas_thread():
            return first.solve_matrix(float64_numpy(matrix_RC, scale), count)
    except np.linalg.LinAlgError as error:
        note = str(error)
    except torch.linalg.LinAlgError as error:
        note = f"no convergence ({error})"
    return not_finite((matrix_RC.shape[0], matrix_RC.shape[1]), 0), note


def all_values(matrices_NRC: Tensor, cpu_threads: int = 1) -> np.ndarray:
    """The singular values of each matrix (N, K), descending, of any dtype and device; NaN where one is not finite.

    From the eigenvalues of the Gram matrix in float64: absolute errors of the squares are about eps sigma_1^2.
    """
    with torch.no_grad():
        scales = scales_of(matrices_NRC)
        usable = np.isfinite(scales)
        result = np.full((len(scales), min(matrices_NRC.shape[1:])), np.nan)
        if not cuda_path(matrices_NRC):

            def one(i: int) -> np.ndarray:
                a_RC = float64_numpy(matrices_NRC[i], scales[i])
                return gram.all_values(a_RC) * scales[i] if a_RC.size else np.empty(0)

            if found := side_by_side(one, np.flatnonzero(usable).tolist(), cpu_threads):
                result[usable] = found
        elif usable.any():
            divided, divisors = divided_by(matrices_NRC, scales)
            values = torch.linalg.eigvalsh(gram_stack(divided)).clamp_min(0.0).sqrt().flip(-1).cpu().numpy()
            result[usable] = (values * divisors[:, None])[usable]
    return result


def scales_of(matrices_NRC: Tensor) -> np.ndarray:
    """A power of two above the greatest entry of each, so that no square overflows; inf where one is not finite."""
    if cuda_path(matrices_NRC):
        low, high = torch.aminmax(matrices_NRC.flatten(1), dim=1)
        greatest = torch.maximum(low.abs(), high.abs()).double().cpu().numpy()
    else:  # on a CPU `aminmax` along a dimension takes 20 times as long
        ends = (torch.aminmax(matrix) for matrix in matrices_NRC)
        greatest = np.array([float(torch.maximum(low.abs(), high.abs())) for low, high in ends])
    return powers_above(greatest)


def powers_above(greatest: np.ndarray) -> np.ndarray:
    """A power of two above each of these numbers, with an exact inverse; inf for numbers that are not finite."""
    _, exponent = np.frexp(greatest)
    scales = np.ldexp(1.0, np.clip(exponent, -1021, 1023))
    return np.where(np.isfinite(greatest), scales, np.inf)


def as_float64(matrix: Tensor, scale: float) -> Tensor:
    """The matrix over `scale`, exactly, as contiguous float64."""
    return (matrix.double() / scale).contiguous()


def divided_by(matrices_NRC: Tensor, scales: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Every matrix over its scale, and the divisors, float64 (N,).

    A matrix that is not finite becomes zeros, so that no solver meets a NaN. Weights of usual size need no scaling and
    no copy: they are returned as they are, with divisors of 1.
    """
    usable = np.isfinite(scales)
    if usable.all() and (np.abs(np.log2(scales)) < 100).all():
        return matrices_NRC, np.ones(len(scales))
    divisors = np.where(usable, scales, 1.0)
    bad, factors = (torch.from_numpy(x).to(matrices_NRC.device)[:, None, None] for x in (~usable, divisors))
    return (matrices_NRC.double() / factors).masked_fill(bad, 0.0), divisors


def _scaled(solved: Solved, scale: float) -> Solved:
    def of(t: Triplets) -> Triplets:
        return replace(t, s=t.s * scale, certificate=t.certificate * scale)

    return replace(solved, s=solved.s * scale, top=of(solved.top), last=of(solved.last))


def _gram_on_cpu(
    matrices_NRC: Tensor, m: int, scales: np.ndarray, cpu_threads: int, cancelled: Callable[[], bool], guard: int
) -> list[tuple[Solved, str] | None]:
    guard = guard if 2 * m + guard < min(matrices_NRC.shape[1:]) else 0

    def one(i: int) -> tuple[Solved, str] | None:
        if cancelled():
            raise Cancelled
        if not np.isfinite(scales[i]):
            return None
        try:
            return refine.solve_matrix(float64_numpy(matrices_NRC[i], scales[i]), m, guard)
        except np.linalg.LinAlgError as error:
            return not_finite((matrices_NRC.shape[1], matrices_NRC.shape[2]), m), str(error)

    return side_by_side(one, range(len(matrices_NRC)), cpu_threads)


def float64_numpy(matrix: Tensor, scale: float = 1.0) -> np.ndarray:
    """`as_float64` as a numpy array. In another thread torch would start a second team of threads for the copy.

    `scale` is a power of two, so that its inverse is exact.
    """
    a_RC = as_numpy(matrix).astype(np.float64, order="C")
    return a_RC if scale == 1 else np.multiply(a_RC, 1 / scale, out=a_RC)


def as_numpy(matrix: Tensor) -> np.ndarray:
    """A view of a float32 or float64 tensor on a CPU; any other type as float32."""
    return matrix.numpy() if matrix.dtype in (torch.float32, torch.float64) else matrix.float().numpy()


def side_by_side(one: Callable[[S], T], items: Iterable[S], cpu_threads: int) -> list[T]:
    """`one` of each item, in their order, with one BLAS thread each; `cpu_threads` of them at once."""
    with one_blas_thread():
        if cpu_threads == 1:
            return [one(item) for item in items]
        with ThreadPoolExecutor(cpu_threads, thread_name_prefix="spectral-solve") as pool:
            return list(pool.map(one, items))


def _gram_on_device(matrices_NRC: Tensor, m: int, scales: np.ndarray) -> list[tuple[Solved, str] | None]:
    divided, divisors = divided_by(matrices_NRC, scales)
    try:
        found = refine.solve_stack(divided, m)
    except torch.linalg.LinAlgError as error:
        return [(not_finite((divided.shape[1], divided.shape[2]), m), f"no convergence ({error})")] * len(scales)
    # The result for the matrix over its scale, whatever the divisor was: the caller multiplies by the scale.
    factors = divisors / np.where(np.isfinite(scales), scales, 1.0)
    return [(_scaled(solved, factor), note) for (solved, note), factor in zip(found, factors, strict=True)]


def _all_of(
    stack: MatrixStack, scales: np.ndarray, m: int, cancelled: Callable[[], bool], i: int
) -> tuple[Solved, str] | None:
    """The ends of one matrix from all its triplets; None where checks fail or the indices are not proven."""
    if cancelled():
        raise Cancelled
    if not np.isfinite(scales[i]):
        return None
    solved, note = _first_of(stack.matrices_NRC[i], float(scales[i]), len)
    return None if note or not solved.index else (first.both_ends(solved, m), "")


def _svd(a_RC: Tensor, m: int, turn: bool, ends: int = 2) -> Solved:
    """The reference: a full float64 SVD, its ends or the first end alone, certified in the same way.

    `turn` takes the SVD of a wide matrix's transpose, which is several times faster and gives other bits.
    """
    with one_torch_thread(a_RC):
        try:
            if turn and a_RC.shape[0] < a_RC.shape[1]:
                v, s, uh = torch.linalg.svd(a_RC.mT.contiguous(), full_matrices=False)
                u, vh = uh.mT, v.mT
            else:
                u, s, vh = torch.linalg.svd(a_RC, full_matrices=False)
        except torch.linalg.LinAlgError as error:
            return replace(not_finite((a_RC.shape[0], a_RC.shape[1]), m), note=f"no convergence ({error})")
        error = svd_error(a_RC, u, s, vh)
        k = s.numel()
        columns = torch.cat([torch.arange(m), torch.arange(k - 1, k - m - 1, -1)][:ends]).to(a_RC.device)
        u, v, values = u[:, columns], vh.mT[:, columns], s[columns]
        ahead = torch.linalg.vector_norm(a_RC @ v - u * values, dim=0)
        back = torch.linalg.vector_norm(a_RC.mT @ u - v * values, dim=0)
        eye = torch.eye(m, dtype=torch.float64, device=a_RC.device)
        halves = [x[:, part] for x in (u, v) for part in (slice(m), slice(m, None))[:ends]]
        off = max(float((x.mT @ x - eye).abs().max()) for x in halves)
    allowance = EPS * max(a_RC.shape) ** 0.5 * s[0]
    certificate = torch.sqrt((ahead**2 + back**2) / 2) + allowance
    values_np, u_np, v_np, certificate_np = (x.cpu().numpy() for x in (values, u, v, certificate))
    both, s_K = Triplets(values_np, u_np, v_np, certificate_np), s.cpu().numpy()
    solved = Solved(s_K, both.pick(list(range(m))), both.pick(list(range(m, ends * m))), off, "svd")
    return replace(solved, index=index_is_proven(solved, s_K - error, s_K + error))


def svd_error(a_RC: Tensor, u_RK: Tensor, s_K: Tensor, vh_KC: Tensor) -> float:
    """A bound of the absolute errors of an SVD's values; see `index.enclosure`."""
    z_KP = torch.from_numpy(probes(s_K.numel())).to(a_RC)
    back_CP, image_RP = vh_KC.mT @ z_KP, u_RK @ z_KP
    off = [matrix @ image - z_KP for matrix, image in ((vh_KC, back_CP), (u_RK.mT, image_RP))]
    differences = [a_RC @ back_CP - u_RK @ (s_K[:, None] * z_KP), *(part * s_K[0] for part in off)]
    return sum(enclosure(part.cpu().numpy()) for part in differences)


@contextmanager
def one_torch_thread(a_RC: Tensor) -> Generator[None]:
    """On a CPU, use one torch thread: LAPACK's bits depend on their number, and the monitor's worker has one."""
    threads = torch.get_num_threads()
    if cuda_path(a_RC) or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
