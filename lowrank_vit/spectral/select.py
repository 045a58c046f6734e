"""Choose the weight matrices to watch: layers of any model by name patterns, and the three parts of qkv."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.foreign import oddity
from lowrank_vit.spectral.fused import is_named_qkv

DEFAULT_TARGETS = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
"""The four matrices of every block of a timm ViT."""
ALL_LINEAR = "all-linear"
"""A pattern that chooses every layer with a 2-D weight, as PEFT calls it."""
Targets = str | Sequence[str] | None
"""Patterns, in a text with commas or a sequence; None: `DEFAULT_TARGETS` if each matches a layer, else `ALL_LINEAR`."""
Rename = Mapping[str, str] | Callable[[str], str]
"""From a layer's name to the one under which its matrix is recorded; names that a mapping lacks stay as they are."""

WEIGHT = ".weight"
"""The ending of the name of a layer's weight."""
_BARE = re.compile(r"(.+\.)?(\w+_weight|weight_[ih][hr]_l\d+(_reverse)?|weight)")
"""Weights that are no layer's `weight`: of torch's MultiheadAttention and RNNs, and of a model that is one layer."""
_QKV = ("q", "k", "v")
_SEPARATE = re.compile(r"(to_)?(q|k|v|kv|qk)(_proj)?|(query|key|value)(_proj)?|[qkv]_lin")
"""Last names of layers that give queries, keys or values."""
_NUMBERED = re.compile(r"[^\W\d]\w*_(\d+)")


class Target(NamedTuple):
    """A watched matrix: the weight of a module, or with `third` 0, 1 or 2 that third of its rows (Q, K or V)."""

    module: str
    """The path of a module of the model, or of a parameter that is no module's `weight`."""
    third: int | None = None
    is_fused: bool = False
    """Whether its rows are known to be Q, K and V, a third each."""


def select_targets(
    weights: Mapping[str, Tensor], patterns: str | Sequence[str], flag: str = "--spec-targets"
) -> dict[str, Tensor]:
    """The weights of the modules that the patterns name.

    Args:
        weights: a state dict, or the parameters by name; any dtype and device.
        patterns: endings of module names, such as "attn.qkv,mlp.fc1" or a sequence of them. A module is chosen when its
            name equals a pattern or ends with "." + pattern, and its `<name>.weight` is a 2-D tensor. A pattern that
            matches no such module chooses convolutions, such as "patch_embed.proj": weights of 3 to 5 dimensions.
        flag: the flag that gives the patterns, for messages.

    Returns:
        Module name ("blocks.0.attn.qkv") to the tensor in `weights` (no copy), in the order of `weights`.

    Raises:
        UserError: no pattern was given, or one matches nothing; the message lists the endings that exist.
    """
    wanted = split_patterns(patterns)
    if not wanted:
        raise UserError(f"{flag} {patterns!r} names nothing; expected endings of module names: {DEFAULT_TARGETS}")
    named = {name.removesuffix(WEIGHT): w for name, w in weights.items() if name.endswith(WEIGHT)}
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


def split_patterns(patterns: str | Sequence[str]) -> list[str]:
    """The patterns of a text, split at commas, or of a sequence; each once."""
    return list(dict.fromkeys(p.strip() for p in _each(patterns) if p.strip()))


def _each(patterns: str | Sequence[str]) -> Sequence[str]:
    return patterns.split(",") if isinstance(patterns, str) else patterns


def choose_targets(
    weights: Mapping[str, Tensor],
    patterns: Targets,
    split_qkv: bool = False,
    fused: Collection[str] = (),
    flags: str = "--spec-",
    *,
    embeddings: Collection[str] = (),
    rename: Rename | None = None,
) -> dict[str, Target]:
    """The matrices that the patterns name, by name and in model order; a matrix that layers share is there once.

    In addition to `select_targets`, a pattern may name a 2-D weight that is no module's `weight`, such as
    "self_attn.in_proj_weight", or be `ALL_LINEAR`: all 2-D weights but those of embeddings.

    With `split_qkv` each module of `fused` gives three, "blocks.0.attn.qkv.q", "....k" and "....v": its rows in three
    equal parts, in this order as in timm's attention (`qkv(x).reshape(B, N, 3, heads, -1)`).

    Args:
        weights: see `select_targets`.
        patterns: see `Targets`.
        split_qkv: see above.
        fused: modules whose rows are Q, K and V (`fused.fused_qkv`).
        flags: the beginning of flags' names, for messages; empty if they are arguments of a function.
        embeddings: modules that `ALL_LINEAR` leaves out.
        rename: see `Rename`.

    Raises:
        UserError: as `select_targets`; or there is nothing to split, a qkv layer is not in `fused`, or its rows are not
            divisible by 3; or a weight is no plain array of real numbers, or two matrices get one name.
    """
    given = patterns if isinstance(patterns, list | tuple) else [] if patterns is None else [patterns]
    if not all(isinstance(one, str) for one in given):
        raise UserError(f"{flags}targets takes a string, a list of strings, or None, not {patterns!r}.")
    flag, flag_of_split = (f"{flags}{name}" if flags else name.replace("-", "_") for name in ("targets", "split-qkv"))
    weights = {f"{key}{WEIGHT}" if _is_bare(key, w) else key: w for key, w in weights.items()}
    chosen = _chosen(weights, patterns, flag, embeddings)
    names = _recorded_names(chosen, rename)
    watched: dict[str, Target] = {}
    for module, weight in chosen.items():
        is_fused = module in fused and weight.shape[0] % 3 == 0
        if not (split_qkv and is_named_qkv(module)):
            watched[names[module]] = Target(module, is_fused=is_fused)
        elif weight.shape[0] % 3:
            raise UserError(
                f"{module} has {weight.shape[0]} rows, which do not divide into Q, K and V; leave out {flag_of_split}"
            )
        elif not is_fused:
            again = f": {flag} {_quoted(patterns)}" if isinstance(patterns, str) else ""
            raise UserError(
                f"{flag_of_split}: it is not known whether the rows of {module} are Q, K and V, a third each (some "
                f"models have them head by head). Watch it whole, without {flag_of_split}{again}"
            )
        else:
            watched |= {f"{names[module]}.{letter}": Target(module, third) for third, letter in enumerate(_QKV)}
    if split_qkv and all(target.third is None for target in watched.values()):
        types = ", ".join(dict.fromkeys(map(module_type, watched)))
        raise UserError(
            f"{flag_of_split}: none of the watched matrices ({types}) is a qkv layer that is known to have Q, K and V "
            f"as the thirds of its rows; leave out {flag_of_split}"
        )
    return watched


def _chosen(
    weights: Mapping[str, Tensor], patterns: Targets, flag: str, embeddings: Collection[str]
) -> dict[str, Tensor]:
    """The layers that the patterns name, without those that share the weight of an earlier one."""
    modules = {key.removesuffix(WEIGHT): w for key, w in weights.items() if key.endswith(WEIGHT)}
    if patterns is None:
        usual = split_patterns(DEFAULT_TARGETS)
        patterns = usual if all(any(_matches(name, one) for name in modules) for one in usual) else ALL_LINEAR
    wanted, found = split_patterns(patterns), dict[str, Tensor]()
    others = [one for one in wanted if one != ALL_LINEAR]
    if others or not wanted:
        found = select_targets(weights, others if others != wanted else patterns, flag)
    if ALL_LINEAR in wanted:
        linear = {n: w for n, w in modules.items() if w.ndim == 2 and w.numel() and n not in embeddings}
        if not linear:
            convolutions = ", ".join(dict.fromkeys(module_type(n) for n, w in modules.items() if 2 < w.ndim <= 5))
            hint = f" Name convolutions, which are taken as matrices: {convolutions}." if convolutions else ""
            raise UserError(f"{flag}: the model has no Linear layer.{hint}")
        found = {name: w for name, w in modules.items() if name in found or name in linear}
    seen, once = set[object](), dict[str, Tensor]()
    for name, weight in found.items():
        _check_watchable(name, weight, flag)
        if (place := _place_in_memory(weight)) not in seen:
            seen.add(place)
            once[name] = weight
    return once


def _is_bare(key: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and not key.endswith(WEIGHT) and _BARE.fullmatch(key) is not None


def _place_in_memory(weight: Tensor) -> object:
    """A key that is equal for two tensors that are one weight."""
    if weight.is_meta:
        return id(weight)
    return weight.device, weight.data_ptr(), weight.shape, weight.stride()


def _check_watchable(name: str, weight: Tensor, flag: str) -> None:
    """Raise `UserError` for a weight whose singular values cannot be computed."""
    if hasattr(weight, "full_tensor"):
        raise UserError(
            f"{flag}: {name} is sharded over ranks (DTensor, FSDP). Each rank needs whole weights, as in DDP."
        )
    odd = "" if weight.is_meta else oddity(weight)
    if not odd and (not weight.is_floating_point() or weight.element_size() < 2):
        odd = f"a tensor of {str(weight.dtype).removeprefix('torch.')}"
    if not odd and not weight.numel():
        odd = f"empty, of shape {tuple(weight.shape)}"
    if odd:
        raise UserError(
            f"{flag}: {name} is {odd}, where floating-point numbers of 16 bits or more are expected. Leave it out."
        )


def _recorded_names(modules: Collection[str], rename: Rename | None) -> dict[str, str]:
    """Module to recorded name. Raises `UserError` for an empty name, and for one that is given twice."""
    if rename is None:
        return dict(zip(modules, modules, strict=True))
    new = {one: rename.get(one, one) if isinstance(rename, Mapping) else rename(one) for one in modules}
    by_name: dict[str, str] = {}
    for module, name in new.items():
        if not isinstance(name, str) or not name:  # type: ignore[reportUnnecessaryIsInstance]  # a user's function
            raise UserError(f"rename gives {name!r} for {module}; expected a name")
        if name in by_name:
            raise UserError(f"rename gives {name!r} for both {by_name[name]} and {module}; each matrix needs its own")
        by_name[name] = module
    return new


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
    """Where a module sits: its numbers, "blocks.3.attn.qkv" -> "3", "layers.2.blocks.11.mlp.fc1" -> "2.11", else "".

    See `module_type` for which numbers count.
    """
    return _type_and_depth(name)[1]


def module_type(name: str) -> str:
    """What a module is, without where it sits: the part after the last number, "blocks.0.attn.qkv" -> "attn.qkv".

    A number is a part of digits, or the end of one as in "encoder_layer_0". Those at the end of a name tell layers of a
    `Sequential` apart and not blocks: "encoder_layer_0.mlp.3" -> "mlp.3". Where there are no others, the name is the
    type, and all its digits are the depth.
    """
    return _type_and_depth(name)[0]


def _type_and_depth(name: str) -> tuple[str, str]:
    parts = name.split(".")
    numbers = [part if part.isdigit() else "" for part in parts]
    for i, part in enumerate(parts[:-1]):
        numbers[i] = found[1] if (found := _NUMBERED.fullmatch(part)) else numbers[i]
    last_word = max((i for i, number in enumerate(numbers) if not number), default=0)
    before = [i for i in range(last_word) if numbers[i]]
    if not before:
        return name, ".".join(part for part in parts if part.isdigit())
    return ".".join(parts[before[-1] + 1 :]), ".".join(numbers[i] for i in before)


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
    """The endings of separate layers where a pattern names a joint one: those of Q, K and V for qkv, fc1_g for fc1."""
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
