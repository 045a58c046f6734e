"""The monitor's other half: the thread that turns snapshots into stored spectra and records."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from lowrank_vit.common.aside import Aside, NotStarted
from lowrank_vit.common.devices import Mark, cuda_path, on_stream
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.threads import Jobs, beat
from lowrank_vit.ranks.world import Channel
from lowrank_vit.spectral.heads import Heads, circuits_by_block
from lowrank_vit.spectral.measures.aggregates import CIRCUIT
from lowrank_vit.spectral.measures.circuits import BlockCircuits
from lowrank_vit.spectral.solving.extremes import ENDS
from lowrank_vit.spectral.solving.solve import LOG, Cancelled
from lowrank_vit.spectral.watching.elsewhere import (
    Prepare,
    as_arrays,
    flattened,
    flattened_circuits,
    refreshed_aside,
    saved,
)
from lowrank_vit.spectral.watching.pace import Pace
from lowrank_vit.spectral.watching.refresh import (
    FOR_HEADS,
    MODEL,
    Memory,
    Refreshed,
    SpectralSettings,
    Stacks,
    describe,
    refresh,
)
from lowrank_vit.spectral.watching.store import Kept, SpectraStore

T = TypeVar("T")
OnFull = Callable[[int, Mapping[str, torch.Tensor] | Exception], object]
"""Gets an update and copies of this rank's share of the model's matrices, by name, or the error if there are none."""


class SpectralRecord(NamedTuple):
    """The scalars of one refresh, by "<kind>/<name>/<metric>", kind "spec" or "spec_ema".

    Metrics are those of `refresh.matrix_metrics`, `refresh.drift_metrics`, `refresh.update_norms`,
    `subspaces.cosine_metrics` and, where asked for, `updates.update_metrics` with the prefixes "dw" and "opt";
    `aggregates.aggregates` adds "<kind>/type/..." and "<kind>/depth/...". About the refresh itself:

    - "spec/refresh/seconds";
    - "spec/refresh/skipped": refreshes so far that were due and left out; "spec/refresh/failed": those so far that
      failed or were not stored; both count from this process's start;
    - "spec/refresh/fallbacks": matrices not solved by the solver asked for;
    - "spec/refresh/since": updates since the refresh it is compared with; absent in the first;
    - "spec/refresh/full": 1 for whole spectra, 0 for the first values alone;
    - "spec/refresh/full_share": the share of matrices whose whole spectrum was solved, 0-1; with "full" 0 these are the
      matrices whose first values were not proven without it;
    - "spec/refresh/since_full", for whole spectra but the first: updates since the whole spectra with which
      "cos_*_last*" compare.
    """

    update: int
    values: dict[str, float]


@dataclass(frozen=True)
class Snapshot:
    """Copies of the weights after an update."""

    update: int
    stacks: Stacks
    ready: Mark
    """The copies are complete once the stream has reached this."""
    full: bool = True
    """Whether the whole spectra are to be computed."""
    before: Kept | None = None
    """On the first rank, the snapshot before."""
    failure: Exception | None = None
    """Why this rank has no copies; other ranks may have theirs."""


class Worker:
    """One thread that takes snapshots one by one. Every attribute may be read from other threads."""

    def __init__(
        self,
        settings: SpectralSettings,
        store: SpectraStore,
        memory: Memory,
        ranks: Channel,
        keys: list[str],
        stream: torch.cuda.Stream | None,
        say: Callable[[str], object],
        is_aside: bool = False,
        heads: Heads | None = None,
        on_full: OnFull | None = None,
        num_workers: int | None = None,
        prepare: Prepare | None = None,
        pace: Pace | None = None,
    ) -> None:
        """Start the thread.

        Args:
            settings: what is computed.
            store: where refreshes are stored.
            memory: earlier refreshes.
            ranks: the ranks that share the work.
            keys: the keys of all ranks, in the order in which they are stored.
            stream: the side stream of weights on a GPU; None for weights on a CPU.
            say: called with the first failure, the first after each success, and if no other process can be started.
            is_aside: whether another process computes what a host computes; this changes no bit.
            heads: this rank's share of the circuits.
            on_full: called with every refresh of whole spectra before these are computed, or with the error if there
                are no copies; must not raise.
            num_workers: how many of the first ranks have a share of the work; default: all.
            prepare: see `SpectralMonitor`.
            pace: told when a refresh begins, and how long a whole one took.
        """
        self._settings, self._store, self._memory, self._ranks = settings, store, memory, ranks
        if settings.on_cpu:  # where a snapshot's copies are, too
            memory.weights = self._on_cpu(memory.weights)
        self._keys, self._stream, self._heads, self._on_full = keys, stream, heads, on_full
        self._num_workers = num_workers
        self._prepare, self._pace = prepare, pace
        self._aside = Aside() if is_aside else None
        self._say, self._is_failing = say, False
        self._noted: set[str] = set()
        self.current: Snapshot | None = None
        """The snapshot in work, or the one that failed. Once it is no longer here, its record is in `finished`."""
        self.finished: queue.SimpleQueue[tuple[SpectralRecord, Any]] = queue.SimpleQueue()
        """The records, each with the result of `prepare`."""
        self.failed = 0
        """Refreshes that failed, or were not stored."""
        self.cancelled = threading.Event()
        cpu_threads = torch.get_num_threads()
        self._jobs = Jobs(self._do, self._failed, "spectral-monitor", begin=_use_one_thread, end=self._end)
        torch.set_num_threads(cpu_threads)  # the new thread's call also changed the default for later threads

    @property
    def is_busy(self) -> bool:
        """Whether a refresh is being computed."""
        return self._jobs.is_busy

    def take(self, snapshot: Snapshot) -> None:
        """Begin a refresh; the one before must be over."""
        self.current = snapshot
        self._jobs.put(snapshot)

    def wait(self) -> None:
        """Wait for the end of the running refresh."""
        self._jobs.wait()

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for the end of the refresh and of the thread, at most `timeout_s` seconds."""
        self._jobs.close(timeout_s)

    def give_up(self, timeout_s: float = 0.0) -> None:
        """End at the next matrix, and wait at most `timeout_s` seconds for that."""
        self.cancelled.set()
        self._jobs.close(timeout_s)

    def _do(self, snapshot: Snapshot) -> None:
        self._refresh(snapshot)
        self.current = None

    def _failed(self, snapshot: Snapshot, error: Exception) -> None:
        # No error here may end the training.
        self.fail(snapshot.update, error)

    def fail(self, update: int, error: Exception) -> None:
        """Count the refresh of this update as failed."""
        self.failed += 1
        is_news, self._is_failing = not self._is_failing, True
        if is_news:
            of_others = f"the spectra of update {update} failed: {type(error).__name__}: {error}."
            reason = str(error) if isinstance(error, UserError) else of_others
            with contextlib.suppress(Exception):  # nor may a terminal that is gone
                self._say(f"warning: {reason} Training goes on, and later refreshes are tried.")

    def _refresh(self, snapshot: Snapshot) -> None:
        start = time.perf_counter()
        part: Refreshed | None = None
        failure: Exception | None = None
        on_full = self._on_full if snapshot.full else None
        since, since_full = self._memory.last_update, self._memory.whole_update
        try:
            if snapshot.failure:
                raise snapshot.failure
            with on_stream(self._stream):
                matrices = [one.matrices_NRC for of_kind in snapshot.stacks.values() for one in of_kind]
                snapshot.ready.hand_over(self._stream, *matrices)
                stacks = self._on_cpu(snapshot.stacks) if self._settings.on_cpu else snapshot.stacks
                if on_full:
                    pairs = (zip(one.names, one.matrices_NRC, strict=True) for one in stacks[MODEL])
                    named, tell, on_full = dict(itertools.chain(*pairs)), on_full, None
                    tell(snapshot.update, named)
                if self._pace:
                    self._pace.begin(stacks)
                    start = time.perf_counter()
                own = {kind: of for kind, of in stacks.items() if not kind.endswith(FOR_HEADS)}
                part = self._refreshed(snapshot, own)
                part.circuits = self._circuits(stacks)
        except Cancelled:
            pass
        except Exception as error:
            failure = error
            if on_full:  # whoever acts on whole spectra must know that there are none
                on_full(snapshot.update, error)
        # Also after a failure, since the others wait here. It is sent as text: an error may not be picklable.
        sent = part and replace(part, solved={key: replace(one, start=None) for key, one in part.solved.items()})
        told = sent or (f"{type(failure).__name__}: {failure}" if failure else "")
        parts = self._ranks.gather(told, of=self._num_workers)
        if parts is None:  # the first rank reports what failed here
            self.failed += failure is not None
            return
        if failure is not None:
            raise failure
        whole = Refreshed(snapshot.update, full=snapshot.full)
        for rank, one in enumerate(parts):
            if not isinstance(one, Refreshed):
                if one:
                    raise RuntimeError(f"rank {rank}: {one}")
                return  # cancelled there
            if one.update != snapshot.update:
                raise RuntimeError(f"rank {rank} is at update {one.update}")
            whole.solved |= one.solved
            whole.values |= one.values
            whole.circuits |= one.circuits
        whole.solved = {key: whole.solved[key] for key in self._keys}
        whole.values = {key: whole.values[key] for key in self._keys}
        flat = self._call(flattened, whole.values) | self._call(flattened_circuits, whole.circuits)
        fallbacks = sum(bool(one.note) for one in whole.solved.values())
        flat |= {"spec/refresh/fallbacks": float(fallbacks), "spec/refresh/seconds": time.perf_counter() - start}
        share = sum(one.solver != ENDS for one in whole.solved.values()) / max(1, len(whole.solved))
        flat |= {"spec/refresh/full": float(snapshot.full), "spec/refresh/full_share": share}
        if self._pace and snapshot.full:
            self._pace.end(flat["spec/refresh/seconds"])
        if since is not None:
            flat["spec/refresh/since"] = float(snapshot.update - since)
        if snapshot.full and since_full is not None:
            flat["spec/refresh/since_full"] = float(snapshot.update - since_full)
        prepared: Any = None
        try:
            of_store = self._store, replace(whole, values={}), flat, self._prepare
            self._store, prepared = self._call(saved, *of_store)
            self._is_failing = False
        finally:  # there is a record whether it could be stored or not
            self.finished.put((SpectralRecord(whole.update, flat), prepared))

    def _refreshed(self, snapshot: Snapshot, stacks: Stacks) -> Refreshed:
        """One refresh of this rank's share. Raises `Cancelled`."""
        here: dict[str, Any] = {"cancelled": self._is_cancelled, "log": self._note, "describing": self._describe}
        asked, memory = (snapshot.update, snapshot.full), self._memory
        if self._aside is None or any(cuda_path(one.matrices_NRC) for of_kind in stacks.values() for one in of_kind):
            return refresh(snapshot.update, stacks, self._settings, memory, full=snapshot.full, **here)
        try:
            sent = as_arrays(stacks), replace(memory, weights=as_arrays(memory.weights))
            part, whole = self._aside.call(refreshed_aside, *asked, *sent, self._settings, hear=self._hear)
        except NotStarted as error:
            self._compute_here(error)
            return refresh(snapshot.update, stacks, self._settings, memory, full=snapshot.full, **here)
        except Exception:
            if not memory.last:  # as in `refresh`: weights that cannot be solved are not tried again
                memory.weights = {}
            raise
        memory.whole = memory.whole or whole
        memory.keep(part, stacks)
        return part

    def _circuits(self, stacks: Stacks) -> dict[str, BlockCircuits]:
        """The circuits of this rank's share, where the snapshot has their weights. Raises `Cancelled`."""
        found: dict[str, BlockCircuits] = {}
        if not self._heads:
            return found
        for kind in [kind for kind in stacks if kind + FOR_HEADS in stacks]:
            if self._is_cancelled():
                raise Cancelled
            weights = {
                name: _float_array(matrix)
                for stack in [*stacks[kind], *stacks[kind + FOR_HEADS]]
                for name, matrix in zip(stack.names, stack.matrices_NRC, strict=True)
                if self._heads.reads(name)
            }
            of_kind = self._call(circuits_by_block, self._heads, weights, self._settings.cpu_threads)
            for name, one in of_kind.items():
                found[f"{kind}/{CIRCUIT}/{name}"] = one
                if np.isnan(one.qk_HK).any() or np.isnan(one.ov_HK).any():
                    self._note(f"{kind}: circuits of {name}: a weight is not finite, so the values of its head are NaN")
        return found

    def _describe(self, *of_refresh: Any) -> dict[str, dict[str, float]]:
        return self._call(describe, *of_refresh)

    def _call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the other process, or here if there is none."""
        if self._aside is not None:
            try:
                return self._aside.call(function, *args)
            except NotStarted as error:
                self._compute_here(error)
        return function(*args)

    def _compute_here(self, error: NotStarted) -> None:
        """From now on compute everything in this thread."""
        self._aside = None
        with contextlib.suppress(Exception):
            self._say(f"warning: {error}. Spectra are computed in the trainer's process, which may slow it down.")

    def _hear(self, line: str) -> None:
        """Hear the other process: a line for the log, or an empty line that asks whether to go on."""
        if line:
            self._note(line)
        elif self._is_cancelled():
            raise Cancelled

    def _end(self) -> None:
        if self._aside is not None:
            self._aside.close()

    def _is_cancelled(self) -> bool:
        """Called before each matrix."""
        beat()
        return self.cancelled.is_set()

    def _note(self, line: str) -> None:
        """Warn about a matrix once, not at every refresh; later lines about it go to the debug log."""
        matrix = ": ".join(line.split(": ")[:2])  # "spec: spectra of blocks.0.attn.qkv"
        whose = f"rank {self._ranks.rank}: " if self._ranks.rank else ""
        LOG.log(logging.DEBUG if matrix in self._noted else logging.WARNING, "%s%s", whose, line)
        self._noted.add(matrix)

    @staticmethod
    def _on_cpu(stacks: Stacks) -> Stacks:
        return {
            kind: [replace(stack, matrices_NRC=stack.matrices_NRC.cpu()) for stack in of_kind]
            for kind, of_kind in stacks.items()
        }


def _float_array(matrix: torch.Tensor) -> np.ndarray:
    on_host = matrix.cpu()
    return on_host.numpy() if on_host.dtype in (torch.float32, torch.float64) else on_host.float().numpy()


def _use_one_thread() -> None:
    """Let the worker have no OpenMP threads of its own on the CPU.

    With more threads than cores, waiting threads sleep instead of spinning, and every small operation of the training
    step then has to wake them.
    """
    torch.get_num_threads()  # a thread's first use would set the process's default, so make it before
    torch.set_num_threads(1)
