"""The Gram solver on a whole stack of matrices with torch's batched routines, for CUDA; runs on any device.

torch >= 2.14 has a batched `eigh` for large matrices on CUDA (cusolverDnXsyevBatched). Older versions loop over the
matrices inside the same call: slower, and still on the side stream and in the worker thread, so still hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_vit.spectral.extremes import Solved, assemble, objection


def solve_stack(matrices_NRC: Tensor, m: int) -> list[tuple[Solved, str]]:
    """As `gram_cpu.solve_matrix`, of every matrix of a stack of finite, scaled matrices of any float dtype.

    The left vectors come from a QR factorisation of the matrix times the basis, and an SVD of its small factor.
    """
    n, rows, cols = matrices_NRC.shape
    tall = rows >= cols
    squares_NK, basis_NKM = _ends_of_gram(matrices_NRC, m)
    image, back = [], []
    for matrix, basis in zip(matrices_NRC, basis_NKM, strict=True):  # no float64 copy of the whole stack
        tall_LK = matrix.double() if tall else matrix.double().T
        image.append(tall_LK @ basis)
    image_NLM = torch.stack(image)
    q, triangle = torch.linalg.qr(image_NLM)
    turn, s_NM, other = torch.linalg.svd(triangle)
    long_NLM, short_NKM = q @ turn, basis_NKM @ other.mT
    for matrix, long in zip(matrices_NRC, long_NLM, strict=True):
        tall_LK = matrix.double() if tall else matrix.double().T
        back.append(tall_LK.T @ long)
    ahead_NM = torch.linalg.vector_norm(image_NLM @ other.mT - long_NLM * s_NM[:, None], dim=1)
    back_NM = torch.linalg.vector_norm(torch.stack(back) - short_NKM * s_NM[:, None], dim=1)
    residual_NM = torch.sqrt((ahead_NM**2 + back_NM**2) / 2)
    eye = torch.eye(2 * m, dtype=torch.float64, device=s_NM.device)
    off_N = torch.stack([(x.mT @ x - eye).abs().amax((1, 2)) for x in (long_NLM, short_NKM)]).amax(0)
    frobenius_N = torch.stack([torch.linalg.vector_norm(a, dtype=torch.float64) ** 2 for a in matrices_NRC])
    u, v = (long_NLM, short_NKM) if tall else (short_NKM, long_NLM)
    host = [x.cpu().numpy() for x in (squares_NK.flip(-1), u, s_NM, v, residual_NM, off_N, frobenius_N)]
    results: list[tuple[Solved, str]] = []
    for squares, u_RM, s_M, v_CM, residual, off, frobenius in zip(*host, strict=True):
        solved = assemble(squares.clip(0.0) ** 0.5, u_RM, s_M, v_CM, residual, float(off))
        results.append((solved, objection(solved, squares, float(frobenius))))
    assert len(results) == n
    return results


def _ends_of_gram(matrices_NRC: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N, K), ascending, of the Gram matrices on the short side, and the 2 m outer vectors (N, K, M)."""
    squares_NK, vectors_NKK = torch.linalg.eigh(gram_stack(matrices_NRC))
    return squares_NK, torch.cat([vectors_NKK[..., :m], vectors_NKK[..., -m:]], dim=-1).contiguous()


def gram_stack(matrices_NRC: Tensor) -> Tensor:
    """A^T A or A A^T on the short side of each, float64 (N, K, K). TF32 and autocast touch 32-bit inputs only."""
    n, rows, cols = matrices_NRC.shape
    k = min(rows, cols)
    gram_NKK = matrices_NRC.new_empty((n, k, k), dtype=torch.float64)
    # One product a matrix: a float64 copy of a whole stack would double the memory, and each is large enough alone.
    for matrix, gram in zip(matrices_NRC, gram_NKK, strict=True):
        a = matrix.double()
        torch.mm(a, a.T, out=gram) if rows < cols else torch.mm(a.T, a, out=gram)
    return gram_NKK
