"""Checkpoints written by a thread of its own, so that training does not wait for the disk."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from lowrank_vit.engine.checkpoint import write_checkpoint

LAST, BEST = "last.pth.tar", "model_best.pth.tar"


@dataclass(frozen=True)
class _Job:
    content: dict[str, Any]
    ready: torch.cuda.Event | None
    """The copies on the device are complete once this has passed; None without CUDA."""
    names: tuple[str, ...]
    obsolete: tuple[str, ...]


class Saver:
    """Copies a run's state at once and writes it behind the run's back, one file at a time, each whole or not at all.

    What cannot be written (a full disk) leaves the older file as it is, is said, and does not stop the run; only if the
    last one fails does `close` raise `UserError`. On CUDA the copy stays on the device until the thread fetches it, so
    it takes as much memory there as the state itself, for a short time.
    """

    def __init__(self, folder: Path, device: torch.device, say: Callable[[str], object]) -> None:
        self._folder, self._device, self._say = folder, device, say
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._failure: UserError | None = None
        # A daemon, so that a crash elsewhere never waits for the disk.
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._jobs.unfinished_tasks > 0

    def save(self, content: dict[str, Any], names: tuple[str, ...] = (LAST,), obsolete: tuple[str, ...] = ()) -> None:
        """Copy `content` and write it under `names`, in that order; then delete the `obsolete` files.

        Waits only where an older one is still being written, lest copies pile up.
        """
        self._jobs.join()
        copy = _copied(content)
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        self._jobs.put(_Job(copy, ready, names, obsolete))

    def close(self) -> None:
        """Wait until all is written. Raises `UserError` if the newest checkpoint could not be. Idempotent."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        if self._failure:
            raise self._failure

    def _work(self) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        while (job := self._jobs.get()) is not None:
            try:
                self._write(job, stream)
                self._failure = None
            except UserError as error:
                self._failure = error
                self._say(f"warning: {error} Training goes on.")
            except Exception as error:  # whatever it is, it must reach the user
                self._failure = UserError(f"A checkpoint could not be written: {type(error).__name__}: {error}")
                self._say(f"warning: {self._failure} Training goes on.")
            finally:
                job = None  # else its memory is held until the next one comes
                self._jobs.task_done()
        self._jobs.task_done()

    def _write(self, job: _Job, stream: torch.cuda.Stream | None) -> None:
        content = job.content
        if stream is not None and job.ready is not None:
            with torch.cuda.stream(stream):
                stream.wait_event(job.ready)
                content = _mapped(content, lambda tensor: tensor.cpu())
        first = self._folder / job.names[0]
        write_checkpoint(first, content)
        for name in job.names[1:]:
            _link(first, self._folder / name)
        for name in job.obsolete:
            with contextlib.suppress(OSError):
                (self._folder / name).unlink()


def _link(there: Path, path: Path) -> None:
    """A second name for a file, atomically; a copy where the file system has no links. Raises `UserError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            os.link(there, temporary)
        except OSError:
            shutil.copyfile(there, temporary)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"Checkpoint {path} cannot be written: {error}. The older one is kept.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _copied(value: Any) -> Any:
    """The same with every tensor copied where it is: training goes on changing the originals."""
    return _mapped(value, lambda tensor: tensor.detach().clone())


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_mapped(one, change) for one in value]
    return value
