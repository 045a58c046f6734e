"""The switch: factorise layers of a model in training, together with the optimizer's state, the EMA and the schedule.

Letters of shapes: weight W (R, C), up A (R, r), down B (P r, C), P parts of the rows (see `model.low_rank`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.layers import pays
from lowrank_vit.lowrank.switching.change import Change, KeptMoments, Made, Trial, sources_of
from lowrank_vit.lowrank.switching.factors import NewFactors
from lowrank_vit.lowrank.switching.groups import Decay, Group, Placed, groups_of, placed_in, put_groups, regrouped
from lowrank_vit.lowrank.switching.moments import SLOW, State, check_can_switch, has_squares, inner
from lowrank_vit.model.low_rank import LowRankLinear, parts_of
from lowrank_vit.model.optimizer import Constant


@dataclass(frozen=True)
class Switched:
    """The result of a switch."""

    layers: dict[str, Change]

    @property
    def scales(self) -> dict[str, float]:
        """By layer name, see `Change.scale`."""
        return {name: one.scale for name, one in self.layers.items()}

    def numbers(self) -> dict[str, float]:
        """Scalars for the log, named "LAYER/NAME"; NaN is left out."""
        found = {
            f"{layer}/{key}": float(value) for layer, one in self.layers.items() for key, value in vars(one).items()
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}


def work_out(
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: Optimizer,
    factors: Mapping[str, NewFactors],
    *,
    moments: KeptMoments = "carry",
) -> dict[str, Made]:
    """Compute a switch by layer name, on the CPU; nothing is changed.

    A bias remains the same parameter, with its state: the gradient at b is that at the layer's output, factorised or
    not. If a method corrects the bias for the mean input, the EMA's bias is corrected for its own weight.

    Args:
        model: neither compiled nor wrapped; layers are Linear, or factorised at a larger rank, which then shrinks.
        ema: its EMA of the same structure, without timm's wrapper.
        optimizer: of the model.
        factors: by layer name, see `factors.make_factors`.
        moments: carry the optimizer's state over, or restart it with a short warm-up if it keeps squares.

    Raises:
        UserError: the optimizer has no rule, a layer cannot get these factors, or values are not finite.
    """
    check_can_switch(optimizer)
    modules = dict(model.named_modules())
    groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    _check(model, modules, factors, groups)
    usual, places, made = groups_of(optimizer)[0], _places(optimizer, modules, factors), dict[str, Made]()
    for name, new in factors.items():
        device = sources_of(modules[name])[0].device
        here = NewFactors(*(None if one is None else one.to(device) for one in new))  # type: ignore[arg-type]
        group = usual[places[name].of] if name in places else None
        trial = Trial(name, modules[name], here, optimizer, group, places.get(name), moments)
        made[name] = trial.made(None if ema is None else ema.get_submodule(name))
    return made


@dataclass(frozen=True)
class Prepared:
    """A switch with everything made and nothing in use yet."""

    made: Mapping[str, Made]
    sources: Sequence[nn.Parameter]
    """The parameters that are removed."""
    groups: list[Group]
    """All groups of the optimizer after the switch."""
    kept: Sequence[dict[nn.Parameter, State]]
    """The optimizer's new state, by parameter."""
    replaced: Sequence[tuple[nn.Module, Mapping[str, LowRankLinear], Mapping[str, Tensor | None]]]
    """For the model and for its EMA: the new layers and the values of their biases, by name."""
    optimizer: Optimizer
    scheduler: Scheduler | Constant

    def put(self) -> Switched:
        """Switch; nothing in here can fail. `TrainStep.rebuild` must be called afterwards."""
        for module, layers, biases in self.replaced:
            _replace(module, layers, biases)
        put_groups(self.optimizer, self.scheduler, self.groups)
        state = inner(self.optimizer).state
        for source in self.sources:
            state.pop(source, None)
        for of_layer in self.kept:
            for parameter, of_parameter in of_layer.items():
                state[parameter] = of_parameter
        return Switched({name: one.change for name, one in self.made.items()})


def prepare(
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: Optimizer,
    scheduler: Scheduler | Constant,
    made: Mapping[str, Made],
    *,
    moments: KeptMoments = "carry",
    decay: Decay = "factors",
    num_updates: int = 0,
) -> Prepared:
    """Make everything that a switch needs, on the model's device; nothing is changed before `Prepared.put`.

    Args:
        model, ema, optimizer, moments: as for `work_out`.
        scheduler: of the optimizer.
        made: the result of `work_out`, in this process or on another rank.
        decay: whether weight decay acts on both factors, or on their product.
        num_updates: updates made so far.
    """
    modules, placed = dict(model.named_modules()), placed_in(groups_of(optimizer)[1])
    layers = {name: _in_factors(modules[name], *one.factors[:2]) for name, one in made.items()}
    for name, place in _places(optimizer, modules, made).items():
        restarts = moments == "restart" and has_squares(optimizer, sources_of(modules[name])[0])
        since = num_updates if restarts else -1
        placed[name] = replace(place, scale=made[name].change.scale, decay=decay, warm_from=since)
    every = {name: layers.get(name, one) for name, one in modules.items() if name in placed}
    own = {name: (one.up, one.down) for name, one in every.items() if isinstance(one, LowRankLinear)}
    sources = [one for name in made for one in sources_of(modules[name])]
    replaced = [(model, layers, {name: one.factors.bias for name, one in made.items()})]
    if ema is not None:
        of_ema = {name: one.ema for name, one in made.items() if one.ema is not None}
        averages = {name: _in_factors(ema.get_submodule(name), one.up, one.down) for name, one in of_ema.items()}
        replaced.append((ema, averages, {name: one.bias for name, one in of_ema.items()}))
    return Prepared(
        made,
        sources,
        regrouped(optimizer, placed, own, {id(one) for one in sources}),
        [_state_of(optimizer, modules[name], layers[name], one) for name, one in made.items()],
        replaced,
        optimizer,
        scheduler,
    )


def _places(optimizer: Optimizer, modules: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, Placed]:
    """The current places of those of these layers that are trained."""
    usual, of_factors = groups_of(optimizer)
    placed = placed_in(of_factors)
    number_of = {id(one): number for number, group in enumerate(usual) for one in group["params"]}
    sources = {name: sources_of(modules[name])[0] for name in names}
    return {
        name: placed[name] if name in placed else Placed(number_of[id(one)])
        for name, one in sources.items()
        if one.requires_grad
    }


def _check(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    factors: Mapping[str, NewFactors],
    groups: Mapping[int, Mapping[str, Any]],
) -> None:
    """Raise `UserError` for a layer that cannot be replaced by its factors."""
    uses = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    for name, new in factors.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | LowRankLinear):
            what = f"of class {type(layer).__name__}" if layer is not None else "not there"
            raise UserError(f"{name} is {what}; only a Linear can be factorised. Leave it out of --lowrank-targets.")
        rows, columns, rank = layer.out_features, layer.in_features, new.up.shape[1]
        parts = parts_of(new.up.shape, new.down.shape)
        if not parts or (len(new.up), new.down.shape[1]) != (rows, columns):
            raise UserError(
                f"{name} is {rows} x {columns}; factors of {tuple(new.up.shape)} and "
                f"{tuple(new.down.shape)} do not match."
            )
        if isinstance(layer, LowRankLinear) and (parts != layer.parts or rank >= layer.rank):
            raise UserError(f"{name} has rank {layer.rank} already; it can only shrink, not go to {rank}.")
        if rank > pays(rows, columns, parts):
            raise UserError(
                f"{name}: factors of rank {rank} have at least as many weights as the layer ({rows * columns:,}). The "
                f"largest rank that saves weights is {pays(rows, columns, parts)}. Leave that layer whole."
            )
        if (new.bias is None) != (layer.bias is None):
            raise UserError(f"{name}: either both factors and layer must have a bias, or neither.")
        if any(uses[id(one)] > 1 for one in sources_of(layer)):
            raise UserError(
                f"{name} shares its weight with another layer, so it cannot be factorised alone. Leave it out of "
                "--lowrank-targets."
            )
        if any(one.requires_grad and id(one) not in groups for one in sources_of(layer)):
            raise UserError(f"{name} is trained, but its weight is not among the optimizer's parameters.")
        numbers = [*sources_of(layer), *(one for one in new[:3] if one is not None)]
        if not all(bool(one.isfinite().all()) for one in numbers):
            raise UserError(
                f"{name} has weights or factors with a NaN or an infinity. Training has diverged: lower "
                "--lr, or resume from an earlier checkpoint."
            )


def _in_factors(layer: nn.Module, up: Tensor, down: Tensor) -> LowRankLinear:
    """A factorised layer to replace another, without its bias."""
    source = sources_of(layer)[0]
    new = LowRankLinear(up.to(source, copy=True), down.to(source, copy=True))
    new.requires_grad_(source.requires_grad)
    return new.train(layer.training)


def _state_of(optimizer: Optimizer, layer: nn.Module, new: LowRankLinear, made: Made) -> dict[nn.Parameter, State]:
    """The optimizer's state for a layer's new parameters, each on the device of the old state."""
    state, sources, found = inner(optimizer).state, sources_of(layer), dict[nn.Parameter, State]()
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
    """Put new layers in place; each takes over the old layer's bias, which gets its new values."""
    for name, new in layers.items():
        bias = model.get_submodule(name).bias
        if isinstance(bias, nn.Parameter) and (values := biases[name]) is not None:
            with torch.no_grad():
                bias.copy_(values)
        new.register_parameter("bias", bias)  # type: ignore[arg-type]
        model.set_submodule(name, new)
