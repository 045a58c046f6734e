"""The interface of all trackers, and the description of a run that each of them gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast


@dataclass(frozen=True)
class About:
    """The description of a run for a tracker. All texts are printable."""

    project: str
    name: str
    run_dir: Path
    """Absolute, since a tracker may have its own process, started in another folder."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    tags: tuple[str, ...] = ()
    goes_on_at: Mapping[str, int] = field(default_factory=dict[str, int])
    """For a resumed run: the next value of each axis. Empty for a new run."""


def paths(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings with their paths after `above`, such as `a/b` for `{"a": {"b": ...}}`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from paths(cast(Mapping[str, Any], value), f"{above}{name}/")
        else:
            yield f"{above}{name}", value


class Table(NamedTuple):
    """Rows of plain cells with column names; a cell without a number is None."""

    columns: list[str]
    rows: list[list[Any]]


class Tracker(ABC):
    """One run at one tracker. Every method may raise or hang; the caller, `Trackers`, expects that."""

    id: str = ""
    """Identifier with which a resumed run continues; empty if none is needed."""
    advice: str = ""
    """A sentence about what to do with numbers that could not be sent."""

    @abstractmethod
    def log(self, values: Mapping[str, float], axis: str) -> None:
        """Send one row; `values[axis]` is the position of all other values on that axis."""

    def holds(self, name: str, step: int) -> bool:
        """Whether the tracker has this point of the metric from before the resume, so it must not be sent again."""
        return False

    def log_table(self, spectra: Table) -> None:
        """Send the latest numbers of the spectra as a table, if the tracker has tables; before `finish`."""
        return

    @abstractmethod
    def finish(self) -> None:
        """Send the remaining rows, and end the run at the tracker."""
