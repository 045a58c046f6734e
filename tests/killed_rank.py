"""One rank of a training that is to be killed: it writes down what it is at, see `tests/kill_ranks.py`.

torchrun starts it with the training command's arguments, as a module or, in forks of its agent, by `--run-path`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_vit import train
from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.run.checkpoints import CheckpointWriter
from lowrank_vit.training.trainer import Trainer
from tests.kill_runs import skip_no_refresh

TRACES = "KILL_RANKS_TRACES"
"""Names the folder where each rank has a file, named by its process."""
PHASES = {"refresh": "refresh", "checkpoint": "capture", "evaluation": "validation"}
"""Of the trainer's phases those that are told apart here; all others are "update"."""
BEFORE, AFTER = ("start", "set-up"), ("last files", "farewell", "exit")
"""Outside of the loop."""


@dataclass(frozen=True)
class Place:
    """What one rank is at."""

    pid: int
    rank: int
    size: int
    update: int
    phase: str

    @property
    def is_training(self) -> bool:
        """Whether it is in the loop."""
        return self.phase not in (*BEFORE, *AFTER)

    @classmethod
    def read(cls, trace: Path) -> Place | None:
        """What the rank of that file is at; None where it has not told yet."""
        try:
            rank, size, update, *phase = trace.read_text().split()
        except (OSError, ValueError):
            return None
        return cls(int(trace.name), int(rank), int(size), int(update), " ".join(phase))


class Trace:
    """Listens to the trainer and writes down, for whoever kills, what this rank is at: one line, always whole."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / str(os.getpid()), os.O_WRONLY | os.O_CREAT)
        self._rank = f"{os.environ.get('RANK', 0)} {os.environ.get('WORLD_SIZE', 1)}"
        self._around, self._inside, self._update = "start", list[str](), 0
        self.is_saving = False
        self._trainer: Trainer | None = None

    def follow(self, trainer: Trainer) -> None:
        """Tell how many updates it has made."""
        self._trainer = trainer
        self._update = trainer.state.position.num_updates

    def at(self, phase: str) -> None:
        """Outside the trainer's own phases."""
        self._around = phase
        self.write()

    def begin(self, phase: str) -> None:
        self._inside.append(PHASES.get(phase, "update"))
        self.write()

    def end(self, phase: str) -> None:
        self._inside.pop()
        if phase == "step" and self._trainer:
            self._update = self._trainer.state.position.num_updates
        self.write()

    def write(self) -> None:
        phase = "saving" if self.is_saving else self._inside[-1] if self._inside else self._around
        os.pwrite(self._file, f"{self._rank} {self._update} {phase}".ljust(60).encode() + b"\n", 0)


def main(argv: list[str]) -> None:
    """Train as one rank, and tell what it is at."""
    trace = Trace(Path(os.environ[TRACES]))
    trace.at("start")
    if multiprocessing.parent_process():  # a forked rank has its agent's handlers
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    skip_no_refresh()
    was_stopped = False
    made, ran, finish, write = Trainer.__init__, Trainer.run, Trainer._finish_spectra, CheckpointWriter._write

    def make(self: Trainer, *args: Any, **more: Any) -> None:
        trace.at("set-up")
        made(self, *args, **more, listener=trace)
        trace.follow(self)
        trace.at("between")

    def run(self: Trainer) -> Any:
        nonlocal was_stopped
        result = ran(self)
        was_stopped = bool(result.stopped_by)
        trace.at("farewell")
        return result

    def finish_spectra(self: Trainer) -> None:
        trace.at("last files")
        finish(self)

    def save(self: CheckpointWriter, job: Any) -> None:
        trace.is_saving = True
        trace.write()
        write(self, job)
        trace.is_saving = False
        trace.write()

    Trainer.__init__, Trainer.run, Trainer._finish_spectra, CheckpointWriter._write = make, run, finish_spectra, save
    try:
        exit_cleanly(lambda: train.main(argv))
    finally:
        trace.at("exit")
        if was_stopped and multiprocessing.parent_process():
            # The agent has asked for it and waits for the end; a forked rank would wait for the agent.
            sys.stdout.flush()
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
