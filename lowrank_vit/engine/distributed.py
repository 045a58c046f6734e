"""The processes of one run: who is who, what they tell one another, and that they end together.

Started by torchrun (or anything that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT). Beside torch's
collectives the ranks share a small store, read by a thread of each rank: in it a rank notes that it failed, which ends
the others even while they wait in a collective.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from data_prep.errors import UserError, exit_cleanly

T = TypeVar("T")

_JOIN_TIMEOUT = timedelta(minutes=10)
_POLL_S = 0.25
_ONLY_OURS_S = 20.0
"""After so long without rank 0's failing, too, an early failure is this rank's own."""
_AGREE_S, _AGREE_UPDATES = 2.0, 1000
_FAILED = "failed"


@dataclass
class World:
    """This process among those of the run. Alone by default, where every call is free."""

    rank: int = 0
    local_rank: int = 0
    """Among the processes of this machine; the number of its GPU."""
    size: int = 1
    local_size: int = 1
    store: Any = None
    """torch.distributed.Store of this attempt, None for one process."""
    _signal: int = 0
    _next_agreement: int = 0
    _agreed_at: tuple[float, int] = (0.0, 0)
    """When, and after which update, the ranks last agreed on whether to stop."""
    _is_failing: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and speaks for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> None:
        """Add up `values` over all ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)

    def average_buffers(self, module: nn.Module) -> None:
        """Make running statistics (BatchNorm's), which each rank has of its own share, those of all; as timm does."""
        for buffer in module.buffers():
            if self.size > 1 and buffer.is_floating_point():
                self.sum(buffer)
                buffer /= self.size

    def from_first(self, value: T | None) -> T:
        """Rank 0's value (anything that can be pickled) on every rank."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]

    def ask_to_stop(self, number: int) -> None:
        """Have the run end because of the signal of that number, once all ranks know. Safe in a signal handler."""
        self._signal = number

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether this rank was; the others need not know yet."""
        return self._signal > 0

    def stops_after(self, num_updates: int) -> bool:
        """Whether all ranks end here, because one of them was asked to. Every rank calls it after every update.

        They agree about every two seconds of training, by the host's network, so that no step waits for it and a stop
        comes well within the 30 s that torchrun leaves after SIGTERM. At the same updates on every rank, since all
        reckon with the slowest one's time.
        """
        if self.size == 1:
            return self.is_asked_to_stop
        if num_updates < self._next_agreement:
            return False
        now, (then, update) = time.monotonic(), self._agreed_at
        mine = [float(self._signal), (now - then) / max(1, num_updates - update)]
        common = torch.tensor(mine, dtype=torch.float64)  # on the CPU whatever the device
        torch.distributed.all_reduce(common, torch.distributed.ReduceOp.MAX)
        number, update_s = common.tolist()
        self._signal = int(number)
        self._agreed_at = now, num_updates
        self._next_agreement = num_updates + max(1, min(_AGREE_UPDATES, int(_AGREE_S / update_s)))
        return self.is_asked_to_stop

    @property
    def stop_reason(self) -> str:
        """The signal's name, e.g. SIGTERM; empty without one."""
        return signal.Signals(self._signal).name if self._signal else ""

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While it lasts a thread reads the store, and ends the process when another rank has failed."""
        is_over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(self.store.clone(), is_over), name="ranks", daemon=True)
        thread.start()
        try:
            yield
        finally:
            # It must not be inside torch's C++ code when the interpreter ends: that aborts the process.
            is_over.set()
            thread.join()

    def _watch(self, store: Any, is_over: threading.Event) -> None:
        with contextlib.suppress(RuntimeError):  # the store goes away with the run
            while not is_over.wait(_POLL_S):
                if store.check([_FAILED]) and not self._is_failing:
                    os._exit(1)  # the main thread may sit in a collective that never ends

    def is_first_to_fail(self) -> bool:
        """Note that this rank fails; whether no other did before, whose doing this may be then."""
        self._is_failing = True
        if self.store is None:
            return True
        with contextlib.suppress(RuntimeError):
            return self.store.compare_set(_FAILED, "", str(self.rank)).decode() == str(self.rank)
        return False  # the store is gone, and with it rank 0


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
    return World(rank, local_rank, size, _number("LOCAL_WORLD_SIZE", 1))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise UserError(f"{name}={text} in the environment is no number. torchrun sets it.") from None


@contextlib.contextmanager
def joined(world: World, device: torch.device) -> Iterator[World]:
    """The world with its ranks joined for collectives: NCCL on CUDA, Gloo on the CPU. Raises `UserError`."""
    if world.size == 1:
        yield world
        return
    import torch.distributed as dist

    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_JOIN_TIMEOUT))
    except (RuntimeError, OSError, ValueError) as error:  # dist.DistNetworkError among them
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"Rank {world.rank} cannot meet the others at {where}: {_first_line(error)}. If another program has that "
            "port, start torchrun with --master-port N or --standalone."
        ) from error
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Restarts of one job meet in one store, so each has names of its own.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"torch/{attempt}", store),
        rank=rank,
        world_size=size,
        timeout=_JOIN_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    world.store = dist.PrefixStore(f"lowrank_vit/{attempt}", store)
    with world.watched():
        yield world
        dist.barrier()
    dist.destroy_process_group()  # not after an error: another rank may be stuck


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def exit_together(main: Callable[[], None], world: World) -> None:
    """`exit_cleanly` for one of several ranks: only the first to fail says why, and the others end with it."""
    if world.size == 1:
        exit_cleanly(main)
        return
    try:
        main()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        _fail(error, world)


def _fail(error: BaseException, world: World) -> NoReturn:
    is_joined, code = world.store is not None, 1
    if not is_joined and not world.is_first:
        # Most likely a mistake on the command line, which all ranks meet: rank 0 says so, and torchrun then ends us.
        time.sleep(_ONLY_OURS_S)
    if not is_joined or world.is_first_to_fail():
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)  # for torchrun's own summary, which comes last
        code = _speak(_named(error, world) if is_joined else error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # other threads may sit in a collective that never ends


def _named(error: BaseException, world: World) -> BaseException:
    """The error with the rank it happened on, and in the user's words where another rank is gone."""
    lost = isinstance(error, RuntimeError) and re.search(r"(?i)connection (closed|reset|refused)|gloo|nccl", str(error))
    if lost:
        return UserError(
            f"rank {world.rank}: another rank is gone without a word ({_first_line(error)}). It may have been killed, "
            "for example for want of memory; see the system's log. Go on from the last checkpoint with --resume."
        )
    return UserError(f"rank {world.rank}: {error}") if isinstance(error, UserError) else error


def _speak(error: BaseException) -> int:
    """Print as `exit_cleanly` does; the exit code."""

    def again() -> NoReturn:
        raise error

    try:
        exit_cleanly(again)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as unexpected:
        sys.excepthook(type(unexpected), unexpected, unexpected.__traceback__)
    return 1
