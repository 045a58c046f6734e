"""The trackers of one run: each has its own thread, so that none can delay or end the training."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import Failures, UserError, in_short
from lowrank_vit.common.packages import needs
from lowrank_vit.common.terminal import printable
from lowrank_vit.common.threads import Jobs
from lowrank_vit.run.trackers.tracker import About, Table, Tracker, paths

TITLES = {"wandb": "W&B", "tensorboard": "TensorBoard", "trackio": "trackio", "mlflow": "MLflow"}
"""The trackers' modules, named like their packages, and their names in messages."""
START_TIMEOUT_S = 90.0
FINISH_TIMEOUT_S = 120.0
"""Time to send the last rows; the files on disk are complete, and can be sent later if the tracker allows it."""
MOST_WAITING = 500_000
"""Values that may wait for a slow tracker, about 100 MB."""


def check(names: Sequence[str], project: str) -> None:
    """Raise `UserError` for a tracker that is not installed, refuses the project or needs a login."""
    without = "leave the option out: the run directory has all numbers"
    for name in names:
        needs(name, extra=name, to=f"--tracker {name}", instead=without)
        if look := getattr(_module(name), "check", None):
            look(project)


def _module(name: str) -> Any:
    return importlib.import_module(f"lowrank_vit.run.trackers.{name}")


class Trackers:
    """Copies of a run's numbers, sent to any number of trackers.

    Names are the same for all trackers. Values that timm's training script logs once per epoch keep its names
    (`train_loss`, `eval_top1`, `lr`), over `epoch`. Log intervals are `train/...` over `update`. Spectra are `spec/...`
    and `spec_ema/...` over `spec_update`, since they are finished some updates after the weights were copied. An error
    of a tracker is reported, and it gets no more rows; a tracker that hangs is left alone.
    """

    def __init__(self, senders: Sequence[_Sender], ids: dict[str, str]) -> None:
        """`senders` are running; each adds its run's id to `ids`, by tracker, when it knows it."""
        self._senders, self.ids = senders, ids

    @classmethod
    def start(
        cls,
        names: Sequence[str],
        about: About,
        *,
        resume_ids: Mapping[str, str] | None = None,
        say: Callable[[str], object] = terminal.say,
        timeout_s: float = START_TIMEOUT_S,
    ) -> Trackers:
        """Start all trackers at once; continue the runs of `resume_ids`, by tracker.

        If a tracker has not started after `timeout_s`, its rows wait. Raises `UserError` for an error that the user has
        to correct, such as a missing login.
        """
        about = replace(about, **_plain({"project": about.project, "name": about.name, "config": about.config}))
        about = replace(about, tags=_plain(about.tags), run_dir=about.run_dir.absolute())
        ids = dict(resume_ids or {})
        trackers = cls([_Sender(name, about, ids, say) for name in names], ids)
        until = time.monotonic() + timeout_s
        for sender in trackers._senders:
            sender.wait(until, timeout_s)
        if refusals := [sender.refusal for sender in trackers._senders if sender.refusal]:
            trackers.finish()
            raise refusals[0]
        return trackers

    def log(self, values: Mapping[str, Any], axis: str) -> None:
        """Send the numbers of one row, nested ones named by path; `values[axis]` is its position on the axis."""
        self.send(plain_row(values), axis)

    def send(self, row: dict[str, float], axis: str) -> None:
        """Send a row made by `plain_row`. It must not be changed afterwards."""
        for sender in self._senders:
            sender.put(row, axis)

    def finish(self, spectra: Table | None = None, *, timeout_s: float = FINISH_TIMEOUT_S) -> None:
        """Finish all trackers at once, within `timeout_s`; send `spectra`, the latest, to those that have tables."""
        for sender in self._senders:
            sender.begin_finish(spectra)
        until = time.monotonic() + timeout_s
        for sender in self._senders:
            sender.finish(until, timeout_s)
        self._senders = ()


def plain_row(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, nested ones named by path, with printable names."""
    return dict(values) if _is_plain(values) else _numbers(values)


def _is_plain(values: Mapping[str, Any]) -> bool:
    """Whether `_numbers` would change nothing; a quick test for the thousands of values of a refresh."""
    return {float, int}.issuperset(map(type, values.values())) and "".join(values).isprintable()


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers, with printable names."""
    return {
        name if name.isprintable() else terminal.one_line(name): int(value) if isinstance(value, int) else float(value)
        for name, value in paths(values, "")
        if isinstance(value, Real)
    }


def _plain(value: Any) -> Any:
    """The value with printable texts: a name may contain bytes that are not UTF-8."""
    if isinstance(value, str | Path):
        return printable(value)
    if isinstance(value, dict):
        return {_plain(name): _plain(one) for name, one in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


class _Sender:
    """One tracker and its thread; all of its methods are called in that thread."""

    def __init__(self, name: str, about: About, ids: dict[str, str], say: Callable[[str], object]) -> None:
        self._title, self._say, self._ids = TITLES[name], say, ids
        self._tracker: Tracker | None = None
        self._advice = ""
        self._is_resumed = bool(ids.get(name))
        self.refusal: UserError | None = None
        self._is_started, self._lock, self._waiting = threading.Event(), threading.Lock(), 0
        self._failures = Failures(f"lines were not sent to {self._title}", say)
        # Jobs handle their own errors, so the thread has none to report.
        self._jobs: Jobs[Callable[[], None]] = Jobs(lambda job: job(), lambda *_: None, f"{name}-log")
        self._jobs.put(partial(self._start, name, about))

    def _start(self, name: str, about: About) -> None:
        try:
            tracker = _module(name).start(about, self._ids.get(name, ""), self._say)
            self._tracker, self._advice = tracker, tracker.advice and f" {tracker.advice}"
            self._is_resumed = self._is_resumed and tracker.id == self._ids.get(name)
            if tracker.id:
                self._ids[name] = tracker.id
        except UserError as error:
            self.refusal = error
        except BaseException as error:  # SystemExit, too: training matters more
            self._say(f"warning: {self._title} cannot be started ({in_short(error)}); training goes on without it.")
        finally:
            self._is_started.set()

    def wait(self, until: float, timeout_s: float) -> None:
        """Wait until the tracker has started or failed, at most until that time."""
        if not self._is_started.wait(max(0.0, until - time.monotonic())):
            self._say(
                f"warning: {self._title} has not started after {timeout_s:.0f} s; training goes on, and the numbers "
                "wait for it."
            )

    def put(self, row: dict[str, float], axis: str) -> None:
        """Queue a row; drop it if too many values are waiting, to limit memory."""
        with self._lock:
            is_room = self._waiting + len(row) <= MOST_WAITING
            self._waiting += len(row) if is_room else 0
            if is_room:
                self._failures.is_over()
            else:
                self._failures.note(f"{self._title} is too slow for the numbers; some are not sent to it.")
        if is_room:
            self._jobs.put(partial(self._log, row, axis))

    def _log(self, row: dict[str, float], axis: str) -> None:
        try:
            if self._tracker is None:
                with self._lock:
                    self._failures.count += self._failures.count > 0
            elif not (self._is_resumed and self._tracker.holds(next(reversed(row)), int(row[axis]))):
                self._tracker.log(row, axis)
        except BaseException as error:  # SystemExit, too: training matters more
            self._tracker = None
            with self._lock:
                self._failures.note(
                    f"{self._title} failed ({in_short(error)}); logging to files goes on without it.{self._advice}"
                )
        finally:
            with self._lock:
                self._waiting -= len(row)

    def begin_finish(self, spectra: Table | None) -> None:
        """Queue the end of the tracker's run, after the last row and the table of the latest spectra."""
        self._jobs.put(partial(self._finish, spectra))

    def _finish(self, spectra: Table | None) -> None:
        try:
            if self._tracker is not None:
                try:
                    if spectra is not None:
                        self._tracker.log_table(spectra)
                finally:
                    self._tracker.finish()
        except BaseException as error:  # SystemExit, too: training matters more
            self._cut_short(in_short(error))

    def _cut_short(self, reason: str) -> None:
        self._say(f"warning: {self._title} could not send everything ({reason}).{self._advice}")

    def finish(self, until: float, timeout_s: float) -> None:
        """Wait for the tracker until that time, unless it never started; report what was lost."""
        has_started = self._is_started.is_set()
        self._jobs.close(max(0.0, until - time.monotonic()) if has_started else 0.0)
        if self._jobs.is_busy:
            self._cut_short(f"not done after {timeout_s:.0f} s" if has_started else "it has never started")
        with self._lock:
            self._failures.tell()
