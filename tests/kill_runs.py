"""Trainings that SIGKILL ends at random moments and that are resumed end in the bits of uninterrupted ones.

    python -m tests.kill_runs --runs 20 --state kills.json      20 trainings of 10 kills each

Each run is trained once undisturbed and once with kills, each followed by the line that a user would submit again: with
`--resume` where there is a checkpoint. A kill may hit anything: the start, the conversion of the data, an update, a
refresh of the spectra, saving, validation, the end, a finished run that is resumed. Compared are the losses and scores
of metrics.jsonl, the records of the spectra, summary.csv, all of spectra/, and weights, EMA, optimizer, progress and
position in the data of the checkpoints.

A run is a function of its number. Finished ones are noted in the state file, so the script takes up where it stopped.

Most children are forked from this process, which has imported everything, so that a kill costs a second; what that
leaves out (Python's start, imports, the interpreter's own exit) is there in runs of whole processes, every twentieth.
One thing differs from a user's training: a refresh that is due waits until the one before is over, since which ones
are skipped for want of time is no function of the seed. Where --spec-store-gb is tight it leaves only the first and the
newest vectors, and all spectra: which files of a longer series are thinned out depends on the kills.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked child has no threads but its own
import argparse
import contextlib
import importlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from PIL import Image

from lowrank_vit import train
from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.spectral.watching.monitor import SpectralMonitor
from tests.golden.compare import differences
from tests.waiting import LONG_S, free_port

IMPORTED = ("sklearn.datasets", *(f"lowrank_vit.data.decode.{name}" for name in ("dali", "ffcv", "resident")))
"""Where they are used otherwise; a forked child finds them there."""
ROOT = Path(__file__).parents[1]
COMMON = f"""
--config {ROOT}/configs/quickstart.yaml --device cpu --loader resident --workers 2 --batch-size 128
--model-kwargs patch_size=4 embed_dim=32 depth=2 num_heads=2 class_token=False global_pool=avg --epochs 4
--warmup-epochs 1 --log-interval 5 --spec-every 3 --spec-topk 4 --checkpoint-interval 2 --checkpoint-hist 2
""".split()


@dataclass(frozen=True)
class Kind:
    """What is trained, and how."""

    name: str
    flags: str
    data: str = "digits"
    """digits: written by the run itself; folder: images that it converts."""
    ranks: int = 1


SMALL = "--batch-size 16 --epochs 5"
KINDS = (
    Kind("every update saved", "--checkpoint-interval 1 --mixup 0.2 --cutmix 1 --reprob 0.25 --drop-path 0.1"),
    Kind("folder, accumulation", "--batch-size 16 --grad-accum-steps 2 --epochs 6 --spec-every 4", data="folder"),
    Kind("two ranks", "--batch-size 64 --mixup 0.2 --epochs 3", ranks=2),
    Kind(
        "no EMA, ffcv", f"{SMALL} --no-model-ema --loader ffcv --aa rand-m9-mstd0.5-inc1 --sched-on-updates", "folder"
    ),
    Kind("few checkpoints", f"{SMALL} --checkpoint-interval 7 --spec-every 2 --log-interval 4 --clip-grad 1", "folder"),
    Kind(
        "thinned spectra",
        f"{SMALL} --spec-store-gb 0.0006 --checkpoint-interval 100 --spec-every 5 --spec-split-qkv --val-interval 2"
        " --opt lookahead_adamw",
        "folder",
    ),
    Kind(
        "low rank",
        "--checkpoint-interval 1 --lowrank-train kfac --lowrank-schedule 1=0.5 2=0.3 3=0.2 --spec-full-every 2"
        " --lowrank-calibration-images 200",
    ),
)


class Attempt:
    """One start of the training command, as one or several processes."""

    def __init__(self, argv: list[str], ranks: int, log: Path, *, is_whole: bool) -> None:
        """`is_whole`: processes of their own instead of forked ones."""
        self.began, port = time.monotonic(), free_port()
        self._children: list[int] = []
        for rank in range(ranks):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in world.items()} if ranks > 1 else {}
            file = log.with_suffix(f".{rank}.log")
            if is_whole:
                code = f"from tests.kill_runs import child; child({argv!r})"
                self._children.append(spawned(["-c", code], environment, file))
            else:
                self._children.append(forked(lambda: child(argv), environment, file))

    def ends_within(self, seconds: float) -> bool:
        """Wait at most so long, counted from the start; whether all processes have ended by then."""
        while time.monotonic() - self.began < seconds:
            if all(has_ended(pid) for pid in self._children):
                return True
            time.sleep(0.005)
        return False

    def kill(self, rng: random.Random) -> None:
        """SIGKILL, of several ranks one shortly before the others."""
        for pid in rng.sample(self._children, len(self._children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            if len(self._children) > 1:
                time.sleep(rng.choice((0.0, 0.05, 0.5)))

    def codes(self) -> list[int]:
        """Wait for the ends; the exit codes, a signal's negative."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self._children]


def has_ended(pid: int) -> bool:
    """Whether a child of this process has ended; it is left to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def spawned(arguments: list[str], environment: dict[str, str], log: Path) -> int:
    """Begin another Python with these arguments; its id."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=out, stderr=out, cwd=ROOT, env={**os.environ, **environment}
        )
    process.returncode = 0  # it is waited for here, and not by subprocess
    return process.pid


def forked(work: Callable[[], object], environment: dict[str, str], log: Path) -> int:
    """Begin `work` in a fork of this process, which must have no threads; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def child(argv: list[str]) -> None:
    """Train; no refresh of the spectra is skipped."""
    skip_no_refresh()
    exit_cleanly(lambda: train.main(argv))


def skip_no_refresh() -> None:
    """Have a refresh of the spectra that is due wait until the one before is over."""
    observe = SpectralMonitor.observe

    def and_skip_none(self: SpectralMonitor, num_updates: int) -> None:
        if self._schedule.is_due(num_updates):
            self.wait()
        observe(self, num_updates)

    SpectralMonitor.observe = and_skip_none


class Run:
    """One training and its twin."""

    def __init__(self, number: int, kills: int, folder: Path) -> None:
        self.kind, self._kills, self._folder = KINDS[number % len(KINDS)], kills, folder
        self.is_whole = number % 20 == 4
        self._rng = random.Random(f"kills/{number}")
        self._seed = 1000 + number

    def record(self) -> dict[str, Any]:
        """Its kind, and how many kills there are of it."""
        return {"kind": f"{self.kind.name}{', whole processes' if self.is_whole else ''}", "kills": self._kills}

    def differences(self) -> list[str]:
        """What is not the same in the end; nothing, if all is well."""
        whole, killed = self._folder / "whole", self._folder / "killed"
        attempt = self._begin("whole")
        if not attempt.ends_within(LONG_S):
            attempt.kill(self._rng)
        if any(attempt.codes()):
            return ["the undisturbed run failed"]
        all_s = time.monotonic() - attempt.began
        attempt = self._begin("whole")
        if any(attempt.codes()):
            return ["resuming the finished run failed"]
        start_s = time.monotonic() - attempt.began
        if problem := self._kill_and_resume(start_s, max(0.5, all_s - start_s)):
            return [problem]
        return differing_bits(whole / "output" / "run", killed / "output" / "run")

    def _kill_and_resume(self, start_s: float, work_s: float) -> str:
        done = 0
        while done < self._kills:
            attempt = self._begin("killed")
            in_start = self._rng.random() < 0.35
            # On average the kills are spread over the work, so that the last ones meet the end.
            wait_s = self._rng.uniform(0, start_s)
            if not in_start:
                wait_s = 0.8 * start_s + self._rng.uniform(0, 2.5 * work_s / (0.65 * self._kills))
            if not attempt.ends_within(wait_s):
                attempt.kill(self._rng)
            codes = attempt.codes()
            if -signal.SIGKILL in codes:
                done += 1
                print(".", end="", flush=True)
            elif any(codes):
                return f"attempt {done + 1} ended with {codes}"
        attempt = self._begin("killed")
        if not attempt.ends_within(LONG_S):
            attempt.kill(self._rng)
        codes = attempt.codes()
        return f"the last attempt ended with {codes}" if any(codes) else ""

    def _begin(self, name: str) -> Attempt:
        home = self._folder / name
        home.mkdir(exist_ok=True)
        argv = [*COMMON, *self.kind.flags.split(), "--seed", str(self._seed), "--spec-monitor"]
        argv += ["--data-dir", str(home / "data"), "--output", str(home / "output"), "--experiment", "run"]
        if self.kind.data == "folder":
            make_images(home / "data")
            argv += ["--dataset", ""]
        last = home / "output" / "run" / "last.pth.tar"
        if last.exists():
            argv += ["--resume", str(last)]
        return Attempt(argv, self.kind.ranks, self._folder / name, is_whole=self.is_whole)


def differing_bits(a: Path, b: Path) -> list[str]:
    """What two run directories do not have in common.

    But for whether the refresh of the spectra whose weights are kept was still being computed when they were written:
    then those of the one before are kept, too.
    """
    is_timing = re.compile(r"spectra/weights_\d+\.pth: before: ")
    return [found for found in differences(a, b) if not is_timing.match(found)]


def make_images(folder: Path) -> None:
    """A few classes of small random images, the same each time."""
    if (folder / "val").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    pixels = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 8)):
        for label in range(4):
            where = folder / f"{split}.part" / f"class{label}"
            where.mkdir(parents=True)
            for n in range(count):
                image = pixels.integers(0, 256, (20, 20 + label, 3)) // (label + 1)
                Image.fromarray(image.astype(np.uint8)).save(where / f"{n}.png")
        (folder / f"{split}.part").rename(folder / split)


class Killed(Protocol):
    """One run of a script of kills."""

    def __init__(self, number: int, kills: int, folder: Path) -> None:
        """All that is random is a function of the number; `folder` is its own, empty and deleted afterwards."""
        ...

    def differences(self) -> list[str]:
        """What is not the same in the end; nothing, if all is well."""
        ...

    def record(self) -> dict[str, Any]:
        """What to note of it: "kind", "kills" (how many), and more."""
        ...


def campaign(description: str, killed: type[Killed], state: str, runs: int) -> dict[str, Any]:
    """Parse the command line of such a script, and run what is not yet noted in the state file; all that is noted."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--kills", type=int, default=10, help="of a run")
    parser.add_argument("--state", type=Path, default=Path(state))
    parser.add_argument("--keep", type=Path, help="folder for the directories of runs that differ")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was begun is ended
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    done: dict[str, Any] = json.loads(options.state.read_text()) if options.state.exists() else {}
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    for number in range(options.first, options.first + options.runs):
        if str(number) in done:
            continue
        with TemporaryDirectory(prefix="kill_runs") as folder:
            run, began = killed(number, options.kills, Path(folder)), time.monotonic()
            print(f"run {number}, {run.record()['kind']} ", end="", flush=True)
            found = run.differences()
            if found and options.keep:
                shutil.copytree(folder, options.keep / f"run{number}", dirs_exist_ok=True)
        seconds = round(time.monotonic() - began)
        print(f" {'differs: ' + '; '.join(found) if found else 'the same'}, {seconds} s", flush=True)
        done[str(number)] = {**run.record(), "seconds": seconds, "commit": commit, "differs": found}
        partial = options.state.with_suffix(".part")
        partial.write_text(json.dumps(done, indent=1) + "\n")
        partial.replace(options.state)
    return done


def verdict(done: dict[str, Any]) -> NoReturn:
    """Say the counts, and exit with 1 if any run differs."""
    bad = [number for number, one in done.items() if one["differs"]]
    print(f"{sum(one['kills'] for one in done.values())} kills in {len(done)} runs, {len(bad)} differ {' '.join(bad)}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    verdict(campaign(__doc__ or "", Run, "kill_runs.json", 20))
