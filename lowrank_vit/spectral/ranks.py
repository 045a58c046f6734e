"""Sharing the spectra's work among the ranks of a training run, in their worker threads and never in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

STOP = -1
"""What a rank without a snapshot tells the others when it ends."""


class Ranks(Protocol):
    """What the monitor's worker needs of the other ranks. Every call is made by all of them, in the same order."""

    rank: int
    world_size: int

    def exchange(self, held: int) -> list[int]:
        """Every rank's number, by rank."""
        ...

    def gather(self, part: T) -> list[T] | None:
        """Every rank's part on rank 0, by rank; None on the others."""
        ...


class OneRank:
    """A run of one process."""

    rank = 0
    world_size = 1

    def exchange(self, held: int) -> list[int]:
        """This rank's number."""
        return [held]

    def gather(self, part: T) -> list[T] | None:
        """This rank's part."""
        return [part]


class GlooRanks:
    """The ranks of torch's default process group, joined by a Gloo group of their own.

    Its traffic goes over the host's network from the worker threads, so neither the step's stream nor its collectives
    wait for it. Make it on every rank at the same place. A rank that ends without `STOP` fails the others' calls
    (`RuntimeError`) at once, one that hangs after `timeout_s`.
    """

    def __init__(self, timeout_s: float = 600.0) -> None:
        from datetime import timedelta

        import torch.distributed as dist

        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def exchange(self, held: int) -> list[int]:
        """Every rank's number, by rank."""
        import torch
        import torch.distributed as dist

        found = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(found, torch.tensor([held]), group=self._group)
        return [int(n) for n in found]

    def gather(self, part: T) -> list[T] | None:
        """Every rank's part on rank 0, pickled on the way."""
        import torch.distributed as dist

        parts: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(part, parts, dst=0, group=self._group)
        return parts


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
