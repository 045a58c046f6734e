"""Checks of a checkpoint before a run continues from it: the type of every value, and consistent counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.foreign import oddity
from lowrank_vit.model.weights import Checkpoint, in_words


class _Kind(NamedTuple):
    """The values that an entry may have."""

    in_words: str
    fits: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and _is_number(value[0]) and _is_whole(value[1])


def _maps(key: Callable[[Any], bool], value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, dict) and all(key(k) and value(v) for k, v in found.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_WHOLE = _Kind("a whole number", _is_whole)
_COUNT = _Kind("a whole number, 0 or more", lambda value: _is_whole(value) and value >= 0)
_FINITE = _Kind("a finite number", _is_finite)
_PROGRESS = {
    "epoch": _COUNT,
    "updates_done": _COUNT,
    "updates_logged": _COUNT,
    "loss_sum": _FINITE,
    "best_metric": _Kind("a number or None", lambda value: value is None or _is_number(value)),
    "best_epoch": _Kind("a whole number, -1 or more", lambda value: _is_whole(value) and value >= -1),
    "kept": _Kind("a list of scores and epochs", lambda value: isinstance(value, list) and all(map(_is_pair, value))),
}
_LATER_PROGRESS = {
    "lr": _FINITE,
    "best_scores": _Kind("scores by name", _maps(_is_text, _is_number)),
    "better": _Kind("model, ema or empty", lambda value: isinstance(value, str) and value in ("", "model", "ema")),
    "is_chosen_by_ema": _Kind("True or False", lambda value: isinstance(value, bool)),
    "wandb_id": _Kind("a text", _is_text),  # newer files have it among `tracker_ids`
    "tracker_ids": _Kind("texts by name", _maps(_is_text, _is_text)),
}
"""Entries that files of older runs may lack."""
_STEP = {
    "num_updates": _COUNT,
    "scaler": _Kind("a mapping of names to numbers", _maps(_is_text, _is_finite)),
    "meter": _Kind("a mapping", lambda value: isinstance(value, dict)),
}
_LATER_STEP = {"regulariser": _Kind("a mapping", lambda value: isinstance(value, dict))}
_REGULARISER = {
    "kept": _Kind("finite numbers, float32", lambda value: _is_flat(value, torch.float32) and _all_finite(value)),
    "counts": _Kind("two whole numbers, int64", lambda value: _is_tensor(value, torch.int64, 2)),
}
_SCALER = {
    "scale": _Kind("a number above 0", lambda value: _is_finite(value) and value > 0),
    "growth_factor": _FINITE,
    "backoff_factor": _FINITE,
    "growth_interval": _COUNT,
    "_growth_tracker": _COUNT,
}
_METER = {
    "sums": _Kind(
        "two finite numbers, float64", lambda value: _is_tensor(value, torch.float64, 2) and _all_finite(value)
    ),
    "bad_update": _Kind("one whole number, int64", lambda value: _is_tensor(value, torch.int64, 1)),
    "lrs": _Kind("learning rates by update", _maps(_is_whole, _is_finite)),
}
_SLOW = "lookahead_slow_buff"
"""Lookahead's entry among the state of its inner optimizer."""
_DATA = {"epoch": _COUNT, "update": _COUNT}
LOW_RANK = "lowrank"
"""Key in a checkpoint of the state of --lowrank-train."""
_RANKS = _Kind("ranks by layer", _maps(_is_text, lambda value: _is_whole(value) and value > 0))
_MAPPING = _Kind("a mapping", lambda value: isinstance(value, dict))
_SETTLING = {
    "update": _Kind("a whole number or None", lambda value: value is None or _is_whole(value)),
    "layers": _MAPPING,
}
_LATER_SETTLING = {"constants": _Kind("numbers by name", _maps(_is_text, _is_finite))}
_LOW_RANK = {
    "num_switches": _COUNT,
    "ranks": _RANKS,
    "seen": _WHOLE,
    "decided": _WHOLE,
    "wanted": _Kind("ranks by layer or None", lambda value: value is None or _RANKS.fits(value)),
    "chosen": _WHOLE,
    "failure": _Kind("a text", _is_text),
    "settling": _MAPPING,
}


def check_state(resumed: Checkpoint) -> None:
    """Raise `UserError` if an entry of a run's checkpoint is missing, unknown or of the wrong type.

    `check_counts` checks the counts, and `load_optimizer` the optimizer's state. Names and shapes of weights are
    checked when they are loaded.
    """
    progress, step, data = (resumed.training_state(key) for key in ("progress", "step", "data"))
    _check(resumed, "progress", progress, _PROGRESS, _LATER_PROGRESS, is_all=True)
    _check(resumed, "step", step, _STEP, _LATER_STEP, is_all=True)
    _check(resumed, "step.meter", step["meter"], _METER, is_all=True)
    if "regulariser" in step:
        _check(resumed, "step.regulariser", step["regulariser"], _REGULARISER, is_all=True)
    args = resumed.args
    if step["scaler"] or (args.get("amp") is True and args.get("amp-dtype") == "float16"):
        _check(resumed, "step.scaler", step["scaler"], _SCALER)
    _check(resumed, "data", data, _DATA | dict.fromkeys(data.keys() - _DATA.keys(), _WHOLE))
    if args.get("lowrank-train", "none") != "none":
        of_run = resumed.training_state(LOW_RANK)
        _check(resumed, LOW_RANK, of_run, _LOW_RANK, is_all=True)
        _check(resumed, f"{LOW_RANK}.settling", of_run["settling"], _SETTLING, _LATER_SETTLING, is_all=True)
    names = resumed.content.get("class_names")
    if names is not None and resumed.class_names is None:
        raise _wrong(resumed, f"its `class_names` is {in_words(names)}, not a list of names")
    for what in ("state_dict", "state_dict_ema"):
        for name, tensor in resumed.content.get(what, {}).items():
            if tensor.isnan().any():  # some models have infinite bounds
                raise _wrong(resumed, f"its `{what}` has NaN values in {name}")


def check_counts(resumed: Checkpoint, updates_per_epoch: int) -> None:
    """Raise `UserError` if a checkpoint's counts of epochs and updates contradict each other."""
    progress, data = resumed.content["progress"], resumed.content["data"]
    epoch, done, logged = (progress[name] for name in ("epoch", "updates_done", "updates_logged"))
    updates, since = resumed.content["step"]["num_updates"], len(resumed.content["step"]["meter"]["lrs"])
    if updates != epoch * updates_per_epoch + done or logged + since != done or done > updates_per_epoch:
        raise _wrong(
            resumed,
            f"its counts contradict each other: {updates} updates, but {epoch} epochs of {updates_per_epoch} and "
            f"{done} more, {logged} of them logged and {since} not",
        )
    if resumed.epoch != epoch - 1:
        raise _wrong(resumed, f"its counts contradict each other: {epoch} epochs and {resumed.epoch + 1}")
    if 0 < done < updates_per_epoch and (data["epoch"], data["update"]) != (epoch, done):
        raise _wrong(
            resumed,
            f"its data are at epoch {data['epoch']}, update {data['update']}, but the run is at {epoch}, {done}",
        )


def load_optimizer(optimizer: Optimizer, resumed: Checkpoint) -> None:
    """Load the saved state into the optimizer. Raises `UserError` for a state that its next step could not use."""
    saved, base = resumed.training_state("optimizer"), getattr(optimizer, "_base_optimizer", optimizer)  # of Lookahead
    expected = _after_a_step(base)
    groups = optimizer.state_dict()["param_groups"]
    try:
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in groups]:
            raise ValueError("its groups have other parameters")
        optimizer.load_state_dict(saved)
    except Exception as error:  # a wrong state fails in many ways
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"{resumed.path} was saved with another optimizer, or is damaged: {reason}.") from error
    for n, (group, before) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        for name, value in before.items():
            if name == "params":
                continue
            if name not in group or not _is_alike(value, group[name]):
                held = in_words(group[name]) if name in group else "missing"
                raise _wrong(resumed, f"its optimizer's `{name}` of group {n} is {held}")
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        state, wanted = base.state.get(parameter, {}), expected.get(parameter, {})
        if not isinstance(state, dict):
            raise _wrong(resumed, f"its optimizer's state is {in_words(state)}")
        lacking = next((name for name in wanted if name not in state), None)
        if lacking is not None and (state or not base.state):
            raise _wrong(
                resumed, f"its optimizer lacks the `{lacking}` of a parameter of shape {tuple(parameter.shape)}"
            )
        for name, value in state.items():
            if not _is_like(value, parameter if name == _SLOW else wanted.get(name, value)):
                shape = f"a parameter of shape {tuple(parameter.shape)}"
                raise _wrong(resumed, f"its optimizer's `{name}` of {shape} is {in_words(value)}, or not finite")


def _after_a_step(optimizer: Optimizer) -> dict[Tensor, Mapping[str, Any]]:
    """The state that an optimizer has of each parameter after a step of a copy; empty if that cannot be tried.

    This covers all of timm's optimizers, whose states have different shapes. The copy is freed at once.
    """
    try:
        twin = copy.deepcopy(optimizer)
        twin.state.clear()
        for parameter in (parameter for group in twin.param_groups for parameter in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        twin.step()
        pairs = zip(optimizer.param_groups, twin.param_groups, strict=True)
        return {
            parameter: {name: _outline(value) for name, value in twin.state.get(copied, {}).items()}
            for group, other in pairs
            for parameter, copied in zip(group["params"], other["params"], strict=True)
        }
    except Exception:  # some need what a step here does not give, such as a closure
        return {}


def _outline(value: Any) -> Any:
    """A tensor as a meta tensor, to free its memory; other values unchanged."""
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def _is_like(value: Any, wanted: Any) -> bool:
    """Whether an entry of an optimizer's state has the shape and dtype that it has after a step, and is finite.

    Fused steps write to memory by these shapes without a check.
    """
    if isinstance(value, Tensor) and isinstance(wanted, Tensor):
        is_same = (value.shape, value.dtype, oddity(value)) == (wanted.shape, wanted.dtype, "")
        return is_same and _all_finite(value)
    return _is_finite(value) if _is_number(wanted) else isinstance(value, type(wanted))


def _is_alike(before: Any, now: Any) -> bool:
    """Whether a value of a parameter group has the same type as before."""
    if isinstance(before, bool) or before is None or isinstance(before, str):
        return type(now) is type(before) or (before is None and _is_finite(now)) or now is None
    if isinstance(before, list | tuple):
        return isinstance(now, list | tuple) and len(now) == len(before) and all(map(_is_alike, before, now))
    return _is_finite(now) if _is_number(before) else isinstance(now, type(before))


def _check(
    resumed: Checkpoint,
    place: str,
    found: Mapping[str, Any],
    kinds: Mapping[str, _Kind],
    optional: Mapping[str, _Kind] | None = None,
    *,
    is_all: bool = False,
) -> None:
    """Check a mapping's values against their kinds; with `is_all` it may have no other entries."""
    known = {**kinds, **(optional or {})}
    for name in kinds:
        if name not in found:
            raise _wrong(resumed, f"its `{place}` lacks `{name}`")
    for name, value in found.items():
        if name in known and not known[name].fits(value):
            raise _wrong(
                resumed, f"its `{place}` has {in_words(value)} for `{name}`, but {known[name].in_words} is expected"
            )
        if is_all and name not in known:
            raise _wrong(resumed, f"its `{place}` has the unknown entry {in_words(name)}")


def _wrong(resumed: Checkpoint, what: str) -> UserError:
    others = sorted(path.name for path in resumed.path.parent.glob("*.pth.tar") if path.name != resumed.path.name)
    there = f" ({', '.join(others[:3])})" if others else ""
    return UserError(
        f"{resumed.path} cannot be resumed: {what}. It is damaged, or was written by a newer or another program. Give "
        f"another checkpoint of the run{there}, or start a new run from its weights with --initial-checkpoint."
    )


def _is_tensor(value: Any, dtype: torch.dtype, numel: int) -> bool:
    return isinstance(value, Tensor) and not oddity(value) and value.dtype is dtype and value.numel() == numel


def _is_flat(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and not oddity(value) and value.dtype is dtype and value.ndim == 1


def _all_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
