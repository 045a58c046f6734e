"""How the processes of a run find each other: by the launcher's environment, in torch's store, under one name.

Started by torchrun, or anything that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import secrets
import socket
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

import torch

from lowrank_vit.common.devices import cuda_path
from lowrank_vit.common.errors import UserError, in_short
from lowrank_vit.ranks.agent import agent, has_ended
from lowrank_vit.ranks.agree import OfRank, Record, agree, differences
from lowrank_vit.ranks.signs import USUAL, Limits
from lowrank_vit.ranks.waiting import saying, until
from lowrank_vit.ranks.world import World, connect_ring

ALONE = "LRV_JOIN_ALONE"
"""If this environment variable is 1, a single process also makes collectives and averages gradients."""
_LATER = timedelta(minutes=5)
_RESOLVE_S = 5.0
"""Time for a host name to resolve: in a cluster this may take a little longer than the start."""
_AGENT_S = 10.0
"""Time for torchrun's store to answer. It exists before any rank, so without an answer its agent has ended."""
_OTHER_DESCRIPTORS = 512
"""Files, pipes and connections of a rank besides those of the store; more than observed in training."""
_LEFT_OVER = (
    "Unset WORLD_SIZE, which may be left over in the environment, or start with torchrun --nproc-per-node=N -m "
    "lowrank_vit.train ..."
)
_SIZE = "the number of ranks"
# The parts of a heterogeneous job only have the first of these in common.
JOB_IDS = ("SLURM_HET_JOB_ID", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
_OWN_PORTS = (
    "Give each job a port of its own (MASTER_PORT, or torchrun's --master-port). One run over several jobs of a batch "
    "system needs torchrun with --rdzv-id=NAME."
)


def environment_world() -> World:
    """This process's place by its launcher's environment, not yet joined with the others.

    Raises `UserError` for an environment that is incomplete or contradicts itself.
    """
    size = _number("WORLD_SIZE", 1, least=1)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set. Start several processes with torchrun "
            "--nproc-per-node=N -m lowrank_vit.train ..., or unset WORLD_SIZE."
        )
    joins_alone = os.environ.get(ALONE) == "1"
    if size == 1 and not os.environ.get("WORLD_SIZE"):
        return World(joins_alone=joins_alone)
    rank = _number("RANK", 0, below=size, of="WORLD_SIZE")
    here = _number("LOCAL_WORLD_SIZE", size, least=1, below=size + 1)
    local_rank = _number("LOCAL_RANK", 0, below=here, of="LOCAL_WORLD_SIZE" if here < size else "WORLD_SIZE")
    _number("MASTER_PORT", 1, least=1, below=2**16)
    return World(joins_alone=joins_alone) if size == 1 else World(rank, local_rank, size, local_size=here)


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
def joined(
    world: World,
    device: torch.device,
    record: Callable[[], Record] = dict,
    limits: Limits = USUAL,
) -> Generator[World]:
    """Join the world's ranks for collectives: NCCL on CUDA, Gloo on the CPU. Raises `UserError`.

    The ranks are waited for as long as `limits` says of the start; a line says so after 20 seconds, and then once a
    minute. torch's own limit of a collective, which cannot tell a slow rank from a lost one, is later than both. What
    `record` says of each must be the same, see `agree`.
    """
    if not world.is_joined:
        yield world
        return
    import torch.distributed as dist

    if world.size == 1:
        _connect(world, device, dist.HashStore(), limits)
    else:
        _join(world, device, record, limits)
    yield world
    dist.destroy_process_group()  # not after an error, since another rank may be stuck


def _join(world: World, device: torch.device, record: Callable[[], Record], limits: Limits) -> None:
    import torch.distributed as dist

    limit = world.start_limit = timedelta(seconds=limits.init_s)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    _require_address(address, port)
    meeting = _Meeting(world.rank, world.size, job_record(world.size), where)
    try:
        with saying(meeting.waits_for):
            store = _open_store(world, limit)
            attempt = meeting.meet(store, limit)
            world.launch = launch_name(store)
    except (RuntimeError, OSError, ValueError) as error:  # dist.DistNetworkError among them
        if isinstance(error, UserError):
            raise
        raise OfRank(
            f"Rank {world.rank} cannot meet the others at {where}: {in_short(error)}. If another program has that "
            f"port, start torchrun with --master-port N or --standalone. {_LEFT_OVER}",
            world.rank,
        ) from error
    world.store = dist.PrefixStore(f"lowrank_vit/{attempt}", store)
    world.store.set(f"host/{world.rank}", socket.gethostname())
    agree(world, "run", record, "its start")
    try:
        _connect(world, device, dist.PrefixStore(f"torch/{attempt}", store), limits)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"Rank {world.rank} has met the others at {where}, but cannot be connected with them by "
            f"{_backend(device)}: {in_short(error)}. Check the network between the nodes; GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME choose the interface."
        ) from error


def _connect(world: World, device: torch.device, store: Any, limits: Limits) -> None:
    """Make the group of all ranks. On CUDA what it sends comes before all else there, as the step waits for it.

    By Gloo a rank is connected with those alone that it sends to, not with all. That takes the store, which may be lost
    before the ranks have ended, so the connections are made here.
    """
    import torch.distributed as dist

    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    dist.init_process_group(
        _backend(device),
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=max(limits.init_s, limits.rank_s)) + _LATER,
        device_id=device if cuda_path(device) else None,
    )
    connect_ring(dist.group.WORLD)
    dist.broadcast(torch.zeros(1), src=0)
    world.side  # noqa: B018


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if cuda_path(device) else "gloo"


def job_record(size: int) -> Record:
    """What the launcher tells of the job that this process is of, the most telling first, see `another_job`."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    ids = {"--rdzv-id": "" if run_id == "none" else run_id, **{name: os.environ.get(name, "") for name in JOB_IDS}}
    told = {_SIZE: str(size), **{name: text for name, text in ids.items() if text}}
    return {name: (text, text) for name, text in told.items()}


def another_job(theirs: Record, ours: Record) -> str:
    """The difference that shows, as text, that two processes belong to different runs; empty if there is none.

    The first number that both have decides. One that was started by hand on its node lacks those of a batch system.
    torchrun's --rdzv-id is before those, so that one run may span several jobs.
    """
    common = [name for name in ("--rdzv-id", *JOB_IDS) if name in ours and name in theirs]
    compared = (_SIZE, *common[:1])
    return differences(
        {name: texts for name, texts in theirs.items() if name in compared},
        {name: texts for name, texts in ours.items() if name in compared},
    )


def launch_name(store: Any) -> str:
    """A random name, which the first rank that asks puts into the store: torchrun's agents' outlives an attempt.

    torchrun's own --rdzv-id is `none` unless one is given, and may be the same in launches that have nothing in common.
    """
    return store.compare_set("lowrank_vit/launch", "", secrets.token_hex(8)).decode()


def _require_address(name: str, port: int) -> None:
    """Raise `UserError` if the name does not resolve, which torch would retry until its time limit."""
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
    if is_server:
        _allow_connections(world.size)
    may_take = timedelta(seconds=_AGENT_S) if is_of_agent else limit
    if not is_server and not until(lambda: _answers(*address), may_take, world.size):
        if not is_of_agent:
            raise RuntimeError("nobody answers there")
        raise OfRank(
            f"torchrun's store at {address[0]}:{address[1]} does not answer rank {world.rank} on "
            f"{socket.gethostname()}: the agent that has it is gone, or that port cannot be reached from here. Start "
            "torchrun again.",
            world.rank,
        )
    return dist.TCPStore(
        *address,
        world.size,
        is_master=is_server,
        timeout=limit,
        wait_for_workers=False,
        multi_tenant=not is_of_agent,
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
    )


def _allow_connections(size: int) -> None:
    """Allow this process, which has the store, two connections with each rank besides its own files."""
    needed, (soft, hard) = 2 * size + _OTHER_DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(most, soft), hard))
        if most < needed:
            raise OfRank(
                f"{size} ranks need {needed} open files in the process of rank 0, on {socket.gethostname()}, and its "
                f"limit is {hard}. Raise it there (ulimit -Hn {needed}).",
                0,
            )


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_RESOLVE_S).close()
    except OSError:
        return False
    return True


class _Meeting:
    """The ranks of one attempt agree on a name that all of them share and no other attempt has.

    The agents' store outlives an attempt, and torch counts restarts per agent: those that were there from the
    beginning and one that came later do not agree on the number, and none of them counts a change of membership. So
    rank 0 makes up a name and tells it to each rank that asks, under a name of that rank's own; what an earlier attempt
    has left in the store is no answer to it. A process of another job, which has the same port, is told so instead.

    A rank asks anew each time it looks for the answer, and is answered only when it has done so: a question may outlive
    who asked it. And a rank may outlive its agent, so it looks after that, too, lest it take its successor's place.
    """

    def __init__(self, rank: int, size: int, job: Record, where: str) -> None:
        self._rank, self._size, self._job, self._where = rank, size, job, where
        self._missing = set(range(1, size)) if rank == 0 else {0}
        self._agent = agent()
        self._turned_away = dict[int, str]()
        self._asked = dict[str, Any]()
        """How often each asking rank had asked when rank 0 saw it first."""
        self._answered = set[str]()
        self._began = time.monotonic()

    def waits_for(self) -> str:
        """What this rank waits for, as a phrase."""
        few = sorted(self._missing)[:8]
        more = ", ..." if len(self._missing) > len(few) else ""
        who = f"rank{'s' if len(few) > 1 else ''} {', '.join(map(str, few))}{more} of {self._size}"
        waited = f"{time.monotonic() - self._began:.0f} s for {who} at {self._where}"
        others = "".join(list(self._turned_away.values())[-1:])
        return f"rank {self._rank} on {socket.gethostname()} has waited {waited}.{others} {_LEFT_OVER}"

    def meet(self, store: Any, limit: timedelta) -> str:
        """The name. Raises `RuntimeError` if not all ranks come within the limit, `UserError` in another job."""
        mine = secrets.token_hex(8)
        if self._rank == 0:
            self._receive(store, mine, limit)
            return mine
        asking = {"token": mine, "host": socket.gethostname(), "job": self._job}
        times = itertools.count()

        def is_answered() -> bool:
            self._require_agent()
            if store.check([f"answer/{mine}"]):
                return True
            store.set(f"asks/{self._rank}", json.dumps({**asking, "times": next(times)}))
            return False

        if not until(is_answered, limit, self._size):
            raise RuntimeError(self.waits_for())
        answer = json.loads(store.get(f"answer/{mine}"))
        if foreign := answer["foreign"]:
            raise OfRank(
                f"Rank {self._rank} on {socket.gethostname()} has met rank 0 of another job at {self._where}: "
                f"{foreign}. {_OWN_PORTS}",
                self._rank,
            )
        if store.add(f"met/{answer['attempt']}/{self._rank}", 1) > 1:
            raise OfRank(
                f"Two processes have come to {self._where} as rank {self._rank}, the second on "
                f"{socket.gethostname()}: {_OWN_PORTS}",
                self._rank,
            )
        return answer["attempt"]

    def _receive(self, store: Any, attempt: str, limit: timedelta) -> None:
        """Answer the ranks that ask until all have met."""
        asking = set[int]()

        def key(rank: int) -> str:
            return f"asks/{rank}"

        def have_come() -> bool:
            self._require_agent()
            asking.update(rank for rank in range(1, self._size) if rank not in asking and store.check([key(rank)]))
            texts = store.multi_get([key(rank) for rank in asking]) if asking else ()
            for rank, told in zip(asking, texts, strict=True):
                self._answer(store, attempt, rank, told)
            for rank in [rank for rank in self._missing if store.check([f"met/{attempt}/{rank}"])]:
                self._missing.discard(rank)
                self._turned_away.pop(rank, None)
            return not self._missing

        if not until(have_come, limit, self._size):
            raise RuntimeError(self.waits_for())

    def _answer(self, store: Any, attempt: str, rank: int, asks: bytes) -> None:
        try:
            told = json.loads(asks)
            token, times, host = told["token"], told["times"], told["host"]
            foreign = another_job(told["job"], self._job)
        except (ValueError, TypeError, KeyError):  # an earlier version of this program asks in another format
            if rank in self._missing:
                self._turned_away[rank] = f" One that came as rank {rank} runs another version of this program."
            return
        if token in self._answered or self._asked.setdefault(token, times) == times:
            return
        self._answered.add(token)
        if foreign and rank in self._missing:
            self._turned_away[rank] = f" One that came as rank {rank}, on {host}, is of another job: {foreign}."
        store.set(f"answer/{token}", json.dumps({"attempt": attempt, "foreign": foreign}))

    def _require_agent(self) -> None:
        if self._agent and has_ended(self._agent):
            raise OfRank(
                f"torchrun's agent on {socket.gethostname()} (process {self._agent.pid}) is gone, while rank "
                f"{self._rank} was waiting for the others. Start torchrun again.",
                self._rank,
            )


def meet(store: Any, rank: int, size: int, limit: timedelta = timedelta(hours=1)) -> str:
    """A name for this attempt that all its ranks share and no other attempt has; all ranks call it."""
    return _Meeting(rank, size, job_record(size), "the store").meet(store, limit)
