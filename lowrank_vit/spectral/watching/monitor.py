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
"""What a rank tells the others where a refresh is due; the greatest counts."""


def default_cpu_threads() -> int:
    """A quarter of the cores that this process may use, at least 1: what the monitor takes of a CPU."""
    return max(1, available_cores() // 4)


class SpectralMonitor:
    """Takes a copy of the target weights every so many updates and has one worker thread compute their spectra.

    It observes only: it reads raw weights, draws no random number, touches no gradient and no compiled module, so the
    losses with it and without it are the same bits. `observe` never waits for the device. A thread is needed because
    the eigensolver's error check waits on the host even when it runs on a side stream.

    Each refresh goes to a `SpectraStore` in `store_dir` and is queued as a `SpectralRecord`. One that fails, or that
    cannot be stored, never raises: it is counted in `failed`, and the first is said. Use it as a context manager, or
    call `close`.

    Memory on the weights' device: a copy of the targets while a refresh runs, and one of the refresh before it, of the
    model and of its EMA each. Of several ranks the first has them twice: of its share, and of all matrices.

    With several ranks make one on every rank: each computes its share of the matrices, and rank 0 stores and records.
    Where a refresh is due they ask one another, over the host's network: all of them take it, or all skip it because
    one is busy.

    A run that is resumed goes on as if it had not ended if `kept()` was written with its checkpoint.

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
            model: any module with Linear layers, already on its device. Of DDP, DataParallel and torch.compile the
                module inside is watched, under the names that it has there.
            ema_model: the average of it (timm's ModelEma, torch's AveragedModel, or a module), on any device, or None.
            store_dir: made if missing, without spectra of before; `open_spectra` reads it.
            targets: endings of layers' names, separated by commas or in a sequence, such as "mlp.fc1"; "all-linear":
                every layer with a 2-D weight but embeddings. A 2-D parameter of another name than `weight` is named
                whole, such as "self_attn.in_proj_weight" of torch's attention. A convolution that is named is taken as
                a matrix. A weight that layers share is watched once. None: the four matrices of a block of timm's ViT
                (attn.qkv, attn.proj, mlp.fc1, mlp.fc2) where the model has them, else "all-linear".
            every: updates between refreshes.
            settings: what is computed; default: `SpectralSettings()`.
            split_qkv: see `choose_targets`.
            circuits: see `heads.attention_blocks`.
            limit_gb: size limit of the store, in 10^9 bytes.
            resumed_update: the update that a resumed run continues from. What the store holds of later ones is deleted,
                and the next refresh is compared with the one of what was kept, or without that the newest left.
            recorded_update: that of the newest record which the resumed run still has, -1 for none. A newer refresh
                that was kept is done again, at once; so is one of `resumed_update` itself where nothing was kept, since
                the model has its weights. None: all are there.
            last_update: the training's last, where it is known: the last refresh due is of whole spectra, whatever
                `settings.full_every` is.
            ranks: the ranks that share the work (`World.channel` with `agrees`); default: this process does it all. One
                that ends without `close` fails the others' refreshes.
            optimizer: the model's, whose update directions are described, too, where `settings.updates` asks for that.
            rename: from a layer's name to the one that its matrix is recorded under, a mapping or a function. Types and
                depths are read from that: "encoder.0.ff.lin_a" -> "blocks.0.mlp.fc1" is of type "mlp.fc1", depth "0".
            on_full: called in the worker's thread with the copies of each refresh of whole spectra, or with why there
                are none, see `Worker`.
            prepare: makes of an update and its record's values what `prepared_records` gives with it (None where the
                refresh was not stored). It is called where nobody waits: be it in a process, for which it is pickled.
            say: told of failures, from the worker's thread too.

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
            # torch loads its linear algebra lazily and not thread-safely, so the first call must not be the worker's.
            torch.linalg.eigvalsh(torch.eye(2, dtype=torch.float64, device=device))
        cuda_device = next((device for device in devices if cuda_path(device)), None)
        # 0 is the lowest priority CUDA has, and the default stream's: the trainer's step is on one that comes first.
        self._stream = None if cuda_device is None else side_stream(cuda_device)
        self.skipped = 0
        """Refreshes that were due while the one before was still being computed, here or elsewhere."""
        self._due_at = time.monotonic()
        self._closed, self._observed = False, (resumed_update or 0) - 1
        # A step on a GPU waits for whoever holds Python's lock when the next operation is to be asked for.
        is_aside = self._stream is not None
        of_worker = (settings, store, taken_up.memory, ranks, self._watched.keys, self._stream, say)
        self._pace = Pace(every, settings, say if ranks.rank == 0 else None)
        told: dict[str, Any] = {"prepare": prepare, "pace": self._pace, "num_workers": self._watched.num_workers}
        self._worker = Worker(*of_worker, is_aside=is_aside, heads=self._watched.heads, on_full=on_full, **told)
        self.store_dir = store.path
        """Where the spectra go, absolute."""
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
        """Refreshes of this process that came to nothing, or could not be stored."""
        return self._worker.failed

    def indices_by_type(self) -> dict[str, dict[str, list[int]]]:
        """The recorded indices for people to read: those of the first matrix of each type."""
        found: dict[str, dict[str, list[int]]] = {}
        for name, matrix in self.matrices.items():
            found.setdefault(module_type(name), {end: matrix[end] for end in ("top", "last")})
        return found

    @property
    def own(self) -> list[str]:
        """The matrices that this rank computes, and that `on_full` is told of, by name."""
        return self._watched.own

    def is_due(self, num_updates: int) -> bool:
        """Whether a refresh is due after so many updates."""
        return self._schedule.is_due(num_updates)

    def observe(self, num_updates: int) -> None:
        """Call after every optimizer update with the updates made so far, and once with 0 before the first.

        When `num_updates` is a multiple of `every`, takes a snapshot (copies enqueued on the current stream) and hands
        it over; when the refresh before is not finished, here or on another rank, counts it in `skipped` instead.
        Update 0 and the last one due are never skipped: they wait for the refresh before. Several ranks wait for one
        another there, on the host alone. Before update 0 the first rank tells of single entries far out, see
        `initial.far_entries`.

        The same number again changes nothing. Raises `UserError` for a smaller one, and for what is no number.
        """
        if self._closed:
            raise RuntimeError("this spectral monitor is closed; make a new one to observe further updates")
        check_whole(NOT_NEGATIVE, num_updates=num_updates)
        if num_updates < self._observed:
            raise UserError(
                f"num_updates is {num_updates}, and was {self._observed} before. Count updates over all epochs; "
                "for a training that goes on from an earlier one, make a new monitor with resumed_update."
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
            self.skipped += not self._is_lost  # else a record of before, which a resumed run keeps, would tell of it
            return
        full = self._schedule.take(num_updates)
        try:
            stacks, newest = self._watched.copies(num_updates)
        except Exception as error:  # such as no memory for the copies; other ranks have theirs, and wait for this one's
            self._worker.take(Snapshot(num_updates, {}, Mark(None), full, failure=error))
            return
        before, self._newest = self._newest, newest and newest._replace(full=full)
        self._hand_over(num_updates, stacks, full, before)

    def _tell_far_entries(self) -> None:
        """On the first rank, say and store which matrices have entries that their spectra would describe."""
        if found := self._watched.far_entries():
            self._say(f"warning: {warning_of(found)}. --fix-init draws such entries of fresh weights anew.")
            with contextlib.suppress(UserError):  # a refresh that cannot be stored either tells of that
                self._store.note_far_entries(found)

    def _is_any_busy(self) -> bool:
        """Whether a refresh that is due now is to be skipped; the same on every rank."""
        if not self._is_over:
            try:
                state = self._ranks.agree(_BUSY if self._worker.is_busy else _IDLE)()
            except RuntimeError:  # another rank is gone; the training itself meets that, and tells of it
                state, self._is_lost = _CLOSED, True
            self._is_over = state == _CLOSED
            return state != _IDLE
        return True

    def _hand_over(self, update: int, stacks: Stacks, full: bool, before: Kept | None) -> None:
        """Have the worker compute the spectra of copies that were enqueued on the current stream."""
        made_on = None if self._stream is None else current_stream(self._stream.device)
        self._worker.take(Snapshot(update, stacks, Mark.of(made_on), full, before))

    def wait(self) -> None:
        """Wait until the refresh that is being computed, if any, is finished."""
        self._worker.wait()

    def records(self) -> list[SpectralRecord]:
        """The refreshes finished since the last call, oldest first; never waits. Still works after `close`."""
        return [record for record, _ in self.prepared_records()]

    def prepared_records(self) -> list[tuple[SpectralRecord, Any]]:
        """As `records`, each with what `prepare` has made of it."""
        found = _drain(self._worker.finished)
        for record, _ in found:
            record.values["spec/refresh/skipped"] = float(self.skipped)
            record.values["spec/refresh/failed"] = float(self.failed)
        return found

    def kept(self) -> Kept | None:
        """What to write, under `kept_name`, beside a checkpoint of now, for a run that is resumed from that.

        None before the first snapshot, and on all ranks but the first. Tensors are on the weights' device; they do not
        change. Call it before `records`, whose refreshes must then be recorded before the checkpoint is written.
        """
        current = self._worker.current
        return self._newest and self._newest._replace(before=current.before if current else None)

    def close(self, cancel: bool = False) -> None:
        """Finish the running refresh and join the worker; with `cancel`, abandon it at the next matrix. Idempotent."""
        self._stop(cancel)

    def give_up(self, timeout_s: float) -> None:
        """Close at the end of a process: abandon the running refresh, and wait for so long at most."""
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
            with contextlib.suppress(RuntimeError, ValueError):  # at the end the others may be gone, or their group
                self._ranks.agree(_CLOSED)  # nobody waits for it, but those who go on
        self._closed = True
        _open.discard(self)
        # Of several ranks one may have died, and this one's worker waits for it; that must not hold up the exit.
        self._worker.close(_JOIN_S if cancel and self._ranks.size > 1 else None)


_open: WeakSet[SpectralMonitor] = WeakSet()
"""Those of this process that are not closed."""


@atexit.register
def _close_all() -> None:
    """Give up what nobody has closed: a process that ends while a worker solves would be aborted."""
    for monitor in list(_open):
        with contextlib.suppress(Exception):
            monitor.give_up(_EXIT_S)


def _require_unused(store_dir: Path) -> None:
    """Raise `UserError` where a new training would mix its spectra with others."""
    if any(monitor.store_dir == store_dir for monitor in _open):
        raise UserError(
            f"{store_dir} is written to by another monitor, which is not closed. Close that first, or give each a "
            "store_dir of its own."
        )
    if found := list_spectra(store_dir):
        raise UserError(
            f"{store_dir} has spectra of another training, of updates {update_of(found[0])} to {update_of(found[-1])}. "
            "Give another store_dir, delete that one, or go on from update N of it with resumed_update=N."
        )


def _drain(items: queue.SimpleQueue[T]) -> list[T]:
    drained: list[T] = []
    with contextlib.suppress(queue.Empty):
        while True:
            drained.append(items.get_nowait())
    return drained
