"""Matrices with known spectra, and small models, for the tests of the spectral room."""

from __future__ import annotations

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer


def orthonormal(rows: int, cols: int, seed: int) -> np.ndarray:
    """Haar-distributed orthonormal columns, float64."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, cols)))
    return q * np.sign(np.diag(r))


def with_spectrum(s: np.ndarray, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """A float64 matrix with these singular values, to rounding."""
    return torch.from_numpy((orthonormal(rows, s.size, seed) * s) @ orthonormal(cols, s.size, seed + 1).T)


def low_rank_and_noise(rows: int, cols: int, s: np.ndarray, noise: float, seed: int = 0) -> torch.Tensor:
    """`with_spectrum` plus independent normal entries of this deviation, float64."""
    entries = np.random.default_rng(seed + 2).standard_normal((rows, cols))
    return with_spectrum(s, rows, cols, seed) + torch.from_numpy(noise * entries)


def of_rank(rank: int, rows: int, cols: int) -> torch.Tensor:
    """A product of float32 factors, whose rounding fills what the rank leaves."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, cols, generator=generator)


def nasty(k: int) -> dict[str, torch.Tensor]:
    """Matrices with values below what one Gram matrix tells, K = k."""
    i, sine_of_angle = np.arange(k), np.sin(1.2)
    kahan = np.diag(sine_of_angle**i) @ (np.eye(k) - np.cos(1.2) * np.triu(np.ones((k, k)), 1))
    laeuchli = {e: torch.cat([torch.ones(1, k), e * torch.eye(k)]).double() for e in (1e-3, 1e-7, 1e-9, 1e-12)}
    rows, half = torch.zeros(3 * k, k), torch.randn(k, k, generator=torch.Generator().manual_seed(1))
    rows[[1, 5, 9, 20, 33]], half[:, ::2] = half[:5], 0.0
    cases = {
        "kahan": torch.from_numpy(kahan),
        "hilbert": torch.from_numpy(1 / (i[:, None] + i[None, :] + 1.0)),
        **{f"laeuchli {e}": matrix for e, matrix in laeuchli.items()},
        "graded to 1e-8": with_spectrum(np.geomspace(1, 1e-8, k), k, 2 * k),
        "graded to 1e-12": with_spectrum(np.geomspace(1, 1e-12, k), 2 * k, k),
        "four clusters": with_spectrum(np.repeat([1, 1e-3, 1e-6, 1e-9], k // 4), k, k),
        "a cluster and three": with_spectrum(np.repeat([1, 1e-9], [k - 3, 3]), k, k),
        "three and a cluster": with_spectrum(np.repeat([1, 1e-5], [3, k - 3]), 2 * k, k),
        "all ones": torch.ones(2 * k, k),
        "five nonzero rows": rows,
        "half the columns": half,
        "bfloat16": of_rank(8, 2 * k, k).bfloat16(),
        "1e200": 1e200 * of_rank(8, 2 * k, k).double(),
        "1e-200": 1e-200 * of_rank(8, k, 2 * k).double(),
    }
    for rank in (1, 2, 8, k // 4 + 1, k // 2, k - 9, k - 1):
        for name, shape in {"tall": (3 * k, k), "square": (k, k), "wide": (k, 3 * k)}.items():
            cases[f"rank {rank}, {name}"] = of_rank(rank, *shape)
    return cases


def sine(a: np.ndarray, b: np.ndarray) -> float:
    """Sine of the largest principal angle between the column spaces of two orthonormal matrices."""
    return float(np.linalg.norm(a - b @ (b.T @ a), 2))


def tiny_vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, proj_drop_rate=0.1
    )
