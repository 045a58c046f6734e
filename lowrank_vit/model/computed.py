"""Weights that a layer computes from other parameters, as its next forward would: where they are, and what they are.

Known are torch's parametrizations; its older hooks `weight_norm`, `spectral_norm` and those of pruning; and PEFT's
layers, whose adapters of any kind PEFT itself merges into a copy. A path here is one of the model without PEFT: what
it keeps as NAME.base_layer.weight, or trains as NAME.modules_to_save.ADAPTER.weight, is NAME.weight.
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
"""Names of the parts of tensors under torch's parametrizations."""
_OF_HOOKS = re.compile(r"(.+)_(g|v|orig)")
"""Names of what the older hooks compute from."""
_Hook = WeightNorm | SpectralNorm | BasePruningMethod
_BASE, _ORIGINAL = "base_layer", "original_module"
_LEAVE_OUT = "Name targets without it"


def weights_by_path(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by path, in the model's order; computed weights stand in the place of their parts.

    Of a layer of PEFT's there is a tensor of the weight's shape and type, without values: `weight_at` has them.

    Raises:
        UserError: a layer has no weights yet.
    """
    modules, found, once = dict(model.named_modules(remove_duplicate=False)), dict[str, Tensor](), dict[Any, Tensor]()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise UserError(
                f"{path} is not there yet: a lazy layer makes it at its first batch. Run one, and begin then."
            )
        owner, _, name = _PARAMETRIZED.sub(r"\1\2", path).rpartition(".")
        name = _made_by_hooks(modules[owner], name)
        place = path_without_peft(model, f"{owner}.{name}" if owner else name)
        if place and place not in found:
            key = id(modules[owner]), name  # what modules that are one compute is one weight
            if key not in once:
                once[key] = _stand_in(model, place, _tensor(modules[owner], name, place))
            found[place] = once[key]
    for path, module in modules.items():
        for name in _unregistered(module):
            if place := path_without_peft(model, f"{path}.{name}" if path else name):
                found.setdefault(place, getattr(module, name))
    return found


def weight_at(model: nn.Module, path: str) -> Tensor:
    """The weight of a path of `weights_by_path`: the parameter itself, or what its layer computes, without gradients.

    Changes nothing of the model. Of a layer of PEFT's float64, where PEFT can merge that.

    Raises:
        UserError: what the layer computes with is not known; it names the layer.
        AttributeError: there is no such weight.
    """
    module, parts = model, path.split(".")
    for module, rest in _walk(model, parts):
        if is_of_peft(module):
            return _merged(module, rest, path)
    return _tensor(module, parts[-1], path)


def layer_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module of a path without PEFT; None where none is there."""
    try:
        *_, (module, _) = _walk(model, [*path.split("."), ""])
    except AttributeError:
        return None
    return module if isinstance(module, nn.Module) else None  # type: ignore[reportUnnecessaryIsInstance]


def path_without_peft(model: nn.Module, path: str) -> str | None:
    """The path of a module or tensor as it is without PEFT; None of an adapter's part, and of what is not in use."""
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
    """Whether PEFT has put a module around a layer, to adapt it. PEFT is not imported for that."""
    return _has_base(type(module), "BaseTunerLayer") and isinstance(getattr(module, _BASE, None), nn.Module)


@lru_cache(maxsize=1024)
def _has_base(kind: type, name: str) -> bool:
    """Asked of every module on the way to every watched matrix, at each refresh of spectra."""
    return any(one.__name__ == name and one.__module__.startswith("peft.") for one in kind.__mro__)


def _inside(module: Any) -> list[str]:
    """The path from a module that PEFT has put around a layer to that, or to the one in use of its copies."""
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
    """The modules on a path without PEFT, each with the rest of the path: those around layers that they adapt, too."""
    module: Any = model
    for i in range(len(parts)):
        while not is_of_peft(module) and (inside := _inside(module)):
            module = module.get_submodule(".".join(inside))
        yield module, parts[i:]
        if i < len(parts) - 1:
            module = getattr(module.base_layer if is_of_peft(module) else module, parts[i])


def _merged(layer: Any, rest: list[str], path: str) -> Tensor:
    """What a layer of PEFT's computes with in the place of a tensor of the layer that it adapts."""
    base, is_weight = layer.base_layer, rest == ["weight"]
    is_undone = layer.disable_adapters and layer.merged  # its forward takes them off again
    of_layer = {*layer._get_available_adapters()}
    is_as_base = layer.disable_adapters or layer.merged
    active = [] if is_as_base else [name for name in layer.active_adapters if name in of_layer]

    def unknown(why: object) -> UserError:
        kind = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
        name = ".".join(path.split(".")[: -len(rest)]) or type(layer).__name__
        return UserError(
            f"{name}: the weight that it computes with is not known. It has an adapter of PEFT's kind {kind}, and "
            f"{why}. {_LEAVE_OUT}, or merge it before."
        )

    if is_of_peft(base):
        raise unknown("that one is around another")
    if type(getattr(vars(layer).get("forward"), "__self__", None)).__module__.startswith("peft."):
        raise unknown("how much it counts differs from sample to sample")
    if is_weight and not is_undone:
        weight = _tensor(base, "weight", path)
        if not active or weight.is_meta or oddity(weight) or not weight.is_floating_point():
            return weight
        if has_adapter(layer) and (total := effective_weight(layer, weight, active)) is not None:
            return total
    if is_weight and "weight" not in base._parameters:
        raise unknown("the weight below it is computed, too")
    failure: Exception | None = None
    for dtype in (torch.float64, None):  # some kinds are written for float32 alone
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
        except Exception as error:  # of PEFT, such as a kind that cannot be merged
            failure = failure or error
    raise unknown(f"cannot be merged ({in_short(failure or ValueError())})") from failure


def _stand_in(model: nn.Module, path: str, weight: Tensor) -> Tensor:
    """The tensor of a layer; where PEFT adapts that, one without values, which is not that of any other layer."""
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
            f"{path} is no parameter: its layer computes it, and how is not known here. {_LEAVE_OUT}, or have it "
            "computed by torch.nn.utils.parametrize."
        )
    raise AttributeError(f"the model has no {path}")


def _parametrized(module: Any, name: str) -> Tensor:
    """A tensor that a parametrization makes, in evaluation mode: in training spectral_norm would go on a step."""
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
    """A tensor that hooks before the forward make, in evaluation mode; the module keeps the one that it has."""
    twin: Any = copy.copy(module)
    twin.training = False
    with torch.no_grad():
        for hook in _hooks(module):
            hook(twin, ())
    return getattr(twin, name).detach()


def _hooks(module: Any) -> Iterator[_Hook]:
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Hook))


def _name_of(hook: Any) -> str:
    """The tensor that a hook computes."""
    return vars(hook)["_tensor_name" if isinstance(hook, BasePruningMethod) else "name"]


def _made_by_hooks(module: nn.Module, name: str) -> str:
    """The name of the tensor that hooks compute from this one, or its own."""
    computed = {_name_of(hook) for hook in _hooks(module)}
    while (part := _OF_HOOKS.fullmatch(name)) and part[1] in computed:
        name = part[1]
    return name


def _unregistered(module: nn.Module) -> Iterator[str]:
    """Names of the weights of torch's layers that are tensors, but no parameters."""
    inside, names = vars(module), ("weight",) if isinstance(module, nn.Linear) else ()
    names = ("in_proj_weight",) if isinstance(module, nn.MultiheadAttention) else names
    names = inside["_flat_weights_names"] if isinstance(module, nn.RNNBase) else names
    of_others = {*inside["_parameters"], *(_name_of(hook) for hook in _hooks(module))}
    for name in names:
        tensor = inside.get(name, inside["_buffers"].get(name))
        if isinstance(tensor, Tensor) and name not in of_others and not parametrize.is_parametrized(module, name):
            yield name
