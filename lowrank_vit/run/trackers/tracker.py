"""The one interface that every tracker is written to, and what each is told about the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast


@dataclass(frozen=True)
class About:
    """What a tracker is told of the run that it follows. All texts are printable."""

    project: str
    name: str
    run_dir: Path
    """Absolute, since a tracker may have a process of its own, which was started in another folder."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    tags: tuple[str, ...] = ()
    goes_on_at: Mapping[str, int] = field(default_factory=dict[str, int])
    """Of a resumed run: the first value of each axis that is still to come. Empty for a new run."""


def paths(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings, named by their paths: `a/b` of `{"a": {"b": ...}}`, behind `above`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from paths(cast(Mapping[str, Any], value), f"{above}{name}/")
        else:
            yield f"{above}{name}", value


class Table(NamedTuple):
    """Plain cells under names; a cell without a number is None."""

    columns: list[str]
    rows: list[list[Any]]


class Tracker(ABC):
    """One run at one tracker. Every method may raise, or hang: whoever calls it, see `Trackers`, expects that."""

    id: str = ""
    """Text with which a resumed run goes on; empty where none is needed."""
    advice: str = ""
    """A sentence on what to do with numbers that could not be sent."""

    @abstractmethod
    def log(self, values: Mapping[str, float], axis: str) -> None:
        """Send one row; `values[axis]` is its place on the axis that all its other values belong to."""

    def holds(self, name: str, step: int) -> bool:
        """Whether a point of that metric is there from before the run was resumed, and not to be sent again."""
        return False

    def log_table(self, spectra: Table) -> None:
        """Send the newest numbers of the spectra as a table, where it has tables; before `finish`."""
        return

    @abstractmethod
    def finish(self) -> None:
        """Send what is left, and end the run there."""
