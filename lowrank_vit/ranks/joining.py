"""How the processes of one run find one another: by the launcher's environment, in torch's store, under one name.

Started by torchrun, or anything that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.terminal import say
from lowrank_vit.ranks.world import World

JOIN_LIMIT = timedelta(minutes=10)
_COLLECTIVE_LIMIT = timedelta(minutes=10)
_RESOLVE_S = 5.0
"""Time for a name to become known: a cluster's may come a little later than the process."""
_POLL_S = 0.05
_FIRST_LINE_S, _NEXT_LINE_S = 20.0, 60.0
_LEFT_OVER = (
    "Unset WORLD_SIZE, which may be left over in the environment, or start with torchrun --nproc-per-node=N -m "
    "lowrank_vit.train ..."
)


def environment_world() -> World:
    """This process's place as its launcher's environment tells it, not yet joined with the others.

    Raises `UserError` for an environment that is incomplete or contradicts itself.
    """
    size = _number("WORLD_SIZE", 1, least=1)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set. Start several processes with torchrun "
            "--nproc-per-node=N -m lowrank_vit.train ..., or unset WORLD_SIZE."
        )
    if size == 1 and not os.environ.get("WORLD_SIZE"):
        return World()
    rank = _number("RANK", 0, below=size, of="WORLD_SIZE")
    here = _number("LOCAL_WORLD_SIZE", size, least=1, below=size + 1)
    local_rank = _number("LOCAL_RANK", 0, below=here, of="LOCAL_WORLD_SIZE" if here < size else "WORLD_SIZE")
    _number("MASTER_PORT", 1, least=1, below=2**16)
    return World() if size == 1 else World(rank, local_rank, size)


def _number(name: str, default: int, *, least: int = 0, below: int | None = None, of: str = "") -> int:
    """A whole number of the environment in its range; `of`: the variable that says where that ends."""
    text = os.environ.get(name, "")
    try:
        number = int(text) if text else default
    except ValueError:
        raise UserError(f"{name}={text} in the environment is no number. torchrun sets it. {_LEFT_OVER}") from None
    if number >= least and (below is None or number < below):
        return number
    limit = f"with {of}={below} " if of else ""
    most = "" if below is None else f" and at most {below - 1}"
    raise UserError(f"{name}={number} in the environment: {limit}it must be at least {least}{most}. {_LEFT_OVER}")


@contextlib.contextmanager
def joined(world: World, device: torch.device, limit: timedelta = JOIN_LIMIT) -> Generator[World]:
    """Join the world's ranks for collectives: NCCL on CUDA, Gloo on the CPU. Raises `UserError`.

    The ranks are waited for up to `limit`; a line says so after 20 seconds, and then once a minute.
    """
    if world.size == 1:
        yield world
        return
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    _require_address(address, port)
    meeting = _Meeting(world.rank, world.size)
    try:
        with saying(lambda: f"{meeting.waits_for()} at {where}. {_LEFT_OVER}"):
            store = _open_store(world, limit)
            attempt = meeting.meet(store, limit)
    except (RuntimeError, OSError, ValueError) as error:  # dist.DistNetworkError among them
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"Rank {world.rank} cannot meet the others at {where}: {_first_line(error)}. If another program has that "
            f"port, start torchrun with --master-port N or --standalone. {_LEFT_OVER}"
        ) from error
    world.store = dist.PrefixStore(f"lowrank_vit/{attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"torch/{attempt}", store),
            rank=world.rank,
            world_size=world.size,
            timeout=_COLLECTIVE_LIMIT,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"Rank {world.rank} has met the others at {where}, but cannot be connected with them by {backend}: "
            f"{_first_line(error)}. Check the network between the nodes; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
            "choose the interface."
        ) from error
    yield world
    dist.destroy_process_group()  # not after an error: another rank may be stuck


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _require_address(name: str, port: int) -> None:
    """Raise `UserError` where the name does not resolve, which torch would try again until its time is over."""
    end = time.monotonic() + _RESOLVE_S
    while True:
        try:
            socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            if time.monotonic() < end:
                time.sleep(1.0)
                continue
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"MASTER_ADDR={name} in the environment is no address that {socket.gethostname()} can find ({reason}). "
                f"Check the name. {_LEFT_OVER}"
            ) from error
        return


def _open_store(world: World, limit: timedelta) -> Any:
    """Open the store at MASTER_ADDR:MASTER_PORT, of torchrun's agent or of rank 0, as torch's own rendezvous does.

    But no rank waits here until as many as it has ranks have come, whoever they are.
    """
    import torch.distributed as dist

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = world.is_first and not is_of_agent
    if not is_server:
        _until(lambda: _answers(*address), limit, lambda: "nobody answers there")
    return dist.TCPStore(
        *address,
        world.size,
        is_master=is_server,
        timeout=limit,
        wait_for_workers=False,
        multi_tenant=not is_of_agent,
    )


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_RESOLVE_S).close()
    except OSError:
        return False
    return True


def _until(is_so: Callable[[], bool], limit: timedelta, otherwise: Callable[[], str]) -> None:
    """Wait in Python, where Ctrl-C is heard, not in torch's store. Raises `RuntimeError` after the limit."""
    end = time.monotonic() + limit.total_seconds()
    while not is_so():
        if time.monotonic() > end:
            raise RuntimeError(otherwise())
        time.sleep(_POLL_S)


@contextlib.contextmanager
def saying(line: Callable[[], str]) -> Generator[None]:
    """While the context lasts, have a thread print a line after 20 seconds, and then once a minute."""
    is_over = threading.Event()

    def speak() -> None:
        wait_s = _FIRST_LINE_S
        while not is_over.wait(wait_s):
            with contextlib.suppress(RuntimeError):  # the store is gone: whoever waits says so
                say(line())
            wait_s = _NEXT_LINE_S

    thread = threading.Thread(target=speak, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class _Meeting:
    """The ranks of one attempt agree on a name that all of them share and no other attempt has.

    The agents' store outlives an attempt, and torch counts restarts per agent: those that were there from the
    beginning and one that came later do not agree on the number, and none of them counts a change of membership. So
    rank 0 makes up a name and tells it to each rank that asks, under a name of that rank's own; what an earlier attempt
    has left in the store is no answer to it.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._missing = set(range(1, size)) if rank == 0 else {0}
        self._began = time.monotonic()

    def waits_for(self) -> str:
        """What this rank waits for, in words."""
        few = sorted(self._missing)[:8]
        more = ", ..." if len(self._missing) > len(few) else ""
        who = f"rank{'s' if len(few) > 1 else ''} {', '.join(map(str, few))}{more} of {self._size}"
        seconds = time.monotonic() - self._began
        return f"rank {self._rank} on {socket.gethostname()} has waited {seconds:.0f} s for {who}"

    def meet(self, store: Any, limit: timedelta) -> str:
        """The name. Raises `RuntimeError` where not all have come within the limit."""
        mine = secrets.token_hex(8)
        if self._rank > 0:
            store.set(f"asks/{self._rank}", mine)
            _until(lambda: store.check([f"answer/{mine}"]), limit, self.waits_for)
            attempt = store.get(f"answer/{mine}").decode()
            store.set(f"met/{attempt}/{self._rank}", "")
            return attempt
        answered = dict[int, bytes]()

        def have_come() -> bool:
            for other in sorted(self._missing):
                if store.check([f"asks/{other}"]) and answered.get(other) != (asks := store.get(f"asks/{other}")):
                    answered[other] = asks
                    store.set(f"answer/{asks.decode()}", mine)
                if store.check([f"met/{mine}/{other}"]):
                    self._missing.discard(other)
            return not self._missing

        _until(have_come, limit, self.waits_for)
        return mine


def meet(store: Any, rank: int, size: int, limit: timedelta = JOIN_LIMIT) -> str:
    """A name for this attempt that all its ranks share and no other has; every rank calls it."""
    return _Meeting(rank, size).meet(store, limit)
