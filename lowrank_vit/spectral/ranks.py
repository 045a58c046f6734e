"""Sharing the spectra's work among the ranks of a training run, in their worker threads and never in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

STOP = -1
"""What a rank without a snapshot tells the others when it ends."""


def share_out(shapes: Mapping[str, Sequence[int]], world_size: int) -> list[list[str]]:
    """Which names each rank computes: dearest first to the rank with the least work; the same on every rank.

    The cost of an (R, C) matrix is that of its Gram matrix and of the eigenvalues, L K^2 + 4/3 K^3 (L the long side, K
    the short one). Each list is in the order of `shapes`.
    """
    costs = {name: max(shape) * min(shape) ** 2 + 4 / 3 * min(shape) ** 3 for name, shape in shapes.items()}
    loads, owner = [0.0] * world_size, dict[str, int]()
    for name in sorted(costs, key=lambda name: -costs[name]):  # stable: equal costs stay in the model's order
        owner[name] = min(range(world_size), key=lambda rank: loads[rank])
        loads[owner[name]] += costs[name]
    return [[name for name in shapes if owner[name] == rank] for rank in range(world_size)]
