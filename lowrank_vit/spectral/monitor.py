"""Watches the spectra of a model while it trains, from a thread of its own."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from data_prep.errors import UserError
from lowrank_vit.spectral.metrics import spectrum_metrics
from lowrank_vit.spectral.select import select_targets
from lowrank_vit.spectral.solve import MatrixStack, solve_stack, stack_by_shape
from lowrank_vit.spectral.store import write_spectra

T = TypeVar("T")


class SpectralRecord(NamedTuple):
    """The scalars of one refresh: "<kind>/<module>/<metric>", kind "spec" or "spec_ema"; see `spectrum_metrics`."""

    update: int
    values: dict[str, float]


@dataclass(frozen=True)
class _Snapshot:
    update: int
    stacks: dict[str, list[MatrixStack]]  # kind -> copies of its matrices
    ready: torch.cuda.Event | None  # the copies are complete once this has passed


class SpectralMonitor:
    """Takes a copy of the target weights every so many updates and has one worker thread compute their spectra.

    It observes only: it reads raw weights, draws no random number, touches no gradient and no compiled module, so the
    losses with it and without it are the same bits. `observe` never waits for the device. A thread is needed because
    the eigensolver's error check waits on the host even when it runs on a side stream.

    Each refresh is stored as `store_dir/update_00000100.npz` (all singular values) and queued as a `SpectralRecord`.
    A failed refresh raises in the caller's thread at the next `observe`, `records` or `close`: `UserError` when the
    store cannot be written, `RuntimeError` otherwise. Use it as a context manager, or call `close`.

    With several ranks make one on rank 0; all ranks hold the same weights.
    """

    def __init__(
        self,
        model: nn.Module,
        ema_model: nn.Module | None,
        *,
        targets: str,
        every: int,
        topk: int,
        interval: int,
        store_dir: Path,
    ) -> None:
        """Choose the targets and start the worker.

        Args:
            model: the raw module, not its compiled or DDP wrapper, already on its device.
            ema_model: the averaged module itself (timm: `ema.module`), on any device, or None.
            targets: comma-separated endings of module names, see `select_targets`.
            every: updates between refreshes.
            topk, interval: which singular values a record lists, see `recorded_indices`.
            store_dir: made if missing.

        Raises:
            UserError: a target matches nothing, a number is below 1, or `store_dir` cannot be made.
            ValueError: model and EMA differ in their targets.
        """
        for flag, value in (("every", every), ("topk", topk), ("interval", interval)):
            if value < 1:
                raise UserError(f"spectral {flag} is {value}; expected 1 or more")
        self._models = {"spec": model} if ema_model is None else {"spec": model, "spec_ema": ema_model}
        selected = {kind: select_targets(dict(m.named_parameters()), targets) for kind, m in self._models.items()}
        self._names = tuple(selected["spec"])
        if any(tuple(chosen) != self._names for chosen in selected.values()):
            raise ValueError("the EMA's targets differ from the model's; pass both without wrappers (ema.module)")
        self._every, self._topk, self._interval = every, topk, interval
        self._store_dir = store_dir
        try:
            store_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make {store_dir} for the spectra: {error.strerror}; choose a writable output directory"
            ) from error

        devices = {weight.device for chosen in selected.values() for weight in chosen.values()}
        for device in devices:
            # torch loads its linear algebra lazily and not thread-safely, so the first call must not be the worker's.
            torch.linalg.eigvalsh(torch.eye(2, dtype=torch.float64, device=device))
        cuda_device = next((device for device in devices if device.type == "cuda"), None)
        # 0 is the lowest priority CUDA has, and the default stream's: to put the step first, run that on a stream
        # of priority -1.
        self._stream = None if cuda_device is None else torch.cuda.Stream(cuda_device, priority=0)

        self.skipped = 0
        """Refreshes that were due while the one before was still being computed."""
        self._handed_over: queue.SimpleQueue[_Snapshot | None] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[SpectralRecord] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._cancelled = threading.Event()
        self._failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self._closed = False
        # A daemon, so that a crash of the main thread that never reaches `close` cannot hang the interpreter's exit.
        self._worker = threading.Thread(target=self._work, name="spectral-monitor", daemon=True)
        cpu_threads, self._is_single_threaded = torch.get_num_threads(), threading.Event()
        self._worker.start()
        self._is_single_threaded.wait()
        torch.set_num_threads(cpu_threads)  # the worker's call below also set the default of threads to come

    def observe(self, num_updates: int) -> None:
        """Call after every optimizer update with the updates made so far, and once with 0 before the first.

        When `num_updates` is a multiple of `every`, takes a snapshot (copies enqueued on the current stream) and hands
        it over; when the refresh before is not finished, counts it in `skipped` instead. Update 0 is never skipped.
        """
        if self._closed:
            raise RuntimeError("this spectral monitor is closed; make a new one to observe further updates")
        self._raise_failure()
        if num_updates % self._every != 0:
            return
        if num_updates == 0:
            self._idle.wait()
        if not self._idle.is_set():
            self.skipped += 1
            return
        snapshot = self._take_snapshot(num_updates)
        self._idle.clear()
        self._handed_over.put(snapshot)

    def records(self) -> list[SpectralRecord]:
        """The refreshes finished since the last call, oldest first; never waits. Still works after `close`."""
        self._raise_failure()
        return _drain(self._finished)

    def close(self, cancel: bool = False) -> None:
        """Finish the running refresh and join the worker; with `cancel`, abandon it at the next shape. Idempotent."""
        self._stop(cancel)
        self._raise_failure()

    def __enter__(self) -> SpectralMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop(cancel=error is not None)
        if error is None:  # else the error on its way out matters more than one of ours
            self._raise_failure()

    def _take_snapshot(self, update: int) -> _Snapshot:
        stacks = {
            kind: stack_by_shape({name: model.get_parameter(f"{name}.weight") for name in self._names})
            for kind, model in self._models.items()
        }
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._stream.device))
        return _Snapshot(update, stacks, ready)

    def _stop(self, cancel: bool) -> None:
        if cancel:
            self._cancelled.set()
        if not self._closed:
            self._closed = True
            self._handed_over.put(None)
        self._worker.join()

    def _raise_failure(self) -> None:
        failures = _drain(self._failures)
        if not failures:
            return
        failure = failures[0]  # later ones are most likely the same
        if isinstance(failure, UserError):
            raise failure
        raise RuntimeError(f"the spectral monitor failed: {type(failure).__name__}: {failure}") from failure

    # Below: the worker thread.

    def _work(self) -> None:
        # On the CPU the worker must not have a team of OpenMP threads of its own: with more of them than cores, waiting
        # threads sleep instead of spinning, and every small operation of the training step then pays for waking them.
        torch.get_num_threads()  # a thread's first use takes the process's default, so let that be over
        torch.set_num_threads(1)
        self._is_single_threaded.set()
        while (snapshot := self._handed_over.get()) is not None:
            try:
                self._refresh(snapshot)
            except Exception as error:  # whatever it is, it belongs to the main thread
                self._failures.put(error)
            finally:
                snapshot = None  # else its memory is held until the next one comes
                self._idle.set()

    def _refresh(self, snapshot: _Snapshot) -> None:
        spectra: dict[str, np.ndarray] = {}
        with self._side_stream(snapshot):
            for kind, stacks in snapshot.stacks.items():
                solved: dict[str, np.ndarray] = {}
                for stack in stacks:
                    if self._cancelled.is_set():
                        return
                    solved |= solve_stack(stack)
                spectra |= {f"{kind}/{name}": solved[name] for name in self._names}
        write_spectra(self._store_dir, snapshot.update, spectra)
        values = {
            f"{key}/{metric}": value
            for key, s in spectra.items()
            for metric, value in spectrum_metrics(s, self._topk, self._interval).items()
        }
        self._finished.put(SpectralRecord(snapshot.update, values))

    @contextlib.contextmanager
    def _side_stream(self, snapshot: _Snapshot) -> Iterator[None]:
        if self._stream is None or snapshot.ready is None:
            yield
            return
        with torch.cuda.stream(self._stream):  # sets this thread's device too
            self._stream.wait_event(snapshot.ready)
            for stacks in snapshot.stacks.values():
                for stack in stacks:
                    if stack.matrices_NRC.is_cuda:
                        # The copies come from the main stream's pool: it must not reuse them while we still read.
                        stack.matrices_NRC.record_stream(self._stream)
            yield


def _drain(items: queue.SimpleQueue[T]) -> list[T]:
    drained: list[T] = []
    with contextlib.suppress(queue.Empty):
        while True:
            drained.append(items.get_nowait())
    return drained
