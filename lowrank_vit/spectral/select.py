"""Which weight matrices are watched: name patterns to modules, and qkv to its three parts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from lowrank_vit.common.errors import UserError

DEFAULT_TARGETS = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
"""The four matrices of every block of a timm ViT."""

_WEIGHT = ".weight"
_QKV = ("q", "k", "v")


class Target(NamedTuple):
    """A watched matrix: the weight of a module, or with `third` 0, 1 or 2 that third of its rows (Q, K or V)."""

    module: str
    third: int | None = None


def select_targets(weights: Mapping[str, Tensor], patterns: str) -> dict[str, Tensor]:
    """The 2-D weights of the modules that the patterns name.

    Args:
        weights: a state dict, or `dict(model.named_parameters())`; any dtype and device.
        patterns: comma-separated endings of module names, such as "attn.qkv,mlp.fc1". A module is chosen when its
            name equals a pattern or ends with "." + pattern, and its `<name>.weight` is a 2-D tensor.

    Returns:
        Module name ("blocks.0.attn.qkv") to the very tensor of `weights` (no copy), in the order of `weights`.

    Raises:
        UserError: no pattern was given, or one matches nothing; the message lists the endings that exist.
    """
    wanted = list(dict.fromkeys(p.strip() for p in patterns.split(",") if p.strip()))
    if not wanted:
        raise UserError(f"no spectral targets in {patterns!r}; expected endings of module names: {DEFAULT_TARGETS}")
    matrices = {name.removesuffix(_WEIGHT): w for name, w in weights.items() if name.endswith(_WEIGHT) and w.ndim == 2}
    for pattern in wanted:
        if not any(_matches(name, pattern) for name in matrices):
            raise UserError(_no_match(pattern, list(matrices)))
    return {name: w for name, w in matrices.items() if any(_matches(name, pattern) for pattern in wanted)}


def choose_targets(weights: Mapping[str, Tensor], patterns: str, split_qkv: bool = False) -> dict[str, Target]:
    """The matrices that the patterns name, by name and in model order.

    With `split_qkv` a module named qkv gives three, "blocks.0.attn.qkv.q", "....k" and "....v": its rows in three equal
    parts, in this order as in timm's attention (`qkv(x).reshape(B, N, 3, heads, -1)`).

    Raises:
        UserError: as `select_targets`; or nothing is there to split, or its rows do not divide by 3.
    """
    chosen = select_targets(weights, patterns)
    if not split_qkv:
        return {name: Target(name) for name in chosen}
    watched: dict[str, Target] = {}
    for name, weight in chosen.items():
        if not is_fused_qkv(name):
            watched[name] = Target(name)
        elif weight.shape[0] % 3:
            raise UserError(
                f"{name} has {weight.shape[0]} rows, which do not divide into Q, K and V; leave out split-qkv"
            )
        else:
            watched |= {f"{name}.{letter}": Target(name, third) for third, letter in enumerate(_QKV)}
    if all(target.third is None for target in watched.values()):
        raise UserError(f"split-qkv: none of the spectral targets {patterns!r} is a qkv module; leave it out")
    return watched


def is_fused_qkv(name: str) -> bool:
    """Whether a matrix's rows are Q, K and V in three equal parts, in this order; judged by its name."""
    return name.rpartition(".")[2] == "qkv"


def take_targets(weight_of: Callable[[str], Tensor], watched: Mapping[str, Target]) -> dict[str, Tensor]:
    """The matrices themselves as views, in the order of `watched`; `weight_of` maps a module's name to its weight."""
    matrices: dict[str, Tensor] = {}
    for name, (module, third) in watched.items():
        weight = weight_of(module)
        rows = weight.shape[0] // 3
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


def _no_match(pattern: str, names: list[str]) -> str:
    if not names:
        return f"spectral target {pattern!r} matches nothing: the model has no 2-D weight at all"
    endings = list(dict.fromkeys(module_type(name) for name in names))
    suffixes = {".".join(name.split(".")[i:]) for name in names for i in range(name.count(".") + 1)}
    near = difflib.get_close_matches(pattern, endings, n=1) or difflib.get_close_matches(pattern, suffixes, n=1)
    hint = f" Perhaps you meant {near[0]!r}." if near else ""
    return f"spectral target {pattern!r} matches no 2-D weight.{hint} Endings that exist: {', '.join(endings)}"
