"""`train --seeds 0 1 2`: one configuration under several seeds, one run after another, each in a process of its own.

A process each, since a run then has the bits that it has alone, gives back all memory at its end, and can take nothing
with it when it fails; compiled code is kept on disk, so that only the first run waits for it. The same command line
goes on with a series: a run that has a checkpoint is resumed, one that is through says so in seconds.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lowrank_vit.common.aside import signalled_with_parent
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.terminal import say
from lowrank_vit.config.options import Config
from lowrank_vit.run.directory import LAST
from lowrank_vit.training.stop import handled

_TO_MEND = 2
"""Exit code of what the user has to mend, which the other runs would meet as well."""


@dataclass(frozen=True)
class SeedRun:
    """One run of a series."""

    seed: int
    path: Path
    exit_code: int
    """Of its process; below 0 by a signal."""


@dataclass(frozen=True)
class Series:
    """What became of it."""

    runs: list[SeedRun]
    """Those that were begun, or gone on with."""
    stopped_by: str = ""
    """The signal's name on which it ended before its last run."""

    @property
    def failed(self) -> list[SeedRun]:
        """The runs that ended with an error."""
        return [one for one in self.runs if one.exit_code]


def run_series(config: Config, command: Sequence[str], series: str, is_done: Callable[[Path], bool]) -> Series:
    """Train under each of --seeds; `command` is the line that trains, without --seeds, --seed and --experiment.

    A run that fails is no reason to leave the others out, unless the user has to mend something. One that ends without
    being through (`is_done`) was stopped, and so is the series; signals for this process are passed on to the run.
    """
    seeds, runs = config.run.seeds or (), list[SeedRun]()
    paths = {seed: config.run.output / f"{series}-seed{seed}" for seed in seeds}
    for path in paths.values():
        require_free(path)
    child = _Child()
    with handled(child.pass_on):
        for number, seed in enumerate(seeds, 1):
            path = paths[seed]
            resume = ["--resume", str(path / LAST)] if (path / LAST).exists() else []
            say(f"\nseed {seed}, {number} of {len(seeds)}: {path}" + " (goes on)" * bool(resume))
            line = [*command, "--seed", str(seed), "--experiment", path.name, *resume]
            code = child.run(line)
            runs.append(SeedRun(seed, path, code))
            if child.signal or (not code and not is_done(path)):
                return Series(runs, signal.Signals(child.signal).name if child.signal else "a signal")
            if code == _TO_MEND:
                return Series(runs)
            if code:
                say(f"warning: the run with seed {seed} has failed (exit code {code}); the next one begins")
    return Series(runs)


def require_free(path: Path) -> None:
    """Raise `UserError` where a run of a series could not begin, nor go on: before others have taken their hours."""
    from lowrank_vit.common.locks import holder, is_locked
    from lowrank_vit.run.directory import RunDir

    if is_locked(path):
        raise UserError(f"{path} is in use by another process ({holder(path)}). Wait for it, or name another series.")
    if not (path / LAST).exists():
        RunDir.require_free(path.parent, path.name)


def unused_name(output: Path, default: str, seeds: Sequence[int]) -> str:
    """A series' name by the time, of which there is no run yet."""
    name = began = f"{default}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while any((output / f"{name}-seed{seed}").exists() for seed in seeds):
        number += 1
        name = f"{began}-{number}"
    return name


def own_command(argv: Sequence[str], module: str) -> list[str]:
    """The words that have started this process, up to the options `argv`; of a call from Python `python -m MODULE`."""
    words = sys.orig_argv
    at = len(words) - len(argv)
    return [sys.executable, *words[1:at]] if at > 1 and words[at:] == list(argv) else [sys.executable, "-m", module]


class _Child:
    """The run's process, to which signals for this one go; the first is remembered."""

    def __init__(self) -> None:
        self.signal = 0
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, command: list[str]) -> int:
        """The exit code of a process that shares the terminal, and is told to save and end where this one is killed."""
        self._process = subprocess.Popen(command, preexec_fn=signalled_with_parent(signal.SIGTERM))
        if self.signal:  # it came between two runs
            self._process.send_signal(self.signal)
        code = self._process.wait()
        self._process = None
        return code

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """A handler of signals."""
        self.signal = self.signal or number
        if self._process is not None:
            self._process.send_signal(number)
