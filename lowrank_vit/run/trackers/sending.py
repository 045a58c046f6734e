"""The trackers of one run: each in a thread of its own, so that none can hold up or end the training."""

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
"""The trackers' modules here, which are called as their packages, and how messages call them."""
START_TIMEOUT_S = 90.0
FINISH_TIMEOUT_S = 120.0
"""Time for the last rows; after that the files on disk are complete and can be sent later, as the tracker allows."""
MOST_WAITING = 500_000
"""Values that may wait for a tracker that is slower than they are made, about 100 MB."""


def check(names: Sequence[str], project: str) -> None:
    """Raise `UserError` for a tracker that is not installed, or that refuses the project or wants a login."""
    without = "leave the option out: the run directory has all numbers"
    for name in names:
        needs(name, extra=name, to=f"--tracker {name}", instead=without)
        if look := getattr(_module(name), "check", None):
            look(project)


def _module(name: str) -> Any:
    return importlib.import_module(f"lowrank_vit.run.trackers.{name}")


class Trackers:
    """Copies of a run's numbers, sent to any number of trackers.

    Names are the same at all of them: what timm's training script logs once an epoch keeps its names (`train_loss`,
    `eval_top1`, `lr`), against `epoch`; each log interval is under `train/...` against `update`; spectra are under
    `spec/...` and `spec_ema/...` against `spec_update`, since they are finished some updates after the weights were
    copied. Whatever a tracker raises, at any call, is said, and it gets nothing more; one that hangs is left alone.
    """

    def __init__(self, senders: Sequence[_Sender], ids: dict[str, str]) -> None:
        """`senders` are at work; `ids` by tracker are added to, be it later, once each knows its run."""
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
        """Start them at once, and go on with the runs of `resume_ids` by tracker.

        For one that has not started after `timeout_s` the rows wait. Raises `UserError` where one does that is the
        user's to mend, such as a missing login.
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
        """Send one row, whose place on its axis is `values[axis]`: its numbers, those in mappings by their paths."""
        self.send(plain_row(values), axis)

    def send(self, row: dict[str, float], axis: str) -> None:
        """Send what `plain_row` has made of values. Nobody may change it any more."""
        for sender in self._senders:
            sender.put(row, axis)

    def finish(self, spectra: Table | None = None, *, timeout_s: float = FINISH_TIMEOUT_S) -> None:
        """Send what is left, for at most `timeout_s`, all at once; `spectra`, the newest, to those that have tables."""
        for sender in self._senders:
            sender.begin_finish(spectra)
        until = time.monotonic() + timeout_s
        for sender in self._senders:
            sender.finish(until, timeout_s)
        self._senders = ()


def plain_row(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, those in mappings by their paths, under names that can be sent."""
    return dict(values) if _is_plain(values) else _numbers(values)


def _is_plain(values: Mapping[str, Any]) -> bool:
    """Whether `_numbers` would change nothing; of the thousands in a refresh of the spectra that is soon seen."""
    return {float, int}.issuperset(map(type, values.values())) and "".join(values).isprintable()


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What is a number, under names that are printable."""
    return {
        name if name.isprintable() else terminal.one_line(name): int(value) if isinstance(value, int) else float(value)
        for name, value in paths(values, "")
        if isinstance(value, Real)
    }


def _plain(value: Any) -> Any:
    """The same with text that can be sent: a name may hold bytes that are not UTF-8."""
    if isinstance(value, str | Path):
        return printable(value)
    if isinstance(value, dict):
        return {_plain(name): _plain(one) for name, one in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


class _Sender:
    """One tracker and its thread, in which all of its methods are called."""

    def __init__(self, name: str, about: About, ids: dict[str, str], say: Callable[[str], object]) -> None:
        self._title, self._say, self._ids = TITLES[name], say, ids
        self._tracker: Tracker | None = None
        self._advice = ""
        self._is_resumed = bool(ids.get(name))
        self.refusal: UserError | None = None
        self._is_started, self._lock, self._waiting = threading.Event(), threading.Lock(), 0
        self._failures = Failures(f"lines were not sent to {self._title}", say)
        # What a job raises it notes itself, so the thread has no errors to tell.
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
            self._say(
                f"warning: {self._title} cannot be started ({in_short(error)}); training goes on without {self._title}."
            )
        finally:
            self._is_started.set()

    def wait(self, until: float, timeout_s: float) -> None:
        """Wait until it is started, or has failed, or that time is over."""
        if not self._is_started.wait(max(0.0, until - time.monotonic())):
            self._say(
                f"warning: {self._title} has not started after {timeout_s:.0f} s; training goes on, and the numbers "
                "wait for it."
            )

    def put(self, row: dict[str, float], axis: str) -> None:
        """Have a row sent after those before it; too many that wait are too many for the memory."""
        with self._lock:
            is_room = self._waiting + len(row) <= MOST_WAITING
            self._waiting += len(row) if is_room else 0
            if is_room:
                self._failures.is_over()
            else:
                self._failures.note(f"{self._title} is slower than the numbers are made; some are not sent to it.")
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
        """Have the tracker's run ended after the last row, and after the table of the newest spectra."""
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
        """Wait for it until that time, unless it has not even started; say what was lost."""
        has_started = self._is_started.is_set()
        self._jobs.close(max(0.0, until - time.monotonic()) if has_started else 0.0)
        if self._jobs.is_busy:
            self._cut_short(f"not done after {timeout_s:.0f} s" if has_started else "it has never started")
        with self._lock:
            self._failures.tell()
