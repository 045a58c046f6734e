"""`train --seeds 0 1 2`: one configuration with several seeds, one run after another, each in its own process.

With its own process, a run has the same bits as alone, frees all memory at its end, and cannot harm the others when it
fails. Compiled code is kept on disk, so only the first run waits for the compiler. The same command line continues a
series: a run with a checkpoint is resumed, and a finished run ends in seconds.
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
"""Exit code of an error that the user has to correct, which the other runs would have too."""


@dataclass(frozen=True)
class SeedRun:
    """One run of a series."""

    seed: int
    path: Path
    exit_code: int
    """Exit code of its process; negative for a signal."""


@dataclass(frozen=True)
class Series:
    """The outcome of a series."""

    runs: list[SeedRun]
    """The runs that were started or continued."""
    stopped_by: str = ""
    """The name of the signal that ended it before its last run; empty if none did."""

    @property
    def failed(self) -> list[SeedRun]:
        """The runs that ended with an error."""
        return [one for one in self.runs if one.exit_code]


def run_series(config: Config, command: Sequence[str], series: str, is_done: Callable[[Path], bool]) -> Series:
    """Train with each of --seeds; `command` is the training command without --seeds, --seed and --experiment.

    If a run fails, the others still run, unless the user has to correct something. A run that ends unfinished
    (`is_done`) was stopped, and the series stops too. Signals to this process are passed on to the run.
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
            say(f"\nseed {seed}, {number} of {len(seeds)}: {path}" + " (resumed)" * bool(resume))
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
    """Raise `UserError` if a run could neither start nor continue; called before other runs have taken hours."""
    from lowrank_vit.common.locks import holder, is_locked
    from lowrank_vit.run.directory import RunDir

    if is_locked(path):
        raise UserError(f"{path} is in use by another process ({holder(path)}). Wait for it, or name another series.")
    if not (path / LAST).exists():
        RunDir.require_free(path.parent, path.name)


def unused_name(output: Path, default: str, seeds: Sequence[int]) -> str:
    """A name for a series, with the time, that no run uses yet."""
    name = began = f"{default}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while any((output / f"{name}-seed{seed}").exists() for seed in seeds):
        number += 1
        name = f"{began}-{number}"
    return name


def own_command(argv: Sequence[str], module: str) -> list[str]:
    """The command that started this process, without the options `argv`; `python -m MODULE` if called from Python."""
    words = sys.orig_argv
    at = len(words) - len(argv)
    return [sys.executable, *words[1:at]] if at > 1 and words[at:] == list(argv) else [sys.executable, "-m", module]


class _Child:
    """The run's process, which gets the signals sent to this one; the first signal is remembered."""

    def __init__(self) -> None:
        self.signal = 0
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, command: list[str]) -> int:
        """Run a process on the same terminal and return its exit code. If this process is killed, it gets SIGTERM."""
        self._process = subprocess.Popen(command, preexec_fn=signalled_with_parent(signal.SIGTERM))
        if self.signal:  # the signal came between two runs
            self._process.send_signal(self.signal)
        code = self._process.wait()
        self._process = None
        return code

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remember the signal and send it to the run."""
        self.signal = self.signal or number
        if self._process is not None:
            self._process.send_signal(number)
