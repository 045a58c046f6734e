"""Which weight matrices are watched: name patterns to modules, and qkv to its three parts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import NamedTuple

from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.lora import effective_weight, has_adapter, lora_of, merged
from lowrank_vit.model.low_rank import LowRankLinear, product, with_products
from lowrank_vit.spectral.fused import fused_qkv, is_named_qkv

DEFAULT_TARGETS = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
"""The four matrices of every block of a timm ViT."""

_WEIGHT = ".weight"
_QKV = ("q", "k", "v")
_SEPARATE = re.compile(r"(to_)?(q|k|v|kv|qk)(_proj)?|(query|key|value)(_proj)?|[qkv]_lin")
"""Last names of layers that give queries, keys or values."""


class Target(NamedTuple):
    """A watched matrix: the weight of a module, or with `third` 0, 1 or 2 that third of its rows (Q, K or V)."""

    module: str
    third: int | None = None
    is_fused: bool = False
    """Whether its rows are known to be Q, K and V, a third each."""


def select_targets(weights: Mapping[str, Tensor], patterns: str, flag: str = "--spec-targets") -> dict[str, Tensor]:
    """The weights of the modules that the patterns name.

    Args:
        weights: a state dict, or the parameters by name; any dtype and device.
        patterns: comma-separated endings of module names, such as "attn.qkv,mlp.fc1". A module is chosen when its
            name equals a pattern or ends with "." + pattern, and its `<name>.weight` is a 2-D tensor. A pattern that
            chooses none so chooses convolutions, such as "patch_embed.proj": weights of three to five dimensions.
        flag: that gives the patterns, for messages.

    Returns:
        Module name ("blocks.0.attn.qkv") to the very tensor of `weights` (no copy), in the order of `weights`.

    Raises:
        UserError: no pattern was given, or one matches nothing; the message lists the endings that exist.
    """
    wanted = list(dict.fromkeys(p.strip() for p in patterns.split(",") if p.strip()))
    if not wanted:
        raise UserError(f"{flag} {patterns!r} names nothing; expected endings of module names: {DEFAULT_TARGETS}")
    named = {name.removesuffix(_WEIGHT): w for name, w in weights.items() if name.endswith(_WEIGHT)}
    matrices = {name: w for name, w in named.items() if w.ndim == 2}
    others = {name: w for name, w in named.items() if 2 < w.ndim <= 5}
    chosen: set[str] = set()
    for pattern in wanted:
        found = [name for name in matrices if _matches(name, pattern)]
        found = found or [name for name in others if _matches(name, pattern)]
        if not found:
            raise UserError(_no_match(pattern, wanted, list(matrices), list(others), flag))
        chosen.update(found)
    return {name: w for name, w in named.items() if name in chosen}


def choose_targets(
    weights: Mapping[str, Tensor],
    patterns: str,
    split_qkv: bool = False,
    fused: Collection[str] = (),
    flags: str = "--spec-",
) -> dict[str, Target]:
    """The matrices that the patterns name, by name and in model order.

    With `split_qkv` each module of `fused` gives three, "blocks.0.attn.qkv.q", "....k" and "....v": its rows in three
    equal parts, in this order as in timm's attention (`qkv(x).reshape(B, N, 3, heads, -1)`).

    Args:
        weights: see `select_targets`.
        patterns: likewise.
        split_qkv: see above.
        fused: modules whose rows are Q, K and V (`fused.fused_qkv`).
        flags: how the names of flags begin, for messages.

    Raises:
        UserError: as `select_targets`; or nothing is there to split, or a qkv is none of `fused`, or its rows do not
            divide by 3.
    """
    chosen = select_targets(weights, patterns, f"{flags}targets")
    watched: dict[str, Target] = {}
    for name, weight in chosen.items():
        is_fused = name in fused and weight.shape[0] % 3 == 0
        if not (split_qkv and is_named_qkv(name)):
            watched[name] = Target(name, is_fused=is_fused)
        elif weight.shape[0] % 3:
            raise UserError(
                f"{name} has {weight.shape[0]} rows, which do not divide into Q, K and V; leave out {flags}split-qkv"
            )
        elif not is_fused:
            raise UserError(
                f"{flags}split-qkv: that the rows of {name} are Q, K and V, a third each, is not known: some have them "
                f"head by head. Watch it whole, without {flags}split-qkv: {flags}targets {_quoted(patterns)}"
            )
        else:
            watched |= {f"{name}.{letter}": Target(name, third) for third, letter in enumerate(_QKV)}
    if split_qkv and all(target.third is None for target in watched.values()):
        raise UserError(f"{flags}split-qkv: none of {flags}targets {patterns!r} is a qkv module; leave it out")
    return watched


def targets_of_model(model: nn.Module, patterns: str, split_qkv: bool = False) -> dict[str, Target]:
    """`choose_targets` in a model. Raises `UserError`.

    A weight that modules share is found under each of its names. A layer in factors counts as the one it stands for, as
    does one with an adapter.
    """
    weights = with_products(dict(model.named_parameters(remove_duplicate=False)))
    weights = merged(weights, lora_of(model), "the model")
    return choose_targets(weights, patterns, split_qkv, fused_qkv(model))


def matrices_of(model: nn.Module, watched: Mapping[str, Target]) -> dict[str, Tensor]:
    """`take_targets` in a model; a float64 copy of the product of factors, and of the sum of layer and adapter."""

    def weight_of(name: str) -> Tensor:
        layer = model.get_submodule(name)
        if has_adapter(layer):
            return effective_weight(layer)
        if isinstance(layer, LowRankLinear):
            return product(layer.up, layer.down)
        return model.get_parameter(name + _WEIGHT)

    return take_targets(cache(weight_of), watched)


def ranks_of_factors(model: nn.Module, watched: Mapping[str, Target]) -> dict[str, int]:
    """What the rank of each matrix of a layer in factors is at most, by name; those of others are left out."""
    layers = {name: model.get_submodule(target.module) for name, target in watched.items()}
    return {
        name: layer.rank * (layer.parts if watched[name].third is None else 1)
        for name, layer in layers.items()
        if isinstance(layer, LowRankLinear)
    }


def fused_of(watched: Mapping[str, Target]) -> frozenset[str]:
    """The matrices whose rows are known to be Q, K and V."""
    return frozenset(name for name, target in watched.items() if target.is_fused)


def take_targets(weight_of: Callable[[str], Tensor], watched: Mapping[str, Target]) -> dict[str, Tensor]:
    """The matrices themselves, in the order of `watched`; `weight_of` maps a module's name to its weight.

    A convolution's weight (R, C, h, w) is the matrix (R, C h w), a copy where its memory is in channels_last. All
    others are views.
    """
    matrices: dict[str, Tensor] = {}
    for name, target in watched.items():
        weight = weight_of(target.module)
        weight = weight if weight.ndim == 2 else weight.detach().flatten(1)
        rows, third = weight.shape[0] // 3, target.third
        matrices[name] = weight if third is None else weight[third * rows : (third + 1) * rows]
    return matrices


def module_depth(name: str) -> str:
    """Where a module sits: its numbers, "blocks.3.attn.qkv" -> "3", "layers.2.blocks.11.mlp.fc1" -> "2.11", else ""."""
    return ".".join(part for part in name.split(".") if part.isdigit())


def module_type(name: str) -> str:
    """What a module is, without where it sits: the part after the last number, "blocks.0.attn.qkv" -> "attn.qkv"."""
    parts = name.split(".")
    after = max((i + 1 for i, part in enumerate(parts) if part.isdigit()), default=0)
    return ".".join(parts[after:]) or name


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith("." + pattern)


def _no_match(pattern: str, wanted: list[str], matrices: list[str], others: list[str], flag: str) -> str:
    if not matrices and not others:
        return f"{flag}: {pattern!r} matches nothing: the model has no 2-D weight at all"
    names = matrices + others
    instead = {one: _in_place_of(one, names) for one in wanted if not any(_matches(name, one) for name in names)}
    endings = list(dict.fromkeys(module_type(name) for name in matrices))
    suffixes = {".".join(name.split(".")[i:]) for name in names for i in range(name.count(".") + 1)}
    near = difflib.get_close_matches(pattern, endings, n=1) or difflib.get_close_matches(pattern, suffixes, n=1)
    hint = f" Perhaps you meant {near[0]!r}." if near else ""
    if instead[pattern]:
        line = ",".join(one for asked in wanted for one in instead.get(asked, [asked]))
        hint = f" This model has {', '.join(instead[pattern])} instead: {flag} {_quoted(line)}"
    convolutions = list(dict.fromkeys(module_type(name) for name in others))
    more = f"; convolutions: {', '.join(convolutions)}" if convolutions else ""
    return (
        f"{flag}: {pattern!r} matches no 2-D weight and no convolution.{hint} "
        f"Endings that exist: {', '.join(endings)}{more}"
    )


def _in_place_of(pattern: str, names: list[str]) -> list[str]:
    """The endings of separate layers where the pattern names a joint one: of qkv those of Q, K and V, of fc1 fc1_g."""
    parent, _, last = pattern.rpartition(".")
    found = dict.fromkeys(
        ending
        for name in names
        for ending in [".".join(name.split(".")[-1 - parent.count(".") - bool(parent) :])]
        if ending.rpartition(".")[0] == parent
    )
    if last == "qkv":
        return [ending for ending in found if _SEPARATE.fullmatch(ending.rpartition(".")[2])]
    return [ending for ending in found if ending.rpartition(".")[2].startswith(f"{last}_")]


def _quoted(patterns: str) -> str:
    return f'"{patterns}"'
