"""What ranks decide on together: layers whose directions have settled go in factors, all that are due at one update.

Switches are few, and layers settle one after the other. So a switch waits until enough are due, see `enough`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lowrank_vit.lowrank.layers import Costs

_WORTH = 0.9
"""A layer in factors shrinks once it would keep this share of its rank or less: each switch is one of a few."""


class Evidence(Protocol):
    """What `decide` reads of a layer's verdict."""

    @property
    def rank(self) -> int:
        """How many directions the layer would keep."""
        ...

    @property
    def settled(self) -> bool:
        """Whether they have stayed the same for long enough."""
        ...


@dataclass(frozen=True)
class Decision:
    """Which layers go in factors at an update, the same on every rank."""

    update: int
    """The update that the switch is a part of."""
    ranks: dict[str, int]
    """By name of the layer; of those that are in factors already, below what they have."""
    evidence: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """By name of the layer what it rests on."""


def decide(verdicts: Mapping[str, Evidence], ranks: Mapping[str, int], costs: Costs) -> dict[str, int]:
    """The ranks of the layers that are due; a pure function, so that every rank comes to the same.

    Args:
        verdicts: by name, of all layers that were looked at.
        ranks: of the layers that are in factors already.
        costs: what layers cost at a rank; a whole one is due only at a rank that saves something.
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
    """What layers have of the parameters, as they are now, of those that could still go in factors; 0-1.

    Layers in factors count with those that could only where they are due, since most never shrink; or where no whole
    one is left.

    Args:
        due: see `decide`.
        ranks: of the layers that are in factors already.
        costs: see `decide`.
    """
    whole = {name for name, layer in costs.layers.items() if name not in ranks and layer.pays}
    among = due.keys() | (whole or {name for name in ranks if int(_WORTH * ranks[name])})
    now = {name: costs.layers[name].cost(ranks.get(name)) for name in among}
    return sum(now[name] for name in due) / max(sum(now.values()), 1)


def enough(at_once: float | None, switches_left: int, updates_left: float) -> float:
    """The share, see `share_of_due`, from which on a switch is made.

    It falls in a straight line with the updates that are left: some layers never settle, and those that have are not to
    wait for them until nothing is left to train.

    Args:
        at_once: at the run's beginning; None: one over the switches that are left, so that these last for all layers.
        switches_left: 1 or more.
        updates_left: share of the run's updates, 0-1.
    """
    return (1 / switches_left if at_once is None else at_once) * updates_left
