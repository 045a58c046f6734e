"""Numbers read off one spectrum. Pure numpy; `s` is always all K singular values, float64, descending."""

from __future__ import annotations

import numpy as np


def recorded_indices(rank: int, topk: int, interval: int) -> tuple[list[int], list[int]]:
    """Which singular values are logged one by one, as 1-based indices into a descending spectrum of `rank` values.

    Returns:
        (from the top, from the end): 1, 1+interval, 1+2*interval, ... and rank, rank-interval, ...; `topk` of each,
        fewer where the spectrum is too short. The two may overlap.

    Raises:
        ValueError: an argument is below 1.
    """
    if min(rank, topk, interval) < 1:
        raise ValueError(f"rank, topk and interval must be at least 1, got {rank}, {topk}, {interval}")
    top = list(range(1, rank + 1, interval))[:topk]
    return top, [rank + 1 - index for index in top]


def stable_rank(s: np.ndarray) -> float:
    """|W|_F^2 / sigma_1^2 = sum_i sigma_i^2 / sigma_1^2, between 1 and K (Rudelson & Vershynin 2007).

    0 for a zero matrix, NaN when any value is NaN.
    """
    relative = _relative_to_first(s)
    return float(np.sum(relative**2))


def effective_rank(s: np.ndarray) -> float:
    """exp(H(p)) with p_i = sigma_i / sum_j sigma_j and H the Shannon entropy in nats, between 1 and K.

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. The weights are the
    singular values themselves, not their squares. 0 for a zero matrix (undefined there), NaN when any value is NaN.
    """
    relative = _relative_to_first(s)
    total = float(np.sum(relative))
    if total == 0.0:
        return 0.0
    p = relative / total
    p = p[p != 0.0]  # 0 log 0 = 0; a NaN passes and makes the result NaN
    return float(np.exp(-np.sum(p * np.log(p))))


def spectrum_metrics(s: np.ndarray, topk: int, interval: int) -> dict[str, float]:
    """The scalars logged for one matrix at one refresh.

    Args:
        s: (K,) all singular values, descending.
        topk, interval: see `recorded_indices`.

    Returns:
        "sigma_max"; "sv1".."sv<topk>", the recorded values from the top in order (sv2 is sigma_2 at interval 1,
        sigma_11 at interval 10); "sv_last1".."sv_last<topk>" likewise from the end (sv_last1 is the smallest);
        "stable_rank"; "effective_rank". Fewer sv keys where the spectrum is short. All NaN for a NaN spectrum.

    Raises:
        ValueError: an empty or not one-dimensional spectrum, or an argument below 1.
    """
    if s.ndim != 1 or s.size == 0:
        raise ValueError(f"expected a non-empty one-dimensional spectrum, got shape {s.shape}")
    top, last = recorded_indices(s.size, topk, interval)
    values = {"sigma_max": float(s[0])}
    values |= {f"sv{k}": float(s[index - 1]) for k, index in enumerate(top, start=1)}
    values |= {f"sv_last{k}": float(s[index - 1]) for k, index in enumerate(last, start=1)}
    return values | {"stable_rank": stable_rank(s), "effective_rank": effective_rank(s)}


def _relative_to_first(s: np.ndarray) -> np.ndarray:
    """S / sigma_1, so that squares neither overflow nor vanish; zeros for a zero matrix."""
    return s / s[0] if s[0] != 0.0 else np.zeros_like(s)
