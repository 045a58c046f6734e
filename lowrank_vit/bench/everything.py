"""The bench `all`: every bench in a process of its own, one after the other, and one table of what is to be reached.

Processes of their own, since torch, numba, DALI and FFCV each keep threads and memory that would weigh on the next.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from data_prep.errors import UserError
from lowrank_vit.bench.aims import judge, print_verdicts
from lowrank_vit.bench.measure import Result, Samples, nothing

BENCHES = ("prep", "loader", "augment", "spectral", "step", "end-to-end", "limits")
SHORT: Mapping[str, Sequence[str]] = {
    "prep": ("--count", "1000"),
    "loader": ("--count", "600"),
    "augment": ("--batches", "4"),
    "spectral": (),
    "step": ("--steps", "2"),
    "end-to-end": ("--count", "600", "--steps", "2"),
    "limits": ("--count", "600"),
}
"""Flags of the short form: the same cases and rounds on fewer images."""


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    short: bool = False
    """Fewer images a round: all of it takes less than 15 minutes on 2 idle cores."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = BENCHES
    """Which benches, in this order."""
    repeats: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: each bench's own)")] = None
    """Rounds of each that count. Fewer than 5 are a smoke test."""


def run(
    options: Options,
    note: Callable[[str], object] = nothing,
    start: Callable[[str, Sequence[str], Path], None] | None = None,
) -> Result:
    """Run them; cases and ratios are named BENCH/NAME, and the section `benches` holds each result whole.

    `start` runs one bench with flags and has it write its JSON (by default in a process). A bench that fails is in the
    section `failed`, and the others go on. Raises `UserError` for an unknown name.
    """
    for name in options.only:
        if name not in BENCHES:
            raise UserError(f"--only {name} is not a bench. There are: {', '.join(BENCHES)}.")
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            note(f"bench {name}")
            flags = [*(SHORT[name] if options.short else ())]
            if options.repeats is not None:
                flags += ["--repeats", str(options.repeats)]
            path, begun = Path(folder) / f"{name}.json", time.perf_counter()
            try:
                (start or _start)(name, flags, path)
                results[name] = json.loads(path.read_text(encoding="utf-8"))
            except UserError as error:
                failed[name] = str(error)
                note(f"bench {name} failed")
            seconds[name] = round(time.perf_counter() - begun, 1)
    return _joined(results, failed, seconds, options.only)


def _start(name: str, flags: Sequence[str], path: Path) -> None:
    command = [sys.executable, "-m", "lowrank_vit.bench", name, *flags, "--json", str(path)]
    # Its progress is seen; its own tables are in the JSON.
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        raise UserError(f"`{' '.join(command[1:])}` ended with code {done.returncode}; see above.")


def _joined(
    results: Mapping[str, dict[str, Any]], failed: dict[str, str], seconds: dict[str, float], wanted: Sequence[str]
) -> Result:
    def named(section: str) -> dict[str, Samples]:
        return {
            f"{bench}/{name}": Samples(tuple(one["samples"]), one.get("unit", ""))
            for bench, result in results.items()
            for name, one in result[section].items()
        }

    everywhere = {bench: results.get(bench, {}) for bench in wanted}
    verdicts = [
        {
            "bench": verdict.aim.bench,
            "name": verdict.aim.name,
            "aim": verdict.aim.least,
            "median": verdict.median,
            "reached": verdict.is_reached,
        }
        for verdict in judge(everywhere)
    ]
    surroundings = next(iter(results.values()))["environment"] if results else {}
    extra = {"aims": verdicts, "seconds": seconds, "failed": failed, "benches": dict(results)}
    return Result("all", surroundings, named("cases"), named("ratios"), extra=extra)


def print_summary(result: Result, console: Console) -> None:
    """What is to be reached, the other ratios in one line each, and how long it took."""
    extra = result.extra
    wanted = {bench: extra["benches"].get(bench, {}) for bench in extra["seconds"]}
    verdicts = judge(wanted)
    print_verdicts(verdicts, console)
    judged = {f"{verdict.aim.bench}/{verdict.aim.name}" for verdict in verdicts}
    others = {name: ratio for name, ratio in result.ratios.items() if name not in judged}
    if others:
        console.print("\nother ratios, median (lowest .. highest):")
        for name, ratio in others.items():
            low, high = min(ratio.samples), max(ratio.samples)
            console.print(f"  {name}  {ratio.median:.3g} ({low:.3g} .. {high:.3g})", highlight=False, soft_wrap=False)
    known, total = result.environment, sum(extra["seconds"].values())
    each = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in extra["seconds"].items())
    console.print(f"\n{total / 60:.1f} minutes: {each}", highlight=False)
    where = [f"{known.get('cpu_cores')} cores", known.get("cpu"), known.get("gpu"), f"commit {known.get('commit')}"]
    console.print(f"measured on {', '.join(str(part) for part in where if part)}", highlight=False)
    for error in extra["failed"].values():
        console.print(error, style="red", highlight=False, markup=False)
