"""The processes of one run: who is who, how they meet, and what they tell one another.

Started by torchrun (or anything that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError

T = TypeVar("T")

_JOIN_TIMEOUT = timedelta(minutes=10)
_MEET_S = 0.05


@dataclass
class World:
    """This process among those of the run. Alone by default, where every call is free."""

    rank: int = 0
    local_rank: int = 0
    """Number among the processes of this machine, and of its GPU."""
    size: int = 1
    store: Any = None
    """torch.distributed.Store of this attempt, None for one process."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and speaks for all."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line about this process alone; that of a rank that does not speak for all begins with its number."""
        terminal.say(line if self.is_first else f"rank {self.rank}: {line}")

    def sum(self, values: Tensor) -> None:
        """Add up `values` over all ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)

    def least(self, value: Tensor) -> Tensor:
        """The least over all ranks of each element, as a new tensor."""
        least = value.clone()
        if self.size > 1:
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return least

    def greatest(self, *numbers: float) -> list[float]:
        """The greatest over all ranks of each number; by the host's network whatever the device."""
        common = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            torch.distributed.all_reduce(common, torch.distributed.ReduceOp.MAX)
        return common.tolist()

    def average_buffers(self, module: nn.Module) -> None:
        """Average running statistics (BatchNorm's) over the ranks, each of which has those of its share; as timm does.

        No other buffer: a constant is the same everywhere, and an average of three of it need not be.
        """
        for name, buffer in module.named_buffers():
            if self.size > 1 and name.endswith(("running_mean", "running_var")):
                self.sum(buffer)
                buffer /= self.size

    def from_first(self, value: T | None) -> T:
        """Rank 0's value (anything that can be pickled) on every rank."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's value (anything that can be pickled), by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def wait_for_all(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def channel(self, timeout: timedelta) -> Channel:
        """Make a channel among all ranks, which call this together.

        A rank that hangs fails the others' calls after `timeout`.
        """
        group = torch.distributed.new_group(backend="gloo", timeout=timeout) if self.size > 1 else None
        return Channel(self.rank, self.size, group)


class Channel:
    """The ranks of a `World` as a thread beside the main one talks with them, without a wait in a step or its stream.

    It goes over the host's network, in a Gloo group of its own. Every rank makes the same calls in the same order, from
    one thread. They raise `RuntimeError` where another rank has ended.
    """

    def __init__(self, rank: int, size: int, group: Any) -> None:
        """See `World.channel`. `group` None: alone."""
        self.rank, self.size, self._group = rank, size, group

    def exchange(self, number: int) -> list[int]:
        """Every rank's number (int64), by rank."""
        if self._group is None:
            return [number]
        found = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        torch.distributed.all_gather(found, torch.tensor([number]), group=self._group)
        return [int(n) for n in found]

    def gather(self, part: T) -> list[T] | None:
        """Every rank's part (anything that can be pickled) on rank 0, by rank; None on the others."""
        if self._group is None:
            return [part]
        parts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        torch.distributed.gather_object(part, parts, dst=0, group=self._group)
        return parts

    def signal(self, rank: int) -> None:
        """End that rank's `wait_for` this one."""
        torch.distributed.send(torch.zeros(1), dst=rank, group=self._group)

    def wait_for(self, rank: int) -> None:
        """Wait until that rank signals."""
        torch.distributed.recv(torch.zeros(1), src=rank, group=self._group)


def environment_world() -> World:
    """This process's place as torchrun's environment tells it, not yet joined with the others.

    Raises `UserError` for an incomplete environment.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return World()
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set. Start several processes with torchrun "
            "--nproc-per-node=N -m lowrank_vit.train ..., or unset WORLD_SIZE."
        )
    rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
    return World(rank, local_rank, size)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise UserError(f"{name}={text} in the environment is no number. torchrun sets it.") from None


@contextlib.contextmanager
def joined(world: World, device: torch.device) -> Generator[World, None, None]:
    """Join the world's ranks for collectives: NCCL on CUDA, Gloo on the CPU. Raises `UserError`."""
    if world.size == 1:
        yield world
        return
    import torch.distributed as dist

    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_JOIN_TIMEOUT))
        attempt = meet(store, rank, size)
    except (RuntimeError, OSError, ValueError) as error:  # dist.DistNetworkError among them
        reason = str(error).partition("\n")[0].rstrip(".")
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"Rank {world.rank} cannot meet the others at {where}: {reason}. If another program has that "
            "port, start torchrun with --master-port N or --standalone."
        ) from error
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"torch/{attempt}", store),
        rank=rank,
        world_size=size,
        timeout=_JOIN_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    world.store = dist.PrefixStore(f"lowrank_vit/{attempt}", store)
    yield world
    dist.destroy_process_group()  # not after an error: another rank may be stuck


def meet(store: Any, rank: int, size: int) -> str:
    """A name for this attempt that all its ranks share and no other has. Every rank calls it.

    The agents' store outlives an attempt, and torch counts restarts per agent: those that were there from the
    beginning and one that came later do not agree on the number, and none of them counts a change of membership. So
    rank 0 makes up a name and tells it to each rank that asks, under a name of that rank's own; what an earlier attempt
    has left in the store is no answer to it.
    """
    mine = secrets.token_hex(8)
    if rank > 0:
        store.set(f"asks/{rank}", mine)
        attempt = store.get(f"answer/{mine}").decode()
        store.add(f"met/{attempt}", 1)
        return attempt
    answered = dict[int, bytes]()
    end = time.monotonic() + _JOIN_TIMEOUT.total_seconds()
    while store.add(f"met/{mine}", 0) < size - 1:
        if time.monotonic() > end:
            raise RuntimeError(f"not all of {size} ranks have come")
        for other in range(1, size):
            if store.check([f"asks/{other}"]) and answered.get(other) != (asks := store.get(f"asks/{other}")):
                answered[other] = asks
                store.set(f"answer/{asks.decode()}", mine)
        time.sleep(_MEET_S)
    return mine
