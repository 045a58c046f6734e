"""Checkpoints: when one is due, its file names, and the thread that writes it during training."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_vit.common.devices import Mark, cuda_path, current_stream, on_stream, side_stream
from lowrank_vit.common.errors import Failures, UserError
from lowrank_vit.common.files import link_whole, whole_file
from lowrank_vit.common.threads import Jobs
from lowrank_vit.config.check import parse_interval
from lowrank_vit.config.options import Run
from lowrank_vit.run.directory import LAST
from lowrank_vit.run.state import BestEpochs, RunState
from lowrank_vit.score.evaluate import Scores

BEST = "model_best.pth.tar"
IS_FINITE = "is_finite"
"""Key in a checkpoint: a bool tensor (), whether the run was still finite. Files never have False."""


@dataclass(frozen=True)
class Beside:
    """A file that a checkpoint needs beside it, in a folder of the run directory; replaces older ones of its kind."""

    folder: str
    name: str
    """KIND_NUMBER.SUFFIX; an existing file of that name has the same content."""
    content: dict[str, Any]
    """Its tensors never change, so they are not copied."""


class Checkpoints:
    """Saves the run's state in the background. Every rank has one, since all take part in capturing; the first writes.

    `state.best` never refers to a missing file: if one could not be written, the best epoch and the kept ones are again
    those with files, so that a later epoch may replace them.

    Use it as a context manager. After an error it waits for the writer and does not raise its failures. After a second
    Ctrl-C it does not wait: the file being written keeps its old content.
    """

    def __init__(
        self,
        options: Run,
        state: RunState,
        capture: Callable[[], dict[str, Any]],
        writer: CheckpointWriter | None,
        beside: Callable[[], Beside | None] = lambda: None,
    ) -> None:
        """`capture` returns the content of a checkpoint of now; all ranks call it. The first interval begins now.

        `beside` returns the file to write beside a checkpoint of now. `writer` None: this rank does not write.
        """
        self._options, self._state, self._capture = options, state, capture
        self._writer, self._beside = writer, beside
        self._updates, self._seconds = parse_interval(options.checkpoint_interval)
        self._saved_at = time.monotonic()
        self._before = BestEpochs()
        """The best epochs before the last validation was added."""

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            with contextlib.suppress(UserError):  # already reported
                self.finish()

    def _is_due(self, *, is_logged: bool) -> bool:
        """Whether to save between two validations; all ranks must get the same answer.

        `is_logged`: the step's meter was just read, so its sums are the same on all ranks.
        """
        # Only then by time, since the ranks' clocks differ.
        by_time = bool(self._seconds) and is_logged and time.monotonic() - self._saved_at >= self._seconds
        by_updates = bool(self._updates) and self._state.position.num_updates % self._updates == 0
        return by_time or by_updates

    def save_if_due(self, *, is_logged: bool) -> None:
        """Save after an update if a trigger asks for it, see `_is_due`."""
        if self._is_due(is_logged=is_logged):
            self.save(may_skip=True)

    def save_epoch(self, epoch: int, scores: dict[str, Scores]) -> None:
        """Save at the end of `epoch`; `scores` by prefix of the metric's name, empty if it was not validated."""
        self._settle()
        names, obsolete = (LAST,), []
        if scores:
            self._before = self._state.best
            known, is_loss = _by_weights(scores, self._options.eval_metric), self._options.eval_metric == "loss"
            num_kept = self._options.checkpoint_hist
            counted = self._before.after_validation(epoch, known, lower_is_better=is_loss, num_kept=num_kept)
            self._state.best, is_best, dropped = counted
            # `last` comes last: it contains the best score, so a resumed run would not write the best file again.
            best = (BEST,) if is_best else ()
            names = (*best, *(() if epoch in dropped else (_kept_name(epoch),)), LAST)
            obsolete = [_kept_name(one) for one in dropped if one != epoch]
        self.save(names, tuple(obsolete))

    def save(self, names: tuple[str, ...] = (LAST,), obsolete: tuple[str, ...] = (), *, may_skip: bool = False) -> None:
        """Save the state. With `may_skip`, skip it while the previous checkpoint is still being written."""
        is_skipped = may_skip and self._writer is not None and self._writer.is_busy
        if not is_skipped:
            self._settle()
        content = self._capture()  # on every rank
        if not is_skipped:
            beside = self._beside()
            if self._writer:
                self._writer.save(content, names, obsolete, beside)
            self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Wait until the last checkpoint is written. Raises `UserError` if it could not be."""
        if self._writer:
            self._writer.close()

    def _settle(self) -> None:
        """Wait for the previous checkpoint, and remove from `state.best` the files that could not be written."""
        lost, before = self._writer.settle() if self._writer else [], self._before
        if BEST in lost:
            best = {"best_metric": before.best_metric, "best_scores": before.best_scores}
            self._state.best = replace(self._state.best, best_epoch=before.best_epoch, **best)
        if any(name not in (BEST, LAST) for name in lost):
            self._state.best = replace(self._state.best, kept=before.kept)


def _by_weights(scores: dict[str, Scores], metric: str) -> dict[str, float]:
    return {prefix.rstrip("_") or "model": getattr(score, metric) for prefix, score in scores.items()}


def _kept_name(epoch: int) -> str:
    return f"checkpoint-{epoch}.pth.tar"


@dataclass
class _Job:
    content: dict[str, Any]
    """Emptied when the device's copies are fetched, so that their memory is free during writing."""
    ready: Mark
    """The copies on the device are complete once this is reached."""
    names: list[str]
    """File names still to be written."""
    obsolete: tuple[str, ...]
    beside: Beside | None


class Diverged(UserError):
    """The state is not finite, so it must not replace a finite one."""


class CheckpointWriter:
    """Copies a run's state at once and writes it in the background, one file at a time, each atomically.

    If a file cannot be written (a full disk), the older file stays, the failure is reported once until writing works
    again, and the run continues; `close` raises `UserError` only if the last checkpoint fails. A state that is not
    finite is refused, to keep the older files. On CUDA the copy stays on the device until the thread fetches it, so for
    a short time it takes as much memory there as the state itself.
    """

    def __init__(self, folder: Path, device: torch.device, say: Callable[[str], object]) -> None:
        self._folder, self._device, self._say = folder, device, say
        self._failure: UserError | None = None
        self._failures = Failures("checkpoints could not be written", say)
        self._lost: list[str] = []
        self._has_missed = False
        self._stream = side_stream(device)
        self._jobs = Jobs[_Job](self._do, self._note, "checkpoints")

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._jobs.is_busy

    def save(
        self,
        content: dict[str, Any],
        names: tuple[str, ...] = (LAST,),
        obsolete: tuple[str, ...] = (),
        beside: Beside | None = None,
    ) -> None:
        """Copy `content`; write `beside`, then `content` under `names` in order; then delete the `obsolete` files.

        Waits if an older one is still being written, so that copies do not pile up.
        """
        self._jobs.wait()
        copy = _copied(content)
        ready = Mark.of(current_stream(self._device))
        self._jobs.put(_Job(copy, ready, list(names), obsolete, beside))

    def settle(self) -> list[str]:
        """Wait until nothing is being written; returns the names that could not be written since the last call."""
        self._jobs.wait()
        lost, self._lost = self._lost, []
        return lost

    def close(self) -> None:
        """Wait until everything is written. Raises `UserError` if the latest checkpoint failed. Idempotent."""
        self._jobs.close()
        self._failures.tell()
        if self._failure:
            raise self._failure

    def _do(self, job: _Job) -> None:
        self._write(job)
        self._failure = None
        self._failures.is_over()

    def _note(self, job: _Job, error: Exception) -> None:
        if not isinstance(error, UserError):  # any error must reach the user
            error = UserError(f"A checkpoint could not be written: {type(error).__name__}: {error}")
        if not isinstance(error, Diverged):
            self._failures.note(f"{error} Training goes on.")
        elif not isinstance(self._failure, Diverged):
            self._say(f"warning: {error}")
            self._failures.is_over()
        self._failure = error
        self._lost += job.names

    def _write(self, job: _Job) -> None:
        content, job.content = job.content, {}
        with on_stream(self._stream):
            job.ready.hand_over(self._stream)
            content = self._on_host(content)
        if not content.get(IS_FINITE, True):
            last = self._folder / LAST
            raise Diverged(
                "The run has diverged: its loss or its weights are not finite. This state is not saved; "
                f"{last} {'has the state before' if last.exists() else 'does not exist yet'}. "
                "Try a smaller --lr, a longer --warmup-epochs or --clip-grad 1."
            )
        first = self._folder / job.names[0]
        if job.beside:
            self._write_beside(job.beside)
        write_checkpoint(first, content)
        job.names.pop(0)
        while job.names:
            self._link(first, self._folder / job.names[0])
            job.names.pop(0)
        for name in job.obsolete:
            with contextlib.suppress(OSError):
                (self._folder / name).unlink()
        if job.beside:
            path = self._folder / job.beside.folder / job.beside.name
            kind = re.compile(rf"{re.escape(path.name.rpartition('_')[0])}_[0-9]{{8,}}{re.escape(path.suffix)}")
            with contextlib.suppress(OSError):
                for older in [one for one in path.parent.iterdir() if kind.fullmatch(one.name) and one != path]:
                    with contextlib.suppress(OSError):
                        older.unlink()

    @staticmethod
    def _link(there: Path, path: Path) -> None:
        try:
            link_whole(there, path)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"Checkpoint {path} cannot be written: {reason}. The older one is kept.") from error

    def _on_host(self, content: Any) -> Any:
        return _mapped(content, lambda tensor: tensor.cpu()) if cuda_path(self._device) else content

    def _write_beside(self, beside: Beside) -> None:
        """Write the file beside; a failure only matters after an interruption, and does not stop the checkpoint."""
        path = self._folder / beside.folder / beside.name
        try:
            if path.exists():
                return
            with on_stream(self._stream):  # it has waited for all work queued before the checkpoint
                content = self._on_host(beside.content)
            write_checkpoint(path, content)
        except Exception as error:  # any error: the checkpoint matters more
            if not self._has_missed:
                cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
                reason = str(getattr(cause, "strerror", None) or cause)
                if isinstance(cause, FileExistsError | NotADirectoryError):
                    reason = f"{path.parent} is a file: move it away"
                self._say(
                    f"warning: the spectral monitor's state, needed after an interruption, could not be written to "
                    f"{path.parent} ({reason}); checkpoints are not affected"
                )
            self._has_missed = True


def _copied(value: Any) -> Any:
    """Copy every tensor on its device, since training changes the originals."""
    return _mapped(value, lambda tensor: tensor.detach().clone())


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_mapped(one, change) for one in value]
    return value


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write atomically: `path` is either the old file or the complete new one. Raises `UserError` on a full disk."""
    try:
        with whole_file(path, through_link=False) as file:
            torch.save(content, file)
    except OSError as error:
        kept = f"The older {path.name} is kept." if path.exists() else "There is no file of that name."
        raise UserError(
            f"Checkpoint {path} cannot be written: {error.strerror or error}. {kept} Free disk space, then resume."
        ) from error
