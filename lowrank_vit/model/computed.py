"""Weights that a layer computes from other parameters: their paths, and their values as in the next forward pass.

Supported are torch's parametrizations, its older hooks `weight_norm`, `spectral_norm` and pruning, and PEFT's layers
with adapters of any kind, which PEFT itself merges into a copy. Paths here are those of the model without PEFT:
NAME.base_layer.weight, and the trained NAME.modules_to_save.ADAPTER.weight, are NAME.weight.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lowrank_vit.common.errors import UserError, in_short
from lowrank_vit.model.foreign import oddity
from lowrank_vit.model.lora import effective_weight, has_adapter

_PARAMETRIZED = re.compile(r"(^|.*?\.)parametrizations\.(\w+)\..+")
"""Names of the tensors behind torch's parametrizations."""
_OF_HOOKS = re.compile(r"(.+)_(g|v|orig)")
"""Names of the tensors from which the older hooks compute."""
_Hook = WeightNorm | SpectralNorm | BasePruningMethod
_BASE, _ORIGINAL = "base_layer", "original_module"
_LEAVE_OUT = "Name targets without it"


def weights_by_path(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by path, in the model's order; computed weights replace the tensors that they are made from.

    For a PEFT layer the tensor has the weight's shape and dtype but no values: `weight_at` computes these.

    Raises:
        UserError: a layer has no weights yet.
    """
    modules, found, once = dict(model.named_modules(remove_duplicate=False)), dict[str, Tensor](), dict[Any, Tensor]()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise UserError(
                f"{path} does not exist yet: a lazy layer makes it at its first batch. Run one batch first."
            )
        owner, _, name = _PARAMETRIZED.sub(r"\1\2", path).rpartition(".")
        name = _made_by_hooks(modules[owner], name)
        place = path_without_peft(model, f"{owner}.{name}" if owner else name)
        if place and place not in found:
            key = id(modules[owner]), name  # a module under two names computes one weight
            if key not in once:
                once[key] = _stand_in(model, place, _tensor(modules[owner], name, place))
            found[place] = once[key]
    for path, module in modules.items():
        for name in _unregistered(module):
            if place := path_without_peft(model, f"{path}.{name}" if path else name):
                found.setdefault(place, getattr(module, name))
    return found


def weight_at(model: nn.Module, path: str) -> Tensor:
    """The weight at a path of `weights_by_path`: the parameter itself, or the computed weight without gradients.

    The model is not changed. For a PEFT layer the result is float64 if PEFT can merge in float64.

    Raises:
        UserError: the weight that the layer computes with is unknown; the message names the layer.
        AttributeError: there is no such weight.
    """
    module, parts = model, path.split(".")
    for module, rest in _walk(model, parts):
        if is_of_peft(module):
            return _merged(module, rest, path)
    return _tensor(module, parts[-1], path)


def layer_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path without PEFT; None if there is none."""
    try:
        *_, (module, _) = _walk(model, [*path.split("."), ""])
    except AttributeError:
        return None
    return module if isinstance(module, nn.Module) else None  # type: ignore[reportUnnecessaryIsInstance]


def path_without_peft(model: nn.Module, path: str) -> str | None:
    """The path of a module or tensor without PEFT; None for parts of adapters and for modules not in use."""
    module, kept, parts = model, list[str](), path.split(".")
    while parts:
        if inside := _inside(module):
            if parts[: len(inside)] != inside:
                return None
            module, parts = module.get_submodule(".".join(inside)), parts[len(inside) :]
        else:
            kept.append(parts.pop(0))
            module = vars(module)["_modules"].get(kept[-1]) or nn.Identity()
    return ".".join(kept)


def is_of_peft(module: nn.Module) -> bool:
    """Whether the module is PEFT's wrapper around an adapted layer. PEFT is not imported for this."""
    return _has_base(type(module), "BaseTunerLayer") and isinstance(getattr(module, _BASE, None), nn.Module)


@lru_cache(maxsize=1024)
def _has_base(kind: type, name: str) -> bool:
    """Whether a class has a base of PEFT with this name. Cached, as each refresh of spectra asks for many modules."""
    return any(one.__name__ == name and one.__module__.startswith("peft.") for one in kind.__mro__)


def _inside(module: Any) -> list[str]:
    """The path from PEFT's wrapper to the layer inside it, or to the copy of it in use; empty for other modules."""
    if is_of_peft(module):
        return [_BASE]
    if not _has_base(type(module), "AuxiliaryTrainingWrapper"):
        return []
    if "token_adapter" in module._modules:
        return ["token_adapter"]
    active = module.active_adapters[:1]
    copies = module._modules.get("modules_to_save", {})
    return (
        ["modules_to_save", *active] if active and active[0] in copies and not module.disable_adapters else [_ORIGINAL]
    )


def _walk(model: nn.Module, parts: list[str]) -> Iterator[tuple[nn.Module, list[str]]]:
    """The modules on a path without PEFT, each with the rest of the path; PEFT's wrappers are included."""
    module: Any = model
    for i in range(len(parts)):
        while not is_of_peft(module) and (inside := _inside(module)):
            module = module.get_submodule(".".join(inside))
        yield module, parts[i:]
        if i < len(parts) - 1:
            module = getattr(module.base_layer if is_of_peft(module) else module, parts[i])


def _merged(layer: Any, rest: list[str], path: str) -> Tensor:
    """The tensor that a PEFT layer computes with instead of a tensor of the adapted layer."""
    base, is_weight = layer.base_layer, rest == ["weight"]
    is_undone = layer.disable_adapters and layer.merged  # its forward unmerges them
    of_layer = {*layer._get_available_adapters()}
    is_as_base = layer.disable_adapters or layer.merged
    active = [] if is_as_base else [name for name in layer.active_adapters if name in of_layer]

    def unknown(why: object) -> UserError:
        kind = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
        name = ".".join(path.split(".")[: -len(rest)]) or type(layer).__name__
        return UserError(
            f"{name}: the weight that it computes with is unknown. It has an adapter of PEFT's kind {kind}, and "
            f"{why}. {_LEAVE_OUT}, or merge it first."
        )

    if is_of_peft(base):
        raise unknown("the adapter wraps another adapter")
    if type(getattr(vars(layer).get("forward"), "__self__", None)).__module__.startswith("peft."):
        raise unknown("its strength differs from sample to sample")
    if is_weight and not is_undone:
        weight = _tensor(base, "weight", path)
        if not active or weight.is_meta or oddity(weight) or not weight.is_floating_point():
            return weight
        if has_adapter(layer) and (total := effective_weight(layer, weight, active)) is not None:
            return total
    if is_weight and "weight" not in base._parameters:
        raise unknown("the weight that it adapts is computed, too")
    failure: Exception | None = None
    for dtype in (torch.float64, None):  # some kinds only work in float32
        try:
            with torch.no_grad():
                twin: Any = copy.deepcopy(layer).eval().to(dtype)
                if is_undone:
                    twin.unmerge()
                elif active:
                    twin.merge()
                found = twin.get_base_layer()
                for part in rest:
                    found = getattr(found.get_base_layer() if is_of_peft(found) else found, part)
                return found.detach()
        except Exception as error:  # PEFT's, such as for a kind that cannot be merged
            failure = failure or error
    raise unknown(f"it cannot be merged ({in_short(failure or ValueError())})") from failure


def _stand_in(model: nn.Module, path: str, weight: Tensor) -> Tensor:
    """The layer's tensor; for a layer adapted by PEFT, a new tensor without values."""
    is_array = weight.is_floating_point() and not oddity(weight) and not hasattr(weight, "full_tensor")
    is_adapted = any(is_of_peft(module) for module, _ in _walk(model, path.split(".")))
    return torch.empty_like(weight, device="meta") if is_adapted and is_array else weight


def _tensor(module: Any, name: str, path: str) -> Tensor:
    """A tensor of a module that PEFT does not adapt."""
    if parametrize.is_parametrized(module, name):
        return _parametrized(module, name)
    if name in module._parameters or name in module._buffers:
        return getattr(module, name)
    if any(name == _name_of(hook) for hook in _hooks(module)):
        return _hooked(module, name)
    if isinstance(getattr(module, name, None), Tensor):
        raise UserError(
            f"{path} is not a parameter: its layer computes it in an unknown way. {_LEAVE_OUT}, or compute it with "
            "torch.nn.utils.parametrize."
        )
    raise AttributeError(f"the model has no {path}")


def _parametrized(module: Any, name: str) -> Tensor:
    """A tensor made by a parametrization, in evaluation mode: in training mode spectral_norm would make a step."""
    made_by = module.parametrizations[name]
    modes = {one: one.training for one in made_by.modules()}
    try:
        made_by.eval()
        with torch.no_grad():
            return getattr(module, name).detach()
    finally:
        for one, is_training in modes.items():
            one.training = is_training


def _hooked(module: nn.Module, name: str) -> Tensor:
    """A tensor made by forward pre-hooks, in evaluation mode; the module's own tensor is not changed."""
    twin: Any = copy.copy(module)
    twin.training = False
    with torch.no_grad():
        for hook in _hooks(module):
            hook(twin, ())
    return getattr(twin, name).detach()


def _hooks(module: Any) -> Iterator[_Hook]:
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Hook))


def _name_of(hook: Any) -> str:
    """The name of the tensor that a hook computes."""
    return vars(hook)["_tensor_name" if isinstance(hook, BasePruningMethod) else "name"]


def _made_by_hooks(module: nn.Module, name: str) -> str:
    """The name of the tensor that hooks compute from `name`, or `name` itself."""
    computed = {_name_of(hook) for hook in _hooks(module)}
    while (part := _OF_HOOKS.fullmatch(name)) and part[1] in computed:
        name = part[1]
    return name


def _unregistered(module: nn.Module) -> Iterator[str]:
    """Names of weights of torch's layers that are plain tensors, not parameters."""
    inside, names = vars(module), ("weight",) if isinstance(module, nn.Linear) else ()
    names = ("in_proj_weight",) if isinstance(module, nn.MultiheadAttention) else names
    names = inside["_flat_weights_names"] if isinstance(module, nn.RNNBase) else names
    of_others = {*inside["_parameters"], *(_name_of(hook) for hook in _hooks(module))}
    for name in names:
        tensor = inside.get(name, inside["_buffers"].get(name))
        if isinstance(tensor, Tensor) and name not in of_others and not parametrize.is_parametrized(module, name):
            yield name
