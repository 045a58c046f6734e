"""Checkpoints: when one is due, under which names, and the thread that writes it while training goes on."""

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
"""Key of a checkpoint's content: () bool, whether the run was still sound. Files never hold False."""


@dataclass(frozen=True)
class Beside:
    """A file that a checkpoint needs beside it, in a folder of the run directory; older ones of its kind then go."""

    folder: str
    name: str
    """KIND_NUMBER.SUFFIX; a file of that name has this content already."""
    content: dict[str, Any]
    """Tensors in it never change, so they are not copied."""


class Checkpoints:
    """Saves the run's state in the background. Every rank has one, since capturing takes them all; the first writes.

    `state.best` tells of no file that is not there: where one could not be written, the best epoch and the kept ones
    are again those whose files are there, so that a later one may take their place.

    Use it as a context manager; on the way out of an error it waits for the writer and says nothing of its failures.
    After a second Ctrl-C it does not wait: what is being written stays as it was.
    """

    def __init__(
        self,
        options: Run,
        state: RunState,
        capture: Callable[[], dict[str, Any]],
        writer: CheckpointWriter | None,
        beside: Callable[[], Beside | None] = lambda: None,
    ) -> None:
        """`capture` makes a checkpoint's content of the run as it is; every rank calls it. A new interval begins now.

        `beside` makes what is written beside a checkpoint of now. `writer` None: this rank does not write.
        """
        self._options, self._state, self._capture = options, state, capture
        self._writer, self._beside = writer, beside
        self._updates, self._seconds = parse_interval(options.checkpoint_interval)
        self._saved_at = time.monotonic()
        self._before = BestEpochs()
        """Before the last validation was counted in."""

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            with contextlib.suppress(UserError):  # said already
                self.finish()

    def _is_due(self, *, is_logged: bool) -> bool:
        """Whether to save between two validations; every rank must come to the same answer.

        `is_logged`: nothing is in the step's meter, whose sums are then common to all ranks.
        """
        # By the clock only where that is so, since the ranks' clocks differ.
        by_time = bool(self._seconds) and is_logged and time.monotonic() - self._saved_at >= self._seconds
        by_updates = bool(self._updates) and self._state.position.num_updates % self._updates == 0
        return by_time or by_updates

    def save_if_due(self, *, is_logged: bool) -> None:
        """Save after an update if a trigger asks for it, see `_is_due`."""
        if self._is_due(is_logged=is_logged):
            self.save(may_skip=True)

    def save_epoch(self, epoch: int, scores: dict[str, Scores]) -> None:
        """Save when `epoch` has ended; `scores` by prefix of the metric's name, none where it was not validated."""
        self._settle()
        names, obsolete = (LAST,), []
        if scores:
            self._before = self._state.best
            known, is_loss = _by_weights(scores, self._options.eval_metric), self._options.eval_metric == "loss"
            num_kept = self._options.checkpoint_hist
            counted = self._before.after_validation(epoch, known, lower_is_better=is_loss, num_kept=num_kept)
            self._state.best, is_best, dropped = counted
            # `last` last: it remembers the best score, and a resumed run would not write that again.
            best = (BEST,) if is_best else ()
            names = (*best, *(() if epoch in dropped else (_kept_name(epoch),)), LAST)
            obsolete = [_kept_name(one) for one in dropped if one != epoch]
        self.save(names, tuple(obsolete))

    def save(self, names: tuple[str, ...] = (LAST,), obsolete: tuple[str, ...] = (), *, may_skip: bool = False) -> None:
        """Save the state; with `may_skip` not while the checkpoint before is still being written: that would stall."""
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
        """Wait for the checkpoint before, and leave out of `state.best` what could not be written."""
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
    """Emptied when the device's copies are fetched, so that their memory is free while the disk is at work."""
    ready: Mark
    """The copies on the device are complete once this is reached."""
    names: list[str]
    """Names that are still to be written."""
    obsolete: tuple[str, ...]
    beside: Beside | None


class Diverged(UserError):
    """A state that is not finite: nothing that may take the place of one that was."""


class CheckpointWriter:
    """Copies a run's state at once and writes it behind the run's back, one file at a time, each whole or not at all.

    What cannot be written (a full disk) leaves the older file as it is, is said once until it can be again, and does
    not stop the run; only if the last one fails does `close` raise `UserError`. A state that is not finite is refused:
    the older files are what such a run is worth. On CUDA the copy stays on the device until the thread fetches it, so
    it takes as much memory there as the state itself, for a short time.
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
        """Copy `content` and write it under `names`, in that order, behind `beside`; then delete the `obsolete` files.

        Waits only where an older one is still being written, lest copies pile up.
        """
        self._jobs.wait()
        copy = _copied(content)
        ready = Mark.of(current_stream(self._device))
        self._jobs.put(_Job(copy, ready, list(names), obsolete, beside))

    def settle(self) -> list[str]:
        """Wait until nothing is being written; the names that could not be written since the last call."""
        self._jobs.wait()
        lost, self._lost = self._lost, []
        return lost

    def close(self) -> None:
        """Wait until all is written. Raises `UserError` if the newest checkpoint could not be. Idempotent."""
        self._jobs.close()
        self._failures.tell()
        if self._failure:
            raise self._failure

    def _do(self, job: _Job) -> None:
        self._write(job)
        self._failure = None
        self._failures.is_over()

    def _note(self, job: _Job, error: Exception) -> None:
        if not isinstance(error, UserError):  # whatever it is, it must reach the user
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
                "The run has diverged: its loss or its weights are not finite. That state is not saved; "
                f"{last} {'is the one before' if last.exists() else 'does not exist yet'}. "
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
        """What cannot be written is missed only after an interruption: not a reason to do without the checkpoint."""
        path = self._folder / beside.folder / beside.name
        try:
            if path.exists():
                return
            with on_stream(self._stream):  # which has waited for all that was enqueued before the checkpoint
                content = self._on_host(beside.content)
            write_checkpoint(path, content)
        except Exception as error:  # whatever it is: the checkpoint matters more
            if not self._has_missed:
                cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
                reason = str(getattr(cause, "strerror", None) or cause)
                if isinstance(cause, FileExistsError | NotADirectoryError):
                    reason = f"{path.parent} is a file: move it away"
                self._say(
                    f"warning: what the spectral monitor needs after an interruption could not be kept in "
                    f"{path.parent} ({reason}); checkpoints are not affected"
                )
            self._has_missed = True


def _copied(value: Any) -> Any:
    """Copy every tensor where it is: training goes on changing the originals."""
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
        kept = f"The older {path.name} is kept." if path.exists() else "Nothing is left under that name."
        raise UserError(
            f"Checkpoint {path} cannot be written: {error.strerror or error}. {kept} Free disk space, then resume."
        ) from error
