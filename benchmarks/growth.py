"""The bench `growth`: how throughput grows with workers, batch, image size and samples, memory with samples, the time
of a refresh of the spectra with the width of the model, and what one rank pays with the set and the world (`scale/`).

`python -m benchmarks.growth KIND FILE.beton IMG_SIZE BATCH WORKERS` reads an epoch and prints its peak in bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count as counted
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmarks.harness.limits import wait
from benchmarks.harness.measure import (
    DEFAULT_REPEATS,
    SECONDS,
    Case,
    Result,
    Samples,
    check_repeats,
    environment,
    measure,
    nothing,
    order_of,
    reason_of,
)
from benchmarks.harness.peak_memory import peak_resident_bytes
from benchmarks.harness.sets import NUM_CLASSES, ensure_photos
from benchmarks.loader import Options as LoaderBench
from benchmarks.loader import converted, plan_of, read_epoch
from benchmarks.scale import axes
from benchmarks.spectral import TOPK, stacks_of
from data_prep.formats.jpeg import ImageOptions
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.resources import available_cores
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import TrainRules
from lowrank_vit.spectral.watching.refresh import Memory, SpectralSettings, Stacks, refresh, solve_all

Sweep = Literal["workers", "batch", "size", "samples", "memory", "width", "sets", "files", "classes", "ranks", "shards"]
SWEEPS: tuple[Sweep, ...] = ("workers", "batch", "size", "samples", "memory", "width", *axes.AXES)
WIDTHS = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}
KINDS = ("ffcv", "dali")
LIMITS = (
    "Each sweep runs by itself; its points run round by round like the cases of any bench.",
    "memory is the host's, of processes of their own that read on the CPU; with fewer samples than 3 rounds its "
    "medians say little.",
    "Simulated sets share the bytes of a few hundred JPEGs, so what they cost says nothing of a disk that is read.",
)


@dataclass(frozen=True)
class Options(axes.Options):
    """Options of the bench."""

    sweeps: Annotated[tuple[Sweep, ...], tyro.conf.arg(metavar="NAME ...")] = SWEEPS
    """The quantities that are increased."""
    count: Annotated[int, tyro.conf.arg(metavar="N")] = 1024
    """Photographs in the largest set, made once and kept in data/bench."""
    batches: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (16, 64, 256)
    """Batch sizes; the other sweeps use the second."""
    sizes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (96, 160, 224, 320)
    """Sides of the crops, pixels; the other sweeps use the last but one."""
    widths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = tuple(WIDTHS)
    """Widths of the ViTs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where images and weights must be. Memory is always measured on a CPU."""


@dataclass(frozen=True)
class Point:
    """The settings at which a loader is measured."""

    count: int
    batch: int
    size: int
    workers: int


@dataclass
class _Growth:
    """Cases by sweep, line and position on the axis."""

    cases: dict[str, Samples] = field(default_factory=dict)
    lines: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def take(self, sweep: str, line: str, x: int, result: Result) -> None:
        """A point of a sweep that `measure` has measured, or why it has not."""
        case = f"{line} {x}"
        if case in result.failed:
            self.failed[f"{sweep}={x}/{line}"] = result.failed[case]
        else:
            self.add(sweep, line, x, result.cases[case])

    def add(self, sweep: str, line: str, x: int, samples: Samples) -> None:
        name = f"{sweep}={x}/{line}"
        self.cases[name] = samples
        self.lines.setdefault(sweep, {}).setdefault(line, {})[x] = name

    def take_back(self, before: Result) -> None:
        """Sweeps that an earlier run has measured in full."""
        for sweep, lines in before.extra["growth"].items():
            if sweep in axes.AXES or any(name.startswith(f"{sweep}=") for name in before.failed):
                continue
            for line, places in lines.items():
                for x, name in places.items():
                    self.add(sweep, line, int(x), before.cases[name])


def run(
    options: Options,
    note: Callable[[str], object] = nothing,
    keep: Callable[[Result], object] = nothing,
    before: Result | None = None,
) -> Result:
    """Measure the sweeps; the section `growth` names the case of each point: sweep, line, place. Raises `UserError`.

    `keep` gets what there is after each sweep, and after each place on an axis of sets and ranks. `before` is what an
    earlier call has kept: if it was not finished, and options and commit were the same, this one goes on from there.
    """
    _check(options)
    from lowrank_vit.common.devices import pick_device

    device = pick_device(options.device)
    surroundings, growth, found = environment(device.type), _Growth(), axes.Found(options)
    chosen = [*dict.fromkeys(options.sweeps)]
    wanted = {**json.loads(json.dumps(asdict(options), default=str)), "budget": None}
    if before and _goes_on(before, surroundings, wanted):
        note("going on from an earlier run")
        growth.take_back(before)
        found.take_back(before)

    def so_far() -> Result:
        return _result(options, surroundings, growth, found, {"options": wanted})

    for sweep in chosen:
        if sweep in axes.AXES or sweep in growth.lines:
            continue
        note(f"{sweep}:")
        if sweep == "memory":
            _add_memory(growth, options, note)
            continue
        with ExitStack() as stack:
            if sweep == "width":
                cases = _width_cases(options, device)
            else:
                cases = _loader_cases(sweep, options, device, stack, note)
            named = {f"{line} {x}": case for (line, x), case in cases.items()}
            result = measure("growth", named, {}, environment=surroundings, repeats=options.repeats, note=note)
            for line, x in cases:
                growth.take(sweep, line, x, result)
        keep(so_far())
    on_axes: list[axes.Axis] = [axis for axis in axes.AXES if axis in chosen]
    axes.measure_axes(on_axes, options, found, note, lambda: keep(so_far()))
    return so_far()


def _goes_on(before: Result, surroundings: Mapping[str, Any], options: object) -> bool:
    # A --json within the repository is a change itself.
    commits = {str(of.get("commit")).removesuffix("+changes") for of in (before.environment, surroundings)}
    same = len(commits) == 1 and before.extra.get("options") == options
    return same and before.bench == "growth" and not before.extra["finished"]


def _result(
    options: Options, surroundings: Mapping[str, Any], growth: _Growth, found: axes.Found, extra: dict[str, object]
) -> Result:
    """The result so far."""
    joined = _Growth(dict(growth.cases), deepcopy(growth.lines))
    for axis, costs in found.costs.items():
        for cost, places in costs.items():
            for x, samples in sorted(places.items()):
                joined.add(axis, cost, x, samples)
    missing = [sweep for sweep in options.sweeps if sweep not in (*axes.AXES, *growth.lines)]
    missing += [axis for axis in axes.AXES if axis in options.sweeps and not found.is_done(axis)]
    remarks = [f"Not finished: {', '.join(missing)}."] if missing else []
    rounds = min([options.repeats, *found.rounds.values()])
    remarks += [f"Only {rounds} of {DEFAULT_REPEATS} rounds."] if rounds < DEFAULT_REPEATS else []
    extra = {"growth": joined.lines, "finished": not missing, **extra}
    if found.costs:
        extra |= {"exponents": found.exponents(), "extrapolated": found.extrapolated()}
        extra |= {"wall_s": dict(found.wall_s), "rounds": dict(found.rounds)}
    failed = {**growth.failed, **found.failed}
    return Result("growth", surroundings, joined.cases, found.ratios(), (*remarks, *LIMITS), extra, failed)


def _check(options: Options) -> None:
    check_repeats(options.repeats)
    if not options.sweeps:
        raise UserError(f"--sweeps names nothing; expected some of {', '.join(SWEEPS)}.")
    if len(options.batches) < 2 or len(options.sizes) < 2 or min(*options.batches, *options.sizes) < 1:
        raise UserError("--batches and --sizes each take two or more numbers of 1 or more.")
    if unknown := set(options.widths) - set(WIDTHS):
        raise UserError(f"--widths {min(unknown)} is not that of a ViT here; expected some of {[*WIDTHS]}.")
    least = max(4 * NUM_CLASSES, 4 * options.batches[1], options.batches[-1])
    if options.count < least:
        raise UserError(f"--count {options.count} is too few for these batches, expected {least} or more.")


def _sets(options: Options) -> tuple[int, ...]:
    return options.count // 4, options.count // 2, options.count


def _usual(options: Options) -> Point:
    return Point(options.count, options.batches[1], options.sizes[-2], available_cores())


def _points(sweep: str, options: Options) -> dict[int, Point]:
    usual, cores = _usual(options), available_cores()
    if sweep == "workers":
        doubled = [2**n for n in range(cores.bit_length()) if 2**n < cores]
        return {n: replace(usual, workers=n) for n in (*doubled, cores)}
    if sweep == "batch":
        return {n: replace(usual, batch=n) for n in options.batches}
    if sweep == "size":
        return {n: replace(usual, size=n) for n in options.sizes}
    return {n: replace(usual, count=n) for n in _sets(options)}


def _beton(options: Options, count: int, note: Callable[[str], object] = nothing) -> Beton:
    return converted(ensure_photos(options.scratch / f"photos_{count}", count, note=note), "", ImageOptions())


def _loader_cases(
    sweep: str, options: Options, device: torch.device, stack: ExitStack, note: Callable[[str], object]
) -> dict[tuple[str, int], Case]:
    cases = {}
    for x, point in _points(sweep, options).items():
        beton = _beton(options, point.count, note)
        for kind in (*KINDS, *(("resident",) if sweep == "samples" else ())):
            run, images = _epoch(kind, beton, point, device, stack)
            setting = (
                f"--loader {kind}, batch {point.batch}, {point.size} px, {point.workers} threads, on {device.type}"
            )
            cases[kind, x] = Case(run, images, setting=setting)
    return cases


def _epoch(
    kind: str, beton: Beton, point: Point, device: torch.device, stack: ExitStack
) -> tuple[Callable[[], None], int]:
    """A function that reads an epoch, and the number of its images."""
    bench = LoaderBench(batch_size=point.batch, img_size=point.size)
    plan = plan_of(beton.heights, beton.widths, bench, TrainRules())
    loader, _ = open_loader(beton, plan, device, LoaderOptions(kind, point.workers))
    stack.callback(loader.close)
    epochs: Iterator[int] = counted()
    return partial(read_epoch, loader, epochs, device), plan.steps_per_epoch * point.batch


def _width_cases(options: Options, device: torch.device) -> dict[tuple[str, int], Case]:
    """Of a ViT's 48 matrices and its EMA's: matrices a second of the solver, and seconds of a whole refresh."""
    settings = SpectralSettings(TOPK, cpu_threads=available_cores())

    def solve(stacks: Stacks) -> None:
        for of_kind in stacks.values():
            solve_all(of_kind, settings)
        wait(device)

    def whole(stacks: Stacks, memory: Memory) -> None:
        refresh(0, stacks, settings, memory)
        wait(device)

    cases = {}
    for width in options.widths:
        stacks = stacks_of(WIDTHS[width], device)
        number = sum(len(stack.names) for of_kind in stacks.values() for stack in of_kind)
        what = f"all {number} matrices of {WIDTHS[width]} and its EMA"
        values = f"values, vectors of both ends and certificates of {what}, on {device.type}"
        cases["gram64", width] = Case(partial(solve, stacks), number, "matrices/s", values)
        # After the first round it has what to compare with, as every refresh but a run's first.
        all_of_it = f"the same with all metrics and the update's norms: a refresh of {what}, but for the disk"
        cases["refresh", width] = Case(partial(whole, stacks, Memory()), 1, SECONDS, all_of_it)
    return cases


def _add_memory(growth: _Growth, options: Options, note: Callable[[str], object]) -> None:
    """Each point once a round, so that what changes on the machine meanwhile meets all of them."""
    usual = _usual(options)
    paths = {count: _beton(options, count, note).path for count in _sets(options)}
    found: dict[tuple[str, int], list[float]] = {(kind, n): [] for kind in ("resident", *KINDS) for n in paths}
    for n in range(options.repeats):
        note(f"round {n + 1} of {options.repeats}")
        for kind, count in order_of([*found], n):
            if f"memory={count}/{kind}" in growth.failed:
                continue
            try:
                found[kind, count].append(_peak_mb(kind, paths[count], usual))
            except RuntimeError as error:
                growth.failed[f"memory={count}/{kind}"] = reason_of(error)
                note(f"{kind} on {count:,} samples failed: {reason_of(error)}")
    for (kind, count), peaks in found.items():
        if f"memory={count}/{kind}" not in growth.failed:
            setting = f"peak of a process that reads one epoch with --loader {kind}, torch and all"
            growth.add("memory", kind, count, Samples(tuple(peaks), "MB", setting))


def _peak_mb(kind: str, path: Path, point: Point) -> float:
    numbers = map(str, (point.size, point.batch, point.workers))
    command = [sys.executable, "-m", "benchmarks.growth", kind, str(path), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"reading {path.name} ended with code {done.returncode}: {last}")
    return int(done.stdout.split()[-1]) / 1e6


def _print_peak(kind: str, path: Path, point: Point) -> None:
    with ExitStack() as stack:
        run, _ = _epoch(kind, Beton(path), point, torch.device("cpu"), stack)
        run()
    print(peak_resident_bytes())


if __name__ == "__main__":
    size, batch, workers = map(int, sys.argv[3:])
    _print_peak(sys.argv[1], Path(sys.argv[2]), Point(0, batch, size, workers))
