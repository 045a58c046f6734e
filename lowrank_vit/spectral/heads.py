"""The weights that make up the circuits of a model's heads, block by block.

A head's circuits are W_Q^T W_K and W_O W_V only if nothing between these factors depends on the token or its position,
the input is normalised before attention, and the output is added to the stream as it is. So a model is refused, naming
the layer, unless the forward of all its attention is known to be so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.lora import has_adapter
from lowrank_vit.model.low_rank import LowRankLinear, with_products
from lowrank_vit.spectral.fused import forward_of
from lowrank_vit.spectral.layers import matrices_of
from lowrank_vit.spectral.measures.circuits import BlockCircuits, HeadWeights, circuits_of
from lowrank_vit.spectral.select import Target
from lowrank_vit.spectral.solving.solve import side_by_side

Circuits = Literal["none", "raw", "folded"]
"""raw: the projections themselves. folded: times the weights of the norm before and of the LayerScale after them."""

_PLAIN = {
    "timm.models.vision_transformer.Block": "ls1.gamma",
    "timm.models.vision_transformer_relpos.RelPosBlock": "ls1.gamma",
    "timm.models.beit.Block": "gamma_1",
    "timm.models.eva.EvaBlock": "gamma_1",
}
"""Blocks that are x + scale * attn(norm1(x)), and the name of their scale."""
_PLAIN_ATTENTION = frozenset(
    """timm.layers.attention.Attention timm.layers.attention.AttentionRope timm.models.beit.Attention
    timm.models.eva.EvaAttention timm.models.vision_transformer_relpos.RelPosAttention""".split()
)
"""Softmax of q k^T, to which tables may add what depends on the two places alone, times v."""
_NORMS = re.compile(r"(Layer|Rms|RMS|Simple)Norm(Fp32)?")
"""Classes that multiply by their weight last, and add a bias."""
_OTHERS = {
    r"ResPost\w*|\w*PostNorm|SwinTransformerV2\w*": "normalises the output of attention, not its input",
    r"Parallel\w*|DiffParallel\w*": "has other branches beside its attention",
    r"Diff\w*": "subtracts one attention map from another",
    r"TalkingHead\w*": "mixes the attention maps of its heads",
    r"XCA|ChannelAttention\w*|CrossCovariance\w*": "compares channels, not tokens",
    r"GPSA": "mixes its attention map with one of positions",
    r"LinearAttention\w*|LiteMLA": "has no softmax",
}
"""Patterns of class names, and how these differ from plain attention."""
_IS_ATTENTION = re.compile(r"Att(n|ention)|MHSA|MSA\b|XCA|GPSA|MLA")
_IS_POOLING = re.compile(r"Pool")


@dataclass(frozen=True)
class AttentionBlock:
    """Where the weights of one block's heads are; names of parameters are empty where there are none."""

    name: str
    heads: int
    q: Target
    k: Target
    v: Target
    o: Target
    norm: str = ""
    """Parameter (n,) that multiplies the input."""
    scale: str = ""
    """Parameter (n,) that multiplies the output."""
    follows: str = ""
    """The block before, whose output it reads."""


def attention_blocks(model: nn.Module, circuits: Circuits, flag: str = "--spec-circuits") -> dict[str, AttentionBlock]:
    """The blocks of a model by name, in its order.

    Args:
        model: the module itself, without wrappers; weights are not read.
        circuits: which parameters count; with "none" there are no blocks.
        flag: for messages.

    Raises:
        UserError: some attention of the model, or all of it, is not known to be plain; the message says which and why.
    """
    if circuits == "none":
        return {}

    def refuse(name: str, why: str) -> UserError:
        return UserError(
            f"{flag}: {name} {why}. So the circuits of this model's heads are not W_Q^T W_K and W_O W_V; leave {flag} "
            "out."
        )

    blocks: dict[str, AttentionBlock] = {}
    inside = ""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Rotary" in kind:
            raise refuse(name, "rotates queries and keys by their position (rotary positions)")
        if inside and name.startswith(inside):
            continue
        if forward_of(module) in _PLAIN:
            inside = f"{name}."
            if why := _why_not(module, circuits):
                raise refuse(f"{name}.{why[0]}", why[1])
            blocks[name] = _block(name, module, circuits, blocks)
        elif name and not _IS_POOLING.search(kind) and (why := _oddity(kind)):
            raise refuse(f"{name} ({kind})", why)
    if not blocks:
        raise refuse(type(model).__name__, "has no attention of a known class")
    return blocks


def _oddity(kind: str) -> str:
    """How a class differs from plain attention; empty where it has nothing to do with attention."""
    for pattern, why in _OTHERS.items():
        if re.fullmatch(pattern, kind):
            return why
    return "is an attention whose forward is not known to be plain" if _IS_ATTENTION.search(kind) else ""


def _why_not(block: Any, circuits: Circuits) -> tuple[str, str] | None:
    """Which part of a known block is not plain, and what it does."""
    attn = block.attn
    if forward_of(attn) not in _PLAIN_ATTENTION:
        return f"attn ({type(attn).__name__})", _oddity(type(attn).__name__) or "is not known to be plain"

    def has(name: str) -> bool:
        return not isinstance(getattr(attn, name, None), nn.Identity | None)

    for part, why in {
        "q_norm": "normalises queries and keys (qk-norm)",
        "k_norm": "normalises queries and keys (qk-norm)",
        "norm": "normalises the outputs of the heads",
        "gate": "multiplies the outputs of the heads by a gate that depends on the token",
    }.items():
        if has(part):
            return f"attn.{part}", why
    parts = ("qkv", "proj") if has("qkv") else ("q_proj", "k_proj", "v_proj", "proj")
    for part in parts:
        layer = getattr(attn, part)
        if not isinstance(layer, nn.Linear | LowRankLinear) and not has_adapter(layer):
            return f"attn.{part}", f"is not a plain linear layer but a {type(layer).__name__}"
    if not has("qkv") and attn.q_proj.out_features != attn.k_proj.out_features:
        return "attn.k_proj", "has fewer heads than the queries (grouped queries)"
    width = attn.proj.out_features
    if width != (attn.qkv if has("qkv") else attn.q_proj).in_features:
        return "attn.proj", f"writes {width} values to a stream of another width"
    if circuits == "folded" and not isinstance(block.norm1, nn.Identity):
        kind = type(block.norm1).__name__
        if not _NORMS.fullmatch(kind):
            return "norm1", f"is a {kind}, whose weight is not known to be a factor (raw does without it)"
    return None


def _block(name: str, block: Any, circuits: Circuits, before: Collection[str]) -> AttentionBlock:
    attn = f"{name}.attn"
    if isinstance(getattr(block.attn, "qkv", None), nn.Module):
        q, k, v = (Target(f"{attn}.qkv", third) for third in range(3))
    else:
        q, k, v = (Target(f"{attn}.{part}") for part in ("q_proj", "k_proj", "v_proj"))
    there = dict(block.named_parameters(remove_duplicate=False)) if circuits == "folded" else {}
    norm, scale = (f"{name}.{part}" if part in there else "" for part in ("norm1.weight", _PLAIN[forward_of(block)]))
    parent, _, number = name.rpartition(".")
    follows = f"{parent}.{int(number) - 1}" if number.isdigit() else ""
    follows = follows if follows in before else ""
    return AttentionBlock(name, block.attn.num_heads, q, k, v, Target(f"{attn}.proj"), norm, scale, follows)


@dataclass(frozen=True)
class Heads:
    """The blocks whose circuits one process computes."""

    blocks: dict[str, AttentionBlock]
    """All blocks of the model."""
    share: tuple[str, ...]
    """Names of the blocks that this process computes."""

    @classmethod
    def shared_out(cls, blocks: dict[str, AttentionBlock], ranks: int) -> list[Heads]:
        """The share of each rank: consecutive blocks, about as many for each."""
        return [cls(blocks, tuple(map(str, names))) for names in np.array_split(list(blocks), ranks)]

    def others(self, model: nn.Module, among: Collection[str]) -> dict[str, Tensor]:
        """The parameters needed in addition to the matrices named in `among`, all as matrices; see `matrices_of`."""
        names: dict[str, Target] = {}
        for target in self._targets:
            if target.module not in among and _matrix_name(target) not in among:
                names[target.module] = Target(target.module)
        matrices = {f"{name}.weight": w for name, w in matrices_of(model, names).items()}
        return matrices | {name: model.get_parameter(name).detach()[None] for name in self._factors}

    def reads(self, name: str) -> bool:
        """Whether `circuits_by_block` reads weights of this name."""
        return name in self._names

    @cached_property
    def _read(self) -> list[AttentionBlock]:
        """The blocks of the share, and the blocks before them."""
        names = [name for one in self.share for name in (self.blocks[one].follows, one) if name]
        return [self.blocks[name] for name in dict.fromkeys(names)]

    @cached_property
    def _targets(self) -> list[Target]:
        return [target for one in self._read for target in (one.q, one.k, one.v, one.o)]

    @cached_property
    def _factors(self) -> list[str]:
        return [name for one in self._read for name in (one.norm, one.scale) if name]

    @cached_property
    def _names(self) -> frozenset[str]:
        matrices = (name for one in self._targets for name in (one.module, f"{one.module}.weight", _matrix_name(one)))
        return frozenset([*matrices, *self._factors])


def _matrix_name(target: Target) -> str:
    return f"{target.module}.{'qkv'[target.third]}" if target.third is not None else target.module


def circuits_by_block(
    heads: Heads, weights: Mapping[str, np.ndarray], cpu_threads: int = 1
) -> dict[str, BlockCircuits]:
    """The circuits of the blocks of a share, by name, the same bits in any number of threads.

    Args:
        heads: which blocks.
        weights: float32 or float64, by parameter name. A matrix may also be under its module's name, or its Q, K and V
            under "<module>.q", "<module>.k" and "<module>.v". Vectors may be matrices of one row.
        cpu_threads: how many runs of blocks are computed at once.
    """
    blocks, runs = heads.blocks, list[list[str]]()
    longest = -(-len(heads.share) // cpu_threads)
    for name in heads.share:
        if not runs or runs[-1][-1] != blocks[name].follows or len(runs[-1]) == longest:
            runs.append([])
        runs[-1].append(name)

    def of_run(i: int) -> list[BlockCircuits]:
        before = blocks[runs[i][0]].follows
        of_blocks = (head_weights(blocks[name], weights) for name in runs[i])
        return circuits_of(of_blocks, head_weights(blocks[before], weights) if before else None)

    found = side_by_side(of_run, range(len(runs)), cpu_threads)
    return {name: one for names, of in zip(runs, found, strict=True) for name, one in zip(names, of, strict=True)}


def circuits_of_state(
    model: nn.Module, state: Mapping[str, Tensor], circuits: Circuits, flag: str, cpu_threads: int = 1
) -> dict[str, BlockCircuits]:
    """The circuits of a state dict's blocks, by name.

    Args:
        model: a model that the state fits; its own weights are not read and may be on torch's device meta.
        state: float32 or float64; a factorised layer counts as its product.
        circuits, flag: see `attention_blocks`.
        cpu_threads: see `circuits_by_block`.

    Raises:
        UserError: see `attention_blocks`; or the state does not fit the model.
    """
    blocks = attention_blocks(model, circuits, flag)
    heads = Heads(blocks, tuple(blocks))
    weights, state = dict[str, np.ndarray](), with_products(state)
    for name, expected in heads.others(model, ()).items():
        found = state.get(name)
        if found is None or found.numel() != expected.numel():
            has = "no such weight" if found is None else f"one of shape {tuple(found.shape)}"
            raise UserError(f"{flag}: the model has {name} of shape {tuple(expected.shape)}, but the file {has}.")
        weights[name] = found.detach().cpu().numpy()
    return circuits_by_block(heads, weights, cpu_threads)


def head_weights(block: AttentionBlock, weights: Mapping[str, np.ndarray]) -> HeadWeights:
    """The projections of a block's heads, times the weights of norm and scale; `weights` as for `circuits_by_block`."""

    def rows(target: Target, factor: str) -> np.ndarray:
        whole = weights.get(target.module, weights.get(f"{target.module}.weight"))
        if whole is None:
            whole = weights[_matrix_name(target)]
        elif target.third is not None:
            whole = np.split(whole, 3)[target.third]
        whole = whole.T if target is block.o else whole
        if factor:
            whole = whole * weights[factor].reshape(-1).astype(np.float64)
        return whole.reshape(block.heads, -1, whole.shape[1])

    q, k, v = (rows(one, block.norm) for one in (block.q, block.k, block.v))
    return HeadWeights(q, k, v, rows(block.o, block.scale))
