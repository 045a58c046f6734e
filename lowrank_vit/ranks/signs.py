"""Signs of life: each rank reports its progress through torch's store, and the ranks find whom they wait for.

All ranks go through the same program, so the rank that the others wait for is the one whose place in it is the
earliest; of those at one place, one that does not itself wait for others; of these, the one that has begun the fewest
collectives, since some stretches, as the backward pass, have collectives within. Times are counted while this process
runs: a job that is stopped for the night and continued is not late.

Of many ranks a few, spread over the nodes, read the signs of all, and tell the one that is stuck to say so. So all of
them together read no more than a small multiple of the number of ranks a second, and nothing while updates are made.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank_vit.common import threads
from lowrank_vit.common.errors import UserError
from lowrank_vit.ranks.waiting import pause_s

_PERIOD_S = 1.0
"""Time between two signs of a rank."""
_GAP_S = 2.0
"""Longer times between two polls do not count."""
_LINES_S = 60.0
"""Time between two lines about whom the ranks wait for while they start."""
_FRAMES = 12
"""Innermost frames of a stack that are shown."""
_FEW = 8
"""Ranks that a message names one by one."""
_JUDGES = 8
"""Number of ranks that read the signs of all, if there are more ranks."""


@dataclass(frozen=True)
class Limits:
    """How long the ranks wait for one that makes no progress, seconds."""

    rank_s: float = 600.0
    """In training: --rank-timeout."""
    init_s: float = 3600.0
    """Until the first update is done: --init-timeout."""
    is_training: bool = True
    """Whether there are checkpoints to continue from, and the two flags."""

    def advice(self, is_starting: bool) -> str:
        """What the user can do about a rank that is stuck."""
        if not self.is_training:
            return "Start it again."
        flag = "--init-timeout" if is_starting else "--rank-timeout"
        return f"Go on from the last checkpoint with --resume; if such a wait is to be expected, give a greater {flag}."


USUAL = Limits(is_training=False)
"""For commands without flags for them."""


@dataclass
class Progress:
    """The progress of this process's main thread, which sets it; other threads read it."""

    what: str = "starting"
    """The current work, in words that may follow "in"."""
    place: int = 0
    """Grows with each step of the program that all ranks take."""
    ticks: int = 0
    """Grows with this rank's own work, such as the batches of its share."""
    waits: bool = False
    """Whether it waits for the other ranks."""
    is_said: bool = False
    """Whether other code prints for whom."""
    is_starting: bool = True
    """Whether --init-timeout counts, which allows for compilers and disks."""
    is_background: bool = False
    """Whether it waits for another thread of this process, whose work counts as progress (see `common.threads`)."""
    least_limit_s: float = 0.0
    """It may take so long whatever the limits are, since it has its own time limit."""
    updates: Callable[[], int] = field(default=lambda: 0)
    """The updates done."""
    collectives: Callable[[], int] = field(default=lambda: 0)
    """The collectives that this rank has begun."""

    def enter(self, what: str, *, is_background: bool = False, least_limit_s: float = 0.0) -> None:
        """Start the next part of the program, which every rank reaches."""
        self.what, self.is_background, self.least_limit_s = what, is_background, least_limit_s
        self.place += 1

    def tick(self, *, is_compiled: bool = True) -> None:
        """Note that a piece of this rank's share is done and, with `is_compiled`, that compilation is finished."""
        self.ticks += 1
        if is_compiled:
            self.is_starting = False

    @contextlib.contextmanager
    def waiting(self, *, is_said: bool = False) -> Generator[None]:
        """Within the context the thread waits until all ranks have come here; `is_said`: another says for whom."""
        self.place += 1
        self.waits, self.is_said = True, is_said
        try:
            yield
        finally:
            self.waits = self.is_said = False
            self.place += 1

    def state(self) -> tuple[int, ...]:
        """Values that change whenever there is progress."""
        work = threads.beats() if self.is_starting or self.is_background else 0
        return self.place, self.ticks, self.waits, work


@dataclass(frozen=True)
class Sign:
    """The last report of a rank."""

    host: str
    at: str
    """Time of day on its host."""
    beat: int
    what: str
    place: int
    waits: bool
    collectives: int
    updates: int
    idle_s: float
    """Time without progress."""
    limit_s: float
    is_starting: bool
    stack: str = ""
    """The main thread's stack, once it has made no progress for long."""

    @property
    def key(self) -> tuple[int, bool, int]:
        """Sorts ranks by progress: smaller is earlier."""
        return self.place, self.waits, self.collectives

    def in_words(self) -> str:
        """Its current work as a phrase."""
        waits = "waiting for the other ranks in " if self.waits else ""
        return f"{waits}{self.what}" + (f", after update {self.updates}" if self.updates else "")


_UNHEARD = Sign("a host that is not known", "it started", 0, "starting", -1, False, 0, 0, 0.0, 0.0, True)
"""Stands for a rank that has not reported yet."""


class Signs:
    """Reports the signs of one rank, and judges those of all. Used by one thread, which calls `poll` often."""

    def __init__(
        self,
        progress: Progress,
        store: Any,
        rank: int,
        size: int,
        limits: Limits,
        *,
        say: Callable[[str], object],
        main_thread: int | None = None,
    ) -> None:
        """`store`: torch.distributed.Store, common to the ranks; `say` is told of waiting while the ranks start.

        `main_thread`: the identifier of the thread whose progress it is; default: the process's main one.
        """
        self._progress, self._store, self._rank, self._size, self._limits = progress, store, rank, size, limits
        self._say, self._main_thread = say, main_thread or threading.main_thread().ident
        self._period_s = pause_s(min(_PERIOD_S, limits.rank_s / 20, limits.init_s / 20), size)
        self._judges = {size * n // _JUDGES for n in range(_JUDGES)}
        self._host = socket.gethostname()
        self._polled_at: float | None = None
        self._since_sign_s = self._idle_s = 0.0
        self._state: tuple[int, ...] = ()
        self._beat, self._line_at_s = 0, _LINES_S
        self._seen: dict[int, Sign] = {}
        self._silent_s = dict.fromkeys(range(size) if rank in self._judges else (), 0.0)
        """Time for which a rank's sign was looked at and had no new beat."""
        self._looked = False

    @property
    def limit_s(self) -> float:
        """The current limit of time without progress, in seconds."""
        usual_s = self._limits.init_s if self._progress.is_starting else self._limits.rank_s
        return max(usual_s, self._progress.least_limit_s)

    def poll(self, now: float) -> UserError | None:
        """Report a sign if one is due. Returns the error to end with if the ranks have waited too long.

        `now`: seconds of any clock that is steady. Raises `RuntimeError` where the store is gone.
        """
        self._since_sign_s += self._count(now)
        if self._beat and self._since_sign_s < self._period_s:
            return None
        since_s, self._since_sign_s = self._since_sign_s, 0.0
        self._beat += 1
        sign = self._sign()
        self._store.set(f"sign/{self._rank}", json.dumps(asdict(sign)))
        self._arm()
        if self._idle_s < min(self.limit_s / 8, _LINES_S / 2):
            self._looked = False
            return None
        if self._rank not in self._judges:
            return self._judged(sign)
        self._look(since_s)
        self._seen[self._rank] = sign
        return self._judge()

    def alone(self, now: float) -> UserError | None:
        """The same without a store: judge only this rank."""
        self._count(now)
        return UserError(self._of_itself(self._sign())) if self._idle_s >= self.limit_s else None

    def _count(self, now: float) -> float:
        """Count the time since the last call, which it returns, as idle if there was no progress meanwhile."""
        # After a longer gap than usual this process itself was stopped: that is nobody's delay.
        passed_s = min(now - self._polled_at, _GAP_S) if self._polled_at is not None else 0.0
        self._polled_at, state = now, self._progress.state()
        if state != self._state:
            self._state, self._idle_s, self._line_at_s = state, 0.0, _LINES_S
        else:
            self._idle_s += passed_s
        return passed_s

    def disarm(self) -> None:
        """Undo what `poll` has set up; call it at the end."""
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        """Let C code print the stack if this thread cannot run because compiled code holds Python's lock."""
        with contextlib.suppress(Exception):  # stderr may not be a file
            faulthandler.dump_traceback_later(0.9 * self.limit_s, file=sys.__stderr__ or sys.stderr)

    def _sign(self) -> Sign:
        progress = self._progress
        stack = self._stack() if self._idle_s >= self.limit_s / 2 else ""
        return Sign(
            host=self._host,
            at=time.strftime("%H:%M:%S"),
            beat=self._beat,
            what=progress.what,
            place=progress.place,
            waits=progress.waits,
            collectives=progress.collectives(),
            updates=progress.updates(),
            idle_s=self._idle_s,
            limit_s=self.limit_s,
            is_starting=progress.is_starting,
            stack=stack,
        )

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main_thread or 0)  # pyright: ignore[reportPrivateUsage]
        return "".join(traceback.format_stack(frame, _FRAMES)) if frame else ""

    def _look(self, since_s: float) -> None:
        """Read the signs of all ranks."""
        keys = {rank: f"sign/{rank}" for rank in range(self._size)}
        if not self._store.check(list(keys.values())):  # otherwise multi_get would wait for missing ones
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        for rank, value in zip(keys, self._store.multi_get(list(keys.values())), strict=True):
            sign = Sign(**json.loads(value))
            is_new = rank not in self._seen or sign.beat != self._seen[rank].beat
            if is_new or not self._looked:
                self._silent_s[rank] = 0.0
            else:
                self._silent_s[rank] += since_s
            self._seen[rank] = sign
        for rank in self._silent_s.keys() - keys:
            self._silent_s[rank] = self._silent_s[rank] + since_s if self._looked else 0.0
        self._looked = True

    def _judge(self) -> UserError | None:
        signs = {rank: self._seen.get(rank, _UNHEARD) for rank in range(self._size)}
        earliest = min(sign.key for sign in signs.values())
        behind = [rank for rank, sign in signs.items() if sign.key == earliest]
        limit_s = max(signs[rank].limit_s for rank in behind) or self._limits.init_s
        # If one of them makes progress, that is enough: the others may wait for it, as for a lock on a folder.
        stuck_s = min(signs[rank].idle_s + self._silent_s[rank] for rank in behind)
        if stuck_s < limit_s:
            self._say_whom(signs, behind)
            return None
        silent = [rank for rank in behind if self._silent_s[rank] >= max(limit_s / 2, 3 * self._period_s)]
        heard = [rank for rank in silent or behind if rank not in silent]
        if heard and heard[0] == self._rank:
            if len(behind) == 1:
                return UserError(self._of_itself(signs[self._rank]))
            return UserError(self._of_several(signs, heard, limit_s))
        if heard and stuck_s < limit_s + max(2.0, limit_s / 10):
            if heard[0] not in self._judges:
                told = {"ranks": heard[:_FEW], "of": len(heard), "is_alone": len(behind) == 1, "limit_s": limit_s}
                self._store.set(f"stuck/{heard[0]}", json.dumps({**told, "key": signs[heard[0]].key}))
            return None  # it reports this itself, with its own name
        if silent:
            return UserError(self._of_silent(signs, silent, limit_s))
        return UserError(self._of_several(signs, heard, limit_s))

    def _judged(self, own: Sign) -> UserError | None:
        """The error to end with if a judging rank has told this one to, and there was no progress since."""
        key = f"stuck/{self._rank}"
        if self._idle_s < self.limit_s or not self._store.check([key]):
            return None
        told = json.loads(self._store.get(key))
        if tuple(told["key"]) != own.key:  # that was another time
            return None
        if told["is_alone"]:
            return UserError(self._of_itself(own))
        texts = self._store.multi_get([f"sign/{rank}" for rank in told["ranks"]])
        signs = {rank: Sign(**json.loads(text)) for rank, text in zip(told["ranks"], texts, strict=True)}
        return UserError(self._of_several(signs, told["ranks"], told["limit_s"], told["of"]))

    def _say_whom(self, signs: dict[int, Sign], behind: list[int]) -> None:
        """While the ranks start, the first of those that wait, and judge, says whom they wait for, once a minute."""
        waiting = [rank for rank in self._judges if signs[rank].waits]
        if (
            not self._progress.is_starting
            or self._progress.is_said
            or self._rank != min(waiting, default=-1)
            or self._rank in behind
        ):
            return
        if self._idle_s >= self._line_at_s:
            self._line_at_s = self._idle_s + _LINES_S
            self._say(f"has waited {self._idle_s:.0f} s for {_named(signs, behind)}")

    def _of_itself(self, sign: Sign) -> str:
        return (
            f"stuck on {sign.host} in {sign.in_words()}: no progress for {sign.idle_s:.0f} s, for which the other "
            f"ranks have waited. {self._limits.advice(sign.is_starting)} Its main thread is here:\n"
            f"{self._stack().rstrip()}"
        )

    def _of_several(self, signs: dict[int, Sign], ranks: list[int], limit_s: float, size: int | None = None) -> str:
        """`ranks`: the first of them, which are `size` in all."""
        who, advice = _named(signs, ranks, size), self._limits.advice(signs[ranks[0]].is_starting)
        why = ""
        if len(ranks) > 1:
            why = " None of them is behind the others, so it may be the network between them."
        stacks = "".join(
            f"\nMain thread of rank {rank}:\n{signs[rank].stack.rstrip()}" for rank in ranks[:2] if signs[rank].stack
        )
        stuck = "is stuck" if len(ranks) == 1 else "are stuck"
        return f"{who} {stuck}: no progress for {limit_s:.0f} s.{why} {advice}{stacks}"

    def _of_silent(self, signs: dict[int, Sign], ranks: list[int], limit_s: float) -> str:
        first = signs[ranks[0]]
        give = "gives" if len(ranks) == 1 else "give"
        return (
            f"{_named(signs, ranks)} {give} no sign of life since {first.at}, and the other ranks have waited for "
            f"{limit_s:.0f} s. A process may be stopped, its host gone, or compiled code holds Python's lock: then its "
            f"own output says where. {self._limits.advice(first.is_starting)}"
        )


def _named(signs: dict[int, Sign], ranks: list[int], size: int | None = None) -> str:
    """Ranks with their hosts, and what they are at; `size`: how many they are in all."""
    few = [f"rank {rank} on {signs[rank].host} (in {signs[rank].in_words()})" for rank in ranks[:_FEW]]
    more = (size or len(ranks)) - len(few)
    return ", ".join(few) + (f" and {more} more" if more else "")
