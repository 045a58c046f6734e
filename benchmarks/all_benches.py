"""The bench `all`: every bench, one after the other, and one table of the ratios with their targets.

On a CPU each bench has its own process, since torch, numba, DALI and FFCV keep threads and memory that would disturb
the next. On a GPU the benches of the short form share one process, since compiling a step takes longer than all
measurements of it. If a bench hangs, the process is ended and the next bench gets a new one.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from benchmarks.harness.aims import judge, print_verdicts
from benchmarks.harness.measure import Result, Samples, check_repeats, nothing, reason_of
from benchmarks.harness.processes import SharedProcess, start_bench
from benchmarks.harness.show import machine_of, print_remarks
from benchmarks.selection import BUDGET_MINUTES, LONGEST_S, NAMES, SELECTIONS, Entry
from lowrank_vit.common.errors import UserError

Start = Callable[[Sequence[str], Path, float], None]
"""Runs the bench of these arguments, which writes its JSON to the file, for at most so many seconds. Raises `UserError`
if it fails; a file that it has written still counts."""
REHEARSED = 4
"""Factor on the time limits for a rehearsal on a CPU, which may have to compile first."""
LEAST_S = 5.0
"""No bench is started with less time left."""


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    short: bool = False
    """Do less in each round: all benches together take less than 15 minutes on 2 idle cores, and 3.6 on a GPU."""
    only: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all of the device)")
    ] = None
    """Run only these benches, in this order; names may be separated by commas. If --json already holds a result of
    `all`, the new results are added to it."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """On a GPU, also make the tables of kernels of a step and of a run, at the end."""
    tiny: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Rehearse the GPU's short form in tiny sizes, on any device. Its figures mean nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the benches run. It also decides which of them exist, and how much the short form leaves out."""
    repeats: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: each bench's own)")] = None
    """Measured rounds of each bench. Fewer than 5 are a smoke test."""
    budget: Annotated[
        float | None,
        tyro.conf.arg(metavar="MINUTES", help_behavior_hint="(default: with --short 15 on a CPU, 3.6 on cuda)"),
    ] = None
    """After this time, end the bench that is running and start no other."""

    def entries(self, device: str, others: Sequence[str] = ()) -> dict[str, Entry]:
        """The benches to run, by name. Raises `UserError` for wrong options; its message also names `others`."""
        if self.repeats is not None:
            check_repeats(self.repeats)
        if self.budget is not None and self.budget <= 0:
            raise UserError(f"--budget is {self.budget:g}, expected minutes above 0.")
        there = SELECTIONS["cuda" if self.tiny else device]
        if self.tiny:
            there = {name: entry for name, entry in there.items() if entry.tiny is not None}
        is_short = self.short or self.tiny
        names = [
            name
            for name, entry in there.items()
            if not is_short or (entry.is_short and (self.profile or not entry.is_profile))
        ]
        if self.only is not None:
            names = list(dict.fromkeys(name for part in self.only for name in part.split(",") if name))
        for name in names:
            if name not in NAMES:
                raise UserError(f"--only {name} is not a bench. There are: {', '.join([*others, *NAMES])}.")
            if name not in there:
                here = ", ".join([*others, *there])
                raise UserError(f"--only {name} is not a bench for this device. There are: {here}.")
        if not names:
            raise UserError(f"--only names no bench. There are: {', '.join(there)}.")
        return {name: there[name] for name in names}

    def flags(self, entry: Entry, device: str) -> list[str]:
        """The command-line flags of one bench."""
        flags = [*entry.flags, *((entry.tiny or ()) if self.tiny else entry.short if self.short else ())]
        if entry.has_device:
            flags += ["--device", device]
        if self.repeats is not None:
            flags += ["--repeats", str(self.repeats)]
        return flags

    def budget_s(self, device: str) -> float:
        """Seconds for all benches together; infinite without --short and --budget."""
        minutes = self.budget or (
            BUDGET_MINUTES[device] if self.short else BUDGET_MINUTES["cpu"] if self.tiny else math.inf
        )
        return 60 * minutes


def run(
    options: Options,
    note: Callable[[str], object] = nothing,
    start: Start | None = None,
    save: Callable[[Result], object] = nothing,
    before: Mapping[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Run the benches; cases and ratios are named BENCH/NAME, and the section `benches` has each complete result.

    A bench that fails, hangs, or comes too late for --budget is in the section `failed` with the reason, and the others
    continue. `start` runs a bench (by default in a process, see `Entry.shares`); `save` gets the result so far after
    each bench; `before` is the JSON of an earlier call, to which these results are added. Raises `UserError` for wrong
    options.
    """
    from lowrank_vit.common.devices import pick_device

    device = pick_device(options.device).type
    entries, end = options.entries(device), clock() + options.budget_s(device)
    joined = Joined(tuple(entries), device, before)
    joined.form = "tiny" if options.tiny else "short" if options.short else "full"
    is_short = options.short or options.tiny
    with tempfile.TemporaryDirectory() as folder, SharedProcess() as shared:
        for name, entry in entries.items():
            begun = clock()
            longest_s = entry.limit_s * (REHEARSED if options.tiny and device != "cuda" else 1)
            limit_s = min(longest_s if is_short else LONGEST_S, end - begun)
            path = Path(folder) / f"{name}.json"
            joined.forget(name)
            try:
                if limit_s < LEAST_S:
                    minutes = options.budget_s(device) / 60
                    raise UserError(f"not started: the budget of {minutes:g} minutes was used up (--budget).")
                note(f"bench {name}, at most {limit_s:.0f} s")
                of_process = shared.start_bench if entry.shares and is_short else start_bench
                (start or of_process)([entry.bench, *options.flags(entry, device)], path, limit_s)
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


def earlier(path: Path | None) -> dict[str, Any] | None:
    """The result of an earlier `all`, to add to; None if there is no file. Raises `UserError` for another file."""
    if path is None or not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["bench"] != "all" or not {"benches", "wanted", "seconds", "failed"} <= set(content):
            raise KeyError("bench")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--json {path} is not a result of `all`, so nothing can be added to it. Change it.") from error
    return content


def read_result(path: Path) -> dict[str, Any]:
    """Read a bench's JSON. Raises `UserError` if part of its schema is missing, `ValueError` if it is not JSON."""
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        if not isinstance(content["environment"], dict):
            raise TypeError("environment")
        for section in ("cases", "ratios"):
            for one in content[section].values():
                if not all(math.isfinite(figure) for figure in (one["median"], *one["samples"], one["samples"][0])):
                    raise ValueError("a figure is not finite")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"its JSON is not that of a bench ({reason_of(error)}).") from error
    return content


class Joined:
    """The results of the benches so far."""

    def __init__(self, wanted: tuple[str, ...], device: str, before: Mapping[str, Any] | None = None) -> None:
        """`before`: the result of an earlier call; it is ignored if it is of another type of device."""
        earlier = before if before and before.get("device") == device else {}
        self._wanted, self._device = tuple(dict.fromkeys([*earlier.get("wanted", ()), *wanted])), device
        self.results: dict[str, dict[str, Any]] = dict(earlier.get("benches", {}))
        self.failed: dict[str, str] = {
            name: reason for name, reason in earlier.get("failed", {}).items() if "/" not in name
        }
        self.seconds: dict[str, float] = dict(earlier.get("seconds", {}))
        self.form = "full"

    def forget(self, bench: str) -> None:
        """Remove the results of a bench that is measured again."""
        for of_bench in (self.results, self.failed, self.seconds):
            of_bench.pop(bench, None)

    def to_result(self) -> Result:
        """Join them to one result. Peers of the benches are its peers, so a failed peer does not break `all` either."""
        verdicts = [
            {
                "bench": verdict.aim.bench,
                "name": verdict.aim.name,
                "aim": verdict.aim.goal,
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
            "form": self.form,
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
                tuple(one["samples"]),
                one.get("unit", ""),
                str(result.get("settings", {}).get(name, "")),
                tuple(one.get("cpu", ())),  # older results have none
            )
            for bench, result in self.results.items()
            for name, one in result[section].items()
        }


def print_summary(result: Result, console: Console) -> None:
    """Print the peers' settings, a line per ratio, and at the end, where it is seen, targets, time and failures."""
    extra = result.extra
    if settings := settings_of_peers(extra["benches"]):
        console.print("settings of the peers:")
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
    """The settings of the peers' cases, by BENCH/CASE.

    If a bench compares (a ratio has "_vs_" in its name) but names no peers, all its cases except limits count.
    """
    found = {}
    for bench, result in benches.items():
        settings, peers = result.get("settings", {}), result.get("peers", [])
        if not peers and any("_vs_" in ratio for ratio in result.get("ratios", {})):
            peers = [name for name, setting in settings.items() if not setting.startswith("limit:")]
        found |= {f"{bench}/{name}": settings[name] for name in peers if settings.get(name)}
    return found
