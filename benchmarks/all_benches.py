"""The bench `all`: every bench in a process of its own, one after the other, and one table of what is to be reached.

Processes of their own, since torch, numba, DALI and FFCV each keep threads and memory that would weigh on the next.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Annotated, Any, Literal

import tyro
from rich.console import Console

from benchmarks.harness.aims import judge, print_verdicts
from benchmarks.harness.measure import Result, Samples, check_repeats, nothing, reason_of
from benchmarks.harness.show import machine_of, print_remarks
from lowrank_vit.common.errors import UserError

BUDGET_MINUTES: Mapping[str, float] = {"cpu": 15, "cuda": 8}
"""All benches in their short form, by device, unless --budget says otherwise."""
LONGEST_S = 3600
"""Of a bench in its full form."""


@dataclass(frozen=True)
class Entry:
    """One bench of the selection."""

    bench: str
    """The command."""
    short: tuple[str, ...] = ()
    """Flags of the short form."""
    flags: tuple[str, ...] = ()
    """Flags of both forms."""
    expected_s: int = 60
    """How long the short form takes."""
    has_device: bool = True
    is_short: bool = True
    """Whether it is in the short form at all."""

    @property
    def limit_s(self) -> int:
        """After which the short form is ended: a busy machine and compiling take long, a bench that hangs for ever."""
        return 60 + 3 * self.expected_s


CPU: Mapping[str, Entry] = {
    # 4,000 images: with fewer, the fixed cost of starting FFCV's writer would flatter us.
    "prep": Entry("prep", ("--count", "4000"), expected_s=180, has_device=False),
    "loader": Entry("loader", ("--count", "1200"), expected_s=75),
    "augment": Entry("augment", ("--batches", "4"), expected_s=30),
    # A third of the layers for the inline SVD, which takes most of the time and the same for each layer.
    "spectral": Entry("spectral", ("--inline-layers", "4"), expected_s=140),
    "step": Entry("step", expected_s=60),
    "end-to-end": Entry("end-to-end", ("--count", "1200", "--steps", "20"), expected_s=120),
    "limits": Entry("limits", ("--count", "600"), expected_s=20),
    # Without memory, which takes a process a sample.
    "growth": Entry(
        "growth",
        ("--sweeps", "workers", "batch", "size", "samples", "width", "--count", "256", "--widths", "192", "384"),
        expected_s=90,
    ),
}
"""In this order. `expected_s` is of 2 cores without a GPU, reckoned from the speeds of the cases: 12 minutes in all,
and two more when the photographs are made for the first time."""

CUDA: Mapping[str, Entry] = {
    # The same photographs as end-to-end: making 4,096 takes half a minute.
    "loader": Entry("loader", ("--count", "4096", "-b", "256"), expected_s=75),
    "augment": Entry("augment", ("--batches", "60", "-b", "1024"), expected_s=65),
    "end-to-end": Entry("end-to-end", ("--count", "4096", "--steps", "20"), expected_s=60),
    "end-to-end-base": Entry(
        "end-to-end", ("--count", "4096", "--steps", "20"), ("--model", "vit_base_patch16_224"), expected_s=60
    ),
    # An inline SVD of a ViT-B takes tens of seconds on a GPU, one layer of the model and its EMA two.
    "spectral": Entry(
        "spectral",
        ("--models", "base", "--inline-layers", "1", "--step-batches", "256", "--steps", "30"),
        expected_s=75,
    ),
    "step": Entry("step", ("--steps", "20"), expected_s=60),
    "limits": Entry("limits", ("--count", "600"), expected_s=25),
    "prep": Entry("prep", ("--count", "4096"), expected_s=50, has_device=False),
    "growth": Entry("growth", is_short=False),
}
"""What has figures to reach comes first, since the budget may end before the last; the short form has no growth.

`expected_s` is an estimate for one H100 with 16 cores, not a measurement: about 10 s for each process to start, 30 s
for each step that is compiled for the first time, 5 s a round. It sums to 8 minutes; with a warm compile cache to
about 5.
"""

SELECTIONS: Mapping[str, Mapping[str, Entry]] = {"cpu": CPU, "cuda": CUDA}
"""By type of device; the names are those of results and aims."""
NAMES = tuple(dict.fromkeys([*CPU, *CUDA]))


GRACE_S = 15.0
"""For a bench that was told to end, to remove its files."""


def start_bench(arguments: Sequence[str], path: Path, limit_s: float) -> None:
    """Run `bench ARGUMENTS --json path` to its end. Raises `UserError` if it fails or is not done in `limit_s`."""
    run_limited([sys.executable, "-m", "benchmarks", *arguments, "--json", str(path)], limit_s)


def run_limited(command: Sequence[str], limit_s: float) -> None:
    """Run `command`; its stderr is passed on, its stdout (tables that the JSON has too) is not.

    Raises `UserError` with the last line of stderr if it ends with another code than 0, or if it had to be ended after
    `limit_s`. Interrupted, it ends the process first.
    """
    # A session of its own, so that its children (loaders' workers, compilers) can be ended with it.
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True, errors="replace"
    )
    assert process.stderr is not None
    last: deque[str] = deque(maxlen=1)
    listener = Thread(target=_pass_on, args=(process.stderr, last), daemon=True)
    listener.start()
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise UserError(f"ended after {limit_s:.0f} s, the time it was given.") from None
    finally:
        _end(process)
        listener.join(1.0)
    if code < 0:
        raise UserError(f"killed by signal {-code}{' (out of memory?)' if -code == signal.SIGKILL else ''}.")
    if code != 0:
        raise UserError(f"ended with code {code}{': ' if last else '.'}{''.join(last)}")


def _pass_on(lines: IO[str], last: deque[str]) -> None:
    with lines:
        for line in lines:
            sys.stderr.write(line)
            if line.strip():
                last.append(line.strip())


def _end(process: subprocess.Popen[str]) -> None:
    """Politely, then the whole session: also what a process that is done has left running."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


Start = Callable[[Sequence[str], Path, float], None]
"""Runs the bench of these arguments, which writes its JSON to the file, for so many seconds at most. Raises `UserError`
if it fails; a file that it has written all the same counts."""
LEAST_S = 5.0
"""With less time left no bench is started."""


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    short: bool = False
    """Less work a round: all of it takes less than 15 minutes on 2 idle cores, 8 on a GPU."""
    only: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all of the device)")
    ] = None
    """Which benches, in this order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where they run; it also decides which there are, and how short the short form is."""
    repeats: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: each bench's own)")] = None
    """Rounds of each that count. Fewer than 5 are a smoke test."""
    budget: Annotated[
        float | None,
        tyro.conf.arg(metavar="MINUTES", help_behavior_hint="(default: with --short 15 on a CPU, 8 on cuda)"),
    ] = None
    """End the bench that is running by then, and start no other."""

    def entries(self, device: str) -> dict[str, Entry]:
        """The benches to run by name. Raises `UserError` for what cannot be."""
        if self.repeats is not None:
            check_repeats(self.repeats)
        if self.budget is not None and self.budget <= 0:
            raise UserError(f"--budget is {self.budget:g}, expected some minutes.")
        there = SELECTIONS[device]
        names = [name for name, entry in there.items() if entry.is_short or not self.short]
        if self.only is not None:
            names = list(dict.fromkeys(self.only))
        for name in names:
            if name not in NAMES:
                raise UserError(f"--only {name} is not a bench. There are: {', '.join(NAMES)}.")
            if name not in there:
                raise UserError(f"--only {name} is a bench for a GPU. Here are: {', '.join(there)}.")
        if not names:
            raise UserError(f"--only names no bench. There are: {', '.join(there)}.")
        return {name: there[name] for name in names}

    def flags(self, entry: Entry, device: str) -> list[str]:
        """Of one bench, behind its name."""
        flags = [*entry.flags, *(entry.short if self.short else ())]
        if entry.has_device:
            flags += ["--device", device]
        if self.repeats is not None:
            flags += ["--repeats", str(self.repeats)]
        return flags

    def budget_s(self, device: str) -> float:
        """For all benches together; infinite without --short and --budget."""
        minutes = self.budget or (BUDGET_MINUTES[device] if self.short else float("inf"))
        return 60 * minutes


def run(
    options: Options,
    note: Callable[[str], object] = nothing,
    start: Start | None = None,
    save: Callable[[Result], object] = nothing,
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Run them; cases and ratios are named BENCH/NAME, and the section `benches` holds each result whole.

    A bench that fails in any way, hangs, or comes too late for --budget is in the section `failed` with the reason,
    and the others go on. `start` runs one (by default in a process); `save` gets what there is after each of them.
    Raises `UserError` for wrong options.
    """
    from lowrank_vit.common.devices import pick_device

    device = pick_device(options.device).type
    entries, end = options.entries(device), clock() + options.budget_s(device)
    joined = Joined(tuple(entries), device)
    with tempfile.TemporaryDirectory() as folder:
        for name, entry in entries.items():
            begun = clock()
            limit_s = min(entry.limit_s if options.short else LONGEST_S, end - begun)
            path = Path(folder) / f"{name}.json"
            try:
                if limit_s < LEAST_S:
                    minutes = options.budget_s(device) / 60
                    raise UserError(f"not started: the budget of {minutes:g} minutes was used up (--budget).")
                note(f"bench {name}, at most {limit_s:.0f} s")
                (start or start_bench)([entry.bench, *options.flags(entry, device)], path, limit_s)
            except Exception as error:
                joined.failed[name] = reason_of(error)
                note(f"bench {name}: {joined.failed[name]}")
            if path.exists():
                try:
                    joined.results[name] = read_result(path)
                except (OSError, ValueError, UserError) as error:
                    joined.failed.setdefault(name, reason_of(error))
            elif name not in joined.failed:
                joined.failed[name] = "it ended without writing its JSON."
            joined.seconds[name] = round(clock() - begun, 1)
            save(joined.to_result())
    return joined.to_result()


def read_result(path: Path) -> dict[str, Any]:
    """A bench's JSON. Raises `UserError` if something of its schema is missing, `ValueError` if it is no JSON."""
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        if not isinstance(content["environment"], dict):
            raise TypeError("environment")
        for section in ("cases", "ratios"):
            for one in content[section].values():
                if not all(math.isfinite(figure) for figure in (one["median"], *one["samples"], one["samples"][0])):
                    raise ValueError("a figure that is none")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"its JSON is not that of a bench ({reason_of(error)}).") from error
    return content


class Joined:
    """What the benches have given so far."""

    def __init__(self, wanted: tuple[str, ...], device: str) -> None:
        self._wanted, self._device = wanted, device
        self.results: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def to_result(self) -> Result:
        """As one result. Its peers are the benches' own, so that a peer that failed does not break `all` either."""
        verdicts = [
            {
                "bench": verdict.aim.bench,
                "name": verdict.aim.name,
                "aim": verdict.aim.least,
                "median": verdict.median,
                "reached": verdict.is_reached,
            }
            for verdict in judge({name: self.results.get(name, {}) for name in self._wanted}, self._device)
        ]
        failed, peers = dict(self.failed), set()
        for bench, result in self.results.items():
            failed |= {f"{bench}/{name}": reason for name, reason in result.get("failed", {}).items()}
            peers |= {f"{bench}/{name}" for name in result.get("peers", [])}
        surroundings = next((one["environment"] for one in self.results.values() if one["environment"]), {})
        extra = {
            "device": self._device,
            "wanted": list(self._wanted),
            "aims": verdicts,
            "seconds": dict(self.seconds),
            "benches": dict(self.results),
        }
        cases, ratios = self._named("cases"), self._named("ratios")
        return Result("all", surroundings, cases, ratios, extra=extra, failed=failed, peers=frozenset(peers))

    def _named(self, section: str) -> dict[str, Samples]:
        return {
            f"{bench}/{name}": Samples(
                tuple(one["samples"]), one.get("unit", ""), str(result.get("settings", {}).get(name, ""))
            )
            for bench, result in self.results.items()
            for name, one in result[section].items()
        }


def print_summary(result: Result, console: Console) -> None:
    """The peers' settings, ratios in a line each, and last, where it is seen: what is to be reached, time, failures."""
    extra = result.extra
    if settings := settings_of_peers(extra["benches"]):
        console.print("how the others are set:")
        print_remarks(settings.items(), console)
        console.print()
    verdicts = judge({bench: extra["benches"].get(bench, {}) for bench in extra["wanted"]}, extra["device"])
    judged = {f"{verdict.aim.bench}/{verdict.aim.name}" for verdict in verdicts}
    others = {name: ratio for name, ratio in result.ratios.items() if name not in judged}
    if others:
        console.print("ratios without an aim, median (lowest .. highest):")
        for name, ratio in others.items():
            low, high = min(ratio.samples), max(ratio.samples)
            console.print(f"  {name}  {ratio.median:.3g} ({low:.3g} .. {high:.3g})", highlight=False, soft_wrap=False)
        console.print()
    print_verdicts(verdicts, console)
    total = sum(extra["seconds"].values())
    each = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in extra["seconds"].items())
    console.print(f"\n{total / 60:.1f} minutes: {each}", highlight=False)
    if result.environment:
        console.print(f"measured on {machine_of(result.environment)}", highlight=False)
    for name, reason in result.failed.items():
        console.print(f"{name} failed: {reason}", style="red", highlight=False, markup=False)


def settings_of_peers(benches: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """BENCH/CASE -> how it was set, of the peers' cases.

    Of a bench that compares (a ratio has "_vs_" in its name) and names no peers, all but its limits.
    """
    found = {}
    for bench, result in benches.items():
        settings, peers = result.get("settings", {}), result.get("peers", [])
        if not peers and any("_vs_" in ratio for ratio in result.get("ratios", {})):
            peers = [name for name, setting in settings.items() if not setting.startswith("limit:")]
        found |= {f"{bench}/{name}": settings[name] for name in peers if settings.get(name)}
    return found
