"""A stand-in for what judges refreshes: layers settle when a test says so, whatever their weights are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from lowrank_vit.lowrank.switching.verdict import NOTHING, Verdict

RANKS = (9, 5, 3, 2)
"""What layers would keep, one after the other each time that they have switched."""


class Told:
    """Settles every layer of a block at its `times`-th look, the first block's before the second's."""

    def __init__(self, *_: Any, times: int = 2, ranks: Sequence[int] = RANKS, **more: Any) -> None:
        """Any arguments of the real one; `times`: of --lowrank-settled."""
        self._times, self._update, self._ranks = times, -1, ranks
        self._layers: dict[str, dict[str, int]] = {}

    def see(self, update: int, weights: Mapping[str, Tensor], **more: Any) -> None:
        """Count a look at each layer; those of later blocks settle a look later each."""
        assert update > self._update, "a refresh counts once"
        self._update = update
        for name, weight in weights.items():
            assert weight.ndim == 2
            one = self._layers.setdefault(name, {"looks": -int(name.split(".")[1]), "switched": 0})
            one["looks"] += 1

    def verdicts(self) -> dict[str, Verdict]:
        """Of all layers that were seen."""
        found: dict[str, Verdict] = {}
        for name, one in self._layers.items():
            rank = self._ranks[min(one["switched"], len(self._ranks) - 1)]
            settled = one["looks"] >= self._times
            found[name] = Verdict(**{**vars(NOTHING), "rank": rank, "settled": settled, "streak": one["looks"]})
        return found

    def forget(self, names: Collection[str]) -> None:
        """Begin anew with layers that have switched."""
        for name in names:
            self._layers[name] = {"looks": 0, "switched": self._layers.get(name, {"switched": 0})["switched"] + 1}

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"update": self._update, "layers": {name: dict(one) for name, one in self._layers.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._update, self._layers = state["update"], {name: dict(one) for name, one in state["layers"].items()}
