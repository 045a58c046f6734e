"""All singular values of many matrices at once: the fast way, and its slow twin.

Shape legend: N matrices of one shape, R rows, C columns, K = min(R, C) singular values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixStack:
    """Matrices of one shape, dtype and device, copied side by side: what the batched solver takes."""

    names: tuple[str, ...]
    matrices_NRC: Tensor


def stack_by_shape(weights: Mapping[str, Tensor]) -> list[MatrixStack]:
    """Copy the matrices into one stack for each (shape, dtype, device): few kernels, no wait for the device.

    Later changes of `weights` do not reach the stacks, so this is also how a snapshot is taken.

    Raises:
        ValueError: a tensor is not 2-D.
    """
    groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[str]] = {}
    for name, weight in weights.items():
        if weight.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected a matrix (2 dimensions)")
        groups.setdefault((weight.shape, weight.dtype, weight.device), []).append(name)
    with torch.no_grad():
        return [MatrixStack(tuple(names), torch.stack([weights[n] for n in names])) for names in groups.values()]


def solve_stack(stack: MatrixStack) -> dict[str, np.ndarray]:
    """Singular values of every matrix of one stack; see `singular_values` for the numbers and their error."""
    with torch.no_grad():
        values_NK = _gram_singular_values(stack.matrices_NRC).cpu().numpy()
    return dict(zip(stack.names, values_NK, strict=True))


def singular_values(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """All singular values of each matrix, as square roots of the eigenvalues of its Gram matrix.

    The Gram matrix on the short side (A^T A or A A^T, K x K) and its eigenvalues are computed in float64, batched by
    shape, on the device where the weights are. TF32 and autocast apply to 32-bit inputs only and cannot touch it.

    Error: the eigenvalues are right to about eps * sigma_1^2 (eps = 2.2e-16, times a modest function of the size),
    so sigma_i has a relative error of about eps * (sigma_1 / sigma_i)^2. The top values are exact to rounding; at
    sigma_i = 1e-5 sigma_1 six digits remain; anything below about 1e-8 sigma_1 is noise of that size, so an exactly
    rank-deficient matrix shows values near 1e-8 sigma_1 where the truth is 0. Where those matter use
    `singular_values_svd`.

    The same set of matrices on the same device (and thread count, on a CPU) gives the same bits.

    Args:
        weights: name to matrix (R, C), any real dtype and device, shapes may differ. Entries beyond about 1e150
            (float64 only) overflow the Gram matrix and count as not finite.

    Returns:
        Name to float64 array (K,) on the host, descending, in the order of `weights`. A matrix with a NaN or an
        infinity has NaN values; the others are unaffected.

    Raises:
        ValueError: a tensor is not 2-D.
    """
    solved: dict[str, np.ndarray] = {}
    for stack in stack_by_shape(weights):
        solved |= solve_stack(stack)
    return {name: solved[name] for name in weights}


def singular_values_svd(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The slow twin of `singular_values`: float64 `torch.linalg.svdvals`, one matrix after another.

    Accurate to about eps * sigma_1 in absolute terms, so also for the smallest values of a rank-deficient matrix.
    Same arguments, results and errors.
    """
    values: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        if weight.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected a matrix (2 dimensions)")
        matrix = weight.detach().double()
        if bool(torch.isfinite(matrix).all()):
            values[name] = torch.linalg.svdvals(matrix).cpu().numpy()
        else:
            values[name] = np.full(min(matrix.shape), np.nan)
    return values


def _gram_singular_values(matrices_NRC: Tensor) -> Tensor:
    n, rows, cols = matrices_NRC.shape
    k = min(rows, cols)
    gram_NKK = matrices_NRC.new_empty((n, k, k), dtype=torch.float64)
    # One product a matrix: a float64 copy of a whole stack would double the memory, and each is large enough alone.
    for matrix, gram in zip(matrices_NRC, gram_NKK, strict=True):
        a = matrix.double()
        torch.mm(a, a.T, out=gram) if rows < cols else torch.mm(a.T, a, out=gram)
    # Given a NaN an eigensolver may raise for the whole batch or return plausible numbers (LAPACK does): solve zeros
    # in its place and mark the answer. Done with masks, so that nothing here asks the device for a value.
    bad_N = ~torch.isfinite(gram_NKK).flatten(1).all(1)
    gram_NKK.masked_fill_(bad_N[:, None, None], 0.0)
    values_NK = torch.linalg.eigvalsh(gram_NKK).clamp_min_(0.0).sqrt_().flip(-1)
    return values_NK.masked_fill_(bad_N[:, None], torch.nan)
