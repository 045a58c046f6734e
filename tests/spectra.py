"""Matrices with known spectra, and small models, for the tests of the spectral room."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from lowrank_vit.spectral.solving.extremes import Solved


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


def sine(a: np.ndarray, b: np.ndarray) -> float:
    """Sine of the largest principal angle between the column spaces of two orthonormal matrices."""
    return float(np.linalg.norm(a - b @ (b.T @ a), 2))


def ends_of(solved: Solved, m: int) -> Solved:
    """What a solver of the first m values alone would give, of one that gave m triplets or more."""
    s = np.where(np.arange(solved.s.size) < m, solved.s, np.nan)
    top, last = solved.top.pick(list(range(m))), solved.last.pick([])
    frobenius = float(np.linalg.norm(solved.s))
    return replace(solved, s=s, top=top, last=last, thirds=None, solver="ends", full=False, frobenius=frobenius)


def tiny_vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, proj_drop_rate=0.1
    )
