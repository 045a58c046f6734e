"""The bench `all`: every bench in a process of its own, one after the other, and one table of what is to be reached.

Processes of their own, since torch, numba, DALI and FFCV each keep threads and memory that would weigh on the next.
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

from benchmarks.aims import judge, print_verdicts
from benchmarks.measure import Result, Samples, check_repeats, nothing, reason_of
from benchmarks.process import start_bench
from benchmarks.selection import BUDGET_MINUTES, LONGEST_S, NAMES, PROGRAMMES, Entry
from benchmarks.show import machine_of, print_remarks
from lowrank_vit.common.errors import UserError

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
        there = PROGRAMMES[device]
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
