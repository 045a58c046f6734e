"""The change of one layer at a switch, computed before anything is changed.

Letters of shapes: weight W (R, C), up A (R, r), down B (P r, C), P parts of the rows (see `model.low_rank`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.switching.factors import RANK_TOLERANCE, NewFactors, in_gauge, weight_of
from lowrank_vit.lowrank.switching.groups import Placed
from lowrank_vit.lowrank.switching.moments import SLOW, Projection, State, carried, has_squares, inner, steps
from lowrank_vit.model.low_rank import LowRankLinear, parts_of, product

KeptMoments = Literal["carry", "restart"]
_LATER: dict[KeptMoments, float] = {"carry": 0.25, "restart": 0.5}
"""Where the speed of later steps lies between that of the first (0) and that of independent entries (1), in
logarithm."""
_FINEST = 4
"""Scales are powers of 2^(1/4), so that layers share groups and a step has few of them."""
_WIDEST = 6
"""Scales are within 2^-6 and 2^6."""


@dataclass(frozen=True)
class Change:
    """How one layer changed."""

    rank: int
    scale: float
    """Learning rate of the factors, as a multiple of the weight's."""
    rate_before: float
    """|dW|_F / |W|_F per update, by the optimizer's current averages and learning rate; NaN without averages."""
    rate_unscaled: float
    """Expected |d(A B)|_F / |A B|_F of the next updates with the weight's learning rate."""
    rate_after: float
    """The same with the scaled learning rate."""
    error: float
    """|W - A B|_F / |W|_F."""
    ema_error: float
    """The same for the EMA's weight and factors; NaN without an EMA."""


class Average(NamedTuple):
    """Another weight of a layer, such as the EMA's, as factors in the same gauge."""

    up: Tensor
    down: Tensor
    bias: Tensor | None


class Made(NamedTuple):
    """Everything new for a layer, on the CPU; nothing of it is in use yet."""

    factors: NewFactors
    ema: Average | None
    slow: Average | None
    states: tuple[State, State]
    change: Change


def sources_of(layer: nn.Module) -> tuple[nn.Parameter, ...]:
    """The parameters that new factors replace."""
    return (layer.up, layer.down) if isinstance(layer, LowRankLinear) else (layer.weight,)  # type: ignore[return-value]


class Trial(NamedTuple):
    """A layer, its new factors and how it is trained; computes everything new for it and changes nothing."""

    name: str
    layer: nn.Module
    new: NewFactors
    optimizer: Optimizer
    group: Mapping[str, Any] | None
    """The optimizer's original group of the weight; None: the layer is not trained."""
    place: Placed | None
    moments: KeptMoments

    def made(self, average: nn.Module | None) -> Made:
        """Everything new for the layer; `average`: the EMA's layer. Raises `UserError` for a NaN or an infinity."""
        weight = weight_of(self.layer)
        states: tuple[State, State] = {}, {}
        slow, rates = None, (math.nan, math.nan, 1.0)
        if self.group is not None:
            projection = self._projection()
            states = carried(self.optimizer, projection, restart=False)
            rates = self._rates(weight, states)
            states = carried(self.optimizer, projection, restart=self.moments == "restart")
            slow = self._slow()
        ema = None if average is None else self._other(weight_of(average), average.bias)  # type: ignore[arg-type]
        ema_error = math.nan
        if average is not None and ema is not None:
            ema_error = _distance(weight_of(average), product(ema.up, ema.down))
        before, unscaled, scale = rates
        error = _distance(weight, product(self.new.up, self.new.down))
        change = Change(self.new.up.shape[1], scale, before, unscaled, unscaled * scale, error, ema_error)
        made = _on_cpu(Made(self.new, ema, slow, states, change))
        tensors = [one for part in (made.ema, made.slow) if part for one in part if one is not None]
        tensors += [one for state in made.states for one in state.values() if isinstance(one, Tensor)]
        self._check_finite(*tensors)
        return made

    def _check_finite(self, *averages: Tensor) -> None:
        if not all(bool(one.isfinite().all()) for one in averages):
            raise UserError(
                f"{self.name}: the optimizer's state or the EMA's weights hold a NaN or an infinity. Training "
                "has diverged: lower --lr, or resume from an earlier checkpoint."
            )

    def _projection(self) -> Projection:
        parts = parts_of(self.new.up.shape, self.new.down.shape)
        a_PRr, b_PrC = (one.double().unflatten(0, (parts, -1)) for one in self.new[:2])
        if not isinstance(self.layer, LowRankLinear):
            weight = sources_of(self.layer)[0]
            return Projection(weight, weight, b_PrC.mT, a_PRr.mT)
        a0_PRq, b0_PqC = (one.detach().double().unflatten(0, (parts, -1)) for one in sources_of(self.layer))
        t_Prq = b_PrC @ torch.linalg.pinv(b0_PqC, rtol=RANK_TOLERANCE)
        s_Pqr = torch.linalg.pinv(a0_PRq, rtol=RANK_TOLERANCE) @ a_PRr
        return Projection(self.layer.up, self.layer.down, t_Prq.mT, s_Pqr.mT)

    def _rates(self, weight: Tensor, states: tuple[State, State]) -> tuple[float, float, float]:
        """Compute rate_before, rate_unscaled and scale of `Change`.

        For a weight, dW is the optimizer's step. For factors, the change of the product is dA B + A dB; dA dB is
        smaller by the learning rate. With the carried-over averages this is exact for the first step. In later steps
        the entries agree less, as averages of squares learn about products of entries, but more than independent
        entries would. With the root mean square q of the old step, independent entries would give |dA B|_F = q sqrt(R /
        P) |B|_F and |A dB|_F = q sqrt(C) |A|_F. The speed is therefore taken to be a quarter of the way to that one, in
        the logarithm, or half of the way if squares restart and the first steps are a warm-up.
        """
        assert self.group is not None
        assert self.place is not None
        sources, state = sources_of(self.layer), inner(self.optimizer).state
        old = steps(self.optimizer, [(one, state.get(one, {}), self.group) for one in sources])
        new = steps(self.optimizer, [(one, kept, self.group) for one, kept in zip(self.new[:2], states, strict=True)])
        if any(one is None for one in (*old, *new)):
            return math.nan, math.nan, 1.0
        moved = old[0] if len(sources) == 1 else _moved(*sources, *old)
        before = float(moved.norm() / weight.norm()) * self.place.scale  # type: ignore[union-attr]
        up, down = self.new[:2]
        entries = torch.cat([one.flatten() for one in old if one is not None])
        rows, cols = len(up) // parts_of(up.shape, down.shape), down.shape[1]
        sizes = rows * down.double().square().sum() + cols * up.double().square().sum()
        independent = (entries.square().mean() * sizes).sqrt()
        share = 0.0
        if has_squares(self.optimizer, sources[0]):
            share = _LATER[self.moments]
        speed = _moved(up, down, *new).norm() ** (1 - share) * independent**share
        unscaled = float(speed / product(up, down).norm())
        lr, scale = self.group["lr"], 1.0
        if math.isfinite(before) and math.isfinite(unscaled) and before > 0 and unscaled > 0:
            nearest = round(_FINEST * math.log2(before / unscaled)) / _FINEST
            scale = 2.0 ** min(max(nearest, -_WIDEST), _WIDEST)
        return lr * before, lr * unscaled, scale

    def _slow(self) -> Average | None:
        """Lookahead's slow weights as factors; None if the optimizer keeps none."""
        state, bias = inner(self.optimizer).state, self.layer.bias
        slow = [state.get(one, {}).get(SLOW) for one in sources_of(self.layer)]
        if any(one is None for one in slow):
            return None
        weight = slow[0] if len(slow) == 1 else product(*slow)
        return self._other(weight, None if bias is None else state.get(bias, {}).get(SLOW))  # type: ignore[arg-type]

    def _other(self, weight: Tensor, bias: Tensor | None) -> Average:
        """Another weight and bias of the layer, in the gauge of its factors; the bias corrects what is cut off."""
        self._check_finite(weight)
        up, down = in_gauge(weight, *self.new[:2])
        if bias is not None and self.new.mean is not None:
            cut = (weight.double() - product(up, down)) @ self.new.mean.to(weight.device)
            bias = (bias.detach().double() + cut).to(bias.dtype)
        return Average(up.to(self.new.up.dtype), down.to(self.new.up.dtype), None if bias is None else bias.detach())


def _moved(up: Tensor, down: Tensor, step_up: Tensor | None, step_down: Tensor | None) -> Tensor:
    """The change of the product with its factors, to first order."""
    assert step_up is not None
    assert step_down is not None
    return product(step_up, down) + product(up, step_down)


def _distance(weight: Tensor, other: Tensor) -> float:
    return float((weight - other).norm() / weight.norm())


def _on_cpu(value: Any) -> Any:
    """The value with all tensors on the CPU, so that it can be sent to other ranks."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(one) for name, one in value.items()}
    if isinstance(value, tuple):
        parts = [_on_cpu(one) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
