"""The bench `growth`: how throughput grows with workers, batch, image size and samples, memory with samples, and the
time of the spectra with the width of the model.

`python -m lowrank_vit.bench.growth KIND FILE.beton IMG_SIZE BATCH WORKERS` reads an epoch and prints its peak in bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count as counted
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from data_prep.errors import UserError
from data_prep.jpeg import ImageOptions
from lowrank_vit.bench.environment import environment
from lowrank_vit.bench.loader import Options as LoaderBench
from lowrank_vit.bench.loader import converted, plan_of, read_epoch
from lowrank_vit.bench.measure import DEFAULT_REPEATS, Case, Result, Samples, measure, nothing
from lowrank_vit.bench.peak_memory import peak_resident_bytes
from lowrank_vit.bench.photos import NUM_CLASSES, ensure_photos
from lowrank_vit.bench.prep import CACHE
from lowrank_vit.bench.spectral import TOPK, stacks_of
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.choose import LoaderOptions, open_loader
from lowrank_vit.data.plan import TrainRules
from lowrank_vit.spectral.refresh import Settings, solve_all

Sweep = Literal["workers", "batch", "size", "samples", "memory", "width"]
SWEEPS: tuple[Sweep, ...] = ("workers", "batch", "size", "samples", "memory", "width")
LABELS = {
    "workers": "decoding threads",
    "batch": "images a batch",
    "size": "side of the crop, pixels",
    "samples": "samples in the set",
    "memory": "samples in the set",
    "width": "width of the ViT (192 tiny, 384 small, 768 base)",
}
WIDTHS = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}
KINDS = ("ffcv", "dali")
LIMITS = ("Each sweep runs by itself; its points run round by round like the cases of any bench.",)


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    sweeps: Annotated[tuple[Sweep, ...], tyro.conf.arg(metavar="NAME ...")] = SWEEPS
    """What grows."""
    count: Annotated[int, tyro.conf.arg(metavar="N")] = 1024
    """Photographs in the largest set, made once and kept in data/bench."""
    batches: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (16, 64, 256)
    """Batch sizes; the second is that of the other sweeps."""
    sizes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (96, 160, 224, 320)
    """Sides of the crops; the others use the one before the last."""
    widths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = tuple(WIDTHS)
    """Widths of the ViTs."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Rounds that count, after one that does not. Fewer than 5 are a smoke test."""
    scratch: Annotated[Path, tyro.conf.arg(metavar="DIR")] = CACHE
    """Where photographs and converted sets are kept."""


@dataclass(frozen=True)
class Point:
    """What a loader is measured at."""

    count: int
    batch: int
    size: int
    workers: int


@dataclass
class _Growth:
    """Cases by sweep, line and place on the axis."""

    cases: dict[str, Samples] = field(default_factory=dict)
    lines: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)

    def add(self, sweep: str, line: str, x: int, samples: Samples) -> None:
        name = f"{sweep}={x}/{line}"
        self.cases[name] = samples
        self.lines.setdefault(sweep, {}).setdefault(line, {})[x] = name


def run(options: Options, note: Callable[[str], object] = nothing) -> Result:
    """Measure the sweeps; the section `growth` names the case of each point: sweep, line, place. Raises `UserError`."""
    _check(options)
    surroundings, growth = environment(), _Growth()
    for sweep in dict.fromkeys(options.sweeps):
        note(f"{sweep}:")
        if sweep == "memory":
            _add_memory(growth, options, note)
            continue
        with ExitStack() as stack:
            cases = _width_cases(options) if sweep == "width" else _loader_cases(sweep, options, stack, note)
            named = {f"{line} {x}": case for (line, x), case in cases.items()}
            result = measure("growth", named, {}, environment=surroundings, repeats=options.repeats, note=note)
            for line, x in cases:
                growth.add(sweep, line, x, result.cases[f"{line} {x}"])
    few = () if options.repeats >= DEFAULT_REPEATS else ("Fewer than 5 rounds: a smoke test, not a measurement.",)
    return Result("growth", surroundings, growth.cases, {}, (*few, *LIMITS), {"growth": growth.lines})


def _check(options: Options) -> None:
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}, expected 1 or more.")
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
    return Point(options.count, options.batches[1], options.sizes[-2], len(os.sched_getaffinity(0)))


def _points(sweep: str, options: Options) -> dict[int, Point]:
    usual, cores = _usual(options), len(os.sched_getaffinity(0))
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
    sweep: str, options: Options, stack: ExitStack, note: Callable[[str], object]
) -> dict[tuple[str, int], Case]:
    cases = {}
    for x, point in _points(sweep, options).items():
        beton = _beton(options, point.count, note)
        for kind in (*KINDS, *(("resident",) if sweep == "samples" else ())):
            run, images = _epoch(kind, beton, point, stack)
            setting = f"--loader {kind}, batch {point.batch}, {point.size} px, {point.workers} threads"
            cases[kind, x] = Case(run, images, setting=setting)
    return cases


def _epoch(kind: str, beton: Beton, point: Point, stack: ExitStack) -> tuple[Callable[[], None], int]:
    """A function that reads an epoch, and its number of images."""
    bench, cpu = LoaderBench(batch_size=point.batch, img_size=point.size), torch.device("cpu")
    plan = plan_of(beton.heights, beton.widths, bench, TrainRules())
    loader, _ = open_loader(beton, plan, cpu, LoaderOptions(kind, point.workers))
    stack.callback(loader.close)
    epochs: Iterator[int] = counted()
    return partial(read_epoch, loader, epochs, cpu), plan.steps_per_epoch * point.batch


def _width_cases(options: Options) -> dict[tuple[str, int], Case]:
    """Matrices a second: values, vectors of both ends and certificates of a ViT's 48, and of its EMA's."""
    settings = Settings(TOPK, cpu_threads=len(os.sched_getaffinity(0)))

    def solve(stacks: Mapping[str, Any]) -> None:
        for of_kind in stacks.values():
            solve_all(of_kind, settings)

    cases = {}
    for width in options.widths:
        stacks = stacks_of(WIDTHS[width], torch.device("cpu"))
        number = sum(len(stack.matrices_NRC) for of_kind in stacks.values() for stack in of_kind)
        setting = f"gram64 on all {number} matrices of {WIDTHS[width]} and its EMA"
        cases["gram64", width] = Case(partial(solve, stacks), number, "matrices/s", setting)
    return cases


def _add_memory(growth: _Growth, options: Options, note: Callable[[str], object]) -> None:
    usual = _usual(options)
    for count in _sets(options):
        path = _beton(options, count, note).path
        for kind in ("resident", *KINDS):
            note(f"peak memory of {kind} on {count:,} samples")
            numbers = map(str, (usual.size, usual.batch, usual.workers))
            command = [sys.executable, "-m", "lowrank_vit.bench.growth", kind, str(path), *numbers]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise UserError(f"reading {path} with --loader {kind} failed:\n{done.stderr.strip()}")
            peak_mb = int(done.stdout.split()[-1]) / 1e6
            setting = f"peak of a process that reads one epoch with --loader {kind}, torch and all"
            growth.add("memory", kind, count, Samples((peak_mb,), "MB", setting))


def growth_chart(result: Result) -> bytes:
    """A panel for each sweep: the medians, with whiskers from the lowest to the highest sample, as a PNG."""
    from lowrank_vit.report.style import EMA, INK, MODEL, heading, new_figure, png, tidy

    lines: Mapping[str, Mapping[str, Mapping[int, str]]] = result.extra["growth"]
    rows = -(-len(lines) // 2)
    figure = new_figure(9.2, 0.9 + 2.5 * rows)
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    colours = {"ffcv": MODEL, "dali": EMA}
    for axes, (sweep, of_sweep) in zip(panels, lines.items(), strict=False):
        unit = ""
        for line, places in of_sweep.items():
            cases = [result.cases[name] for name in places.values()]
            unit, medians = cases[0].unit, [case.median for case in cases]
            low = [case.median - min(case.samples) for case in cases]
            high = [max(case.samples) - case.median for case in cases]
            axes.errorbar(
                list(places), medians, yerr=[low, high], label=line, marker="o", ms=4, capsize=3,
                color=colours.get(line, INK),
            )  # fmt: skip
        tidy(axes, xlabel=LABELS[sweep], ylabel=unit)
        axes.set_title("memory" if sweep == "memory" else "spectra" if sweep == "width" else "loading", loc="left")
        axes.set_xticks(sorted({x for places in of_sweep.values() for x in places}))
        axes.set_ylim(bottom=0)
        if len(of_sweep) > 1:
            axes.legend(frameon=False, fontsize=8.5)
    for axes in panels[len(lines) :]:
        axes.set_visible(False)
    known = result.environment
    heading(figure, "Bench: growth", f"{known.get('cpu_cores')} cores, {known.get('cpu')}")
    return png(figure)


def _print_peak(kind: str, path: Path, point: Point) -> None:
    with ExitStack() as stack:
        run, _ = _epoch(kind, Beton(path), point, stack)
        run()
    print(peak_resident_bytes())


if __name__ == "__main__":
    size, batch, workers = map(int, sys.argv[3:])
    _print_peak(sys.argv[1], Path(sys.argv[2]), Point(0, batch, size, workers))
