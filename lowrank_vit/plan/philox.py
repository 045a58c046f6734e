"""Philox4x32-10, a counter-based random generator, and the few distributions that the plan needs; in numba.

A draw is a pure function of (key, counter): nothing has to be drawn before it and nothing is remembered after it.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the reference
implementation and its known-answer vectors are those of Random123 1.14.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_TO_UNIT = 2.0**-32
Word = int | np.uint64
"""A word of a counter."""


class Stream:
    """The last counter word, so that no two uses share a draw. Values are part of the reproducible stream.

    Plain numbers: with enumerations each call of compiled code takes 30 microseconds more.
    """

    ORDER = 0
    CROP = 1
    FLIP = 2
    MIX = 3
    VFLIP = 4
    OPS = 5
    JITTER = 6
    ERASE = 7
    MIX_SAMPLE = 8
    INTERPOLATION = 9
    LABEL = 10
    SUBSET = 11
    ORDER_KEYS = 12
    SUBSET_KEYS = 13


@njit(cache=True, inline="always")
def philox(key: Word, c0: Word, c1: Word, c2: Word, c3: Word) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Ten rounds of Philox4x32.

    `key` is a uint64, its low 32 bits the first key word; `c0..c3` are 32-bit counter words.
    Returns four uint64, each below 2**32.
    """
    c0, c1, c2, c3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    k0, k1 = np.uint64(key) & _LOW, np.uint64(key) >> _32
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


LAST_ID = 2**32 - 1
"""The greatest id of a sample."""


@njit(cache=True, inline="always")
def counter_of(sample: np.int64, stream: int) -> tuple[np.uint64, np.uint64]:
    """The counter's words for a sample's number, and for the use of a draw.

    If a sample comes several times in an epoch, `sample` has the number of the repetition, from 0, above the lower 32
    bits; it is moved above the stream's bits.
    """
    return np.uint64(sample) & _LOW, np.uint64(stream) + (np.uint64(sample) >> _32 << np.uint64(8))


@njit(cache=True, inline="always")
def to_unit(word: np.uint64) -> float:
    """A 32-bit word as a float64 strictly inside (0, 1)."""
    return (np.float64(word) + 0.5) * _TO_UNIT


@njit(cache=True, inline="always")
def to_below(word: np.uint64, bound: int) -> np.int64:
    """A 32-bit word as an int64 in [0, bound); the bias is below bound / 2**32."""
    return np.int64((np.uint64(word) * np.uint64(bound)) >> _32)


@njit(cache=True)
def _gamma(key: np.uint64, alpha: float, draw: int, step: Word, epoch: int, stream: Word) -> tuple[float, int]:
    """One Gamma(alpha, 1) draw and the next free draw counter: Marsaglia and Tsang, ACM TOMS 26 (2000).

    For alpha < 1 their boost Gamma(alpha + 1) * U**(1 / alpha) is used, in logarithms. Returns (log of the draw, draw).
    """
    shape = alpha if alpha >= 1.0 else alpha + 1.0
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        w0, w1, w2, w3 = philox(key, draw, step, epoch, stream)
        draw += 1
        normal = math.sqrt(-2.0 * math.log(to_unit(w0))) * math.cos(2.0 * math.pi * to_unit(w1))  # Box-Muller
        v = (1.0 + c * normal) ** 3
        if v > 0.0 and math.log(to_unit(w2)) < 0.5 * normal * normal + d - d * v + d * math.log(v):
            log_gamma = math.log(d * v)
            if alpha < 1.0:
                log_gamma += math.log(to_unit(w3)) / alpha
            return log_gamma, draw


@njit(cache=True)
def beta(key: np.uint64, alpha: float, step: Word, epoch: int, stream: Word) -> float:
    """One Beta(alpha, alpha) draw in [0, 1] from the counters (1.., step, epoch, stream); alpha > 0."""
    log_x, draw = _gamma(key, alpha, 1, step, epoch, stream)
    log_y, _ = _gamma(key, alpha, draw, step, epoch, stream)
    return 1.0 / (1.0 + math.exp(min(log_y - log_x, 700.0)))
