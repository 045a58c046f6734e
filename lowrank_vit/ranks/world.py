"""The processes of one run: their ranks, and the collectives between them."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_vit.common import terminal
from lowrank_vit.ranks.signs import Progress

T = TypeVar("T")

_WANTED, _COMMON = "step wanted", "step in common"
"""Keys in torch's store."""
_SIGNAL, _PARTS = 0, 1
"""Tags of messages."""


class CommonStep:
    """A step at which all ranks agree soon after one of them requests it, without a wait in every step.

    The threads that watch the ranks (see `failing.py`) exchange through torch's store which step each rank ends next.
    The largest of these is the common step. No rank has passed it, and no rank passes the step that it has told before
    all are known, so all of them learn of it in time. It comes within one step, however slow steps are. Rank 0 reads
    the steps of all ranks, and tells the others the largest. There is one common step per run. The main thread calls
    `is_here`, the watching thread everything else.
    """

    def __init__(self) -> None:
        self.is_wanted = False
        """Set it to request the common step; safe in a signal handler."""
        self._steps = 0
        """Steps that the main thread has ended."""
        self._told: int | None = None
        self._common: int | None = None
        self._lock, self._is_decided = threading.Lock(), threading.Event()

    def is_here(self) -> bool:
        """Whether the step that ends here is the common one. All ranks call it after every step.

        It waits only if a common step was requested, until the threads of all ranks know.
        """
        with self._lock:
            self._steps += 1
            is_told = self._told is not None
        if not is_told:
            return False
        self._is_decided.wait()
        return self._steps == self._common

    def poll(self, store: Any, rank: int, size: int) -> None:
        """Exchange with the other ranks. Call it often; raises `RuntimeError` if the store is gone."""
        if self._is_decided.is_set():
            return
        if self._told is None:
            if self.is_wanted:
                store.set(_WANTED, "")
            elif not store.check([_WANTED]):
                return
            with self._lock:
                self._told = self._steps + 1
            store.set(f"step/{rank}", str(self._told))
        keys = [f"step/{other}" for other in range(size)] if rank == 0 else [_COMMON]
        if store.check(keys):
            common = max(map(int, store.multi_get(keys)))
            if rank == 0:
                store.set(_COMMON, str(common))
            self._common = common
            self._is_decided.set()

    def give_up(self) -> None:
        """Let the main thread continue, since the store is gone."""
        self._is_decided.set()


@dataclass
class World:
    """This process among those of the run. By default a single process, for which all calls cost nothing."""

    rank: int = 0
    local_rank: int = 0
    """Number among the processes of this machine, and index of its GPU."""
    size: int = 1
    store: Any = None
    """torch.distributed.Store of this attempt; None for one process."""
    progress: Progress = field(default_factory=Progress)
    """The progress of the main thread."""
    common_step: CommonStep = field(default_factory=CommonStep, compare=False)
    """The next step at which the ranks agree."""
    start_limit: timedelta = timedelta(hours=1)
    """Time limit for waits in the store; no limit while `Failing` watches late ranks."""
    local_size: int = 1
    """Number of the run's processes on this machine."""
    launch: str = ""
    """A name that all attempts of one launch share while torchrun's own store exists; empty for one process."""
    joins_alone: bool = False
    """Whether a single process also makes collectives and averages gradients, to test NCCL on one GPU."""
    _side: Channel | None = field(default=None, repr=False, compare=False)

    @property
    def is_joined(self) -> bool:
        """Whether there are collectives: with several processes, or with `joins_alone`."""
        return self.size > 1 or self.joins_alone

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and prints for all."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line about this process; on all ranks but the first it begins with the rank's number."""
        terminal.say(line if self.is_first else f"rank {self.rank}: {line}")

    def host(self, rank: int) -> str:
        """The name of a rank's machine, if it has told it."""
        key = f"host/{rank}"
        if self.store is None or not self.store.check([key]):
            return "a host not known yet"
        return self.store.get(key).decode(errors="replace")

    def sum(self, values: Tensor) -> None:
        """Sum `values` over all ranks, in place."""
        if self.is_joined:
            with self.progress.waiting():
                torch.distributed.all_reduce(values)

    def least(self, value: Tensor) -> Tensor:
        """The elementwise minimum over all ranks, as a new tensor."""
        least = value.clone()
        if self.is_joined:
            with self.progress.waiting():
                torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return least

    def greatest(self, *numbers: float) -> list[float]:
        """The maximum over all ranks of each number; always over the host's network."""
        common = torch.tensor(numbers, dtype=torch.float64)
        if self.is_joined:
            with self.progress.waiting():
                torch.distributed.all_reduce(common, torch.distributed.ReduceOp.MAX)
        return common.tolist()

    def average_buffers(self, module: nn.Module) -> None:
        """Average the running statistics of BatchNorm over the ranks, as timm does; each rank has those of its share.

        Other buffers are left alone: constants are the same everywhere, and averaging could change their last bits.
        """
        for name, buffer in module.named_buffers():
            if self.is_joined and name.endswith(("running_mean", "running_var")):
                self.sum(buffer)
                buffer /= self.size

    def from_first(self, value: T | None) -> T:
        """Rank 0's value (anything that can be pickled), on every rank."""
        if not self.is_joined:
            return value  # type: ignore[return-value]
        values = [value]
        with self.progress.waiting():
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]

    @property
    def side(self) -> Channel:
        """The ranks' own channel; its calls wait for the other ranks. All ranks must make the first access together.

        `joined` makes that access. One thread besides the main one may wait for a neighbour in it.
        """
        if self._side is None:
            self._side = self.channel(timedelta(days=365))
        return self._side

    def gather(self, value: T) -> list[T]:
        """Every rank's value (anything that can be pickled), by rank, on every rank; all must fit in its memory."""
        return self.from_first(self.gather_on_first(value))  # type: ignore[return-value]

    def gather_on_first(self, value: T) -> list[T] | None:
        """Every rank's value (anything that can be pickled), by rank, on the first rank; None on the others."""
        if not self.is_joined:
            return [value]
        with self.progress.waiting():
            return self.side.gather(value)

    def wait_for_all(self) -> None:
        """Wait until all ranks call this."""
        self.greatest(0.0)

    def channel(self, timeout: timedelta, *, agrees: bool = False) -> Channel:
        """Make a channel between all ranks; all of them must call this together.

        If a rank hangs, the others' calls fail after `timeout`. `agrees`: see `Channel.agree`.
        """

        def group() -> Any:
            return torch.distributed.new_group(backend="gloo", timeout=timeout) if self.is_joined else None

        channel = Channel(self.rank, self.size, group(), group() if agrees else None, self.progress)
        channel.connect()
        return channel


def collectives_begun() -> int:
    """The number of collectives that this rank has begun, including torch's own; see `World`.

    0 if torch does not count them. Safe in any thread.
    """
    group: Any = torch.distributed.group.WORLD
    try:
        return int(group._get_sequence_number_for_group())
    except (AttributeError, RuntimeError):
        return 0


class Channel:
    """Communication between the ranks of a `World` for a thread besides the main one, without a wait in a step.

    It uses its own Gloo group over the host's network. All ranks must make the same calls in the same order, from one
    thread. Calls raise `RuntimeError` if another rank has ended.

    A rank is connected with its two neighbours and its neighbours in a binomial tree, at most 2 + log2(size) ranks.
    """

    def __init__(
        self, rank: int, size: int, group: Any, main_group: Any = None, progress: Progress | None = None
    ) -> None:
        """See `World.channel`. `group` None: a single process. `main_group`: for `agree`; `progress`: of the main
        thread.
        """
        self.rank, self.size, self._group, self._main_group = rank, size, group, main_group
        self._progress = progress or Progress()

    def agree(self, number: int) -> Callable[[], int]:
        """Start to find the maximum of all ranks' numbers (int64); calling the returned function waits for it.

        For the main thread, while the other thread works; the channel must have been made with `agrees`.
        """
        if self._group is None:
            return lambda: number
        greatest = torch.tensor([number])
        work = torch.distributed.all_reduce(
            greatest, torch.distributed.ReduceOp.MAX, group=self._main_group, async_op=True
        )

        def wait() -> int:
            with self._progress.waiting():
                work.wait()  # type: ignore[union-attr]
            return int(greatest)

        return wait

    def connect(self) -> None:
        """Make the connections that later calls need, through the store; all ranks call it together."""
        if self._group is None:
            return
        self.gather(None)
        connect_ring(self._group)
        if self._main_group is not None:
            connect_ring(self._main_group)

    def gather(self, part: T, *, of: int | None = None) -> list[T] | None:
        """Every rank's part (anything that can be pickled), by rank, on rank 0; None on the others.

        Parts are passed up a binomial tree one at a time, so an inner rank holds at most one besides its own. `of`:
        only the first so many ranks take part; default: all.
        """
        if self._group is None:
            return [part]
        size, rank = self.size if of is None else max(1, min(of, self.size)), self.rank
        if rank >= size:
            return None
        parts, above, step = [part], rank & (rank - 1), 1
        if rank:
            self._send(_pickled(part), above)
        while rank % (2 * step) == 0 and rank + step < size:
            for _ in range(min(step, size - rank - step)):  # that rank and those below it
                data = self._receive(rank + step)
                if rank:
                    self._send(data, above)
                else:
                    parts.append(pickle.loads(data.numpy().data))
            step *= 2
        return None if rank else parts

    def _send(self, data: Tensor, rank: int) -> None:
        for one in (torch.tensor([data.numel()]), data):
            self._group.send([one], rank, _PARTS).wait()

    def _receive(self, rank: int) -> Tensor:
        size = torch.zeros(1, dtype=torch.int64)
        self._group.recv([size], rank, _PARTS).wait()
        data = torch.empty(int(size), dtype=torch.uint8)
        self._group.recv([data], rank, _PARTS).wait()
        return data

    def signal(self, rank: int) -> None:
        """End the other rank's `wait_for` this one."""
        self._group.send([torch.zeros(1)], rank, _SIGNAL).wait()

    def wait_for(self, rank: int) -> None:
        """Wait until that rank signals."""
        self._group.recv([torch.zeros(1)], rank, _SIGNAL).wait()


def connect_ring(group: Any) -> None:
    """Connect every rank of a Gloo group with its two neighbours, as its all-reduce does."""
    group.allreduce([torch.zeros(1)]).wait()


def _pickled(part: Any) -> Tensor:
    """The pickled part, uint8 (n,)."""
    buffer = io.BytesIO()
    pickle.dump(part, buffer, pickle.HIGHEST_PROTOCOL)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
