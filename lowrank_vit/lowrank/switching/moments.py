"""Carrying an optimizer's state from a weight over to its factors, and the size of an optimizer step.

Letters of shapes: weight W (R, C), up A (R, r) and down B (r, C), W ~ A B. If the rows are in P parts (see
`model.low_rank`), all of this holds for each part.

With G the gradient at W, the chain rule through W = A B gives A the gradient G B^T, and B the gradient A^T G. Both are
linear in G, and so is every average of gradients: m_A = m_W B^T and m_B = A^T m_W exactly, as long as A and B do not
change. An average of squares is not linear: (G B^T)^2 has products of different entries of G, which v_W does not
contain. If these are taken as independent with mean zero, they vanish on average, and v_A = v_W (B * B)^T, v_B = (A *
A)^T v_W, where * is elementwise.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm.optim
import torch
from timm.optim.adamw import AdamWLegacy
from timm.optim.lamb import Lamb
from timm.optim.lion import Lion
from timm.optim.lookahead import Lookahead
from timm.optim.muon import Muon
from timm.optim.nadamw import NAdamW
from timm.optim.sgdw import SGDW
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam

from lowrank_vit.common.errors import UserError

SLOW = "lookahead_slow_buff"
"""The key of Lookahead's slow weights in the inner optimizer's state."""
_PROBED_LR = 1e-3
"""Learning rate of the trial step; its result is divided by this."""
_NEXT_TO_NONE = 1e-12
"""Weight decay of the trial step if the group has any: LAMB checks whether it is zero."""


@dataclass(frozen=True)
class Rule:
    """The names in an optimizer's state of a parameter, by kind."""

    first: frozenset[str] = frozenset()
    """Averages of gradients, of the parameter's shape."""
    second: frozenset[str] = frozenset()
    """Averages of squared gradients, of the parameter's shape."""
    begins: Mapping[str, float] = field(default_factory=dict[str, float])
    """Single numbers, with their values before the first step."""
    kept: frozenset[str] = frozenset()
    """Single values that tell how a parameter is treated."""


_ADAM = Rule(frozenset({"exp_avg"}), frozenset({"exp_avg_sq", "max_exp_avg_sq"}), {"step": 0.0})
_MOMENTUM = Rule(frozenset({"momentum_buffer"}))
_RULES: dict[type[Optimizer], Rule] = {
    Adam: _ADAM,
    AdamW: _ADAM,
    AdamWLegacy: _ADAM,
    NAdamW: _ADAM,
    NAdam: Rule(_ADAM.first, _ADAM.second, {"step": 0.0, "mu_product": 1.0}),
    RAdam: _ADAM,
    Lamb: _ADAM,
    Lion: Rule(frozenset({"exp_avg"})),
    SGD: _MOMENTUM,
    SGDW: _MOMENTUM,
    # Its momentum is an average of gradients; its orthogonalised step is not part of the state.
    Muon: Rule(_ADAM.first | _MOMENTUM.first, _ADAM.second, _ADAM.begins, frozenset({"use_muon"})),
}


def inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer that holds the state: the one inside Lookahead, otherwise the given one."""
    return optimizer._base_optimizer if isinstance(optimizer, Lookahead) else optimizer  # pyright: ignore


def rule_of(optimizer: Optimizer) -> Rule:
    """The rule for an optimizer. Raises `UserError` if it has none."""
    base = inner(optimizer)
    rule = _RULES.get(type(base))
    averages_steps = any(group.get("algo") == "adamuon" for group in base.param_groups)  # it averages squared steps
    if rule is None or averages_steps:
        able = [str(n) for n in timm.optim.list_optimizers() if _can(str(n))]
        name = "AdaMuon" if averages_steps else type(base).__name__
        raise UserError(
            f"The state that {name} keeps of a weight cannot be carried over to factors, so layers cannot be "
            f"factorised during training. Train with another --opt: {', '.join(able)}; or leave out "
            "--lowrank-train and --lowrank-schedule."
        )
    return rule


def check_can_switch(optimizer: Optimizer) -> None:
    """Raise `UserError`, with the names of suitable optimizers, if an optimizer's state cannot be carried over."""
    rule_of(optimizer)


def _can(name: str) -> bool:
    if "adamuon" in name or name.startswith(("bnb", "fused")):
        return False
    return timm.optim.get_optimizer_class(name, bind_defaults=False) in _RULES


class Projection(NamedTuple):
    """Maps gradients of a layer's old parameters to those of its new factors: G_A = G_u R and G_B = L G_d.

    For a weight, G_u and G_d are both its gradient G, R = B^T and L = A^T. For factors A0, B0 that shrink, G_u is the
    gradient of A0 and G_d that of B0. As B = T B0 and A = A0 S, R = T^T and L = S^T, and averages of gradients carry
    over exactly here, too.
    """

    up_from: nn.Parameter
    down_from: nn.Parameter
    right: Tensor
    """(P, C or r0, r), float64."""
    left: Tensor
    """(P, r, R / P or r0), float64."""

    def up(self, values: Tensor, *, squares: bool = False) -> Tensor:
        """Map state of `up_from`, (R, C or r0), to A: (R, r) of the same dtype."""
        right, parts = self.right.square() if squares else self.right, len(self.right)
        return (values.double().unflatten(0, (parts, -1)) @ right).flatten(0, 1).to(values.dtype)

    def down(self, values: Tensor, *, squares: bool = False) -> Tensor:
        """Map state of `down_from`, (R or P r0, C), to B: (P r, C) of the same dtype."""
        left, parts = self.left.square() if squares else self.left, len(self.left)
        return (left @ values.double().unflatten(0, (parts, -1))).flatten(0, 1).to(values.dtype)


State = dict[str, Any]


def has_squares(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether the optimizer keeps averages of squares of a parameter, which a restart would reset."""
    return any(name in rule_of(optimizer).second for name in inner(optimizer).state.get(parameter, {}))


def carried(optimizer: Optimizer, projection: Projection, *, restart: bool) -> tuple[State, State]:
    """The state of A and the state of B; both are empty if there is no state yet.

    Args:
        optimizer: with the state of the old layer.
        projection: to the factors.
        restart: reset the state as before the first update, if the optimizer keeps squares; without squares, averages
            carry over exactly, so there is no need.

    Raises:
        UserError: the state has an entry that the optimizer's rule does not name.
    """
    base, rule = inner(optimizer), rule_of(optimizer)
    made: list[State] = []
    for source, project in ((projection.up_from, projection.up), (projection.down_from, projection.down)):
        state: State = {}
        before = base.state.get(source, {})
        begins_anew = restart and has_squares(optimizer, source)
        for name, value in before.items():
            if name == SLOW:
                continue  # these are weights, see `factors.in_gauge`
            if name in rule.first | rule.second:
                if value is not None:
                    new = project(value, squares=name in rule.second)
                    value = torch.zeros_like(new) if begins_anew else new
            elif name in rule.begins:
                value = copy.deepcopy(value)
                if begins_anew:
                    value = value.fill_(rule.begins[name]) if isinstance(value, Tensor) else rule.begins[name]
            elif name not in rule.kept or (isinstance(value, Tensor) and value.numel() > 1):
                raise UserError(
                    f"{type(base).__name__} keeps `{name}` of a weight, which cannot be carried over to factors. "
                    "Train with another --opt, such as adamw."
                )
            state[name] = value
        made.append(state)
    return made[0], made[1]


def steps(optimizer: Optimizer, tried: Sequence[tuple[Tensor, State, Mapping[str, Any]]]) -> list[Tensor | None]:
    """How far the optimizer would move each parameter in a step, per unit of learning rate and without weight decay.

    Another optimizer of the same class makes a step in float64 with copies, so its own arithmetic is used. The gradient
    is the one that leaves the average of gradients unchanged. Optimizers that look ahead (NAdam, Nesterov's momentum,
    Lion) add part of the last gradient itself, which is longer than the average; that gradient is not known any more.

    Args:
        optimizer: left unchanged.
        tried: for each parameter: itself, its state and its group.

    Returns:
        Float64 tensors with the parameters' shapes; None if there is no average of gradients yet.
    """
    base, rule = inner(optimizer), rule_of(optimizer)
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    groups: list[State] = []
    copies: list[Tensor | None] = []
    for parameter, kept, group in tried:
        average = next((kept[name] for name in sorted(rule.first) if kept.get(name) is not None), None)
        if average is None:
            copies.append(None)
            continue
        moved = nn.Parameter(parameter.detach().to(torch.float64, copy=True))
        moved.grad = average.double() * _steady(group)
        state[moved] = {name: _doubled(value) for name, value in kept.items()}
        own = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        decay = _NEXT_TO_NONE if group["weight_decay"] else 0.0
        own |= {"params": [moved], "lr": _PROBED_LR, "weight_decay": decay}
        own |= {name: False for name in ("fused", "foreach", "capturable") if name in own}
        groups.append(own)
        copies.append(moved)
    twin = type(base).__new__(type(base))
    defaults = {**base.defaults, **({"max_grad_norm": None} if "max_grad_norm" in base.defaults else {})}
    twin.__setstate__({"defaults": defaults, "state": state, "param_groups": groups})
    before = [None if one is None else one.detach().clone() for one in copies]
    if groups:
        twin.step()
    pairs = zip(copies, before, strict=True)
    return [None if new is None or old is None else (new.detach() - old) / _PROBED_LR for new, old in pairs]


def _steady(group: Mapping[str, Any]) -> float:
    """The factor from an average of gradients to the gradient that leaves it unchanged; SGD's average is a sum."""
    if "dampening" not in group or group["dampening"] >= 1:
        return 1.0
    return (1 - group["momentum"]) / (1 - group["dampening"])


def _doubled(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    return value.to(torch.float64, copy=True) if value.ndim and value.is_floating_point() else value.clone().cpu()
