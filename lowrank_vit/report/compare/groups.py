"""Runs to be compared: which options differ, and which runs are one configuration with several seeds."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.terminal import one_line
from lowrank_vit.report.compare.extract import Numbers, read_numbers
from lowrank_vit.report.compression.read import find_compression
from lowrank_vit.report.language import msg, tr
from lowrank_vit.report.read import Run, find_analysis, read_analysis, read_run

OF_THE_RUN = frozenset({"experiment", "output", "resume", "wandb-resume-id", "config", "checkpoint"})
"""Options that identify a run but do not change what it does."""
_OF_THE_SEED = OF_THE_RUN | {"seed", "seeds"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#882255")
"""Colours that differ under deuteranopia; further groups repeat them, dashed."""
MARKS = (
    *(("circle", "o"), ("square", "s"), ("diamond", "D"), ("x", "X"), ("triangle-up", "^"), ("triangle-down", "v")),
    *(("cross", "P"), ("star", "*")),
)
"""Plotly's and matplotlib's names of markers, one for each colour."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone; often only one."""

    name: str
    at: list[int]
    """Their places among all runs."""
    place: int
    """Its place among the groups, from 0."""

    @property
    def color(self) -> str:
        """The colour of its lines."""
        return COLORS[self.place % len(COLORS)]

    @property
    def mark(self) -> tuple[str, str]:
        """The marker of its points, see `MARKS`."""
        return MARKS[self.place % len(MARKS)]

    @property
    def is_dashed(self) -> bool:
        """Whether another group has the colour without dashes."""
        return self.place >= len(COLORS)


@dataclass(frozen=True)
class Compared:
    """The runs in the order in which they were given."""

    runs: list[Run]
    names: list[str]
    """One line each, all different."""
    groups: list[Group]
    numbers: list[Numbers] = field(default_factory=list)
    """The numbers of each run."""
    end: float = 0.0
    """The last position on the axis that every run with spectra has reached; there spectra are compared."""
    notes: list[str] = field(default_factory=list)

    @property
    def axis(self) -> str:
        """update, or epoch if the runs have different numbers of updates per epoch."""
        counts = [updates_per_epoch(run) for run in self.runs if not run.moment]
        return msg("epoch") if all(counts) and len(set(counts)) > 1 else msg("update")

    def on_axis(self, at: int, updates_T: np.ndarray) -> np.ndarray:
        """Updates of one run on the common axis."""
        unit = updates_per_epoch(self.runs[at]) if self.axis == "epoch" else 1.0
        return updates_T / (unit or 1.0)

    @property
    def options_that_differ(self) -> dict[str, list[str]]:
        """By option, its values in each group (those of all its runs), as they are typed."""
        names = dict.fromkeys(name for run in self.runs for name in run.args if name not in OF_THE_RUN)
        found = {name: [typed(run.args.get(name)) for run in self.runs] for name in names}
        return {name: self._by_group(values) for name, values in found.items() if len(set(values)) > 1}

    @property
    def environment_that_differs(self) -> dict[str, list[str]]:
        """The same for versions and hardware; the command, which is different in every run, is left out."""
        names = dict.fromkeys(name for run in self.runs for name in run.environment if name != "command")
        found = {name: [typed(run.environment.get(name)) for run in self.runs] for name in names}
        return {name: self._by_group(values) for name, values in found.items() if len(set(values)) > 1}

    def _by_group(self, values: Sequence[str]) -> list[str]:
        return [tr(", ").join(dict.fromkeys(values[i] or "–" for i in group.at)) for group in self.groups]


def updates_per_epoch(run: Run) -> float:
    """Updates per epoch, as of the last validated epoch; 0 where that is not known."""
    epochs = run.epochs
    if not {"epoch", "update"} <= epochs.keys() or not np.isfinite(epochs["epoch"][-1]):
        return 0.0
    return float(epochs["update"][-1] / (epochs["epoch"][-1] + 1))


def read_compared(paths: Sequence[Path]) -> Compared:
    """Read the parts of runs, or of analyses, that a comparison needs.

    Raises:
        UserError: one cannot be read, is a compression or is given twice, or there are fewer than two.
    """
    if len(paths) < 2:
        raise UserError("A comparison needs two runs or more, but only one is given.")
    places = [path.resolve() for path in paths]
    if twice := next((path for n, path in enumerate(paths) if places.index(path.resolve()) < n), None):
        raise UserError(f"{twice} is given twice. Give each run once.")
    for path in paths:
        if find_compression(path) and not (path.is_dir() and (path / "args.yaml").exists()):
            raise UserError(f"{path} is a compression, but only runs and analyses can be compared. Leave it out.")
    analyses = [find_analysis(path) for path in paths]
    for path, analysis in zip(paths, analyses, strict=True):
        if path.is_file() and not analysis:
            raise UserError(f"{path} is a file, but no analysis. Give run directories, or *_spectral.json files.")
    runs = [
        read_analysis(found) if found else read_run(path, spectra=False)
        for path, found in zip(paths, analyses, strict=True)
    ]
    names = _names([path.name.removesuffix("_spectral.json") or str(path) for path in places], places)
    compared = Compared(runs, names, _groups(runs, names))
    numbers, end, notes = read_numbers(compared)
    return dataclasses.replace(compared, numbers=numbers, end=end, notes=notes)


def _names(names: list[str], places: Sequence[Path]) -> list[str]:
    """Names that are all different: with the names of their folders where necessary."""
    if len(set(names)) < len(names):
        common = os.path.commonpath(places)
        names = [os.path.relpath(place, common) for place in places]
    return [one_line(name) for name in names]


def _groups(runs: Sequence[Run], names: Sequence[str]) -> list[Group]:
    alike: dict[tuple[tuple[str, str], ...] | int, list[int]] = {}
    for n, run in enumerate(runs):
        options = {name: typed(value) for name, value in run.args.items() if name not in _OF_THE_SEED}
        # Nothing is known about a run without its options, and an analysis has no seed.
        key = tuple(sorted(options.items())) if options and not run.moment else n
        alike.setdefault(key, []).append(n)
    found: list[Group] = []
    for place, at in enumerate(alike.values()):
        name = names[at[0]] if len(at) == 1 else _of_seeds([names[i] for i in at], [runs[i].args for i in at])
        found.append(Group(name, at, place))
    return found


def _of_seeds(names: Sequence[str], args: Sequence[Mapping[str, Any]]) -> str:
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    begins = "".join(letters[0] for letters in same).rstrip("-_. ").removesuffix("seed").rstrip("-_. ")
    seeds = _ranges(list(dict.fromkeys(typed(one.get("seed")) for one in args)))
    return tr("{group} (seeds {seeds})", group=begins or names[0], seeds=seeds)


def _ranges(seeds: list[str]) -> str:
    """Such as "0-4" for three or more consecutive numbers, else all of them."""
    numbers = [int(seed) for seed in seeds if seed.isdecimal()]
    if len(numbers) == len(seeds) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}-{numbers[-1]}"
    return tr(", ").join(seeds)


def typed(value: Any) -> str:
    """The value as it is typed on the command line: lists with spaces, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(typed(item) for item in value)
    return str(value)
