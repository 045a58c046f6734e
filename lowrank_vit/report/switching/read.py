"""Reads the "lowrank" lines of a run's log: when layers were factorised, with which rank and which evidence."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_vit.report.compression.read import Table
from lowrank_vit.report.language import msg, tr

_UNKNOWN = "?"
"""In a table: not measured."""
_EVENT, _TRAIN, _SPEED = (f'{{"kind": "{kind}"'.encode() for kind in ("lowrank", "train", "speed"))
EVIDENCE = {
    "energy": msg("energy held"),
    "energy_of_chance": msg("energy by chance"),
    "cosine": msg("cosine"),
    "chance": msg("cosine by chance"),
    "above_noise": msg("above noise"),
    "certificate": msg("certificate"),
    "scale": msg("factor of the lr"),
    "error": "|W - AB| / |W|",
}
"""The evidence for a rank and the results of a switch, by key in the log, in words."""


@dataclass(frozen=True)
class Switch:
    """Layers that were factorised at one update, or would have been."""

    update: int
    """The update at which it happened."""
    is_dry: bool
    """Whether it was only logged (--lowrank-dry-run)."""
    ranks: dict[str, int]
    """Ranks of the layers that changed, by name."""
    layers: dict[str, dict[str, float]]
    """By layer, the evidence for its rank and the result of the switch; see `EVIDENCE`."""
    numbers: dict[str, float]
    """All other numbers of the line."""

    def number(self, name: str) -> float:
        """A number of the line; NaN where it has none of that name."""
        return self.numbers.get(name, math.nan)

    @property
    def is_scheduled(self) -> bool:
        """Whether it was scheduled for the beginning of an epoch, before the update."""
        return "epoch" in self.numbers

    @property
    def done(self) -> int:
        """Updates made before it."""
        return self.update - 1 if self.is_scheduled else self.update


@dataclass(frozen=True)
class Look:
    """The evidence of one refresh of whole spectra."""

    update: int
    layers: dict[str, dict[str, float]]
    """By layer: rank, settled (0 or 1), streak, and the keys of `EVIDENCE`; unknown ones are left out."""


@dataclass(frozen=True)
class Switching:
    """The switches and the evidence of one run, by update."""

    switches: list[Switch]
    looks: list[Look]
    refusals: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    """Updates at which a switch was due but no layer was factorised, and why."""
    rates: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """Images per second of each interval of the log, by its last update."""
    measured: dict[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])
    """By a switch's update: images per second before and after, in the nearest intervals without compilation."""

    @property
    def is_dry(self) -> bool:
        """Whether all switches were only logged (dry run)."""
        return bool(self.switches) and all(one.is_dry for one in self.switches)

    @property
    def layers(self) -> list[str]:
        """The names of all layers in the log, in the order of the model's blocks, then of the log."""
        found = dict.fromkeys(name for one in self.looks for name in one.layers)
        return sorted(found | dict.fromkeys(name for one in self.switches for name in one.ranks), key=_block)

    def ranks_after(self, count: int) -> dict[str, int]:
        """The rank of every factorised layer after `count` switches; whole layers are left out."""
        ranks: dict[str, int] = {}
        for one in self.switches[:count]:
            ranks |= one.ranks
        return ranks

    def speeds(self) -> list[tuple[float, float]]:
        """Median images per second before and after each switch, up to the neighbouring switches; NaN if not known.

        The first interval with updates after a switch includes its compilation and is left out. If there are no other
        intervals, the run's own measurement is used.
        """
        stretches: list[float] = []
        for begin, end in itertools.pairwise([-1, *(one.done for one in self.switches), math.inf]):
            rates = [rate for update, rate in self.rates if begin < update <= end]
            rates = rates[1:] if begin >= 0 else rates
            stretches.append(float(np.median(rates)) if rates else math.nan)
        found: list[tuple[float, float]] = []
        for one, pair in zip(self.switches, itertools.pairwise(stretches), strict=True):
            own = self.measured.get(one.update, (math.nan, math.nan))
            before, after = (b if math.isnan(a) else a for a, b in zip(pair, own, strict=True))
            found.append((before, after))
        return found


def _block(name: str) -> list[int]:
    """The numbers in a name: blocks.2 before blocks.10."""
    return [int(part) for part in name.split(".") if part.isdecimal()]


def read_switching(run_dir: Path) -> Switching | None:
    """The content of `metrics.jsonl`; None for a run whose log has no such lines. Damaged lines are left out."""
    events: list[dict[str, Any]] = []
    train: list[bytes] = []
    measured: dict[int, tuple[float, float]] = {}
    with contextlib.suppress(OSError), (run_dir / "metrics.jsonl").open("rb") as file:
        for line in file:
            if line.startswith(_TRAIN):
                train.append(line)
            elif line.startswith(_SPEED):
                with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):
                    of_it = _numbers(json.loads(line))
                    measured[int(of_it["switch"])] = of_it.get("img_per_s_before", math.nan), of_it["img_per_s"]
            elif line.startswith(_EVENT):
                with contextlib.suppress(ValueError):
                    events.append(json.loads(line))
    # A resumed run repeats some lines: if an update has two, the later one counts.
    switches: dict[int, Switch] = {}
    looks: dict[int, Look] = {}
    refusals: dict[int, str] = {}
    for event in events:
        with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):
            update, kind = int(event["update"]), event["event"]
            if kind == "evidence":
                seen = int(event["seen"])
                looks[seen] = Look(seen, {name: _known(one) for name, one in _by_layer(event["layers"]).items()})
            elif kind in ("switch", "dry-run"):
                switches[update] = _switch(event, is_dry=kind == "dry-run")
            elif kind == "refused":
                refusals[update] = str(event["why"])
    if not switches and not looks and not refusals:
        return None
    return Switching(
        [switches[update] for update in sorted(switches)],
        [looks[update] for update in sorted(looks)],
        refusals=sorted(refusals.items()),
        rates=sorted(_rates(train).items()),
        measured=measured,
    )


def _switch(event: Mapping[str, Any], *, is_dry: bool) -> Switch:
    layers = _by_layer(event.get("layers") or {})
    for key, value in _numbers(event.get("change") or {}).items():
        name, _, number = key.rpartition("/")
        layers.setdefault(name, {})[number] = value
    ranks = {str(name): int(rank) for name, rank in event["ranks"].items()}
    return Switch(int(event["update"]), is_dry, ranks, layers, _numbers(event))


def _rates(train: Iterable[bytes]) -> dict[int, float]:
    found: dict[int, float] = {}
    for line in train:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            event = json.loads(line)
            found[int(event["update"])] = float(event["img_per_s"])
    return {update: rate for update, rate in found.items() if math.isfinite(rate)}


def _by_layer(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {str(name): _numbers(numbers) for name, numbers in content.items() if isinstance(numbers, Mapping)}


def _known(verdict: dict[str, float]) -> dict[str, float]:
    """The verdict without zeros that mean unknown: no rank pays, or there is nothing to compare with."""
    return {key: value for key, value in verdict.items() if value or key in ("settled", "streak")}


def _numbers(content: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in content.items() if isinstance(value, int | float)}


def in_words(switching: Switching) -> list[str]:
    """A line for each switch: layers, parameters, FLOPs and images per second before and after, where known."""
    lines: list[str] = []
    for one, speed in zip(switching.switches, switching.speeds(), strict=True):
        forms = (
            (
                msg("update {at:,}: {n} layer would be factorised"),
                msg("update {at:,}: {n} layers would be factorised"),
            )
            if one.is_dry
            else (msg("update {at:,}: {n} layer factorised"), msg("update {at:,}: {n} layers factorised"))
        )
        parts = [tr(forms[len(one.ranks) != 1], at=one.update, n=len(one.ranks))]
        changes = {tr("M parameters"): _parameters(one), tr("GFLOP an image"): _flops(one)}
        if not one.is_dry and all(map(math.isfinite, speed)):
            changes["img/s"] = _change(*speed, ",.0f")
        lines.append(tr(", ").join([*parts, *(f"{change} {what}" for what, change in changes.items() if change)]))
    return lines


def headline(switching: Switching) -> list[tuple[str, str]]:
    """The number that a reader of a switched run looks for first, as (label, value)."""
    done = [one for one in switching.switches if not one.is_dry]
    left = done[-1].number("parameters") / done[0].number("parameters_before") if done else math.nan
    return [(tr("parameters left"), f"{100 * left:.1f} %")] if math.isfinite(left) else []


def tables(switching: Switching, shapes: Mapping[str, tuple[int, int]]) -> list[Table]:
    """The tables of the switches, and of the ranks by layer with their evidence."""
    return [_switches(switching), _ranks(switching, shapes)]


def notes(switching: Switching) -> list[str]:
    """A line for each time that a switch was due but layers stayed as they were."""
    text = msg("At update {n:,} no layer was factorised: {why}.")
    return [tr(text, n=update, why=why) for update, why in switching.refusals]


def beside_the_loss(args: Mapping[str, Any], train: Mapping[str, np.ndarray]) -> list[Table]:
    """The table of a run's adapters and regularisers, from its options and train lines; empty without any."""
    flags = ("lora", "reg-nuclear", "reg-stable-rank", "spectral-clip")
    given = [f"--{flag} {args[flag]:g}" for flag in flags if isinstance(args.get(flag), int | float) and args[flag]]
    if not given:
        return []
    rows: list[list[str]] = []
    for key in ("nuclear_norm", "stable_rank", "stable_rank_error", "clipped_values"):
        known = [value for value in map(float, train.get(key, ())) if math.isfinite(value)]
        if known:
            rows.append(
                [key.replace("_", " "), *(f"{one:.4g}" for one in (known[0], known[-1], min(known), max(known)))]
            )
    title = "Adapters" if given[0].startswith("--lora") else "Regularisers"
    return [Table(title, ["", "first", "last", "least", "greatest"], rows, f"{', '.join(given)}.")]


def _switches(switching: Switching) -> Table:
    rows: list[list[str]] = []
    for one, speed in zip(switching.switches, switching.speeds(), strict=True):
        why = tr("schedule, after epoch {n:.0f}", n=one.number("epoch")) if one.is_scheduled else tr("settled")
        share = one.number("share")
        rows.append(
            [
                f"{one.update:,}",
                why,
                str(len(one.ranks)),
                _UNKNOWN if math.isnan(share) else f"{100 * share:.1f} %",
                _parameters(one) or _UNKNOWN,
                _flops(one) or _UNKNOWN,
                tr("not trained") if one.is_dry else _change(*speed, ",.0f") or _UNKNOWN,
                _change(one.number("loss_before"), one.number("loss"), ".4f") or _UNKNOWN,
            ]
        )
    columns = [tr("update"), tr("why"), tr("layers"), tr("targets left"), tr("M parameters"), tr("GFLOP an image"),
               "img/s", tr("loss, one batch")]  # fmt: skip
    title = tr("Factorised layers")
    note = tr(
        "FLOPs of training on one image; loss on the same images before and after. img/s are medians of the log's "
        "intervals up to the next switch, without the one in which the step is recompiled. ?: not measured."
    )
    if switching.is_dry:
        title = tr("Layers that would be factorised (dry run)")
        note = tr(
            "FLOPs of training on one image; loss on the same images. Each row is compared with the whole model. "
            "?: not measured."
        )
    return Table(title, columns, rows, note)


def _ranks(switching: Switching, shapes: Mapping[str, tuple[int, int]]) -> Table:
    newest: dict[str, dict[str, float]] = {}
    for look in switching.looks:
        newest |= look.layers
    for one in switching.switches:
        newest |= {name: newest.get(name, {}) | numbers for name, numbers in one.layers.items()}
    known = [key for key in EVIDENCE if any(math.isfinite(one.get(key, math.nan)) for one in newest.values())]
    after = [switching.ranks_after(count + 1) for count in range(len(switching.switches))]
    rows: list[list[str]] = []
    for name in switching.layers:
        shape = " x ".join(map(str, shapes[name])) if name in shapes else _UNKNOWN
        ranks = [str(ranks.get(name, tr("whole"))) for ranks in after]
        rows.append([name, shape, *ranks, *(_cell(key, newest.get(name, {}).get(key)) for key in known)])
    at = [tr("update {n}", n=f"{one.update:,}") for one in switching.switches]
    note = tr("The rank after each switch, and the evidence of the newest switch or refresh. ?: not measured.")
    return Table(tr("Ranks by layer"), ["", tr("shape"), *at, *(tr(EVIDENCE[key]) for key in known)], rows, note)


def _cell(key: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return _UNKNOWN
    return f"{value:.0e}" if key == "certificate" else f"{value:.3g}"


def _parameters(one: Switch) -> str:
    return _change(one.number("parameters_before") / 1e6, one.number("parameters") / 1e6)


def _flops(one: Switch) -> str:
    return _change(one.number("flops_before") / 1e9, one.number("flops") / 1e9)


def _change(before: float, after: float, form: str = ".3g") -> str:
    """Such as 3.2 → 1.1, with a question mark for an unknown value; empty if both are unknown."""
    shown = [format(value, form) if math.isfinite(value) else _UNKNOWN for value in (before, after)]
    return "" if shown == [_UNKNOWN, _UNKNOWN] else " → ".join(shown)


def mean_over_time(looks: Iterable[Look], key: str, names: Iterable[str]) -> np.ndarray:
    """The mean of a number over these layers at each refresh (T,); NaN where none has it."""
    wanted = list(names)
    found = [[look.layers.get(name, {}).get(key, math.nan) for name in wanted] for look in looks]
    values = np.array(found, float).reshape(-1, len(wanted))
    known = np.isfinite(values)
    sums = np.where(known, values, 0.0).sum(axis=1)
    return np.divide(sums, known.sum(axis=1), out=np.full(len(sums), np.nan), where=known.any(axis=1))
