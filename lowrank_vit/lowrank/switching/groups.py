"""Parameter groups of an optimizer that give factors their own learning rates and weight decay.

A factor's group is a copy of its weight's group, which keeps its position and its other parameters. The settings of the
factors are stored in the group itself, under `KEY`, as plain values. A checkpoint's optimizer thus tells what the
groups were, and `regroup` restores them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.low_rank import LowRankLinear, parts_of
from lowrank_vit.model.optimizer import Constant

KEY = "lowrank"
"""The extra key of a group of factors."""
WARM_UPDATES = 20
"""Updates over which the learning rate of factors that start without moments rises to its full value. Adam's first
average (beta 0.9) spans ten updates; before that, its steps are two to four times as long as later."""

Decay = Literal["factors", "product"]
Group = dict[str, Any]


@dataclass(frozen=True)
class Placed:
    """The group that a layer's factors come from, and how they are trained."""

    of: int
    """Index of the group that the layer's weight was in."""
    scale: float = 1.0
    """Learning rate, as a multiple of that group's."""
    decay: Decay = "factors"
    warm_from: int = -1
    """The update before which the factors started without moments; -1: they did not."""


def groups_of(optimizer: Optimizer) -> tuple[list[Group], list[Group]]:
    """The optimizer's original groups, and the groups of factors."""
    of_factors = [group for group in optimizer.param_groups if KEY in group]
    return [group for group in optimizer.param_groups if KEY not in group], of_factors


def placed_in(groups: Iterable[Any]) -> dict[str, Placed]:
    """Read the settings of factorised layers from groups, also a checkpoint's. Raises `UserError` for damaged ones."""
    found: dict[str, Placed] = {}
    for group in groups:
        if not isinstance(group, Mapping) or KEY not in group:
            continue
        try:
            about: dict[str, Any] = dict(group[KEY])
            names, placed = about.pop("layers"), Placed(**about)
            kinds = {"of": int, "scale": (int, float), "decay": str, "warm_from": int}
            is_sound = all(isinstance(about[key], kind) for key, kind in kinds.items())
            if not is_sound or not math.isfinite(placed.scale) or placed.scale <= 0 or placed.of < 0:
                raise ValueError
            if placed.decay not in ("factors", "product"):
                raise ValueError
            found.update({str(name): placed for name in names})
        except (TypeError, ValueError, KeyError) as error:
            raise UserError("its optimizer's groups for factors are damaged. Give another checkpoint.") from error
    return found


def regrouped(
    optimizer: Optimizer,
    placed: Mapping[str, Placed],
    factors: Mapping[str, tuple[nn.Parameter, nn.Parameter]],
    gone: Collection[int] = (),
) -> list[Group]:
    """Make groups with these layers' factors in groups of their own; the optimizer is unchanged.

    First come the original groups, without the parameters that move. Then follows, for each way of training, a group of
    the layers that share it, in the order of `factors`. An existing group keeps what the optimizer has noted in it,
    such as LAMB's step.

    Args:
        optimizer: its groups hold the layers' weights, or their factors.
        placed: by layer name, including layers that have their own groups already.
        factors: up and down by layer name, in the model's order, of the same layers.
        gone: ids of the parameters that the factors replace.
    """
    usual, of_factors = groups_of(optimizer)
    moved = {id(one) for pair in factors.values() for one in pair}.union(gone)
    groups = [{**group, "params": [one for one in group["params"] if id(one) not in moved]} for group in usual]
    before = {_placed(group): group for group in of_factors}
    made: dict[Placed, Group] = {}
    for name, pair in factors.items():
        where = placed[name]
        if where not in made:
            made[where] = _copy(before[where]) if where in before else _derived(usual[where.of], where)
            made[where] |= {"params": [], KEY: {**asdict(where), "layers": []}}
        made[where]["params"] += pair
        made[where][KEY]["layers"].append(name)
    return groups + list(made.values())


def _placed(group: Group) -> Placed:
    return next(iter(placed_in([group]).values()))


def _copy(group: Group) -> Group:
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _derived(group: Group, placed: Placed) -> Group:
    """A group for the factors of weights that are in `group`.

    Decay that is no part of the gradient's average (AdamW's, Lion's), or scales with it (SGD's), stays as strong on
    each factor as it was on the weight, whatever the scale. One within a normalised gradient (Adam's, LAMB's) stays as
    it is.
    """
    new, scale = _copy(group), placed.scale
    new |= {"lr": group["lr"] * scale, "lr_scale": group.get("lr_scale", 1.0) * scale}
    if group.get("max_lr_snapshot") is not None:
        new["max_lr_snapshot"] = group["max_lr_snapshot"] * scale
    if placed.decay == "product":
        new["weight_decay"] = 0.0
        if "always_adapt" in new and group["weight_decay"]:
            new["always_adapt"] = True  # as LAMB did for the weight, which had weight decay
    elif group.get("decoupled_weight_decay", group.get("decoupled_decay", True)):
        new["weight_decay"] = group["weight_decay"] / scale
    if "ns_steps" in group and not group.get("use_fallback"):
        new["use_muon"] = True  # otherwise Muon decides by the shape of each factor
    if placed.warm_from >= 0 and "step" in new:
        del new["step"]  # LAMB counts steps by group
    return new


def put_groups(optimizer: Optimizer, scheduler: Scheduler | Constant, groups: Sequence[Group]) -> None:
    """Give the optimizer these groups, and the scheduler the matching values for each group.

    A group of factors has the base values of its weights' group; `lr_scale` gives its own rate.
    """
    usual, of_factors = groups_of(optimizer)
    before = {_placed(group): group for group in of_factors}
    kept = [*usual, *(before.get(_placed(group), group) for group in groups[len(usual) :])]
    for group, new in zip(kept, groups, strict=True):
        group.update(new)  # updated in place: others may hold these dicts
    optimizer.param_groups[:] = kept
    of = [*range(len(usual)), *(group[KEY]["of"] for group in kept[len(usual) :])]
    for name in ("base_values", "warmup_steps"):
        if isinstance(values := getattr(scheduler, name, None), list):
            setattr(scheduler, name, [values[number] for number in of])


def regroup(
    optimizer: Optimizer,
    scheduler: Scheduler | Constant,
    model: nn.Module,
    saved: Iterable[Any],
) -> None:
    """Restore a run's groups of factors in a new optimizer and scheduler for a factorised model.

    Args:
        optimizer: newly made for the model, without groups for factors.
        scheduler: newly made for that optimizer.
        model: with the run's factorised layers.
        saved: the groups of the run's optimizer, from its `state_dict()`.

    Raises:
        UserError: these groups are damaged, or belong to another model.
    """
    placed, usual = placed_in(saved), len(optimizer.param_groups)
    modules = {name: one for name, one in model.named_modules() if isinstance(one, LowRankLinear)}
    if strange := next((n for n, where in placed.items() if n not in modules or where.of >= usual), None):
        raise UserError(f"its optimizer has a group for {strange}, which is not factorised here.")
    factors = {name: (one.up, one.down) for name, one in modules.items() if name in placed}
    if factors:
        put_groups(optimizer, scheduler, regrouped(optimizer, placed, factors))


def decay_product(optimizer: Optimizer, scheduler: Scheduler | Constant, model: nn.Module) -> None:
    """Let weight decay act on the products of factors: move these from the original groups to groups of their own."""
    numbers = {id(one): n for n, group in enumerate(optimizer.param_groups) for one in group["params"]}
    modules = {n: one for n, one in model.named_modules() if isinstance(one, LowRankLinear) and id(one.up) in numbers}
    placed = {name: Placed(numbers[id(one.up)], decay="product") for name, one in modules.items()}
    factors = {name: (one.up, one.down) for name, one in modules.items()}
    put_groups(optimizer, scheduler, regrouped(optimizer, placed, factors))


@contextmanager
def step_of_factors(optimizer: Optimizer, num_updates: int, is_skipped: Tensor | None = None) -> Generator[None]:
    """A context for the optimizer's step after update `num_updates`, with the rates and the decay of factors.

    Rates of factors that started without moments rise over their first `WARM_UPDATES` updates. Decay of the product is
    the gradient of |A B|_F^2 / 2, applied apart from the loss (Khodak et al., "Initialization and regularization of
    factorized neural layers", ICLR 2021): A -= lr wd A (B B^T) and B -= lr wd (A^T A) B, both from the values before,
    with the weight's lr and wd. It is skipped if `is_skipped`, (), is above 0, because a gradient scaler then skips the
    step. Nothing waits for the device.
    """
    rates: list[tuple[Group, float]] = []
    for group in optimizer.param_groups:
        about = group.get(KEY)
        if about is None:
            continue
        rate: float = group["lr"]
        if about["warm_from"] >= 0 and (done := num_updates - about["warm_from"]) < WARM_UPDATES - 1:
            rates.append((group, rate))
            group["lr"] = rate * (done + 1) / WARM_UPDATES
        if about["decay"] == "product":
            usual = optimizer.param_groups[about["of"]]
            decay_products(group["params"], _strength(usual, rate / about["scale"]), is_skipped)
    try:
        yield
    finally:
        for group, rate in rates:
            group["lr"] = rate


def _strength(group: Group, lr: float) -> float:
    """The share of itself that a weight of the group loses in a step, by timm's rules."""
    if group.get("corrected_weight_decay") and group.get("max_lr_snapshot"):
        lr = lr * lr / group["max_lr_snapshot"]
    return lr * group["weight_decay"]


@torch.no_grad()
def decay_products(factors: Sequence[Tensor], strength: float, is_skipped: Tensor | None = None) -> None:
    """Subtract `strength` times the gradient of |A B|_F^2 / 2 from A and B, in place; `factors` is A, B, A, B, ..."""
    if not strength:
        return
    shrunk: list[Tensor] = []
    for up, down in zip(factors[::2], factors[1::2], strict=True):
        parts = parts_of(up.shape, down.shape)
        a_PRr, b_PrC = up.unflatten(0, (parts, -1)), down.unflatten(0, (parts, -1))
        shrunk += [(a_PRr @ (b_PrC @ b_PrC.mT)).flatten(0, 1), ((a_PRr.mT @ a_PRr) @ b_PrC).flatten(0, 1)]
    if is_skipped is not None:
        shrunk = list(torch._foreach_mul(shrunk, (is_skipped == 0).to(shrunk[0])))  # pyright: ignore
    torch._foreach_sub_(list(factors), shrunk, alpha=strength)  # pyright: ignore[reportPrivateUsage]
