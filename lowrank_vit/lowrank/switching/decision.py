"""What ranks decide on together: layers whose directions have settled go in factors, all that are due at one update."""

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
