"""Ranks and nodes that SIGKILL ends under torchrun end, after its restarts, where an undisturbed run ends.

    python -m tests.kill_ranks --runs 10 --kills 10 --state kill_ranks.json      10 trainings of 10 kills each

Each training is two ranks on the CPU. It is run once undisturbed and once with kills, which one `torchrun
--max-restarts` survives, or two of `--nnodes 1:2`: two nodes on this machine, each with an agent and one rank. Killed
is a random rank in a random phase (start, set-up, an update, a refresh of the spectra, validation, saving, the end, the
process's exit), or a node: agent and rank at once. Then another node takes its place at once, or the one that is left
goes on alone until another comes. Where the agents' store or the only agent is lost, the ranks that are left must end
by themselves. Where a launch ends before its last kill the same line is begun again with `--resume`, as a user would;
if the training is over, it is a finished run that is killed.

With two ranks in all updates all is the same to the bit: losses and scores of metrics.jsonl, records of the spectra,
summary.csv, all of spectra/, and weights, EMA, optimizer, progress and position in the data of the checkpoints. Where
one rank was alone for some updates its sums have another order: then every figure of the rows as the log prints it is
the same (loss, learning rate, norm of the gradient, scores), the checkpoints hold the same progress, and weights and
spectra are the same up to rounding.

Agents and most ranks are forked from this process, which has imported everything; whole processes, with Python's start,
imports and the interpreter's own exit, are those of every fifth run. What a run is follows from its number, finished
ones are noted in the state file, and no refresh of the spectra is skipped, all as in `kill_runs.py`.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked child has no threads but its own
import csv
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.kill_runs import COMMON, campaign, differing_bits, verdict
from tests.killed_rank import AFTER, BEFORE, Place
from tests.launches import Fault, Launch, Victim, lives
from tests.runs import records
from tests.waiting import LONG_S

EPOCHS, UPDATES = 10, 110
TRAINED = [*COMMON, "--epochs", str(EPOCHS), "--batch-size", "64", "--mixup", "0.2", "--reprob", "0.25"]


@dataclass(frozen=True)
class Kind:
    """What is launched, and what is done to it."""

    name: str
    nodes: int = 1
    is_whole: bool = False
    """Agent and ranks are processes of their own instead of forked ones."""
    alone_for: tuple[int, int] | None = None
    """Updates, at least and at most, that a node trains alone before another takes the lost one's place."""
    is_first_lost: bool = False
    """Whether nodes are lost that hold the agents' store, and with it all of the launch."""


KINDS = (
    Kind("one node"),
    Kind("a node replaced at once", nodes=2),
    Kind("a node lost, another later", nodes=2, alone_for=(2, 8)),
    Kind("the first node lost, too", nodes=2, is_first_lost=True),
    Kind("one node, whole processes", is_whole=True),
)
PHASES = (), ("start",), ("set-up",), ("refresh", "capture"), ("saving",), ("validation",)
PHASE_WEIGHTS = 6, 2, 2, 1, 2, 3


@dataclass(frozen=True)
class Target:
    """When to kill: from an update on, in a phase of any rank, and a random while into it."""

    update: int
    phases: tuple[str, ...]
    """None of them: whatever comes."""
    most_s: float
    victim: Victim = "rank"


class Run:
    """One training and its twin."""

    def __init__(self, number: int, kills: int, folder: Path) -> None:
        self._number, self.kind, self._num_kills, self._folder = number, KINDS[number % len(KINDS)], kills, folder
        self._rng = random.Random(f"ranks/{number}")
        self._kills = list[dict[str, Any]]()
        self._start_s, self._fewest = 1.0, 2
        self._num_launches, self._is_named = 0, number % 2 == 0

    def record(self) -> dict[str, Any]:
        """Its kind, how many kills there are of it, and each of them."""
        named = "given" if self._is_named else "left out"
        compared = "bits" if self._fewest == 2 else "as printed"
        more = {"launches": self._num_launches, "--experiment": named, "compared": compared}
        return {"kind": self.kind.name, "kills": len(self._kills), **more, "each": self._kills}

    def differences(self) -> list[str]:
        """What is not the same in the end; nothing, if all is well."""
        try:
            launch = self._begin("whole", is_disturbed=False)
            try:
                self._start_s = self._time_of_start(launch)
                self._wait_for_end(launch)
            finally:
                launch.end()
            self._kill_all()
            compare = differing_bits if self._fewest == 2 else _differences_as_printed
            return list(compare(self._run_dir("whole"), self._run_dir("killed")))
        except Fault as fault:
            return [str(fault)]

    def _targets(self) -> list[Target]:
        """Where the kills are to be, in order; the last one or two meet the end, or what comes after it."""
        rng, found = self._rng, list[Target]()
        num_last = 1 + (self._num_kills > 5)
        for update in sorted(rng.uniform(0, 0.95) * UPDATES for _ in range(self._num_kills - num_last)):
            phases, most_s = rng.choices(PHASES, PHASE_WEIGHTS)[0], 0.3
            if phases:
                most_s = {"start": self._start_s, "set-up": 0.5 * self._start_s}.get(phases[0], 0.03)
            found.append(Target(int(update), phases, most_s, self._victim()))
        after = AFTER if self.kind.is_whole else AFTER[:2]
        return [*found, *[Target(UPDATES, after, 0.1)] * num_last]

    def _victim(self) -> Victim:
        if self.kind.nodes > 1:
            return "node" if self._rng.random() < 0.7 else "rank"
        return "agent" if self._rng.random() < 0.15 else "rank"

    def _kill_all(self) -> None:
        launch = self._begin("killed")
        try:
            for n, target in enumerate(self._targets()):
                while not self._kill(launch, target, n):
                    launch.end()
                    is_finished = not launch.has_lost_store
                    launch = self._begin("killed")
                    if not is_finished:
                        continue
                    target = Target(0, ("start",), self._start_s if self.kind.is_whole else 1.0)
            self._wait_for_end(launch)
        finally:
            launch.end()

    def _kill(self, launch: Launch, target: Target, n: int) -> bool:
        """Make one kill; False if the launch is over before. Raises `Fault`."""
        until = time.monotonic() + LONG_S
        while time.monotonic() < until:
            pids = self._wait_for_target(launch, target)
            if pids is None:
                return False
            time.sleep(self._rng.uniform(0, target.most_s))
            pids = [pid for pid in pids if lives(pid)]
            victim = "rank" if target.victim == "node" and len(launch.nodes) == 1 else target.victim
            if victim == "node" and not self.kind.is_first_lost:
                pids = [pid for pid in pids if not launch.is_of_first_node(pid)]
            if not pids:
                continue
            pid, began = self._rng.choice(sorted(pids)), time.monotonic()
            place = launch.kill(pid, victim)
            if place is None:
                continue
            self._note(n, place, victim, began - launch.began)
            if launch.has_lost_store:
                seconds = launch.wait_for_ranks()
                print(f"  ranks that were left ended after {seconds:.1f} s", end="", flush=True)
                self._kills[-1]["ended after"] = round(seconds, 1)
            elif victim == "node":
                self._replace(launch)
            return True
        raise Fault(f"no rank was there to be killed: {launch.last_words()}")

    def _wait_for_target(self, launch: Launch, target: Target) -> list[int] | None:
        if target.phases == ("start",):
            return launch.wait_for_start()
        what = f"update {target.update}{' and ' if target.phases else ''}{', '.join(target.phases)}"

        def is_there(places: list[Place]) -> bool:
            self._fewest = min([self._fewest, *(place.size for place in places if place.is_training)])
            if target.victim == "node" and len(launch.nodes) > len(places):
                return False  # a node that has just come is not yet part of it
            early = target.phases == ("set-up",)
            far = [place for place in places if early or place.update >= target.update]
            return any(not target.phases or place.phase in target.phases for place in far)

        places = launch.wait_for(is_there, what)
        return None if places is None else [place.pid for place in places]

    def _replace(self, launch: Launch) -> None:
        """Start another node, at once or when the one that is left has trained for a while."""
        if self.kind.alone_for:
            updates = self._rng.randint(*self.kind.alone_for)
            begun = dict[int, int]()

            def is_far(places: list[Place]) -> bool:
                alone = [place for place in places if place.size == 1 and place.is_training]
                for place in alone:
                    self._fewest = 1
                    begun.setdefault(place.pid, place.update)
                return any(place.update >= begun[place.pid] + updates for place in alone)

            if launch.wait_for(is_far, f"{updates} updates of one rank alone") is None:
                return
        launch.add()

    def _note(self, n: int, place: Place, what: str, seconds: float) -> None:
        of = f"rank {place.rank} of {place.size}" if place.size else "a rank"
        at = f"update {place.update:>3}  {place.phase:<11} {seconds:6.1f} s"
        print(f"\n  {n + 1:>3}  {what:<5} {of:<12} {at}", end="", flush=True)
        one = {"rank": place.rank, "ranks": place.size, "update": place.update, "phase": place.phase}
        self._kills.append({"what": what, **one, "seconds": round(seconds, 1)})

    def _begin(self, name: str, *, is_disturbed: bool = True) -> Launch:
        home = self._folder / name
        home.mkdir(exist_ok=True)
        self._num_launches += is_disturbed
        argv = [*TRAINED, "--seed", str(2000 + self._number), "--spec-monitor"]
        argv += ["--data-dir", str(home / "data"), "--output", str(home / "output")]
        if self.kind.nodes > 1:
            argv += ["--global-batch-size", "128"]
        if (last := self._run_dir(name) / "last.pth.tar").exists():
            argv += ["--resume", str(last)]
        elif not self._is_named:
            shutil.rmtree(home / "output", ignore_errors=True)  # an attempt with nothing to resume from
        if self._is_named:
            argv += ["--experiment", "run"]
        kind = self.kind if is_disturbed else Kind("undisturbed")
        restarts = 2 * self._num_kills + 2
        return Launch(argv, home, nodes=kind.nodes, is_whole=kind.is_whole, restarts=restarts)

    def _run_dir(self, name: str) -> Path:
        """The run's directory; the newest, if there should be more than one, and a fault then."""
        found = [path.parent for path in (self._folder / name / "output").glob("*/args.yaml")]
        found = [folder for folder in found if not folder.is_symlink()]
        if len(found) > 1:
            raise Fault(f"one training has made {len(found)} run directories: {[path.name for path in found]}")
        return found[0] if found else self._folder / name / "output" / "run"

    @staticmethod
    def _time_of_start(launch: Launch) -> float:
        launch.wait_for_start()
        began = time.monotonic()
        launch.wait_for(lambda places: all(place.phase not in BEFORE for place in places), "an update")
        return time.monotonic() - began

    def _wait_for_end(self, launch: Launch) -> None:
        launch.wait_for(lambda _: False, "the end")


def _differences_as_printed(a: Path, b: Path) -> Iterator[str]:
    """What differs of the rows as the log prints them, of progress, and beyond rounding of weights and spectra."""
    rows = [list(_printed(run)) for run in (a, b)]
    if len(rows[0]) != len(rows[1]):
        yield f"{len(rows[0])} and {len(rows[1])} rows"
    unequal = [f"{ours} and {theirs}" for ours, theirs in zip(*rows, strict=False) if ours != theirs]
    if unequal:
        yield f"{len(unequal)} of {len(rows[0])} rows as printed, first {unequal[0]}"
    first, second = (torch.load(run / "last.pth.tar", weights_only=True) for run in (a, b))
    for key in ("data", "epoch"):
        if first[key] != second[key]:
            yield f"last.pth.tar: {key}: {first[key]} and {second[key]}"
    for key in ("state_dict", "state_dict_ema"):
        for name, weight in first[key].items():
            if not torch.allclose(weight.double(), second[key][name].double(), rtol=1e-3, atol=1e-4):
                yield f"last.pth.tar: {key}: {name}"
    names = [sorted(path.name for path in (run / "spectra").glob("*.npz")) for run in (a, b)]
    if names[0] != names[1]:
        yield f"spectra of {names[0]} and {names[1]}"
    for name in set(names[0]) & set(names[1]):
        stored = [np.load(run / "spectra" / name) for run in (a, b)]
        for key in stored[0]:
            if key.endswith("/s") and not np.allclose(stored[0][key], stored[1][key], rtol=1e-3, atol=1e-4):
                yield f"spectra/{name}: {key}"


def _printed(run: Path) -> Iterator[str]:
    """Every row of the run, each figure as the log prints it."""
    for row in records(run, "train"):
        norm = f" |g| {row['grad_norm']:.2g}" if "grad_norm" in row else ""
        yield f"update {row['update']} loss {row['loss']:.3f} lr {row['lr']:.1e}{norm}"
    with (run / "summary.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            scores = " ".join(f"{name} {float(value):.2f}" for name, value in row.items() if "top" in name)
            yield f"epoch {row['epoch']} loss {float(row['train_loss']):.3f} {scores}"


def table(done: dict[str, Any]) -> Iterator[str]:
    """Kills by phase and kind, and what came of them."""
    kinds = [kind.name for kind in KINDS if any(one["kind"] == kind.name for one in done.values())]
    counts = {name: Counter[str]() for name in kinds}
    for one in done.values():
        counts[one["kind"]].update(kill["phase"] for kill in one["each"])
    phases = sorted({phase for count in counts.values() for phase in count})
    width = max(map(len, kinds), default=0)
    yield " " * width + "".join(f"  {phase:>10}" for phase in (*phases, "nodes", "agents", "kills", "same"))
    for name in kinds:
        of_kind = [one for one in done.values() if one["kind"] == name]
        whats = Counter(kill["what"] for one in of_kind for kill in one["each"])
        same = f"{sum(not one['differs'] for one in of_kind)} of {len(of_kind)}"
        figures = (
            *(counts[name][phase] for phase in phases),
            whats["node"],
            whats["agent"],
            counts[name].total(),
            same,
        )
        yield f"{name:<{width}}" + "".join(f"  {figure:>10}" for figure in figures)


def main() -> None:
    """Run what is not yet noted in the state file, and say the counts."""
    done = campaign(__doc__ or "", Run, "kill_ranks.json", 10)
    print(*table(done), sep="\n")
    verdict(done)


if __name__ == "__main__":
    main()
