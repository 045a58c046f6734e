"""The switch: layers of a model that trains become factors, with the optimizer's state, the EMA and the schedule.

Letters of shapes: weight W (R, C), up A (R, r), down B (P r, C), P parts of the rows (see `model.low_rank`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.layers import pays
from lowrank_vit.lowrank.switching.factors import RANK_TOLERANCE, NewFactors, in_gauge, weight_of
from lowrank_vit.lowrank.switching.groups import Decay, Placed, groups_of, placed_in, put_groups, regrouped
from lowrank_vit.lowrank.switching.moments import (
    SLOW,
    Projection,
    State,
    carried,
    check_can_switch,
    has_squares,
    inner,
    steps,
)
from lowrank_vit.model.low_rank import LowRankLinear, parts_of, product
from lowrank_vit.model.optimizer import Constant

KeptMoments = Literal["carry", "restart"]
_FINEST = 4
"""Scales are powers of 2^(1/4): near enough for layers to share a group, so that a step has few."""
_WIDEST = 6
"""Scales are within 2^-6 and 2^6."""


@dataclass(frozen=True)
class Change:
    """What became of one layer."""

    rank: int
    scale: float
    """Learning rate of its factors, as a multiple of its weight's."""
    rate_before: float
    """|dW|_F / |W|_F in an update, by the optimizer's averages and learning rate as they are; NaN without averages."""
    rate_unscaled: float
    """|d(A B)|_F / |A B|_F in an update, were the learning rate the weight's."""
    rate_after: float
    """The same with the scale."""
    error: float
    """|W - A B|_F / |W|_F."""
    ema_error: float
    """The same of the EMA's weight and factors; NaN without an EMA."""


@dataclass(frozen=True)
class Switched:
    """What a switch has done."""

    layers: dict[str, Change]

    @property
    def scales(self) -> dict[str, float]:
        """By name of the layer, see `Change.scale`."""
        return {name: one.scale for name, one in self.layers.items()}

    def numbers(self) -> dict[str, float]:
        """Scalars for a log, by "LAYER/NAME"; NaN is left out."""
        found = {
            f"{layer}/{key}": float(value) for layer, one in self.layers.items() for key, value in vars(one).items()
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}


class _Average(NamedTuple):
    """Another weight of a layer, in the gauge of its factors."""

    up: Tensor
    down: Tensor
    bias: Tensor | None


class _Made(NamedTuple):
    """All that is new of a layer, on the CPU; nothing of it is in use yet."""

    factors: NewFactors
    ema: _Average | None
    slow: _Average | None
    states: tuple[State, State]
    change: Change


def switch(
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: Optimizer,
    scheduler: Scheduler | Constant,
    factors: Mapping[str, NewFactors],
    *,
    moments: KeptMoments = "carry",
    decay: Decay = "factors",
    num_updates: int = 0,
    agreed: Callable[[Any], Any] = lambda value: value,
) -> Switched:
    """Put layers in factors between two updates, in place: all of them, or on an error none.

    Their parameters go out of the optimizer, the factors go in, with state (see `moments`) and groups (`groups`). A
    bias stays the parameter that it was, with its state: the gradient at b is that at the layer's output, in factors
    or not. Where a method has the bias make up for what is cut off of the mean input, the EMA's does so for its own.
    Afterwards `TrainStep.rebuild` is due.

    Args:
        model: not compiled and not wrapped; layers are Linear, or in factors of a greater rank and then shrink.
        ema: its average of the same structure, without timm's wrapper.
        optimizer: of the model.
        scheduler: of the optimizer.
        factors: by name of the layer, see `factors.make_factors`.
        moments: carry the optimizer's squares over, or begin anew where it has any, with a short warm-up.
        decay: whether weight decay acts on both factors, or on their product.
        num_updates: made so far.
        agreed: given all numbers that were worked out here, gives back those to use: the first rank's on every rank.

    Raises:
        UserError: the optimizer has no rule, a layer cannot be put in these factors, or numbers are not finite. All is
            as it was then.
    """
    check_can_switch(optimizer)
    modules = dict(model.named_modules())
    groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    _check(model, modules, factors, groups)
    usual, of_factors = groups_of(optimizer)
    placed = placed_in(of_factors)
    number_of = {id(one): number for number, group in enumerate(usual) for one in group["params"]}
    places, made = dict[str, Placed](), dict[str, _Made]()
    for name, new in factors.items():
        source = _sources(modules[name])[0]
        if source.requires_grad:
            places[name] = placed[name] if name in placed else Placed(number_of[id(source)])
        here = NewFactors(*(None if one is None else one.to(source.device) for one in new))  # type: ignore[arg-type]
        group = usual[places[name].of] if name in places else None
        trial = _Trial(name, modules[name], here, optimizer, group, places.get(name), moments)
        made[name] = trial.made(None if ema is None else ema.get_submodule(name))
    made = agreed(made)
    layers = {name: _in_factors(modules[name], *one.factors[:2]) for name, one in made.items()}
    for name in places:
        restarts = moments == "restart" and has_squares(optimizer, _sources(modules[name])[0])
        since = num_updates if restarts else -1
        placed[name] = replace(places[name], scale=made[name].change.scale, decay=decay, warm_from=since)
    every = {name: layers.get(name, one) for name, one in modules.items() if name in placed}
    own = {name: (one.up, one.down) for name, one in every.items() if isinstance(one, LowRankLinear)}
    gone = {id(one) for name in factors for one in _sources(modules[name])}
    new_groups = regrouped(optimizer, placed, own, gone)
    averages = {
        name: _in_factors(ema.get_submodule(name), one.ema.up, one.ema.down)
        for name, one in made.items()
        if ema is not None and one.ema is not None
    }
    kept = [_state_of(optimizer, modules[name], layers[name], one) for name, one in made.items()]
    # From here on nothing can fail.
    _replace(model, layers, {name: one.factors.bias for name, one in made.items()})
    if ema is not None:
        _replace(ema, averages, {name: one.ema.bias for name, one in made.items() if one.ema is not None})
    put_groups(optimizer, scheduler, new_groups)
    state = inner(optimizer).state
    for name in factors:
        for source in _sources(modules[name]):
            state.pop(source, None)
    for of_layer in kept:
        for parameter, of_parameter in of_layer.items():
            state[parameter] = of_parameter
    return Switched({name: one.change for name, one in made.items()})


def _sources(layer: nn.Module) -> tuple[nn.Parameter, ...]:
    """The parameters that factors take the place of."""
    return (layer.up, layer.down) if isinstance(layer, LowRankLinear) else (layer.weight,)  # type: ignore[return-value]


def _check(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    factors: Mapping[str, NewFactors],
    groups: Mapping[int, Mapping[str, Any]],
) -> None:
    """Raise `UserError` for a layer that cannot be put in its factors."""
    uses = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    for name, new in factors.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | LowRankLinear):
            what = f"of class {type(layer).__name__}" if layer is not None else "not there"
            raise UserError(f"{name} is {what}, and only a Linear becomes factors. Leave it out of --lowrank-targets.")
        rows, columns, rank = layer.out_features, layer.in_features, new.up.shape[1]
        parts = parts_of(new.up.shape, new.down.shape)
        if not parts or (len(new.up), new.down.shape[1]) != (rows, columns):
            raise UserError(
                f"{name} is {rows} x {columns}; factors of {tuple(new.up.shape)} and "
                f"{tuple(new.down.shape)} do not make that."
            )
        if isinstance(layer, LowRankLinear) and (parts != layer.parts or rank >= layer.rank):
            raise UserError(f"{name} is in factors of rank {layer.rank} already; it can only shrink, not go to {rank}.")
        if rank > pays(rows, columns, parts):
            raise UserError(
                f"{name}: factors of rank {rank} have no fewer weights than its {rows * columns:,}; "
                f"{pays(rows, columns, parts)} is the greatest rank that saves any. Leave it whole."
            )
        if (new.bias is None) != (layer.bias is None):
            raise UserError(f"{name}: factors and layer must both have a bias, or none.")
        if any(uses[id(one)] > 1 for one in _sources(layer)):
            raise UserError(
                f"{name} shares its weight with another layer, so one cannot become factors without the "
                "other. Leave it out of --lowrank-targets."
            )
        if any(one.requires_grad and id(one) not in groups for one in _sources(layer)):
            raise UserError(f"{name} trains, but its weight is not among the optimizer's parameters.")
        numbers = [*_sources(layer), *(one for one in new[:3] if one is not None)]
        if not all(bool(one.isfinite().all()) for one in numbers):
            raise UserError(
                f"{name} has weights or factors with a NaN or an infinity. Training has diverged: lower "
                "--lr, or resume from an earlier checkpoint."
            )


class _Trial(NamedTuple):
    """A layer, its factors and how it is trained; works out all that is new of it, and changes nothing."""

    name: str
    layer: nn.Module
    new: NewFactors
    optimizer: Optimizer
    group: Mapping[str, Any] | None
    """The group that the weight was in, as the optimizer was made; None: the layer does not train."""
    place: Placed | None
    moments: KeptMoments

    def made(self, average: nn.Module | None) -> _Made:
        """All that is new; `average`: the EMA's layer."""
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
        made = _on_cpu(_Made(self.new, ema, slow, states, change))
        tensors = [one for part in (made.ema, made.slow) if part for one in part if one is not None]
        tensors += [one for state in made.states for one in state.values() if isinstance(one, Tensor)]
        self._check_finite(*tensors)
        return made

    def _check_finite(self, *averages: Tensor) -> None:
        if not all(bool(one.isfinite().all()) for one in averages):
            raise UserError(
                f"{self.name}: the optimizer's averages or those of the weights hold a NaN or an infinity. Training "
                "has diverged: lower --lr, or resume from an earlier checkpoint."
            )

    def _projection(self) -> Projection:
        parts = parts_of(self.new.up.shape, self.new.down.shape)
        a_PRr, b_PrC = (one.double().unflatten(0, (parts, -1)) for one in self.new[:2])
        if not isinstance(self.layer, LowRankLinear):
            weight = _sources(self.layer)[0]
            return Projection(weight, weight, b_PrC.mT, a_PRr.mT)
        a0_PRq, b0_PqC = (one.detach().double().unflatten(0, (parts, -1)) for one in _sources(self.layer))
        t_Prq = b_PrC @ torch.linalg.pinv(b0_PqC, rtol=RANK_TOLERANCE)
        s_Pqr = torch.linalg.pinv(a0_PRq, rtol=RANK_TOLERANCE) @ a_PRr
        return Projection(self.layer.up, self.layer.down, t_Prq.mT, s_Pqr.mT)

    def _rates(self, weight: Tensor, states: tuple[State, State]) -> tuple[float, float, float]:
        """See `Change`: rate_before, rate_unscaled, scale.

        dW of a weight is the optimizer's step. Of factors the change of the product is dA B + A dB, but for dA dB,
        which is smaller by the learning rate.
        """
        assert self.group is not None
        assert self.place is not None
        sources, state = _sources(self.layer), inner(self.optimizer).state
        old = steps(self.optimizer, [(one, state.get(one, {}), self.group) for one in sources])
        new = steps(self.optimizer, [(one, kept, self.group) for one, kept in zip(self.new[:2], states, strict=True)])
        if any(one is None for one in (*old, *new)):
            return math.nan, math.nan, 1.0
        moved = old[0] if len(sources) == 1 else _moved(*sources, *old)
        before = float(moved.norm() / weight.norm()) * self.place.scale  # type: ignore[union-attr]
        up, down = self.new[:2]
        unscaled = float(_moved(up, down, *new).norm() / product(up, down).norm())
        lr, scale = self.group["lr"], 1.0
        if math.isfinite(before) and math.isfinite(unscaled) and before > 0 and unscaled > 0:
            nearest = round(_FINEST * math.log2(before / unscaled)) / _FINEST
            scale = 2.0 ** min(max(nearest, -_WIDEST), _WIDEST)
        return lr * before, lr * unscaled, scale

    def _slow(self) -> _Average | None:
        """Lookahead's slow weights; None where the optimizer keeps none."""
        state, bias = inner(self.optimizer).state, self.layer.bias
        slow = [state.get(one, {}).get(SLOW) for one in _sources(self.layer)]
        if any(one is None for one in slow):
            return None
        weight = slow[0] if len(slow) == 1 else product(*slow)
        return self._other(weight, None if bias is None else state.get(bias, {}).get(SLOW))  # type: ignore[arg-type]

    def _other(self, weight: Tensor, bias: Tensor | None) -> _Average:
        """Another weight and bias of the layer in the gauge of its factors; the bias makes up for what is cut off."""
        self._check_finite(weight)
        up, down = in_gauge(weight, *self.new[:2])
        if bias is not None and self.new.mean is not None:
            cut = (weight.double() - product(up, down)) @ self.new.mean.to(weight.device)
            bias = (bias.detach().double() + cut).to(bias.dtype)
        return _Average(up.to(self.new.up.dtype), down.to(self.new.up.dtype), None if bias is None else bias.detach())


def _moved(up: Tensor, down: Tensor, step_up: Tensor | None, step_down: Tensor | None) -> Tensor:
    """How the product moves with its factors, to first order."""
    assert step_up is not None
    assert step_down is not None
    return product(step_up, down) + product(up, step_down)


def _distance(weight: Tensor, other: Tensor) -> float:
    return float((weight - other).norm() / weight.norm())


def _on_cpu(value: Any) -> Any:
    """The same with all tensors on the CPU, so that it can be sent to other ranks."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(one) for name, one in value.items()}
    if isinstance(value, tuple):
        parts = [_on_cpu(one) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _in_factors(layer: nn.Module, up: Tensor, down: Tensor) -> LowRankLinear:
    """A layer in factors for the place of another, without its bias."""
    source = _sources(layer)[0]
    new = LowRankLinear(up.to(source, copy=True), down.to(source, copy=True))
    new.requires_grad_(source.requires_grad)
    return new.train(layer.training)


def _state_of(optimizer: Optimizer, layer: nn.Module, new: LowRankLinear, made: _Made) -> dict[nn.Parameter, State]:
    """What the optimizer is to keep of a layer's parameters, each on the device where it kept the like."""
    state, sources, found = inner(optimizer).state, _sources(layer), dict[nn.Parameter, State]()
    for parameter, source, kept in zip((new.up, new.down), (sources[0], sources[-1]), made.states, strict=True):
        like = state.get(source, {})
        own = {name: one.to(like[name].device) if isinstance(one, Tensor) else one for name, one in kept.items()}
        if made.slow is not None:
            own[SLOW] = (made.slow.up if parameter is new.up else made.slow.down).to(parameter)
        if own:
            found[parameter] = own
    bias = layer.bias
    if made.slow is not None and isinstance(bias, nn.Parameter) and made.slow.bias is not None:
        found[bias] = {**state[bias], SLOW: made.slow.bias.to(bias)}
    return found


def _replace(model: nn.Module, layers: Mapping[str, LowRankLinear], biases: Mapping[str, Tensor | None]) -> None:
    """Put layers in their places; each takes over the bias of the one before, which gets its new values."""
    for name, new in layers.items():
        bias = model.get_submodule(name).bias
        if isinstance(bias, nn.Parameter) and (values := biases[name]) is not None:
            with torch.no_grad():
                bias.copy_(values)
        new.register_parameter("bias", bias)  # type: ignore[arg-type]
        model.set_submodule(name, new)
