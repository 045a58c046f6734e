"""Watches the spectra of a model while it trains: the training thread's side. The work itself is in `worker.py`."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, TypeVar, get_args
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank_vit.common.arguments import (
    ABOVE_0,
    NOT_NEGATIVE,
    Range,
    check_choice,
    check_function,
    check_number,
    check_path,
    check_type,
    check_whole,
)
from lowrank_vit.common.devices import Mark, cuda_path, current_stream, side_stream
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.resources import available_cores
from lowrank_vit.ranks.world import Channel
from lowrank_vit.spectral.heads import Circuits
from lowrank_vit.spectral.measures.initial import warning_of
from lowrank_vit.spectral.measures.subspaces import chance_of_each
from lowrank_vit.spectral.select import Rename, Targets, module_type
from lowrank_vit.spectral.solving.solve import LOG
from lowrank_vit.spectral.watching.elsewhere import Prepare
from lowrank_vit.spectral.watching.files import list_spectra, update_of
from lowrank_vit.spectral.watching.pace import Pace
from lowrank_vit.spectral.watching.refresh import EMA, MODEL, SpectralSettings, Stacks
from lowrank_vit.spectral.watching.schedule import Schedule
from lowrank_vit.spectral.watching.store import Kept, SpectraStore, far_entries_content, read_far_entries
from lowrank_vit.spectral.watching.watched import TakenUp, Watched, begin_store, take_up
from lowrank_vit.spectral.watching.worker import OnFull, Snapshot, SpectralRecord, Worker

T = TypeVar("T")

DEFAULT_LIMIT_GB = 2.0
_JOIN_S, _EXIT_S = 2.0, 10.0
_IDLE, _BUSY, _CLOSED = range(3)
"""What a rank tells the others when a refresh is due; the greatest of all ranks counts."""


def default_cpu_threads() -> int:
    """The cores that the monitor uses: a quarter of those that this process may use, at least 1."""
    return max(1, available_cores() // 4)


class SpectralMonitor:
    """Copies the target weights every `every` updates and computes their spectra in one worker thread.

    It only observes: it reads raw weights, draws no random number, and touches no gradient and no compiled module, so
    the losses with it and without it are the same bits. `observe` never waits for the device. A thread is needed
    because the eigensolver's error check waits on the host even when it runs on a side stream.

    Each refresh goes to a `SpectraStore` in `store_dir` and is queued as a `SpectralRecord`. A refresh that fails, or
    that cannot be stored, never raises: it is counted in `failed`, and `say` reports the first. Use the monitor as a
    context manager, or call `close`.

    Memory on the weights' device: one copy of the targets while a refresh runs, and one copy from the refresh before,
    for the model and for its EMA. With several ranks the first has copies of its share and of all matrices.

    With several ranks make one monitor on every rank: each computes its share of the matrices, and rank 0 stores and
    records. When a refresh is due, the ranks ask one another over the host's network: either all take it, or all skip
    it because one is busy.

    A resumed run goes on as if it had not been interrupted if `kept()` was written with its checkpoint.

    Example:
        >>> settings = SpectralSettings(topk=2)
        >>> with SpectralMonitor(model, store_dir="watched", targets="head", every=100, settings=settings) as monitor:
        ...     monitor.observe(0)  # before the first update, and then after each
        >>> open_spectra("watched").updates, monitor.failed
        ([0], 0)
    """

    def __init__(
        self,
        model: nn.Module,
        ema_model: nn.Module | None = None,
        *,
        store_dir: str | os.PathLike[str],
        targets: Targets = None,
        every: int = 100,
        settings: SpectralSettings | None = None,
        split_qkv: bool = False,
        circuits: Circuits = "none",
        limit_gb: float = DEFAULT_LIMIT_GB,
        resumed_update: int | None = None,
        recorded_update: int | None = None,
        last_update: int | None = None,
        ranks: Channel | None = None,
        optimizer: Optimizer | None = None,
        rename: Rename | None = None,
        on_full: OnFull | None = None,
        prepare: Prepare | None = None,
        say: Callable[[str], object] = LOG.warning,
    ) -> None:
        """Choose the targets and start the worker.

        Args:
            model: any module with Linear layers, already on its device. Inside DDP, DataParallel and torch.compile the
                wrapped module is watched, under its own names.
            ema_model: its average (timm's ModelEma, torch's AveragedModel, or a module), on any device, or None.
            store_dir: made if missing; must hold no spectra of another training. `open_spectra` reads it.
            targets: endings of layers' names, separated by commas or in a sequence, such as "mlp.fc1"; "all-linear":
                every layer with a 2-D weight but embeddings. A 2-D parameter that is not called `weight` needs its
                ending in full, such as "self_attn.in_proj_weight" of torch's attention. A convolution is taken as a
                matrix. A weight that layers share is watched once. None: the four matrices of a block of timm's ViT
                (attn.qkv, attn.proj, mlp.fc1, mlp.fc2) where the model has them, else "all-linear".
            every: updates between refreshes.
            settings: what is computed; default: `SpectralSettings()`.
            split_qkv: see `choose_targets`.
            circuits: see `heads.attention_blocks`.
            limit_gb: size limit of the store, in 10^9 bytes.
            resumed_update: the update that a resumed run continues from. Stored spectra of later updates are deleted,
                and the next refresh is compared with the kept snapshot, or else with the newest stored refresh.
            recorded_update: the update of the newest record that the resumed run still has, -1 for none. A kept
                snapshot that is newer is refreshed again at once. If nothing was kept, so is `resumed_update` itself,
                since the model has its weights. None: no record is missing.
            last_update: the training's last update, if known: the last refresh due is then of whole spectra, whatever
                `settings.full_every` is.
            ranks: the ranks that share the work (`World.channel` with `agrees`); default: this process does it all. A
                rank that ends without `close` fails the others' refreshes.
            optimizer: the model's optimizer, whose update directions are described if `settings.updates` is on.
            rename: from a layer's name to the one under which its matrix is recorded, a mapping or a function. The new
                name gives type and depth: "encoder.0.ff.lin_a" -> "blocks.0.mlp.fc1" has type "mlp.fc1", depth "0".
            on_full: called in the worker's thread with the copies of each refresh of whole spectra, or with the error
                if there are none, see `Worker`.
            prepare: called with an update and its record's values, maybe in another process, so it must be picklable;
                `prepared_records` returns its result with the record (None where the refresh was not stored).
            say: called with messages about failures, also from the worker's thread.

        Raises:
            UserError: a target matches nothing, or has no real values of its own here (device meta, a shard, packed
                integers); model and EMA differ in their targets; an argument is out of range or of another type; or
                `store_dir` has spectra of another training.
        """
        check_type(nn.Module, "a torch.nn.Module", model=model)
        check_type((nn.Module, NoneType), "a torch.nn.Module, or None", ema_model=ema_model)
        check_type((SpectralSettings, NoneType), "SpectralSettings(...), or None", settings=settings)
        check_path(store_dir=store_dir)
        check_whole(every=every)
        check_number(ABOVE_0, limit_gb=limit_gb)
        counts = {"resumed_update": resumed_update, "last_update": last_update}
        check_whole(NOT_NEGATIVE, **{name: value for name, value in counts.items() if value is not None})
        if recorded_update is not None:
            check_whole(Range(-1), recorded_update=recorded_update)
        check_choice((False, True), split_qkv=split_qkv)
        check_choice(get_args(Circuits), circuits=circuits)
        check_type((Optimizer, NoneType), "a torch.optim.Optimizer, or None", optimizer=optimizer)
        check_function("a mapping of names, a function, or None", (Mapping, NoneType), rename=rename)
        check_function("a function, or None", NoneType, on_full=on_full, prepare=prepare)
        check_function("a function", say=say)
        settings = settings or SpectralSettings()
        models = {MODEL: model} if ema_model is None else {MODEL: model, EMA: ema_model}
        ranks = ranks or Channel(0, 1, None)
        of_optimizer = optimizer if settings.updates else None
        self._watched = Watched(models, targets, settings, ranks, split_qkv, circuits, of_optimizer, rename)
        self._schedule = Schedule(every, settings.full_every, last_update)
        self.matrices = self._watched.matrices
        """By name: "shape", and the recorded indices "top" and "last", 1-based."""
        patterns = targets if targets is None or isinstance(targets, str) else ",".join(targets)
        options: dict[str, Any] = {"targets": patterns, "every": every, "split_qkv": split_qkv, "limit_gb": limit_gb}
        options |= {"circuits": circuits} if self._watched.heads else {}
        chance = {name: chance_of_each(len(one["top"]), one["shape"]) for name, one in self.matrices.items()}
        far = {} if resumed_update is None else read_far_entries(Path(store_dir))
        index = {"format": 2, **options, **asdict(settings), "matrices": self.matrices, "chance": chance}
        index |= far_entries_content(far)
        store = self._store = SpectraStore(Path(store_dir).absolute(), limit_gb * 1e9, index)
        if ranks.rank == 0:
            if resumed_update is None:
                _require_unused(store.path)
            of_heads, is_new = circuits if self._watched.heads else "", recorded_update is None
            begin_store(store, resumed_update, of_heads, say, is_new=is_new)
        self._ranks, self._is_over, self._is_lost, self._say = ranks, False, False, say
        taken_up = TakenUp()
        if resumed_update is not None:
            of_run = resumed_update, recorded_update, self._schedule.is_due
            taken_up = take_up(self._watched, store, ranks, *of_run, say)

        devices = {p.device for one in models.values() for p in one.parameters()}
        for device in devices:
            # torch loads its linear algebra lazily, which is not thread-safe: the first call must not be the worker's.
            torch.linalg.eigvalsh(torch.eye(2, dtype=torch.float64, device=device))
        cuda_device = next((device for device in devices if cuda_path(device)), None)
        # Priority 0 is CUDA's lowest and the default stream's; the trainer's step is on a stream with a higher one.
        self._stream = None if cuda_device is None else side_stream(cuda_device)
        self.skipped = 0
        """Refreshes left out because the one before was still being computed, on this rank or another."""
        self._due_at = time.monotonic()
        self._closed, self._observed = False, (resumed_update or 0) - 1
        # To launch its next operation, a step on a GPU needs Python's lock, so the host's work goes to another process.
        is_aside = self._stream is not None
        of_worker = (settings, store, taken_up.memory, ranks, self._watched.keys, self._stream, say)
        self._pace = Pace(every, settings, say if ranks.rank == 0 else None)
        told: dict[str, Any] = {"prepare": prepare, "pace": self._pace, "num_workers": self._watched.num_workers}
        self._worker = Worker(*of_worker, is_aside=is_aside, heads=self._watched.heads, on_full=on_full, **told)
        self.store_dir = store.path
        """The directory of the spectra, absolute."""
        _open.add(self)
        weakref.finalize(self, self._worker.give_up).atexit = False
        kept = taken_up.kept if ranks.rank == 0 else None
        self._newest = kept._replace(before=None) if kept else None
        self._is_again = bool(taken_up.again)
        self._schedule.taken = taken_up.taken
        if taken_up.again:
            full = self._schedule.take(taken_up.update)
            self._newest = self._newest and self._newest._replace(full=full)
            self._hand_over(taken_up.update, taken_up.again, full, kept.before if kept else None)

    @property
    def failed(self) -> int:
        """Refreshes of this process that failed, or could not be stored."""
        return self._worker.failed

    def indices_by_type(self) -> dict[str, dict[str, list[int]]]:
        """The recorded indices for people to read: those of the first matrix of each type."""
        found: dict[str, dict[str, list[int]]] = {}
        for name, matrix in self.matrices.items():
            found.setdefault(module_type(name), {end: matrix[end] for end in ("top", "last")})
        return found

    @property
    def own(self) -> list[str]:
        """The names of the matrices that this rank computes and passes to `on_full`."""
        return self._watched.own

    def is_due(self, num_updates: int) -> bool:
        """Whether a refresh is due after so many updates."""
        return self._schedule.is_due(num_updates)

    def observe(self, num_updates: int) -> None:
        """Call after every optimizer update with the number of updates so far, and once with 0 before the first.

        If `num_updates` is a multiple of `every`, takes a snapshot (copies enqueued on the current stream) and hands it
        over; if the refresh before is not finished, on this rank or another, counts it in `skipped` instead. Update 0
        and the last one due are never skipped: they wait for the refresh before. Several ranks wait for one another
        here, on the host alone. At update 0 the first rank warns of single entries far out, see `initial.far_entries`.

        The same number again changes nothing. Raises `UserError` for a smaller number, and if it is no whole number.
        """
        if self._closed:
            raise RuntimeError("this spectral monitor is closed; make a new one to observe further updates")
        check_whole(NOT_NEGATIVE, num_updates=num_updates)
        if num_updates < self._observed:
            raise UserError(
                f"num_updates is {num_updates}, and was {self._observed} before. Count updates over all epochs; "
                "to resume an earlier training, make a new monitor with resumed_update."
            )
        if num_updates == self._observed:
            return
        self._observed = num_updates
        if not self._schedule.is_due(num_updates):
            return
        if num_updates == 0:
            self._tell_far_entries()
        since_s, self._due_at = time.monotonic() - self._due_at, time.monotonic()
        must_be = num_updates == 0 or self._is_again
        if must_be or self._schedule.is_last(num_updates):
            self._worker.wait()
        self._is_again = False
        if not must_be and self._is_any_busy():
            self._pace.skip(num_updates, since_s)
            self.skipped += not self._is_lost  # else an earlier record, which a resumed run keeps, would count it
            return
        full = self._schedule.take(num_updates)
        try:
            stacks, newest = self._watched.copies(num_updates)
        except Exception as error:  # such as no memory for the copies; other ranks have theirs and wait for this rank
            self._worker.take(Snapshot(num_updates, {}, Mark(None), full, failure=error))
            return
        before, self._newest = self._newest, newest and newest._replace(full=full)
        self._hand_over(num_updates, stacks, full, before)

    def _tell_far_entries(self) -> None:
        """On the first rank, report and store the entries that would dominate their matrices' spectra."""
        if found := self._watched.far_entries():
            self._say(f"warning: {warning_of(found)}. --fix-init redraws such entries of fresh weights.")
            with contextlib.suppress(UserError):  # the refresh cannot be stored either, and reports it
                self._store.note_far_entries(found)

    def _is_any_busy(self) -> bool:
        """Whether a refresh that is due now is to be skipped; the same on every rank."""
        if not self._is_over:
            try:
                state = self._ranks.agree(_BUSY if self._worker.is_busy else _IDLE)()
            except RuntimeError:  # another rank is gone; the training itself will notice and report that
                state, self._is_lost = _CLOSED, True
            self._is_over = state == _CLOSED
            return state != _IDLE
        return True

    def _hand_over(self, update: int, stacks: Stacks, full: bool, before: Kept | None) -> None:
        """Have the worker compute the spectra of copies that were enqueued on the current stream."""
        made_on = None if self._stream is None else current_stream(self._stream.device)
        self._worker.take(Snapshot(update, stacks, Mark.of(made_on), full, before))

    def wait(self) -> None:
        """Wait until the running refresh, if any, is finished."""
        self._worker.wait()

    def records(self) -> list[SpectralRecord]:
        """The refreshes finished since the last call, oldest first; never waits. Still works after `close`."""
        return [record for record, _ in self.prepared_records()]

    def prepared_records(self) -> list[tuple[SpectralRecord, Any]]:
        """As `records`, each with the result of `prepare`."""
        found = _drain(self._worker.finished)
        for record, _ in found:
            record.values["spec/refresh/skipped"] = float(self.skipped)
            record.values["spec/refresh/failed"] = float(self.failed)
        return found

    def kept(self) -> Kept | None:
        """The snapshot to write, under `kept_name`, beside a checkpoint made now, for a run that is resumed from it.

        None before the first snapshot, and on all ranks but the first. Tensors are on the weights' device; they do not
        change. Call it before `records`, whose refreshes must be recorded before the checkpoint is written.
        """
        current = self._worker.current
        return self._newest and self._newest._replace(before=current.before if current else None)

    def close(self, cancel: bool = False) -> None:
        """Finish the running refresh and join the worker; with `cancel`, abandon it at the next matrix. Idempotent."""
        self._stop(cancel)

    def give_up(self, timeout_s: float) -> None:
        """Close at the end of a process: abandon the running refresh, and wait at most `timeout_s` seconds for it."""
        self._closed = True
        self._worker.give_up(timeout_s)

    def __enter__(self) -> SpectralMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop(cancel=error is not None)

    def _stop(self, cancel: bool) -> None:
        if cancel:
            self._worker.cancelled.set()
        if not self._closed and not self._is_over:
            with contextlib.suppress(RuntimeError, ValueError):  # at the end the others, or their group, may be gone
                self._ranks.agree(_CLOSED)  # not waited for; only ranks that go on read it
        self._closed = True
        _open.discard(self)
        # Another rank may have died while this rank's worker waits for it; that must not hold up the exit.
        self._worker.close(_JOIN_S if cancel and self._ranks.size > 1 else None)


_open: WeakSet[SpectralMonitor] = WeakSet()
"""The monitors of this process that are not closed."""


@atexit.register
def _close_all() -> None:
    """Give up monitors that were not closed: a process that ends while a worker solves would be aborted."""
    for monitor in list(_open):
        with contextlib.suppress(Exception):
            monitor.give_up(_EXIT_S)


def _require_unused(store_dir: Path) -> None:
    """Raise `UserError` where a new training would mix its spectra with others."""
    if any(monitor.store_dir == store_dir for monitor in _open):
        raise UserError(
            f"another monitor that is not closed writes to {store_dir}. Close that first, or give each its own "
            "store_dir."
        )
    if found := list_spectra(store_dir):
        raise UserError(
            f"{store_dir} has spectra of another training, of updates {update_of(found[0])} to {update_of(found[-1])}. "
            "Give another store_dir, delete this one, or resume from its update N with resumed_update=N."
        )


def _drain(items: queue.SimpleQueue[T]) -> list[T]:
    drained: list[T] = []
    with contextlib.suppress(queue.Empty):
        while True:
            drained.append(items.get_nowait())
    return drained
