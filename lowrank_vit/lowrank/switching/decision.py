"""The decision, alike on all ranks: which settled layers are factorised, all due ones at one update.

Switches are few, and layers settle one after the other. A switch therefore waits until enough are due, see `enough`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lowrank_vit.lowrank.layers import Costs

_WORTH = 0.9
"""A factorised layer shrinks only to this share of its rank or less, because switches are few."""


class Evidence(Protocol):
    """The part of a layer's verdict that `decide` reads."""

    @property
    def rank(self) -> int:
        """How many directions the layer would keep."""
        ...

    @property
    def settled(self) -> bool:
        """Whether these directions have stayed the same for long enough."""
        ...


@dataclass(frozen=True)
class Decision:
    """Which layers are factorised at an update, the same on every rank."""

    update: int
    """The update that the switch belongs to."""
    ranks: dict[str, int]
    """New rank by layer name; for layers that are factorised already, below the current rank."""
    evidence: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """The numbers behind the decision, by layer name."""


def decide(verdicts: Mapping[str, Evidence], ranks: Mapping[str, int], costs: Costs) -> dict[str, int]:
    """The ranks of the layers that are due; a pure function, so every process gets the same.

    Args:
        verdicts: by name, for all layers that were judged.
        ranks: of the layers that are factorised already.
        costs: of all targets; a whole layer is due only at a rank that saves something.
    """
    due: dict[str, int] = {}
    for name, layer in costs.layers.items():
        verdict = verdicts.get(name)
        if verdict is None or not verdict.settled or verdict.rank < 1:
            continue
        most = int(_WORTH * ranks[name]) if name in ranks else layer.pays
        if verdict.rank <= most:
            due[name] = verdict.rank
    return due


def share_of_due(due: Mapping[str, int], ranks: Mapping[str, int], costs: Costs) -> float:
    """Current parameters of the due layers, as a share of those in all layers that could still be factorised; 0-1.

    Factorised layers count among these only if they are due, since most never shrink; or if no whole layer is left.

    Args:
        due: see `decide`.
        ranks: of the layers that are factorised already.
        costs: see `decide`.
    """
    whole = {name for name, layer in costs.layers.items() if name not in ranks and layer.pays}
    among = due.keys() | (whole or {name for name in ranks if int(_WORTH * ranks[name])})
    now = {name: costs.layers[name].cost(ranks.get(name)) for name in among}
    return sum(now[name] for name in due) / max(sum(now.values()), 1)


def enough(at_once: float | None, switches_left: int, updates_left: float) -> float:
    """The share, see `share_of_due`, that a switch needs.

    It falls linearly with the remaining updates: some layers never settle, and settled ones should not wait for them
    until no training is left.

    Args:
        at_once: the share at the start of the run; None: one over the remaining switches, so that these suffice for all
        layers.
        switches_left: 1 or more.
        updates_left: remaining share of the run's updates, 0-1.
    """
    return (1 / switches_left if at_once is None else at_once) * updates_left
