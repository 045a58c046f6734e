"""Which weight matrices are watched: name patterns to modules."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from torch import Tensor

from data_prep.errors import UserError

DEFAULT_TARGETS = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
"""The four matrices of every block of a timm ViT."""

_WEIGHT = ".weight"


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
