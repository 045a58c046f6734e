"""A layer has settled when its first r directions stayed the same for several complete refreshes and are not noise.

A layer's *anchor* is the basis at the start of its streak. Every later look is compared with it, not with the previous
look, so slowly turning directions do not pass. A look adds to the streak if all three shares reach the thresholds, ends
it if one is `HYSTERESIS` below them, and leaves it unchanged in between:

- energy: the energy of the current W in the anchor's directions, from chance to the best possible;
- cosine: the mean squared principal cosine between the two, from chance (r/n) to 1, on the worse side;
- above noise: how much of the energy share of the first r noise does not explain, see `Look.above_noise`. This holds
  back weights that never change: their directions are always the same and mean nothing.

All three use the r directions of the rule's current rank, and as many of the anchor. r may change a little during a
streak (`margin`); a larger change starts a new streak. A look whose triplets are not proven to be the first changes
nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.layers import pays
from lowrank_vit.lowrank.switching.settled import (
    FEWEST_VALUES,
    TURN,
    Basis,
    Likeness,
    Look,
    Rule,
    look_at,
    rank_by_energy,
    rank_by_noise,
)


class Shares(NamedTuple):
    """Thresholds for the three shares, each from chance (0) to the most possible (1)."""

    energy: float
    cosine: float
    above_noise: float


GAIN = Shares(0.75, 0.7, 0.2)
HYSTERESIS = Shares(0.1, 0.1, 0.05)
"""A streak ends when a share is this far below the threshold that adds to it."""
_SMALL = 4.0
"""The threshold above noise rises by this / K: the spectra of small matrices vary more by chance."""


CONSTANTS: dict[str, float] = {
    **{f"hysteresis_{name}": value for name, value in HYSTERESIS._asdict().items()},
    "small": _SMALL,
    "noise_values": FEWEST_VALUES,
    "turn": TURN,
    "margin": 8,
}
"""The constants that decide besides the options, by name; they must not change during a run."""


@dataclass(frozen=True)
class Verdict:
    """The state of a layer after its last look. All numbers are 0 without finite weights and a rank that pays."""

    rank: int
    """r by the rule at the last look; 0 if no rank pays or the weights are not finite."""
    settled: bool
    streak: int
    """How many looks in a row found the anchor's directions."""
    energy: float
    energy_of_chance: float
    cosine: float
    chance: float
    """See `Likeness`. 0 at the start of a streak."""
    certificate: float
    share: float
    share_of_noise: float
    above_noise: float
    """See `Look`."""


NOTHING = Verdict(0, False, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass
class _Layer:
    """The state kept for a layer."""

    rank: int
    """The anchor's rank."""
    streak: int
    settled: bool
    anchor: Basis | None
    verdict: Verdict


def margin(rank: int) -> int:
    """How far r may rise during a streak: by an eighth, but at least 2 (1 for rank 1); it may fall twice as far."""
    return max(rank // int(CONSTANTS["margin"]), min(rank, 2))


def is_near(rank: int, settled: int) -> bool:
    """Whether a result for the first `settled` directions also holds for the first `rank`; see `margin`."""
    return settled - 2 * margin(settled) <= rank <= settled + margin(settled)


class Settling:
    """Watches which layers have settled, from copies of their weights at full refreshes.

    Deterministic: the same weights give the same bits. No global generator of torch or numpy is touched. For each layer
    with a rank that pays, it keeps a float32 basis of 9/8 r directions on both sides. That is at most 9/8 of the
    float32 weights: 381 MB for the block layers of a ViT-B, or 66 MB with r = 100 everywhere.
    """

    def __init__(
        self, rule: Rule, *, energy: float = 0.9, times: int = 3, fused: Collection[str] = (), gain: Shares = GAIN
    ) -> None:
        """Start without any look.

        Args:
            rule: "energy", "mp", or "kfac", whose ranks come with the weights.
            energy: for rule "energy", the energy share, 0-1, of r directions.
            times: how many looks in a row, after the first, must find the same directions.
            fused: the names of matrices whose rows are Q, K and V, a third each.
            gain: the thresholds at which a look adds to the streak.
        """
        self._gain = gain
        self._lose = Shares(*(high - low for high, low in zip(gain, HYSTERESIS, strict=True)))
        self._rule, self._energy, self._times, self._fused = rule, energy, times, frozenset(fused)
        self._update: int | None = None
        self._layers: dict[str, _Layer] = {}

    def see(
        self,
        update: int,
        weights: Mapping[str, Tensor],
        *,
        ranks: Mapping[str, int] | None = None,
        in_factors: Mapping[str, int] | None = None,
    ) -> None:
        """Look at all matrices after an update. An update that is not later than the last one seen is ignored.

        Args:
            update: its number.
            weights: copies by name, any float dtype and device; for a factorised layer the product.
            ranks: r by name, for rule "kfac"; a layer without one has no verdict.
            in_factors: the ranks of layers that are factorised already. They only shrink, by at least `margin`, as less
            is not worth a switch.
        """
        if self._update is not None and update <= self._update:
            return
        self._update = update
        for name, matrix in weights.items():
            given = (ranks or {}).get(name, 0)
            self._layers[name] = self._seen(name, matrix, given, (in_factors or {}).get(name, 0))

    def verdicts(self) -> dict[str, Verdict]:
        """The verdict of the last look at each layer, by name."""
        return {name: layer.verdict for name, layer in self._layers.items()}

    def forget(self, names: Collection[str]) -> None:
        """Start anew with these layers, such as after a switch."""
        for name in names:
            self._layers.pop(name, None)

    def _seen(self, name: str, matrix: Tensor, given: int, q: int) -> _Layer:
        rows, columns = matrix.shape
        most = q - margin(q) if q else pays(rows, columns)

        def rank_of(s_K: np.ndarray) -> int:
            if self._rule == "energy":
                return rank_by_energy(s_K[: q or s_K.size], self._energy)
            return given if self._rule == "kfac" else rank_by_noise(name, matrix, s_K, name in self._fused)

        look = look_at(name, matrix, rank_of, most=most, margin=margin, in_factors=q)
        if look is None or not look.rank:
            return _Layer(0, 0, False, None, NOTHING)
        before = self._layers.get(name)
        if before is None or before.anchor is None or not _knows(before, look.rank):
            return _begin(look)
        like = look.likeness(before.anchor, matrix)
        if not look.is_certain:
            return replace(before, verdict=_verdict(look, like, before.streak, before.settled))
        if _below(like, look, self._lose):
            return replace(_begin(look), verdict=_verdict(look, like, 0, settled=False))
        streak = before.streak if _below(like, look, self._gain) else before.streak + 1
        settled = before.settled or streak >= self._times
        return _Layer(before.rank, streak, settled, before.anchor, _verdict(look, like, streak, settled))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, which `torch.load` reads with `weights_only=True`."""
        layers: dict[str, dict[str, Any]] = {}
        for name, layer in self._layers.items():
            layers[name] = {"rank": layer.rank, "streak": layer.streak, "settled": layer.settled}
            layers[name]["verdict"] = asdict(layer.verdict)
            if layer.anchor is not None:
                layers[name] |= {"left": layer.anchor.left, "right": layer.anchor.right}
        return {"update": self._update, "layers": layers, "constants": CONSTANTS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, which may be on any device.

        Raises `UserError` for a state of a version with other constants, by which other layers would settle. Options
        are not among them. A state without constants comes from a version that did not record them, and is accepted.
        """
        was = state.get("constants", CONSTANTS)
        if other := [name for name in sorted({*was, *CONSTANTS}) if was.get(name) != CONSTANTS.get(name)]:
            changed = ", ".join(f"{name} was {was.get(name)}, now {CONSTANTS.get(name)}" for name in other)
            raise UserError(
                f"The run was started by a version with another test of when a layer has settled: {changed}. Resume it "
                "with that version, or start a new run from its weights with --initial-checkpoint."
            )
        self._update = state["update"]
        self._layers = {}
        for name, one in state["layers"].items():
            anchor = Basis(one["left"].cpu(), one["right"].cpu()) if "left" in one else None
            verdict = Verdict(**one["verdict"])
            self._layers[name] = _Layer(one["rank"], one["streak"], one["settled"], anchor, verdict)


def _knows(layer: _Layer, rank: int) -> bool:
    assert layer.anchor is not None
    return is_near(rank, layer.rank) and rank <= layer.anchor.count


def _begin(look: Look) -> _Layer:
    if not look.is_certain:
        return _Layer(0, 0, False, None, _verdict(look, None, 0, settled=False))
    return _Layer(look.rank, 0, False, look.basis(), _verdict(look, None, 0, settled=False))


def _below(like: Likeness, look: Look, limits: Shares) -> bool:
    shares = Shares(like.energy_share, like.cosine_share, look.above_noise - _SMALL / look.solved.s.size)
    return any(not share >= limit for share, limit in zip(shares, limits, strict=True))


def _verdict(look: Look, like: Likeness | None, streak: int, settled: bool) -> Verdict:
    return Verdict(
        rank=look.rank,
        settled=settled,
        streak=streak,
        energy=like.energy if like else 0.0,
        energy_of_chance=like.energy_of_chance if like else 0.0,
        cosine=like.cosine if like else 0.0,
        chance=like.chance if like else 0.0,
        certificate=look.certificate,
        share=look.share,
        share_of_noise=look.share_of_noise,
        above_noise=look.above_noise,
    )
