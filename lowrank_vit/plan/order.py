"""The order of an epoch: a permutation of all samples, of which any part can be computed at once.

Up to `MOST_SORTED` samples are sorted by random numbers, which always takes all of them. In a larger set a keyed
permutation tells which sample is at a place: any part of any epoch, in a time that depends only on this part's size.

It is a Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations", SIAM J. Comput. 17, 1988) over
the R rows and C columns of a grid instead of two words of bits; both are near the square root of N, and R * C is below
N + R. So results outside the set, which are permuted again until one is inside, are rare (Black and Rogaway, "Ciphers
with arbitrary finite domains", CT-RSA 2002: generalised Feistel cipher, cycle-walking). Philox keys the rounds. A
chi-square test of pairs tells four or six rounds from random permutations, but not eight (tested).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numba import njit

from lowrank_vit.plan.philox import Stream, philox

OrderName = Literal["keyed", "sorted"]
"""keyed: sets of more than `MOST_SORTED` samples by a keyed permutation; sorted: all sets by sorting."""
MOST_SORTED = 1 << 16
ROUNDS = 8

_KEYS_OF = {Stream.ORDER: Stream.ORDER_KEYS, Stream.SUBSET: Stream.SUBSET_KEYS}
_32 = np.uint64(32)
_FIRST, _SECOND, _29 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(29)


@dataclass(frozen=True)
class Order:
    """A permutation of the numbers below `num_samples`."""

    num_samples: int
    keys: np.ndarray
    """uint64 (ROUNDS,): the keys of a keyed permutation."""
    all: np.ndarray | None = None
    """uint32 (N,): the number at each place, in a permutation made by sorting."""

    @classmethod
    def of(cls, key: np.uint64, num_samples: int, epoch: int, stream: int, name: OrderName) -> Order:
        """The permutation of an epoch, for one use of the order."""
        if name == "keyed" and num_samples > MOST_SORTED:
            return cls(num_samples, round_keys(key, ROUNDS, epoch, _KEYS_OF[stream]))
        # Uniform up to ties, less likely than N**2 / 2**65.
        sorted_ids = np.argsort(_random_numbers(key, num_samples, epoch, stream), kind="stable")
        return cls(num_samples, np.empty(0, np.uint64), sorted_ids.astype(np.uint32))

    def at(self, places: np.ndarray) -> np.ndarray:
        """The numbers at `places` (int64, below N): int64, of the same shape."""
        if self.all is not None:
            return self.all[places].astype(np.int64)
        return permuted(self.keys, self.num_samples, np.ascontiguousarray(places).ravel()).reshape(places.shape)

    def without(self, bad: Collection[int], places: np.ndarray) -> np.ndarray:
        """As `at`, but each of the `bad` is replaced by the next number in the order that is not bad."""
        ids = self.at(places)
        if not len(bad) or len(bad) >= self.num_samples:
            return ids
        left_out = np.fromiter(bad, np.int64, len(bad))
        while len(rows := np.flatnonzero(np.isin(ids, left_out))):
            places = places.copy()
            places[rows] = (places[rows] + 1) % self.num_samples
            ids[rows] = self.at(places[rows])
        return ids


def subset(seed: int, num_samples: int, count: int, order: OrderName = "keyed") -> np.ndarray:
    """The ids of `count` samples that stand for all: int64, ascending; all of them if there are not more.

    A smaller count gives a part of the same samples.
    """
    places = np.arange(min(count, num_samples))
    return np.sort(Order.of(np.uint64(seed), num_samples, 0, Stream.SUBSET, order).at(places))


@njit(cache=True)
def permuted(keys: np.ndarray, num_samples: int, places: np.ndarray) -> np.ndarray:
    """int64 (B,): the numbers that the keyed permutation of N, of `len(keys)` rounds, has at `places`, int64 (B,)."""
    rows, columns = grid(num_samples)
    R, C, N = np.uint64(rows), np.uint64(columns), np.uint64(num_samples)
    ids = np.empty(len(places), np.int64)
    for n in range(len(places)):
        number = np.uint64(places[n])
        while True:
            row = number // C
            column = number - row * C
            for k in range(0, len(keys), 2):
                row += (_scrambled(column, keys[k]) * R) >> _32
                row -= R if row >= R else np.uint64(0)
                column += (_scrambled(row, keys[k + 1]) * C) >> _32
                column -= C if column >= C else np.uint64(0)
            number = row * C + column
            if number < N:
                break
        ids[n] = number
    return ids


@njit(cache=True)
def grid(num_samples: int) -> tuple[int, int]:
    """Rows and columns of a grid with at least N places, and fewer than N + rows."""
    rows = int(math.sqrt(num_samples))
    while rows * rows < num_samples:
        rows += 1
    return rows, -(-num_samples // rows)


@njit(cache=True, inline="always")
def _scrambled(half: np.uint64, key: np.uint64) -> np.uint64:
    """32 bits: SplitMix64's finaliser of the sum (Steele, Lea, Flood, OOPSLA 2014), without its last steps."""
    word = half + key
    word = (word ^ (word >> _32)) * _FIRST
    return ((word ^ (word >> _29)) * _SECOND) >> _32


@njit(cache=True)
def round_keys(key: np.uint64, rounds: int, epoch: int, stream: int) -> np.ndarray:
    """uint64 (rounds,): the keys of the rounds, an even number of them."""
    keys = np.empty(rounds, np.uint64)
    for draw in range(rounds // 2):
        w0, w1, w2, w3 = philox(key, draw, 0, epoch, stream)
        keys[2 * draw], keys[2 * draw + 1] = (w0 << _32) | w1, (w2 << _32) | w3
    return keys


@njit(cache=True)
def _random_numbers(key: np.uint64, num_samples: int, epoch: int, stream: int) -> np.ndarray:
    numbers = np.empty(num_samples, np.uint64)
    for i in range(num_samples):
        w0, w1, _, _ = philox(key, 0, i, epoch, stream)
        numbers[i] = (w0 << _32) | w1
    return numbers
