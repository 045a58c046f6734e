"""The axes: simulated sets of more and more samples, files and classes, worlds of more ranks, folders of more files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.harness import simulated
from benchmarks.harness.measure import DEFAULT_REPEATS, Result, Samples, nothing, reason_of
from benchmarks.harness.sets import made_anew
from benchmarks.prep import CACHE
from benchmarks.scale.exponents import EXTRAPOLATED, extrapolated, growth_of, ratio_name, ratio_of
from lowrank_vit.common.errors import UserError

Axis = Literal["sets", "files", "classes", "ranks", "shards"]
AXES: tuple[Axis, ...] = ("sets", "files", "classes", "ranks", "shards")
_NUMBERS = tyro.conf.arg(metavar="N ...")
WORLD_SIZE, BATCH_SIZE = 8, 16
CLASSES = 21_841
"""ImageNet-21k's, in all sets that are large enough."""
IMAGES_A_SHARD = 1000
LONGEST_S = 900.0
"""For one process."""
RATIOS = {
    "first_batch": "first_batch",
    "resume": "resume",
    "ffcv_kept": "ffcv_memory",
    "private_memory": "private_memory",
}
"""Of the largest set over the smallest: the ratio's name and its cost."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the axes are measured at."""

    sets: Annotated[tuple[int, ...], _NUMBERS] = (100_000, 1_000_000, 14_200_000)
    """Samples of simulated sets: what opening, planning, reading and naming cost a rank of 8."""
    files: Annotated[tuple[int, ...], _NUMBERS] = (1, 10, 100, 1000, 10_000)
    """Files that the smallest set is divided into."""
    classes: Annotated[tuple[int, ...], _NUMBERS] = (10, 1000, 4000, CLASSES)
    """Classes of a set that is scored by class, with as many samples as the most."""
    ranks: Annotated[tuple[int, ...], _NUMBERS] = (1, 8, 64, 1024, 16_384)
    """World sizes: what one rank's plan of the second smallest set costs, without other processes."""
    shards: Annotated[tuple[int, ...], _NUMBERS] = (3_000, 10_000, 100_000)
    """Files in a folder of which one shard of 1,000 is converted."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Measured rounds, after one that warms up (none for memory). Fewer than 5 are a smoke test."""
    budget: Annotated[float, tyro.conf.arg(metavar="MINUTES")] = 60
    """Begin nothing more on these axes after so long. The same command goes on from what --json has."""
    scratch: Annotated[Path, tyro.conf.arg(metavar="DIR")] = CACHE
    """Where photographs and converted and simulated sets are kept."""


@dataclass
class Found:
    """Costs by axis, name and place."""

    options: Options
    costs: dict[str, dict[str, dict[int, Samples]]] = field(default_factory=dict)
    wall_s: dict[str, list[float]] = field(default_factory=dict)
    """Of the cases that are CPU seconds."""
    failed: dict[str, str] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    """How many each place has."""

    def add(self, axis: str, x: int, costs: Mapping[str, Mapping[str, Any]]) -> None:
        """What a probe has told."""
        for name, cost in costs.items():
            places = self.costs.setdefault(axis, {}).setdefault(name, {})
            before = places[x].samples if x in places else ()
            places[x] = Samples((*before, *cost["samples"]), cost["unit"], SETTINGS[name])
            if "wall" in cost:
                self.wall_s.setdefault(case_name(axis, name, x), []).extend(cost["wall"])

    def take_back(self, before: Result) -> None:
        """What an earlier run has measured."""
        for axis in AXES:
            for cost, places in before.extra["growth"].get(axis, {}).items():
                for x, name in places.items():
                    case = before.cases[name]
                    wall = {"wall": before.extra["wall_s"][name]} if name in before.extra["wall_s"] else {}
                    self.add(axis, int(x), {cost: {"unit": case.unit, "samples": case.samples, **wall}})
        self.rounds.update(before.extra.get("rounds", {}))

    def is_done(self, axis: Axis) -> bool:
        """Whether each place has had its rounds, or has failed."""
        names = _places(axis, self.options).values()
        return all(name in self.failed or self.rounds.get(name, 0) >= self.options.repeats for name in names)

    def pieces(self, axis: str, x: int) -> float:
        """What a cost is divided by: a rank's own samples, or files or classes."""
        own = {"sets": x / WORLD_SIZE, "ranks": _samples_of_ranks(self.options) / x}
        return own.get(axis, float(x))

    def ratios(self) -> dict[str, Samples]:
        """Those of `RATIOS`, and of the largest set the opening by a further process over that by the first one."""
        costs, found, sizes = self.costs.get("sets", {}), dict[str, Samples](), self.options.sets
        for name, cost in RATIOS.items():
            if (ratio := ratio_of(costs.get(cost, {}), sizes)) is not None:
                found[ratio_name(name, max(sizes), min(sizes))] = ratio
        further, first = (costs.get(name, {}).get(max(sizes)) for name in ("open", "first_open"))
        if further and first:
            pairs = zip(further.samples, first.samples, strict=False)
            found["second_open_vs_first_open"] = Samples(tuple(a / b for a, b in pairs))
        return found

    def extrapolated(self) -> dict[str, dict[str, float]]:
        """What is to be expected of a larger set: by samples and cost, in the cost's unit."""
        found = {name: extrapolated(places, EXTRAPOLATED) for name, places in self.costs.get("sets", {}).items()}
        return {str(EXTRAPOLATED): {name: cost for name, cost in found.items() if cost is not None}}

    def exponents(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By axis and cost: those of `Growth`, and the unit."""
        found = dict[str, dict[str, dict[str, Any]]]()
        for axis, costs in self.costs.items():
            for name, places in costs.items():
                if fit := growth_of(places, partial(self.pieces, axis)):
                    unit = next(iter(places.values())).unit
                    found.setdefault(axis, {})[name] = {**asdict(fit), "unit": unit}
        return found


SETTINGS = {
    "first_open": "Beton(path) by the first process that opens these files",
    "open": f"Beton(path) by a further process, one of {WORLD_SIZE} ranks",
    "open_peak": "how far resident memory rises while that opens, mapped pages of files among it",
    "plan": "TrainPlan.of",
    "order": "ids of an epoch of one rank",
    "eval_plan": "EvalPlan.of and its ids",
    "private_memory": "private memory of a rank that has opened the set and planned an epoch, torch and all",
    "first_batch": f"wait for the first batch of {BATCH_SIZE} at an epoch's start, --loader ffcv, 1 thread",
    "resume": "the same from the middle of an epoch",
    "batches": "30 further batches",
    "ffcv_memory": "private memory of the rank that reads with --loader ffcv",
    "descriptors": "files that this rank has open",
    "naming": "Beton.describe of a sample, the first one in the process",
    "per_class": "validate --per-class of a tiny ViT, from the command line to the files",
    "per_class_peak": "how far resident memory rises meanwhile",
    "list": "data_prep list",
    "shard": f"data_prep imagefolder of one shard of {IMAGES_A_SHARD:,} files, headers read",
}
"""By cost: what is measured."""


LABELS: Mapping[str, str] = {
    "sets": "samples in a simulated set",
    "files": "files of a set",
    "classes": "classes",
    "ranks": "ranks of the world",
    "shards": "files in the folder",
}
TITLES: Mapping[str, str] = {
    "sets": "One rank, by samples",
    "files": "One rank, by files",
    "classes": "Scores by class, by classes",
    "ranks": "Plans, by ranks",
    "shards": "A shard, by files of the folder",
}
"""Of the pictures."""


def case_name(axis: str, cost: str, x: int) -> str:
    """sets=100000/open."""
    return f"{axis}={x}/{cost}"


def _places(axis: Axis, options: Options) -> dict[int, str]:
    """Their names; all worlds are one place, which one process measures."""
    return {0: axis} if axis == "ranks" else {x: f"{axis}={x}" for x in getattr(options, axis)}


def measure_axes(
    axes: Sequence[Axis],
    options: Options,
    found: Found,
    note: Callable[[str], object] = nothing,
    keep: Callable[[], object] = nothing,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Add to `found` the rounds that it lacks, each place in processes of its own; `keep` is called after each.

    No place is begun after --budget. Raises `UserError` for wrong options.
    """
    for axis in axes:
        if not getattr(options, axis) or min(getattr(options, axis)) < 1:
            raise UserError(f"--{axis} takes numbers of 1 or more.")
    end = clock() + 60 * options.budget
    for n in range(options.repeats):
        for axis in axes:
            for x, name in _places(axis, options).items():
                if name in found.failed or found.rounds.get(name, 0) > n:
                    continue
                if clock() >= end:
                    note(f"the budget of {options.budget:g} minutes is used up; the same command goes on from here")
                    return
                note(f"round {n + 1} of {options.repeats}: {name}")
                try:
                    for place, costs in [*_MEASURED[axis](x, options, note)]:
                        found.add(axis, place, costs)
                    found.rounds[name] = n + 1
                except RuntimeError as error:
                    found.failed[name] = reason_of(error)
                    note(f"{name} failed: {found.failed[name]}")
                keep()


_Costs = Iterator[tuple[int, Mapping[str, Any]]]


def _sets(x: int, options: Options, note: Callable[[str], object]) -> _Costs:
    return _rank(x, _simulated(options, note, x), note)


def _files(x: int, options: Options, note: Callable[[str], object]) -> _Costs:
    return _rank(x, _simulated(options, note, min(options.sets), files=x, classes=1000), note)


def _rank(x: int, path: Path, note: Callable[[str], object]) -> _Costs:
    note(f"  {path}")
    for file in path.parent.glob("*.beton"):
        os.utime(file)  # other files than before, for whoever keeps what was found out about them
    yield x, probe("opening", path=str(path))
    yield x, probe("rank", path=str(path), world_size=WORLD_SIZE, batch_size=BATCH_SIZE)


def _classes(x: int, options: Options, note: Callable[[str], object]) -> _Costs:
    path = _simulated(options, note, max(options.classes), classes=x)
    yield x, probe("per_class", path=str(path), num_classes=x, folder=str(path.parent))


def _samples_of_ranks(options: Options) -> int:
    return sorted(options.sets)[:2][-1]


def _ranks(_x: int, options: Options, note: Callable[[str], object]) -> _Costs:
    samples = _samples_of_ranks(options)
    worlds = [size for size in options.ranks if size * BATCH_SIZE <= samples]
    found = probe("plans", path=str(_simulated(options, note, samples)), worlds=worlds, batch_size=BATCH_SIZE)
    yield from ((int(size), costs) for size, costs in found.items())


def _shards(x: int, options: Options, _note: Callable[[str], object]) -> _Costs:
    folder = _folder(options.scratch, x)
    out = options.scratch / "shards" / "shard.beton"
    words = ["imagefolder", "--out", str(out), "--verify", "header", "--workers", "1"]
    shard = ["--shard", f"1/{-(-x // IMAGES_A_SHARD)}"]
    out.parent.mkdir(exist_ok=True)
    for file in out.parent.iterdir():
        file.unlink()
    listed = out.with_name("files.list")
    try:
        yield x, probe("command", words=["list", str(folder), "--out", str(listed)], name="list")
        words += ["--file-list", str(listed)]
    except RuntimeError as error:
        if "is not a command" not in str(error):  # each shard lists all of the folder, as it once did
            raise
    yield x, probe("command", words=[*words, "--src", str(folder), *shard], name="shard")


_MEASURED: Mapping[Axis, Callable[[int, Options, Callable[[str], object]], _Costs]] = {
    "sets": _sets,
    "files": _files,
    "classes": _classes,
    "ranks": _ranks,
    "shards": _shards,
}


def _simulated(
    options: Options, note: Callable[[str], object], samples: int, *, files: int = 1, classes: int = CLASSES
) -> Path:
    """A set of the scratch folder, made once."""
    classes = min(classes, samples)
    folder = options.scratch / "simulated" / f"{samples}_samples_{files}_files_{classes}_classes"
    if not folder.is_dir():
        note(f"simulating {samples:,} samples in {folder} (once)")
        with made_anew(folder) as made:
            simulated.simulate(simulated.Options(made, samples, files, classes))
    return folder / simulated.NAME


def _folder(scratch: Path, count: int) -> Path:
    """A folder of `count` image files, 1,000 a class, made once: links to a few JPEGs."""
    folder = scratch / "simulated" / f"{count}_files"
    if not folder.is_dir():
        with made_anew(folder) as made:
            jpegs = simulated.small_jpegs(0)
            for n in range(count):
                path = made / f"c{n // IMAGES_A_SHARD:04d}" / f"{n:08d}.jpg"
                if n < len(jpegs):
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(jpegs[n])
                    continue
                if n % IMAGES_A_SHARD == 0:
                    path.parent.mkdir()
                first = n % len(jpegs)
                path.hardlink_to(made / f"c{first // IMAGES_A_SHARD:04d}" / f"{first:08d}.jpg")
    return folder


def probe(name: str, /, **arguments: object) -> dict[str, Any]:
    """What a process of its own tells. Raises `RuntimeError` where it fails."""
    command = [sys.executable, "-m", "benchmarks.scale.probes", name, json.dumps(arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"ended after {LONGEST_S:,.0f} s, the time it was given") from error
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"ended with code {done.returncode}: {last}")
    return json.loads(done.stdout.strip().rpartition("\n")[2])
