"""Which layers of a model can be factorised: patterns name them, and forward passes of noise check them."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say
from lowrank_vit.model.create import input_spec
from lowrank_vit.model.low_rank import LowRankLinear, ranks_of
from lowrank_vit.spectral.fused import fused_qkv, is_named_qkv
from lowrank_vit.spectral.select import DEFAULT_TARGETS, select_targets

Split = Literal["whole", "thirds", "heads"]
"""How a fused qkv layer is treated: as one matrix, as three, or as three for each head."""
Purpose = Literal["factors", "adapters"]
"""What the layers are for: to be replaced by factors, or to get adapters beside them."""
_TOLERANCE = 1e-4
"""Allowed difference of logits at full rank from the model's own, as a share of the largest; covers rounding."""


class _Words(NamedTuple):
    """A purpose's words in messages."""

    can: str
    """No layer can ..."""
    only: str
    """Only Linear ..."""
    of_float: str
    unlike: str
    """The problem if a model reads a weight itself."""
    change: str
    """The problem if logits change."""


_WORDS: dict[Purpose, _Words] = {
    "factors": _Words(
        "be factorised",
        "can be factorised",
        "factors need",
        "which factors do not have",
        "factors of full rank change the model's output",
    ),
    "adapters": _Words(
        "have adapters",
        "can have adapters",
        "adapters need",
        "and would not see an adapter",
        "replacing it by another layer changes the model's output",
    ),
}


def find_targets(
    model: nn.Module,
    patterns: str = DEFAULT_TARGETS,
    *,
    img_size: int | None = None,
    flag: str = "--targets",
    purpose: Purpose = "factors",
    say: Say = terminal.say,
    already: str = "",
) -> dict[str, nn.Linear]:
    """The layers that the patterns name and that can be factorised, or have adapters, in model order.

    Layers that cannot are reported by `say` with the reason and left out: convolutions and embeddings, classes with
    their own forward, layers with hooks, layers whose weight the model reads itself (timm's EVA, BEiT, Swin V2), and
    any layer that changes the logits when factorised at full rank. To find these, the model sees two images of noise in
    evaluation mode.

    Args:
        model: neither compiled nor wrapped, on its device.
        patterns: see `spectral.select.select_targets`.
        img_size: side of an image, pixels; default: the one the model was built for, see `side_of`.
        flag: the flag that gives the patterns, for messages.
        purpose: for messages; the layers are the same for both purposes.
        say: prints a line about layers that are left out.
        already: another way out for a model that is factorised already, the end of a sentence.

    Raises:
        UserError: a pattern matches nothing; the model is factorised already; a weight is shared by two layers, in half
        precision or not finite; logits are not finite; or no layer is left.
    """
    if has := ranks_of(model):
        raise UserError(
            f"The model is factorised already: {_some(list(has))}. Give the checkpoint that it was made from, or the "
            f"merged one (--merge of `lowrank_vit.compress`){already}."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = select_targets(parameters, patterns, flag)
    _check_weights(chosen, parameters, flag, purpose)
    refused = _refused_by_class(model, chosen, flag, purpose)
    found = {name: model.get_submodule(name) for name in chosen if name not in refused}
    layers = {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}
    images = noise(model, img_size)
    refused |= _read_elsewhere(model, layers, images, _WORDS[purpose].unlike)
    layers = {name: layer for name, layer in layers.items() if name not in refused}
    refused |= dict.fromkeys(_changed_at_full_rank(model, layers, images), _WORDS[purpose].change)
    for line in _lines_of(refused, len(chosen), flag, purpose):
        say(f"note: left unchanged: {line}")
    return {name: layer for name, layer in layers.items() if name not in refused}


def possible_weights(model: nn.Module, patterns: str, flag: str, purpose: Purpose = "factors") -> dict[str, Tensor]:
    """The weights that the patterns name, of layers whose class allows it. The model may be on the meta device.

    Raises `UserError` if there is none.
    """
    chosen = select_targets(dict(model.named_parameters(remove_duplicate=False)), patterns, flag)
    refused = _refused_by_class(model, chosen, flag, purpose)
    return {name: weight for name, weight in chosen.items() if name not in refused}


def _refused_by_class(model: nn.Module, names: Collection[str], flag: str, purpose: Purpose) -> dict[str, str]:
    """The modules that their class rules out, by name, with the reason. Raises `UserError` if none is left."""
    refused = {name: why for name in names if (why := _objection(model.get_submodule(name), _WORDS[purpose].only))}
    _lines_of(refused, len(names), flag, purpose)
    return refused


def _lines_of(refused: Mapping[str, str], count: int, flag: str, purpose: Purpose) -> list[str]:
    """A line for each reason. Raises `UserError` if all of `count` layers are refused."""
    by_reason: dict[str, list[str]] = {}
    for name, why in refused.items():
        by_reason.setdefault(why, []).append(name)
    lines = [f"{_some(names)}: {why}" for why, names in by_reason.items()]
    if len(refused) == count:
        can = _WORDS[purpose].can
        raise UserError(f"No layer that {flag} names can {can}. {'. '.join(lines)}. Name other layers.")
    return lines


def parts_of_targets(model: nn.Module, targets: Mapping[str, nn.Linear], split: Split) -> dict[str, int]:
    """Into how many parts each layer's rows are split: those of a fused qkv by `split`, all others not at all.

    Raises:
        UserError: no target is a fused qkv, or the order of the rows of one is not known (see `spectral.fused`).
    """
    parts, fused = dict.fromkeys(targets, 1), fused_qkv(model)
    if split == "whole":
        return parts
    named = [name for name in targets if is_named_qkv(name)]
    if not named:
        raise UserError(f"--split {split} needs a target named qkv, and there is none. Leave out --split.")
    for name in named:
        heads = getattr(model.get_submodule(name.rpartition(".")[0]), "num_heads", None) if split == "heads" else 1
        wanted = 3 * heads if isinstance(heads, int) else 0
        if name not in fused or not wanted or targets[name].out_features % wanted:
            raise UserError(
                f"--split {split}: it is not known that the rows of {name} are Q, K and V, a third "
                f"each{_of_heads(split)}. Leave out --split to take the layer whole."
            )
        parts[name] = wanted
    return parts


def _check_weights(chosen: Mapping[str, Tensor], parameters: Mapping[str, Tensor], flag: str, purpose: Purpose) -> None:
    """Raise `UserError` for weights that cannot be factorised in any layer."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names_of.setdefault(id(parameter), []).append(name)
    for name, weight in chosen.items():
        if weight.dtype not in (torch.float32, torch.float64):
            kind = str(weight.dtype).removeprefix("torch.")
            raise UserError(f"{name} is {kind}; {_WORDS[purpose].of_float} float32 weights. Load the model in float32.")
        if not bool(weight.isfinite().all()):
            raise UserError(f"{name} has weights that are not finite (NaN or infinite). Give another checkpoint.")
        if len(shared := names_of[id(weight)]) > 1:
            raise UserError(
                f"{' and '.join(shared)} are one tensor, so one cannot {_WORDS[purpose].can} without the other. Leave "
                f"these layers out of {flag}."
            )


def _objection(module: nn.Module, only: str) -> str:
    """Why a module with a weight cannot be a target, judged by its class and hooks; empty if it can."""
    if not isinstance(module, nn.Linear):
        return f"of class {type(module).__name__}; only Linear {only}"
    has_own = type(module).forward is not nn.Linear.forward or "forward" in vars(module)
    if has_own and type(module).__module__ != "timm.layers.linear":
        return f"its class {type(module).__name__} is a Linear with its own forward"
    if any(vars(module)[f"_{kind}_hooks"] for kind in ("forward", "forward_pre", "backward", "backward_pre")):
        return "it has hooks"
    return ""


class _Probe(nn.Module):
    """Stands in for a Linear and records how the model uses it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.is_called, self.is_read = layer, False, False
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @property
    def weight(self) -> Tensor:
        """The weight, for a model that reads it itself."""
        self.is_read = True
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, which a factorised layer has too."""
        return self.layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """Record the call and call the layer."""
        self.is_called = True
        return self.layer(input)


def _read_elsewhere(model: nn.Module, layers: Mapping[str, nn.Linear], images: Tensor, unlike: str) -> dict[str, str]:
    """The layers whose weight the model reads directly, or that it does not use, with the reason."""
    probes = {name: _Probe(layer) for name, layer in layers.items()}
    with _in_place_of(model, layers, probes):
        logits_of(model, images)
    found: dict[str, str] = {}
    for name, probe in probes.items():
        if probe.is_read:
            owner = type(model.get_submodule(name.rpartition(".")[0]))
            found[name] = f"{owner.__module__}.{owner.__qualname__} reads its weight itself, {unlike}"
        elif not probe.is_called:
            found[name] = "the forward pass of an image does not use it"
    return found


def _changed_at_full_rank(model: nn.Module, layers: Mapping[str, nn.Linear], images: Tensor) -> list[str]:
    """The layers that change the logits when they are replaced by factors of full rank."""
    expected, like = logits_of(model, images), next(model.parameters())
    check_finite(model, images, expected)
    identity = cache(lambda columns: torch.eye(columns, dtype=like.dtype, device=like.device))
    limit = _TOLERANCE * float(expected.abs().max())

    def fails(names: list[str]) -> bool:
        some = {name: layers[name] for name in names}
        # The product of a weight and an identity is that weight to the bit.
        in_factors = {n: LowRankLinear(one.weight, identity(one.in_features), one.bias) for n, one in some.items()}
        with _in_place_of(model, some, in_factors):
            try:
                found = logits_of(model, images)
            except Exception:  # a model may do anything with its layers
                return True
        return found.shape != expected.shape or not float((found - expected).abs().max()) <= limit

    def culprits(names: list[str]) -> list[str]:
        """Find the failing layers by bisection."""
        if not names or not fails(names):
            return []
        half = len(names) // 2
        return names if len(names) == 1 else culprits(names[:half]) + culprits(names[half:])

    return culprits(list(layers))


@contextmanager
def _in_place_of(model: nn.Module, layers: Mapping[str, nn.Module], others: Mapping[str, nn.Module]) -> Generator[None]:
    try:
        for name, other in others.items():
            model.set_submodule(name, other)
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def check_finite(model: nn.Module, images: Tensor, logits: Tensor) -> None:
    """Raise `UserError` for logits with a NaN or an infinity, and name the likely cause."""
    if bool(logits.isfinite().all()):
        return
    if not bool(images.isfinite().all()):
        raise UserError("The model's logits are not finite: the images hold a NaN or an infinity.")
    named = {name: one for name, one in chain(model.named_parameters(), model.named_buffers()) if one.numel()}
    broken = next((name for name, one in named.items() if not bool(one.isfinite().all())), None)
    why = f"{broken} holds a NaN or an infinity"
    if broken is None:
        greatest = {name: float(one.detach().abs().max()) for name, one in named.items()}
        largest = max(greatest, key=greatest.__getitem__)
        why = f"no weight holds a NaN or an infinity, but {largest} has values up to {greatest[largest]:.1e}"
    raise UserError(f"The model's logits are not finite: {why}. Give another checkpoint.")


def side_of(model: nn.Module, img_size: int | None) -> int:
    """The side of an image, pixels: as given, else from the patch embedding, else timm's for the model."""
    built: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return img_size or (built[0] if isinstance(built, tuple) else input_spec(model, None, None).img_size)


def noise(model: nn.Module, img_size: int | None) -> Tensor:
    """Two images of noise (2, 3, side, side), the same each time, in the model's dtype and on its device."""
    side, weight = side_of(model, img_size), next(model.parameters())
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return images.to(weight.device, weight.dtype)


@contextmanager
def in_evaluation(model: nn.Module) -> Generator[None]:
    """Put a model in evaluation mode, and restore each module's mode at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output in evaluation mode, in its own dtype. Raises `UserError` if it is not a tensor."""
    with in_evaluation(model):
        answer: Any = model(images)
    answer = answer[0] if isinstance(answer, list | tuple) else answer
    if not isinstance(answer, Tensor):
        raise UserError(f"The model returns a {type(answer).__name__} for images; logits for each class are expected.")
    return answer


def _some(names: Sequence[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"


def _of_heads(split: Split) -> str:
    return ", and how many heads they have" if split == "heads" else ""
